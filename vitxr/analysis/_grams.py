"""Arithmetic of similarity: inner products between images, their centring, dissimilarities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "Metric",
    "batches",
    "centred",
    "dissimilarities",
    "gram",
    "products",
    "ranks",
    "u_centred",
]

Array = npt.NDArray[Any]
Metric = Literal["correlation", "euclidean"]

#: Bytes of features that are multiplied at a time, which a core's own cache should hold.
_BUFFER_BYTES = 1 << 20
#: Share of the squares that is rounding, of sums of many products in float64.
_ROUNDING = 1e-13


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


def gram(parts: Sequence[Array], dtype: Any, sums: bool = False) -> Array:
    """Inner products between images for each layer and frame, and the sum of an image's features.

    Parameters
    ----------
    parts
        Of each image the same frames, (shift_y, shift_x, layer, map, row, col).
    dtype
        What products are computed in.
    sums
        Add a last column, which holds the sums of the features, and take them as they are.
        Otherwise the first image and then the images' mean are subtracted from each feature, which
        no centring of the matrix sees, and which keeps small differences between large values:
        of images that are the same nothing at all is left.

    Returns
    -------
    numpy.ndarray
        ``(layer, frame, image, image)``, with sums ``(..., image + 1)``, float64.
    """
    height, width, layers = parts[0].shape[:3]
    frames, images, features = height * width, len(parts), math.prod(parts[0].shape[3:])
    flat = [part.reshape(frames, layers, features) for part in parts]
    out = np.empty((layers, frames, images, images + sums))
    some = max(1, _BUFFER_BYTES // (images * features * np.dtype(dtype).itemsize))
    room = np.empty((min(some, frames), images, features), dtype)
    for layer in range(layers):
        for start in range(0, frames, some):
            frame = slice(start, min(start + some, frames))
            rows = room[: frame.stop - start]
            for i, part in enumerate(flat):
                rows[:, i] = part[frame, layer]
            if not sums:
                rows -= rows[:, :1].copy()
                rows -= rows.mean(axis=1, keepdims=True)
            here = out[layer, frame]
            here[..., :images] = rows @ rows.swapaxes(-1, -2)
            if sums:
                here[..., -1] = rows.sum(axis=-1, dtype=np.float64)
    return out


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


def dissimilarities(k: Array, features: int, metric: Metric) -> tuple[Array, Array]:
    """Turn inner products and sums, (..., image, image + 1), into dissimilarities.

    And how much of each is rounding at most.
    """
    products, total = k[..., :-1], k[..., -1]
    n = products.shape[-1]
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    # Of images that are the same, differences of products are rounding.
    noise = _ROUNDING * np.sqrt(squares[..., :, None] * squares[..., None, :])
    if metric == "euclidean":
        far = squares[..., :, None] + squares[..., None, :] - 2 * products
        far = np.sqrt(np.where(far <= noise, 0, far))
        with np.errstate(invalid="ignore", divide="ignore"):
            noise = np.fmin(noise / (2 * far), np.sqrt(noise) / 2)  # of the square's root
    else:
        products = products - total[..., :, None] * total[..., None, :] / features
        own = np.diagonal(products, axis1=-2, axis2=-1)
        own = np.where(own <= _ROUNDING * squares, np.nan, own)
        with np.errstate(invalid="ignore"):
            unit = np.sqrt(own[..., :, None] * own[..., None, :])
            far, noise = 1 - products / unit, noise / unit
            far = np.where(far <= noise, 0, far)
        squares = own
    far[..., np.arange(n), np.arange(n)] = np.where(np.isnan(squares), np.nan, 0)
    return far, noise


def ranks(values: Array, noise: Array) -> Array:
    """Ranks along the last axis, from 1; what differs by rounding only has its mean rank.

    Examples
    --------
    >>> ranks(np.array([0.3, 0.1 + 0.2, 0.1]), np.full(3, 1e-15))
    array([2.5, 2.5, 1. ])
    """
    from scipy.stats import rankdata

    by_size = np.argsort(values, axis=-1)
    ascending, slack = (np.take_along_axis(a, by_size, -1) for a in (values, noise))
    with np.errstate(invalid="ignore"):
        step = np.diff(ascending, axis=-1) > slack[..., 1:] + slack[..., :-1]
    level = np.zeros(values.shape)
    np.put_along_axis(level, by_size[..., 1:], np.cumsum(step, axis=-1), -1)
    out: Array = rankdata(np.where(np.isnan(values), np.nan, level), axis=-1)
    return out


def products(x: Array, y: Array, orders: Array) -> tuple[Array, Array, Array, Array]:
    """Inner products of matrices, x (of x, part, n, n) and y, summed over parts.

    All of x with all of y; the same with the images of y in other orders, (order, of x, of y);
    each of x with itself; each of y.
    """
    flat = x.reshape(len(x), -1)
    cross = flat @ y.reshape(len(y), -1).T
    shuffled = np.stack(
        [flat @ y[..., order[:, None], order].reshape(len(y), -1).T for order in orders]
    )
    own, others = (np.einsum("apij,apij->a", k, k) for k in (x, y))
    return cross, shuffled, own, others
