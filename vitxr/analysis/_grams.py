"""Inner products between images, frame by frame, of arrays larger than memory; dissimilarities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError

__all__ = [
    "Metric",
    "batches",
    "blocks",
    "centred",
    "dissimilarities",
    "gram",
    "grams",
    "room_for",
    "u_centred",
    "walk",
]

Array = npt.NDArray[Any]
Block = tuple[slice, slice]
Metric = Literal["correlation", "euclidean"]

#: Bytes of a block of activations: some shifts of all images of a batch and some feature maps.
_BLOCK_BYTES = 96 << 20
#: Bytes that matrices between images may take at a time.
_GRAM_BYTES = 1 << 30


def batches(images: int, size: int, seed: int) -> list[Array]:
    """Divide images at random into as few batches as hold at most ``size``, as equal as can be.

    At random, because images often come sorted by class, and a batch of one class tells nothing
    about what differs between classes.

    Examples
    --------
    >>> [len(b) for b in batches(10, 4, seed=0)]
    [4, 3, 3]
    """
    order = np.random.default_rng(seed).permutation(images)
    return [np.sort(part) for part in np.array_split(order, math.ceil(images / size))]


def blocks(arrays: Sequence[xr.DataArray], images: int) -> list[Block]:
    """Cut the shift lattice into blocks, rows first, that hold few bytes for ``images`` of each."""
    most, (height, width) = 1 << 62, arrays[0].shape[1:3]
    for x in arrays:
        maps = max(x.chunksizes["feature_map"]) if x.chunks else x.sizes["feature_map"]
        frame = maps * x.sizes["patch_row"] * x.sizes["patch_col"] * x.dtype.itemsize
        of_grams = x.sizes["layer"] * (images + 1) * 8
        frames = min(_BLOCK_BYTES // (images * frame), _GRAM_BYTES // 4 // (images * of_grams))
        most = max(1, min(most, frames))
    rows, columns = max(1, most // width), min(width, most)
    # As equal as can be: less is then read twice where they cut through what is stored together.
    return list(itertools.product(_cut(height, rows), _cut(width, columns)))


def _cut(size: int, most: int) -> list[slice]:
    ends = np.linspace(0, size, math.ceil(size / most) + 1).round().astype(int).tolist()
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def room_for(matrices: int, images: int, remedy: str) -> None:
    """Refuse what would take more memory than it may."""
    size = matrices * images**2 * 8
    if size > _GRAM_BYTES:
        raise ArgumentError(
            f"{matrices} matrices between {images} images take {size / 1e9:.1f} GB in memory, more "
            f"than the {_GRAM_BYTES / 1e9:.1f} GB that vitxr allows: {remedy}."
        )


def gram(parts: Sequence[Array], dtype: Any) -> Array:
    """Inner products between images for each layer and frame, and the sum of an image's features.

    Parameters
    ----------
    parts
        Of each image the same frames, (shift_y, shift_x, layer, map, row, col).
    dtype
        What products are computed in. float32: after subtracting the images' mean from each
        feature, which no centring of the matrix sees, and which keeps small differences between
        large values. float64: of the features as they are.

    Returns
    -------
    numpy.ndarray
        ``(layer, frame, image, image + 1)``, float64; the last column holds the sums.
    """
    height, width, layers = parts[0].shape[:3]
    images, features = len(parts), math.prod(parts[0].shape[3:])
    out = np.empty((layers, height * width, images, images + 1))
    rows = np.empty((images, features), dtype)
    for y, x, layer in np.ndindex(height, width, layers):
        for row, part in zip(rows, parts, strict=True):
            row[:] = part[y, x, layer].reshape(-1)
        if rows.dtype != np.float64:
            rows -= rows.mean(axis=0)
        here = out[layer, y * width + x]
        here[:, :-1] = rows @ rows.T
        here[:, -1] = rows.sum(axis=1, dtype=np.float64)
    return out


def grams(x: xr.DataArray, images: Array, block: Block, dtype: Any) -> Array:
    """Compute :func:`gram` of some images and shifts of each layer.

    Parameters
    ----------
    x
        Frames with all dims, NumPy or Dask. Of Dask, nothing but these images and shifts is read.
    images
        Which ones.
    block
        Of the shift lattice.
    dtype
        As of :func:`gram`.

    Returns
    -------
    numpy.ndarray
        ``(layer, frame, image, image + 1)``, summed over feature maps.
    """
    if x.chunks is None:
        return gram([x.values[i, *block] for i in images], dtype)
    import dask
    from threadpoolctl import threadpool_limits

    data = x.variable.chunk({"patch_row": -1, "patch_col": -1}).data
    # Each image by itself: what is selected reaches the reader, which reads no more than that.
    # (shift_y, shift_x, layer, map) blocks of each.
    pieces = [data[i, *block].to_delayed()[..., 0, 0] for i in images]
    of_block = dask.delayed(_gram_of_blocks, pure=False)
    layers, maps = pieces[0].shape[2:]
    wanted = [
        [of_block([p[:, :, k, m].tolist() for p in pieces], dtype) for m in range(maps)]
        for k in range(layers)
    ]
    with threadpool_limits(1, user_api="blas"):  # Dask has its own threads
        (found,) = dask.compute(wanted)
    return np.concatenate([sum(of_layers) for of_layers in found])


def _gram_of_blocks(parts: list[list[list[Array]]], dtype: Any) -> Array:
    """Compute :func:`gram` of images whose shifts come in blocks."""
    return gram(
        [
            rows[0][0]
            if len(rows) == len(rows[0]) == 1
            else np.concatenate([np.concatenate(row, axis=1) for row in rows])
            for rows in parts
        ],
        dtype,
    )


def u_centred(k: Array) -> Array:
    """Centre so that inner products of two such matrices are unbiased.

    With the diagonal set to zero and n images, for ``i != j``::

        K_ij - sum_l K_il / (n - 2) - sum_l K_lj / (n - 2) + sum_lm K_lm / ((n - 1)(n - 2))

    and 0 on the diagonal. ``(U(K) * U(L)).sum() / (n (n - 3))`` is then HSIC_1 of Song et al.
    (2012).

    References
    ----------
    Szekely and Rizzo (2014), Partial distance correlation with methods for dissimilarities,
    Annals of Statistics 42, 2382-2412, definition 2; Song et al. (2012), Feature selection via
    dependence maximization, JMLR 13, 1393-1434, equation 5.
    """
    n = k.shape[-1]
    k = k.copy()
    diagonal = np.arange(n)
    k[..., diagonal, diagonal] = 0
    rows = k.sum(-1, keepdims=True)
    k += rows.sum(-2, keepdims=True) / ((n - 1) * (n - 2))
    k -= (rows + rows.swapaxes(-1, -2)) / (n - 2)
    k[..., diagonal, diagonal] = 0
    return k


def centred(k: Array) -> Array:
    """Centre rows and columns: ``H K H`` with ``H = 1 - 1/n``."""
    rows = k.mean(-1, keepdims=True)
    out: Array = k - rows - rows.swapaxes(-1, -2) + rows.mean(-2, keepdims=True)
    return out


def dissimilarities(k: Array, features: int, metric: Metric) -> Array:
    """Turn inner products and sums, (..., image, image + 1), into dissimilarities."""
    products, total = k[..., :-1], k[..., -1]
    n = products.shape[-1]
    if metric == "correlation":
        products = products - total[..., :, None] * total[..., None, :] / features
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    if metric == "euclidean":
        far = squares[..., :, None] + squares[..., None, :] - 2 * products
        far = np.sqrt(np.maximum(far, 0))
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            far = 1 - products / np.sqrt(squares[..., :, None] * squares[..., None, :])
    far[..., np.arange(n), np.arange(n)] = 0
    return far


def walk(
    arrays: Sequence[xr.DataArray], orders: Sequence[Array], images: Array, dtype: Any
) -> Iterator[tuple[Block, list[Array]]]:
    """Go through the shift lattice: for each block the Gram matrices of each array.

    ``orders`` say where an array has the images.
    """
    for block in blocks(arrays, len(images)):
        yield (
            block,
            [
                grams(x, order[images], block, dtype)
                for x, order in zip(arrays, orders, strict=True)
            ],
        )
