"""Activations to neuron tensors: selections and reductions, lazy and labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.extract.ranking import rank_channels
from vitxr.names import NEURON, SHIFT, VARIABLES, provenance, unit_dims, unwritten

__all__ = ["activity", "neuron_matrix", "neuron_tensor"]

Ranking = Literal["first_frame", "mean"]
FeatureMaps = int | Sequence[int] | None


def neuron_tensor(
    ds: xr.Dataset,
    layer: int | None,
    feature_maps: FeatureMaps = 20,
    ranking: Ranking = "first_frame",
    rectify: bool = True,
    normalize: bool = True,
    stack: bool = True,
    drop_edge: int = 0,
    variable: str = "activation",
) -> xr.DataArray:
    r"""Responses of one layer's neurons to every image and shift.

    With :math:`a` the block's output for a patch (or another ``variable``), the response is
    :math:`x = \max(a, 0)` divided, in each frame, by the largest :math:`|x|` of
    its feature map; a map that is zero everywhere stays zero.

    Parameters
    ----------
    ds
        Dataset with ``activation``, as :func:`vitxr.extract` makes it.
    layer
        Block, by its label; None for a variable without layers, such as ``embedding``.
    feature_maps
        How many of the most active maps to keep; or the model's channel numbers,
        kept in that order; or None for all of them, in the stored order.
    ranking
        What a count ranks maps by: their mean rectified activity over patches in
        the first frame of the first image (``"first_frame"``, the original
        notebook's rule), or over all images and shifts (``"mean"``).
    rectify
        Replace negative activations by zero. Needed by nonnegative methods.
    normalize
        Divide each map by its maximum in each frame.
    stack
        Stack to ``(neuron, image, shift)``. False keeps the lattice.
    drop_edge
        Leave out the outermost rows and columns of patches, this many on each
        side, before ranking and normalising. ``edge_distance`` marks patches by
        their distance to the border in any case.
    variable
        Whose maps: ``activation``, or another variable on the patch grid, such as
        ``attention_output``, ``mlp_hidden`` or one of ``modules``; of ``attention_query``,
        ``attention_key`` and ``attention_value`` those of the head that ``ds`` is selected
        to, ``ds.sel(head=3)``. The result is called after it, and its maps are
        ``feature_map`` whatever they are called in ``ds`` (``hidden_unit``,
        ``head_channel``, ``<name>_unit``).

    Returns
    -------
    xarray.DataArray
        ``(neuron, image, shift)``, lazy if ``ds`` is. ``neuron`` and ``shift`` are
        multi-indexes; ``.unstack()`` takes them apart. With a count, the ranking is
        computed at once from what it needs; nothing else is.

    Raises
    ------
    DataError
        If ``ds`` has no such variable, it is not on the patch grid, it has several heads, or
        ``ds`` keeps too few of its feature maps, or a count is to be ranked by frames that hold
        NaN, as those of an unfinished store that are not written yet.
    ArgumentError
        If the layer, a feature map or an option does not exist.

    References
    ----------
    The original notebook, section 5 (``compute_neuron_output``).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[0], shifts=vitxr.ShiftGrid(step=16), progress=False)
    >>> ds.vit.neuron_tensor(layer=0, feature_maps=5).sizes
    Frozen({'neuron': 320, 'image': 10, 'shift': 4})
    """
    x = _layer(ds, layer, drop_edge, variable)
    # Selected first: what is not kept is then never read.
    x = _select_maps(ds, x, layer, feature_maps, ranking, drop_edge)
    if rectify:
        x = x.clip(min=0)
    if normalize:
        # skipna=False throughout: a value that is not a number must not go unseen.
        top = abs(x).max(("patch_row", "patch_col"), skipna=False)
        # A map that is zero everywhere is divided by one: it stays zero.
        x = x / top.where(top != 0, 1)
    x = x.astype(ds[variable].dtype).rename(variable)
    what = ["rectified"] * rectify + ["normalised"] * normalize
    x.attrs = {
        **provenance(ds.attrs),
        **whose(ds, variable),
        "units": "1",
        "long_name": " ".join([f"{variable},", *what]) if what else variable,
        **({} if layer is None else {"layer": int(layer)}),
        "drop_edge": int(drop_edge),
        # 0 or 1, as netCDF has no attributes that are bool.
        "rectify": int(rectify),
        "normalize": int(normalize),
    }
    if isinstance(feature_maps, int | np.integer):
        x.attrs["ranking"] = ranking
    if not stack:
        return x.transpose("image", *SHIFT, *NEURON)
    return x.stack(neuron=NEURON, shift=SHIFT).transpose("neuron", "image", "shift")


def neuron_matrix(
    ds: xr.Dataset,
    layer: int | None,
    feature_maps: FeatureMaps = 20,
    ranking: Ranking = "first_frame",
    rectify: bool = True,
    normalize: bool = True,
    stack: bool = True,
    drop_edge: int = 0,
    variable: str = "activation",
) -> xr.DataArray:
    """Mean response of one layer's neurons to every image, over all shifts.

    The mean over ``shift`` of :func:`neuron_tensor`, accumulated in float64.
    Parameters and errors are the same.

    Returns
    -------
    xarray.DataArray
        ``(neuron, image)``, lazy if ``ds`` is.

    References
    ----------
    The original notebook, section 6 (``show_stimuli_2D``).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[5], shifts=None, progress=False)
    >>> ds.vit.neuron_matrix(layer=5, feature_maps=2).sizes
    Frozen({'neuron': 128, 'image': 10})
    """
    x = neuron_tensor(
        ds, layer, feature_maps, ranking, rectify, normalize, False, drop_edge, variable
    )
    mean = x.mean(SHIFT, dtype=np.float64, skipna=False, keep_attrs=True).astype(x.dtype)
    mean.attrs["long_name"] += ", mean over shifts"
    return mean.stack(neuron=NEURON).transpose("neuron", "image") if stack else mean


def activity(ds: xr.Dataset, rectify: bool = True, variable: str = "activation") -> xr.DataArray:
    """Mean activity of each feature map over its patches.

    Parameters
    ----------
    ds
        Dataset with ``activation``.
    rectify
        Replace negative activations by zero first, as the original notebook does.
    variable
        Whose maps, as in :func:`neuron_tensor`.

    Returns
    -------
    xarray.DataArray
        ``(image, shift_y, shift_x, layer, feature_map)``, without ``layer`` if the variable
        has none; lazy if ``ds`` is.

    References
    ----------
    The original notebook, section 5 (``fm_avg``).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers="all", shifts=None, progress=False)
    >>> ds.vit.activity().sizes["layer"]
    6
    """
    x = maps_of(ds, variable)
    x = x.clip(min=0) if rectify else x
    mean = x.mean(("patch_row", "patch_col"), dtype=np.float64, skipna=False)
    mean = mean.astype(x.dtype).rename("activity")
    mean.attrs = {
        **provenance(ds.attrs),
        **whose(ds, variable),
        **VARIABLES["activity"].attrs,
        "long_name": f"mean over patches of the {'rectified ' * rectify}{variable}",
    }
    return mean


def whose(ds: xr.Dataset, variable: str) -> dict[str, Any]:
    """Attributes that say whose maps they are."""
    head = {"head": int(ds["head"])} if "head" in _dims_of(ds[variable], variable) else {}
    return {"variable": variable, **head}


def _dims_of(x: xr.DataArray, variable: str) -> tuple[str, ...]:
    """Dims that a variable has where nothing is selected."""
    if variable in VARIABLES:
        return VARIABLES[variable].dims[0]
    layer = ["layer"] if "layer" in x.coords else []
    return ("image", *SHIFT, *layer, f"{variable}_unit", "patch_row", "patch_col")


def maps_of(ds: xr.Dataset, variable: str) -> xr.DataArray:
    """Take a variable with all its dims, its maps called ``feature_map``.

    What was selected by a scalar comes back as a dim, but for a head, which has to be.
    """
    if variable not in ds.data_vars:
        what = f" ({VARIABLES[variable].meaning})" if variable in VARIABLES else ""
        raise DataError(
            f"the Dataset has no `{variable}`{what}; it has: {', '.join(map(str, ds.data_vars))}. "
            "Add it, or extract it."
        )
    x = ds[variable]
    dims = _dims_of(x, variable)
    units = unit_dims(dims)
    if not units:
        raise DataError(
            f"`{variable}` has dims ({', '.join(map(str, x.dims))}), which are not on the patch "
            "grid; expected a variable of feature maps, such as `activation` or `mlp_hidden`."
        )
    if "head" in x.dims:
        raise DataError(
            f"`{variable}` has {x.sizes['head']} heads, and neurons are those of one: select it "
            f"first, such as ds.sel(head={x['head'].values[0]})."
        )
    dims = tuple(dim for dim in dims if dim != "head")
    for dim in dims:
        if dim not in x.dims and dim in x.coords:
            x = x.expand_dims(dim)
    if set(x.dims) != set(dims):
        given = ", ".join(map(str, x.dims))
        raise DataError(f"`{variable}` has dims ({given}); expected ({', '.join(dims)}).")
    if x.dtype.kind != "f":
        raise DataError(f"`{variable}` has dtype {x.dtype}; expected floating-point numbers.")
    x = x.transpose(*dims).drop_vars("head", errors="ignore")
    return x if units[-1] == "feature_map" else x.rename({units[-1]: "feature_map"})


def _layer(ds: xr.Dataset, layer: int | None, drop_edge: int, variable: str) -> xr.DataArray:
    """Select one layer, mark the patches' distance to the border, drop the edge."""
    x = maps_of(ds, variable)
    known = variable in VARIABLES and "layer" in VARIABLES[variable].dims[0]
    if "layer" not in x.dims or (layer is None and not known and "layer" not in ds[variable].dims):
        if layer is not None:
            raise ArgumentError(f"layer={layer!r}: `{variable}` has no layers. Pass layer=None.")
        x = x.isel(layer=0) if "layer" in x.dims else x
        return _edges(x.drop_vars("layer", errors="ignore"), drop_edge)
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
        raise ArgumentError(f"layer={layer!r}: expected one block number.")
    if layer not in x.indexes["layer"]:
        raise ArgumentError(
            f"layer={layer} is not in the Dataset, which holds "
            f"{', '.join(map(str, x.indexes['layer']))}. Extract it with layers=[{layer}]."
        )
    return _edges(x.sel(layer=layer).drop_vars("layer"), drop_edge)


