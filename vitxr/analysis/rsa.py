"""Dissimilarities between images, and how alike those of two representations are (RSA)."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._compared import check_counts, compared, labelled
from vitxr.analysis._frames import frames
from vitxr.analysis._grams import Metric, dissimilarities, products, ranks
from vitxr.analysis._pairs import Across, pair
from vitxr.analysis._walk import blocks, grams, room_for
from vitxr.errors import ArgumentError, DataError
from vitxr.names import SHIFT, VARIABLES, provenance
from vitxr.tensors import whose

__all__ = ["rdm", "rsa"]

Array = npt.NDArray[Any]


def rsa(
    ds: xr.Dataset,
    other: xr.Dataset | None = None,
    across: Across = "layer",
    metric: Metric = "correlation",
    shuffles: int = 20,
    random_state: int = 0,
    variable: str = "activation",
) -> xr.Dataset:
    """Representational similarity analysis: whether two tell the same images apart.

    Spearman's rank correlation between the dissimilarities (:func:`rdm`) of one representation and
    those of another, over all pairs of images; across layers, the mean over shifts. Dissimilarities
    that are the same but for rounding, as of an image that is there twice, have their mean rank.

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
    variable
        As of :func:`vitxr.analysis.cka`.

    Returns
    -------
    xarray.Dataset
        ``rsa``, ``rsa_floor_mean`` and ``rsa_floor_quantile`` (95 % of shuffled images), with dims
        as of :func:`cka`. Computed at once. NaN where all dissimilarities are the same, or one
        is NaN.

    Raises
    ------
    ArgumentError
        If an option does not exist or is out of range, or the result would not fit in memory.
    DataError
        If the images or shifts of the two differ, there are fewer than 4 images, or a store does
        not hold all of them yet.

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
    check_counts(shuffles=(shuffles, 1))
    arrays, orders = pair(ds, other, across, variable)
    n = arrays[0].sizes["image"]
    if n < 4:
        raise DataError(f"{n} images: RSA compares the pairs of 4 or more.")
    above, beside = np.triu_indices(n, 1)
    rng = np.random.default_rng((random_state, 1))
    permutations = np.stack([rng.permutation(n) for _ in range(shuffles)])
    features = [math.prod(x.shape[4:]) for x in arrays]
    shifts = math.prod(arrays[0].shape[1:3]) if across == "layer" else 1

    def ranked(k: Array, features: int) -> Array:
        """Ranks of the dissimilarities, centred and of length 1, in the upper triangle."""
        far, noise = dissimilarities(k, features, metric)
        flat = ranks(far[:, :, above, beside], noise[:, :, above, beside])
        flat -= flat.mean(-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
        out = np.zeros(far.shape)
        out[:, :, above, beside] = flat
        return out

    def of_all(x: Array, y: Array, _: int) -> list[Array]:
        a, b = ranked(x, features[0]), ranked(y, features[1])
        # The upper triangle in one, both in the other: permuted, it may lie in either.
        cross, shuffled = products(a, b + b.swapaxes(-1, -2), permutations)[:2]
        return [cross / shifts, shuffled / shifts]

    remedy = "select some of the shifts, or fewer images"
    cross, shuffled = compared(
        arrays, orders, [np.arange(n)], across, np.float64, of_all, True, remedy
    )
    found, shuffled = np.clip(cross, -1, 1), np.moveaxis(shuffled, -3, 0)
    return labelled("rsa", found, shuffled, arrays, across, (ds, ds if other is None else other), {
        "metric": metric, "images": n, "shuffles": shuffles, "random_state": random_state,
        **whose(ds, variable),
    })  # fmt: skip


def rdm(
    ds: xr.Dataset, metric: Metric = "correlation", variable: str = "activation"
) -> xr.DataArray:
    """Representational dissimilarity matrices: how differently two images are represented.

    Parameters
    ----------
    ds
        Dataset with ``variable``. There is a matrix for each shift and layer: select first.
    metric
        Over all feature maps and patches, "correlation": 1 - Pearson's correlation, from 0 to 2;
        "euclidean": the length of the difference.
    variable
        As of :func:`vitxr.analysis.cka`.

    Returns
    -------
    xarray.DataArray
        ``dissimilarity(image, shift_y, shift_x, layer, other_image)``, float64, computed at once.
        NaN for images that hold NaN, such as those that a store does not hold yet.

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
    x = frames(ds, variable)
    n = x.sizes["image"]
    height, width, layers = (x.sizes[d] for d in (*SHIFT, "layer"))
    room_for(height * width * layers, n, "select some of the shifts or layers first")
    out = np.empty((height, width, layers, n, n))
    everything = np.arange(n)
    for block in blocks([x], [n]):
        (k,) = grams(x, [everything], block, np.float64, sums=True)
        far, _ = dissimilarities(k, math.prod(x.shape[4:]), metric)
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
        {
            **provenance(ds.attrs),
            **whose(ds, variable),
            **VARIABLES["dissimilarity"].attrs,
            "metric": metric,
        },
    ).transpose("image", ...)


def _check_metric(metric: Metric) -> None:
    if metric not in get_args(Metric):
        raise ArgumentError(f"metric={metric!r}: expected 'correlation' or 'euclidean'.")
