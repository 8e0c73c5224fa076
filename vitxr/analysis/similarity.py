"""Similarity of representations: linear CKA, dissimilarities between images, and their RSA."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._frames import frames
from vitxr.analysis._grams import (
    Metric,
    batches,
    blocks,
    centred,
    dissimilarities,
    grams,
    room_for,
    u_centred,
    walk,
)
from vitxr.analysis._pairs import Across, pair
from vitxr.errors import ArgumentError, DataError
from vitxr.names import SHIFT, VARIABLES, provenance

__all__ = ["cka", "rdm", "rsa"]

Array = npt.NDArray[Any]

#: Share of the shuffled similarities that lie below the upper floor.
QUANTILE = 0.95


def cka(
    ds: xr.Dataset,
    other: xr.Dataset | None = None,
    across: Across = "layer",
    unbiased: bool = True,
    batch_size: int = 32,
    shuffles: int = 20,
    random_state: int = 0,
) -> xr.Dataset:
    r"""Linear centred kernel alignment of representations.

    A representation is what a layer does with a frame: all feature maps and patches, one row of
    features for each image. With :math:`K = XX^T` of one and :math:`L = YY^T` of another,

    .. math::

        \mathrm{CKA} = \frac{\sum \mathrm{HSIC}(K, L)}
            {\sqrt{\sum \mathrm{HSIC}(K, K) \sum \mathrm{HSIC}(L, L)}}

    summed over batches of images and, across layers, over shifts: images are only ever compared
    with images of the same shift. 1: the same up to rotations, reflections and one scale.
    Permutations of features are rotations; so is a roll of the patch grid.

    Parameters
    ----------
    ds
        Dataset with ``activation``.
    other
        Another one, of another model or store; ``ds`` itself by default. Its images are the same
        by name, and by ``sha256`` where both have it, in any order.
    across
        "layer": each layer with each layer of ``other``, at the same shifts. "shift": each shift
        with each shift of ``other``, in the same layer.
    unbiased
        HSIC_1, whose expectation for independent representations is 0, for any number of images
        and features; CKA may then be below 0. False: HSIC_0, as CKA was first defined, of all
        images at once. With few images and many features it is near 1 whatever they are.
    batch_size
        Most images that are compared with one another. Batches are drawn at random and as equal
        as can be. With more the estimate varies less and takes more memory and time.
    shuffles
        How many times images are permuted within their batch for the floors.
    random_state
        Seed of batches and permutations.

    Returns
    -------
    xarray.Dataset
        ``cka``, and of shuffled images ``cka_floor_mean`` and ``cka_floor_quantile`` (95 %):
        (layer, other_layer), or (shift_y, shift_x, layer, other_shift_y, other_shift_x). Computed
        at once, one block of the data in memory at a time. NaN where a representation is the same
        for all images.

    Raises
    ------
    ArgumentError
        If an option does not exist or is out of range, or the result would not fit in memory.
    DataError
        If the images or shifts of the two differ, or there are fewer than 4 images.

    References
    ----------
    Kornblith et al. (2019), Similarity of neural network representations revisited, ICML
    (``unbiased=False``); Nguyen, Raghu and Kornblith (2021), Do wide and deep networks learn the
    same things?, ICLR (batches); Song et al. (2012), Feature selection via dependence
    maximization, JMLR 13, 1393-1434 (HSIC_1).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=2), vitxr.load_model("digits"),
    ...                    layers="all", shifts=None, progress=False)
    >>> c = ds.vit.cka()
    >>> bool(c.cka.sel(layer=0, other_layer=1) > c.cka.sel(layer=0, other_layer=5))
    True
    """
    arrays, orders = pair(ds, other, across)
    n = arrays[0].sizes["image"]
    _check_counts(batch_size=(batch_size, 4), shuffles=(shuffles, 1))
    if n < 4:
        raise DataError(f"{n} images: CKA compares 4 or more.")
    if not unbiased and batch_size < n:
        raise ArgumentError(
            f"unbiased=False with batch_size={batch_size} of {n} images: biased CKA is of all "
            f"images at once. Pass batch_size={n}, or take the unbiased one."
        )
    parts = batches(n, batch_size, random_state)
    if len(parts[-1]) < 4:
        raise ArgumentError(
            f"batch_size={batch_size} cuts {n} images into batches of {len(parts[-1])}; unbiased "
            "CKA needs 4 or more in each: take another size."
        )
    if across == "shift":
        _check_room(arrays, len(parts[0]), "take a smaller batch_size, or some of the shifts")
    dtype = np.result_type(np.float32, *(x.dtype for x in arrays))
    centre = u_centred if unbiased else centred
    rng = np.random.default_rng((random_state, 1))
    orderings = [np.stack([rng.permutation(len(p)) for _ in range(shuffles)]) for p in parts]

    def similarities(of: list[xr.DataArray]) -> tuple[Array, Array]:
        """CKA of each layer, or of each shift of one layer, and the same of shuffled images."""
        sums: list[Any] = [0.0] * 4
        for images, orders_of in zip(parts, orderings, strict=True):
            for mats in _matrices(of, orders, images, across, dtype):
                x, y = (centre(k[..., :-1]) for k in mats)
                # n (n - 3) HSIC_1, or (n - 1)^2 HSIC_0: the mean over batches weighs them alike.
                b = len(images)
                scale = 1 / (b * (b - 3)) if unbiased else 1 / (b - 1) ** 2
                for at, value in enumerate(_products(x, y, orders_of)):
                    sums[at] = sums[at] + scale * value
        cross, shuffled, own, others = sums
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = np.sqrt(np.outer(own, others))
            return cross / unit, shuffled / unit

    return _result("cka", arrays, ds, other, across, similarities, {
        "unbiased": int(unbiased), "batches": len(parts), "images": n, "shuffles": shuffles,
        "random_state": random_state,
    })  # fmt: skip


def rsa(
    ds: xr.Dataset,
    other: xr.Dataset | None = None,
    across: Across = "layer",
    metric: Metric = "correlation",
    shuffles: int = 20,
    random_state: int = 0,
) -> xr.Dataset:
    """Representational similarity analysis: whether two tell the same images apart.

    Spearman's rank correlation between the dissimilarities (:func:`rdm`) of one representation and
    those of another, over all pairs of images; across layers, the mean over shifts.

    Parameters
    ----------
    ds, other, across
        As of :func:`cka`.
    metric
        Dissimilarity of two images, as of :func:`rdm`.
    shuffles
        How many times images are permuted for the floors.
    random_state
        Seed of the permutations.

    Returns
    -------
    xarray.Dataset
        ``rsa``, ``rsa_floor_mean`` and ``rsa_floor_quantile`` (95 % of shuffled images), with dims
        as of :func:`cka`. Computed at once. NaN where all dissimilarities are the same.

    Raises
    ------
    ArgumentError
        If an option does not exist or is out of range, or the result would not fit in memory.
    DataError
        If the images or shifts of the two differ, or there are fewer than 4 images.

    References
    ----------
    Kriegeskorte, Mur and Bandettini (2008), Representational similarity analysis, Frontiers in
    Systems Neuroscience 2, 4.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[0, 5], shifts=None, progress=False)
    >>> ds.vit.rsa().rsa.round(6).sel(layer=0).values.tolist()[0]
    1.0
    """
    _check_metric(metric)
    _check_counts(shuffles=(shuffles, 1))
    arrays, orders = pair(ds, other, across)
    n = arrays[0].sizes["image"]
    if n < 4:
        raise DataError(f"{n} images: RSA compares the pairs of 4 or more.")
    if across == "shift":
        _check_room(arrays, n, "select some of the shifts, or fewer images")
    above, beside = np.triu_indices(n, 1)
    rng = np.random.default_rng((random_state, 1))
    permutations = np.stack([rng.permutation(n) for _ in range(shuffles)])

    def similarities(of: list[xr.DataArray]) -> tuple[Array, Array]:
        from scipy.stats import rankdata

        sums: list[Any] = [0.0, 0.0]
        count = 0
        for mats in _matrices(of, orders, np.arange(n), across, np.float64):
            ranks = []
            for k, x in zip(mats, of, strict=True):
                far = dissimilarities(k, math.prod(x.shape[4:]), metric)
                flat = rankdata(far[:, :, above, beside], axis=-1)
                flat -= flat.mean(-1, keepdims=True)
                with np.errstate(invalid="ignore"):
                    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
                ranks.append(np.zeros(far.shape))
                ranks[-1][:, :, above, beside] = flat
            # The upper triangle in one, both in the other: permuted, it may lie in either.
            mirrored = ranks[1] + ranks[1].swapaxes(-1, -2)
            cross, shuffled, _, _ = _products(ranks[0], mirrored, permutations)
            sums = [sums[0] + cross, sums[1] + shuffled]
            count += mats[0].shape[1]
        return np.clip(sums[0] / count, -1, 1), sums[1] / count

    return _result("rsa", arrays, ds, other, across, similarities, {
        "metric": metric, "images": n, "shuffles": shuffles, "random_state": random_state,
    })  # fmt: skip


def rdm(ds: xr.Dataset, metric: Metric = "correlation") -> xr.DataArray:
    """Representational dissimilarity matrices: how differently two images are represented.

    Parameters
    ----------
    ds
        Dataset with ``activation``. There is a matrix for each shift and layer: select first.
    metric
        Over all feature maps and patches, "correlation": 1 - Pearson's correlation, from 0 to 2;
        "euclidean": the length of the difference.

    Returns
    -------
    xarray.DataArray
        ``dissimilarity(image, shift_y, shift_x, layer, other_image)``, float64, computed at once.

    Raises
    ------
    ArgumentError
        If the metric does not exist, or the matrices would not fit in memory.

    References
    ----------
    Kriegeskorte, Mur and Bandettini (2008), Representational similarity analysis, Frontiers in
    Systems Neuroscience 2, 4.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[5], shifts=None, progress=False)
    >>> ds.vit.rdm().sizes
    Frozen({'image': 10, 'shift_y': 1, 'shift_x': 1, 'layer': 1, 'other_image': 10})
    """
    _check_metric(metric)
    x = frames(ds)
    n = x.sizes["image"]
    height, width, layers = (x.sizes[d] for d in (*SHIFT, "layer"))
    room_for(height * width * layers, n, "select some of the shifts or layers first")
    out = np.empty((height, width, layers, n, n))
    for block in blocks([x], n):
        far = dissimilarities(
            grams(x, np.arange(n), block, np.float64), math.prod(x.shape[4:]), metric
        )
        here = out[block]
        here[:] = np.moveaxis(far, 0, 1).reshape(here.shape)
    kept = {"image", *SHIFT, "layer"}
    coords = {k: c.variable for k, c in x.coords.items() if set(c.dims) <= kept and c.dims}
    if "image" in coords:
        coords["other_image"] = ("other_image", x["image"].values)
    return xr.DataArray(
        out,
        coords,
        (*SHIFT, "layer", "image", "other_image"),
        "dissimilarity",
        {**provenance(ds.attrs), **VARIABLES["dissimilarity"].attrs, "metric": metric},
    ).transpose("image", ...)


def _products(x: Array, y: Array, orders: Array) -> tuple[Array, Array, Array, Array]:
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


def _matrices(
    both: list[xr.DataArray], orders: list[Array], images: Array, across: Across, dtype: Any
) -> Any:
    """Go through Gram matrices of both, (representation, part, image, image + 1).

    Across layers, shifts are parts, a block of them at a time. Across shifts there is one part.
    """
    # One array that is compared with itself is read once.
    of = [0] if both[0] is both[1] else [0, 1]
    arrays, own = [both[i] for i in of], [orders[i] for i in of]
    if across == "layer":
        for _, found in walk(arrays, own, images, dtype):
            yield [found[0], found[-1]]
        return
    whole = []
    n = len(images)
    for x, order in zip(arrays, own, strict=True):
        k = np.empty((*x.shape[1:3], n, n + 1))
        for block, (part,) in walk([x], [order], images, dtype):
            into = k[block]
            into[:] = part[0].reshape(into.shape)
        whole.append(k.reshape(-1, 1, n, n + 1))
    yield [whole[0], whole[-1]]


def _result(
    name: str,
    arrays: list[xr.DataArray],
    ds: xr.Dataset,
    other: xr.Dataset | None,
    across: Across,
    similarities: Callable[[list[xr.DataArray]], tuple[Array, Array]],
    attrs: dict[str, Any],
) -> xr.Dataset:
    """Compare, and label what comes out."""
    if across == "layer":
        found, shuffled = similarities(arrays)
        dims: tuple[str, ...] = ("layer", "other_layer")
    else:
        layers = range(arrays[0].sizes["layer"])
        a, b = ([x.isel(layer=[k]) for k in layers] for x in arrays)
        pairs = [[u, u if arrays[0] is arrays[1] else v] for u, v in zip(a, b, strict=True)]
        each = [similarities(pair) for pair in pairs]
        sizes = [x.sizes[d] for x in arrays for d in SHIFT]
        found = np.stack([f.reshape(sizes) for f, _ in each], axis=2)
        shuffled = np.stack([s.reshape(len(s), *sizes) for _, s in each], axis=3)
        dims = (*SHIFT, "layer", *(f"other_{d}" for d in SHIFT))
    coords: dict[str, Any] = {}
    for x, prefix in zip(arrays, ("", "other_"), strict=True):
        for key, c in x.coords.items():
            here = tuple(prefix + str(d) for d in c.dims)
            if here and set(here) <= set(dims) and (not prefix or key in c.dims):
                coords[prefix + str(key)] = (here, c.values, c.attrs)
    out = xr.Dataset(coords=coords)
    for key, values in (
        (name, found),
        (f"{name}_floor_mean", shuffled.mean(axis=0)),
        (f"{name}_floor_quantile", np.quantile(shuffled, QUANTILE, axis=0)),
    ):
        out[key] = (dims, values, VARIABLES[key].attrs)
    theirs = provenance((ds if other is None else other).attrs)
    theirs = {f"other_{key}": value for key, value in theirs.items()}
    out.attrs = {**provenance(ds.attrs), **theirs, **attrs, "quantile": QUANTILE}
    return out


def _check_room(arrays: list[xr.DataArray], images: int, remedy: str) -> None:
    # Of all shifts, and as they are centred a second time.
    room_for(2 * sum(x.shape[1] * x.shape[2] for x in arrays), images, remedy)


def _check_metric(metric: Metric) -> None:
    if metric not in get_args(Metric):
        raise ArgumentError(f"metric={metric!r}: expected 'correlation' or 'euclidean'.")


def _check_counts(**counts: tuple[Any, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ArgumentError(f"{name}={value!r}: expected an integer of {least} or more.")