def _edges(x: xr.DataArray, drop_edge: int) -> xr.DataArray:
    """Mark the patches' distance to the border, and drop the edge."""
    rows, columns = x.sizes["patch_row"], x.sizes["patch_col"]
    limit = (min(rows, columns) - 1) // 2
    if (
        isinstance(drop_edge, bool)
        or not isinstance(drop_edge, int | np.integer)
        or not 0 <= drop_edge <= limit
    ):
        raise ArgumentError(
            f"drop_edge={drop_edge!r}: a {rows} x {columns} patch grid can lose 0 to {limit} "
            "rows and columns on each side."
        )
    r, c = np.arange(rows), np.arange(columns)
    distance = np.minimum(
        np.minimum(r, rows - 1 - r)[:, None], np.minimum(c, columns - 1 - c)[None, :]
    )
    mark = ("patch_row", "patch_col"), distance, VARIABLES["edge_distance"].attrs
    inner = slice(int(drop_edge), -int(drop_edge) or None)
    return x.assign_coords(edge_distance=mark).isel(patch_row=inner, patch_col=inner)


def _select_maps(
    ds: xr.Dataset,
    x: xr.DataArray,
    layer: int | None,
    feature_maps: FeatureMaps,
    ranking: Ranking,
    drop_edge: int,
) -> xr.DataArray:
    """Keep the wanted feature maps, labelled by the model's channel numbers."""
    if "channel" in x.coords:
        # The store kept a selection: its maps are ranks, and `channel` says which.
        x = x.assign_coords(feature_map=x["channel"].values).drop_vars("channel")
    stored = x.indexes["feature_map"]
    if feature_maps is None:
        return x
    if isinstance(feature_maps, int | np.integer) and not isinstance(feature_maps, bool):
        return x.isel(feature_map=_top(ds, x, layer, int(feature_maps), ranking, drop_edge))
    try:
        wanted = np.asarray(feature_maps)
    except ValueError:
        wanted = np.empty(0)
    if wanted.ndim != 1 or wanted.size == 0 or wanted.dtype.kind not in "iu":
        raise ArgumentError(
            f"feature_maps={feature_maps!r}: expected a count, a sequence of channel numbers, or "
            "None for all."
        )
    if len(set(wanted.tolist())) < wanted.size:
        raise ArgumentError(f"feature_maps={feature_maps!r} names a channel twice.")
    absent = [int(c) for c in wanted if c not in stored]
    if absent:
        raise ArgumentError(
            f"feature_maps: channels {absent[:5]} are not in the Dataset, which holds "
            f"{stored.size} channels, {stored.min()} to {stored.max()}."
        )
    return x.sel(feature_map=wanted)


