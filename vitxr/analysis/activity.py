"""Activity of feature maps: sparseness, selectivity for classes, what their variance is due to."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._frames import frames, written
from vitxr.errors import ArgumentError, DataError
from vitxr.names import SHIFT, VARIABLES, provenance
from vitxr.tensors import whose

__all__ = ["class_activity", "map_table", "population_sparseness"]

Array = npt.NDArray[Any]

#: Share of the selectivities of shuffled labels that lie below the floors. Weibull's
#: positions, i / (n + 1), so that one more shuffle lies above with the chance that is left.
QUANTILE = 0.95
#: Share of what is compared that is rounding.
_ROUNDING = 1e-12
_MAPS = ("layer", "feature_map")


def map_table(
    ds: xr.Dataset, shuffles: int = 100, random_state: int = 0, variable: str = "activation"
) -> xr.Dataset:
    r"""What each feature map cares about, a table with one row for each.

    With :math:`r_{is}` a map's activity for image :math:`i` and shift :math:`s`, the mean over
    patches of the rectified activation (:func:`vitxr.tensors.activity`), :math:`\bar r_i` its mean
    over shifts and :math:`\mu_c` the mean of these over the images of class :math:`c`, the columns
    are as below.

    Parameters
    ----------
    ds
        Dataset with ``variable``; the classes are its coordinate ``label``.
    shuffles
        How many times labels are permuted between images for the floors.
    random_state
        Seed of the permutations.
    variable
        Whose feature maps: "activation", "attention_output", "mlp_hidden", or any other on the
        patch grid.

    Returns
    -------
    xarray.Dataset
        All (layer, feature_map), computed at once in one pass over the data;
        ``.to_dataframe()`` is a table to sort and filter.

        - ``mean_activity``: mean of :math:`r`
        - ``responsiveness``: share of values (image, shift, patch) that are above zero
        - ``lifetime_sparseness``: ``(1 - mean(r)**2 / mean(r**2)) / (1 - 1 / n)`` over the n frames
          (image, shift). 0: the same for all; 1: one frame alone
        - ``image_share``, ``shift_share``, ``interaction_share``: of the variance (divided by n)
          of :math:`r` over frames, what is due to the image alone, to the shift alone, and to
          which image is shifted by how much. They add up to 1
        - ``label_share``: the part of ``image_share`` that lies between classes
        - ``preferred_label``: the class :math:`c` of largest :math:`\mu_c`, of equal ones the
          first by name; none where :math:`\bar r_i` is the same for all images
        - ``class_selectivity``: :math:`(\mu_c - \mu_{-c}) / (\mu_c + \mu_{-c})` for the preferred
          class, with :math:`\mu_{-c}` the mean of the other classes' :math:`\mu`, in which each
          class counts alike however many images it has. 0 where :math:`\bar r_i` is the same for
          all images
        - ``d_prime``: :math:`(m_c - m_{-c}) / \sqrt{(s_c^2 + s_{-c}^2) / 2}` of the means and
          variances (divided by n - 1) of :math:`\bar r_i` over the images of the preferred class
          and over those of all others, pooled: each image counts alike. Infinite where neither
          varies and yet they differ
        - ``class_selectivity_floor``, ``d_prime_floor``: 95 % quantile of the same with labels
          permuted between images, the preferred class chosen anew, over those permutations for
          which it is defined. What is not above its floor is what so few images give by chance

        NaN, and no ``preferred_label``, where a map is silent or holds NaN; but ``mean_activity``
        and ``responsiveness`` of a silent map, which are 0. So also the shares of a map that does
        not vary, ``d_prime`` where :math:`\bar r_i` is the same for all images or where the
        preferred class or the rest has one image, and selectivity where there is one class.

    Raises
    ------
    ArgumentError
        If ``shuffles`` is out of range.
    DataError
        If there is no ``variable``, no coordinate ``label``, or a store does not hold all of it
        yet.

    References
    ----------
    Sparseness: Vinje and Gallant (2000), Sparse coding and decorrelation in primary visual cortex,
    Science 287, 1273-1276, of Treves and Rolls (1991), Network 2, 371-397. Class selectivity:
    Morcos et al. (2018), On the importance of single directions for generalization, ICLR.
    Sensitivity index: Green and Swets (1966), Signal detection theory and psychophysics.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=3), vitxr.load_model("digits"),
    ...                    layers=[0, 5], shifts=vitxr.ShiftGrid(step=16), progress=False)
    >>> table = ds.vit.map_table().to_dataframe()
    >>> best = table.query("d_prime > d_prime_floor").sort_values("d_prime", ascending=False)
    >>> best.index.names
    FrozenList(['layer', 'feature_map'])
    """
    import dask

    _check_shuffles(shuffles)
    x, labels, which = _labelled(ds, variable)
    r = _activity(x)
    frame, patch = ("image", *SHIFT), ("patch_row", "patch_col")
    responsive, by_image, by_shift, squares = dask.compute(
        (x > 0).mean((*frame, *patch)),
        r.mean(SHIFT, skipna=False),
        r.mean("image", skipna=False),
        (r**2).mean(frame, skipna=False),
    )
    mean = by_image.mean("image", skipna=False)
    spread = squares - mean**2
    # What is left of maps that do not vary is rounding.
    spread = spread.where(spread > _ROUNDING * squares)
    of_image = ((by_image - mean) ** 2).mean("image", skipna=False)
    of_shift = ((by_shift - mean) ** 2).mean(SHIFT, skipna=False)
    out = xr.Dataset(
        {
            "mean_activity": mean,
            "responsiveness": responsive.where(mean.notnull()),
            "lifetime_sparseness": sparseness(mean, squares, math.prod(x.shape[:3])),
            "image_share": of_image / spread,
            "shift_share": of_shift / spread,
            "interaction_share": (spread - of_image - of_shift) / spread,
        }
    ).transpose(*_MAPS)
    out = out.drop_vars([c for c in out.coords if not set(out[c].dims) & set(_MAPS)])
    flat = by_image.transpose("image", *_MAPS).values
    found = selectivity(flat, which, len(labels))
    rng = np.random.default_rng(random_state)
    shuffled = [selectivity(flat, rng.permutation(which), len(labels)) for _ in range(shuffles)]
    out["label_share"] = (_MAPS, found["between"] / spread.transpose(*_MAPS).values)
    out["preferred_label"] = (_MAPS, np.append(labels, "")[found["preferred"]])
    for name in ("class_selectivity", "d_prime"):
        out[name] = (_MAPS, found[name])
        out[f"{name}_floor"] = (_MAPS, _floor(np.stack([one[name] for one in shuffled])))
    for name in map(str, out.data_vars):
        out[name].attrs = dict(VARIABLES[name].attrs)
    out.attrs = {
        **provenance(ds.attrs),
        **whose(ds, variable),
        "images": x.sizes["image"],
        "shuffles": shuffles,
        "random_state": random_state,
        "quantile": QUANTILE,
    }
    return out


def class_activity(ds: xr.Dataset, variable: str = "activation") -> xr.DataArray:
    """Mean activity of each feature map for the images of each class.

    Parameters
    ----------
    ds
        Dataset with ``variable`` and the coordinate ``label``.
    variable
        As of :func:`map_table`.

    Returns
    -------
    xarray.DataArray
        ``class_activity(layer, feature_map, label)``: the mean over images of the class, shifts
        and patches of the rectified activation, float64. Lazy if ``ds`` is. NaN where one of these
        is.

    Raises
    ------
    DataError
        If there is no ``variable``, no coordinate ``label``, or a store does not hold all of it
        yet.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[5], shifts=None, progress=False)
    >>> ds.vit.class_activity().sizes
    Frozen({'layer': 1, 'feature_map': 48, 'label': 10})
    """
    x, labels, which = _labelled(ds, variable)
    share = np.zeros((len(labels), len(which)))
    share[which, np.arange(len(which))] = 1 / np.bincount(which)[which]
    by_image = _activity(x).mean(SHIFT, skipna=False)
    of_class = xr.DataArray(share, dims=("label", "image"), coords={"label": labels})
    by_image = by_image.drop_vars("label")
    # A product with 0 would carry NaN over to classes that have none.
    lost = xr.dot(of_class, by_image.isnull().astype(float), dim="image") > 0
    out = xr.dot(of_class, by_image.fillna(0), dim="image").where(~lost)
    out = out.transpose(*_MAPS, "label").rename("class_activity")
    out.attrs = {
        **provenance(ds.attrs), **whose(ds, variable), **VARIABLES["class_activity"].attrs
    }  # fmt: skip
    return out


def population_sparseness(ds: xr.Dataset, variable: str = "activation") -> xr.DataArray:
    """How few of a layer's feature maps are active for a frame.

    ``(1 - mean(r)**2 / mean(r**2)) / (1 - 1 / n)`` over the n feature maps' activities r, means
    over patches of the rectified activation. 0: all alike; 1: one map alone.

    Parameters
    ----------
    ds
        Dataset with ``variable`` of all feature maps, or of those that are meant.
    variable
        As of :func:`map_table`.

    Returns
    -------
    xarray.DataArray
        ``population_sparseness(image, shift_y, shift_x, layer)``, float64. Lazy if ``ds`` is. NaN
        where no map is active or one is NaN.

    References
    ----------
    Vinje and Gallant (2000), Sparse coding and decorrelation in primary visual cortex, Science
    287, 1273-1276; Willmore and Tolhurst (2001), Characterizing the sparseness of neural codes,
    Network 12, 255-270.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers="all", shifts=None, progress=False)
    >>> ds.vit.population_sparseness().dims
    ('image', 'shift_y', 'shift_x', 'layer')
    """
    x = frames(ds, variable)
    r = _activity(x)
    mean, squares = (v.mean("feature_map", skipna=False) for v in (r, r**2))
    out = sparseness(mean, squares, x.sizes["feature_map"]).rename("population_sparseness")
    out.attrs = {
        **provenance(ds.attrs), **whose(ds, variable), **VARIABLES["population_sparseness"].attrs
    }  # fmt: skip
    return out


def sparseness(mean: Any, squares: Any, n: int) -> Any:
    """Sparseness of n values from their mean and the mean of their squares; NaN of zeros.

    Examples
    --------
    >>> r = np.array([0.0, 0.0, 3.0, 0.0])
    >>> float(sparseness(r.mean(), (r**2).mean(), 4))
    1.0
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return (1 - mean**2 / squares) / np.float64(1 - 1 / n)