def _top(
    ds: xr.Dataset, x: xr.DataArray, layer: int | None, count: int, ranking: Ranking, drop_edge: int
) -> np.ndarray:
    if ranking not in get_args(Ranking):
        raise ArgumentError(f"ranking={ranking!r}: expected 'first_frame' or 'mean'.")
    have = x.sizes["feature_map"]
    if not 1 <= count <= have:
        raise ArgumentError(
            f"feature_maps={count}: the Dataset holds {have} feature maps of this layer; "
            f"expected 1 to {have}, a sequence of channel numbers, or None for all."
        )
    if x.name == "activation" and ds.attrs.get("feature_map_selection") == "first_frame":
        if ranking == "mean" or drop_edge:
            what = "drop_edge" if drop_edge else f"ranking={ranking!r}"
            raise DataError(
                f"a count with {what} needs all feature maps, and this Dataset keeps the {have} "
                "that ranked highest over the whole grid in the first frame. Extract with "
                "feature_maps=None; or pass feature_maps=None here for all that were kept."
            )
        return np.arange(count)  # stored in the order of that ranking
    x = x.clip(min=0)
    frame = {"image": 0, "shift_y": 0, "shift_x": 0}
    over = ["patch_row", "patch_col"]
    if ranking == "first_frame":
        x = x.isel(frame)
    else:
        over += list(frame)
    mean = x.mean(over, dtype=np.float64, skipna=False).values
    if not np.isfinite(mean).all():
        raise DataError(_unranked(ds, x, layer, ranking))
    return rank_channels(mean)[:count]


def _unranked(ds: xr.Dataset, x: xr.DataArray, layer: int | None, ranking: Ranking) -> str:
    """Say by which frame maps cannot be ranked, and what to do about it."""
    if unwritten(x):
        what, remedy, bad = "is not written yet", unwritten(ds, "ds"), ~x["written"]
    else:
        what, remedy = "holds NaN or infinite values", "; leave such images out"
        each = x.mean(("feature_map", "patch_row", "patch_col"), dtype=np.float64, skipna=False)
        bad = each.isnull() | (abs(each) == np.inf)
        bad = bad.compute()
    place = np.unravel_index(int(bad.values.argmax()), bad.shape)
    frame = bad.isel(dict(zip(bad.dims, place, strict=True)))
    labels = [f"{d} {frame[d].item()}" for d in ("image", *SHIFT) if d in frame.coords]
    labels += [] if layer is None else [f"layer {layer}"]
    return (
        f"feature maps cannot be ranked by {ranking!r}: {', '.join(labels)} "
        f"{what}{remedy}; or name the channels, feature_maps=[...]."
    )