def selectivity(r: Array, which: Array, classes: int) -> dict[str, Array]:
    """Selectivity for classes of responses that are not negative.

    Parameters
    ----------
    r
        Responses to images, (image, ...).
    which
        Class of each image, from 0; every class has one.
    classes
        How many.

    Returns
    -------
    dict of numpy.ndarray
        Of the shape of a response: ``preferred`` class, -1 for none; ``class_selectivity``;
        ``d_prime``; ``between``, the variance over images that lies between classes.
    """
    n, count = len(which), np.bincount(which, minlength=classes)
    member = np.zeros((classes, n))
    member[which, np.arange(n)] = 1
    middle = r.mean(axis=0)
    off = r - middle
    total = np.tensordot(member, off, 1)
    squares = np.tensordot(member, off**2, 1)
    of = count.reshape(-1, *[1] * (r.ndim - 1))
    means = total / of
    with np.errstate(invalid="ignore"):
        # The first of those that are the largest but for rounding.
        preferred = (means >= means.max(axis=0) - _ROUNDING * middle).argmax(axis=0)

    def take(values: Array) -> Array:
        picked: Array = np.take_along_axis(values, preferred[None], axis=0)[0]
        return picked

    with np.errstate(invalid="ignore", divide="ignore"):
        best = take(means) + middle
        others = ((means + middle).sum(axis=0) - best) / (classes - 1)
        in_it, n_in = take(total), count[preferred]
        n_out = n - n_in
        m_in, m_out = in_it / n_in, (total.sum(axis=0) - in_it) / n_out
        s_in = (take(squares) - n_in * m_in**2) / (n_in - 1)
        s_out = (squares.sum(axis=0) - take(squares) - n_out * m_out**2) / (n_out - 1)
        within = np.where((n_in > 1) & (n_out > 1), s_in + s_out, np.nan)
        # What is left of responses that do not differ is rounding.
        within = np.where(within <= _ROUNDING * squares.sum(axis=0), 0, within)
        same = np.ptp(r, axis=0) <= _ROUNDING * middle
        index = (best - others) / (best + others)
        return {
            "preferred": np.where(same | np.isnan(index), -1, preferred),
            "class_selectivity": np.where(same, 0 * index, index),
            "d_prime": np.where(same, np.nan, (m_in - m_out) / np.sqrt(within / 2)),
            "between": (of * means**2).sum(axis=0) / n,
        }


def _floor(values: Array) -> Array:
    """Quantile over shuffles, (shuffle, ...), of those where the index is defined."""
    out = np.full(values.shape[1:], np.nan)
    some = ~np.isnan(values).all(axis=0)
    with np.errstate(invalid="ignore"):
        found = np.nanquantile(values[:, some], QUANTILE, axis=0, method="weibull")
    out[some] = np.where(np.isnan(found), np.inf, found)  # between two infinite ones
    return out


def _activity(x: xr.DataArray) -> xr.DataArray:
    """Mean over patches of what is above zero; NaN stays."""
    return x.clip(min=0).mean(("patch_row", "patch_col"), dtype=np.float64, skipna=False)


def _labelled(ds: xr.Dataset, variable: str) -> tuple[xr.DataArray, Array, Array]:
    """Take all frames, the classes in the order of their names, and the class of each image."""
    x = frames(ds, variable)
    written(x)
    if "label" not in x.coords:
        raise DataError(
            "the Dataset has no coordinate label, the class of each image: "
            "ds.assign_coords(label=('image', labels))."
        )
    labels, which = np.unique(x["label"].values.astype(str), return_inverse=True)
    return x, labels.astype(object), which.reshape(-1)


def _check_shuffles(shuffles: int) -> None:
    whole = isinstance(shuffles, numbers.Integral) and not isinstance(shuffles, bool)
    if not whole or shuffles < 1:
        raise ArgumentError(f"shuffles={shuffles!r}: expected an integer of 1 or more.")
