"""Curves over layers: the middle of many values as a line, their quartiles as a band."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES
from vitxr.plot._select import described
from vitxr.plot._style import MARKERS, beside, categorical, curve_axes, holoviews, styled

__all__ = ["attention_distance", "attention_entropy", "by_layer", "equivariance", "layers_of"]

_REMEDY = "Give the Dataset of ds.vit.equivariance()."
#: The error of whole patches, a part of ``phase_error``.
_WHOLE = "whole_patches"
_ERRORS = {
    _WHOLE: "rolled back, whole patches",
    "equivariance_error": "rolled back, all shifts",
    "still_error": "not rolled",
}


def layers_of(array: xr.DataArray) -> np.ndarray:
    """Numbers of the blocks."""
    return array["layer"].values if "layer" in array.coords else np.arange(array.sizes["layer"])


def by_layer(
    data: xr.DataArray | Mapping[str, xr.DataArray],
    *,
    label: str | None = None,
    line: tuple[float, str] | None = None,
    title: str | None = None,
) -> Any:
    """Draw a quantity over layers: median and quartiles over everything else.

    Parameters
    ----------
    data
        Array with ``layer`` and any other dims, such as ``table.image_share`` (layer,
        feature_map) or ``ds.vit.population_sparseness()``; or several by name, of other runs
        and models or of other quantities, a curve each. They need not have the same layers.
        NaN does not count.
    label
        Name of the vertical axis; by default what the vocabulary says of the first array.
    line
        A value to compare with, drawn as a dashed line, and its name.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        For each array a ``Curve`` of its median and, where it has more than one value a layer,
        an ``Area`` from the lower to the upper quartile.

    Raises
    ------
    DataError
        If an array has no dimension ``layer``, or there is none.

    Examples
    --------
    >>> x = xr.DataArray([[0.0, 1.0, 2.0], [2.0, 3.0, 7.0]], dims=("layer", "feature_map"))
    >>> by_layer(x).Curve.I.dimension_values("value")
    array([1., 3.])
    """
    hv = holoviews()
    several = dict(data) if isinstance(data, Mapping) else {"": data}
    if not several or not all(
        isinstance(a, xr.DataArray) and "layer" in a.dims for a in several.values()
    ):
        bad = [described(a) for a in several.values()] or ["nothing"]
        raise DataError(
            f"a curve over layers needs arrays with the dimension `layer`; given: {bad[0]}. "
            "Extract several layers, layers='all'."
        )
    first = next(iter(several.values()))
    label = label or _quantity(first)
    x, y = hv.Dimension("layer", label="Block"), hv.Dimension("value", label=label)
    parts, blocks, tops = [], [np.empty(0)], [np.empty(0)]
    hues = categorical(len(several))
    for k, ((name, array), hue) in enumerate(zip(several.items(), hues, strict=True)):
        layer = layers_of(array)
        values = np.asarray(array.transpose("layer", ...).values, dtype=np.float64)
        low, middle, high = _quartiles(values.reshape(len(layer), -1))
        marker, bokeh_marker = MARKERS[k % len(MARKERS)]
        if values.size > len(layer):
            band = hv.Area((layer, low, high), x, [y, hv.Dimension("upper")])
            parts.append(
                styled(
                    band,
                    both={"alpha": 0.15},
                    mpl={"facecolor": hue, "linewidth": 0},
                    bokeh={"color": hue, "line_color": None},
                )
            )
        named = {"label": name} if name else {}
        curve = hv.Curve((layer, middle), x, y, **named)
        dots = hv.Scatter((layer, middle), x, y, **named)
        parts += [
            styled(curve, both={"color": hue}, mpl={"linewidth": 1.2}, bokeh={"line_width": 2}),
            styled(
                dots,
                both={"color": hue},
                mpl={"s": 14, "linewidth": 0, "marker": marker, "show_legend": False},
                bokeh={"size": 6, "marker": bokeh_marker},
            ),
        ]
        blocks.append(np.asarray(layer, dtype=float))
        tops += [low, high, middle]
    reach = np.concatenate(tops)
    if line is not None:
        parts.insert(0, _dashed(line, np.concatenate(blocks), x, y))
        reach = np.append(reach, line[0])
    return curve_axes(
        hv.Overlay(parts).collate(),
        title=title or (label[:1].upper() + label[1:]),
        ylim=_limits(reach),
        **_frame(np.concatenate(blocks), len(several) > 1 or line is not None),
    )


def _frame(blocks: np.ndarray, legend: bool) -> dict[str, Any]:
    known = np.unique(blocks)
    return {
        "xlim": beside(known),
        "xticks": [int(v) for v in known] if len(known) <= 16 else 10,
        "legend_position": "right",
        "legend_cols": 1,
        "show_legend": legend,
    }


def _dashed(line: tuple[float, str], blocks: np.ndarray, x: Any, y: Any) -> Any:
    low, high = beside(blocks)
    curve = holoviews().Curve(([low, high], [line[0], line[0]]), x, y, label=line[1])
    return styled(
        curve,
        both={"color": "#7a7a7a"},
        mpl={"linewidth": 1.0, "linestyle": "--"},
        bokeh={"line_width": 1.5, "line_dash": "dashed"},
    )


def _limits(reach: np.ndarray) -> tuple[float, float]:
    """From 0, or from a little below the least value, to a little above the largest."""
    known = reach[np.isfinite(reach)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    room = 0.08 * (high - min(0.0, low)) or 0.5
    return (low - room if low < 0 else 0.0), high + room


def _quartiles(values: np.ndarray) -> np.ndarray:
    """Quartiles along the second axis; NaN where there is nothing else."""
    out = np.full((3, len(values)), np.nan)
    some = np.isfinite(values).any(axis=1)
    out[:, some] = np.nanquantile(values[some], [0.25, 0.5, 0.75], axis=1)
    return out


def _quantity(array: xr.DataArray) -> str:
    known = VARIABLES.get(str(array.name))
    words = known.meaning if known else str(array.attrs.get("long_name", array.name or "value"))
    unit = str(array.attrs.get("units", known.units if known else ""))
    return f"{words} ({unit})" if unit not in ("", "1") else words


def equivariance(
    e: xr.Dataset | Mapping[str, xr.Dataset],
    variable: str | None = None,
    *,
    title: str | None = None,
) -> Any:
    """Draw how well feature maps move with the image, over layers; several models compared.

    Lines are medians over the feature maps, bands their quartiles: maps of large variance
    count no more than others. For errors 0 is a map that moves exactly with the image, and
    the dashed line at 1 is chance.

    Parameters
    ----------
    e
        Dataset of ``ds.vit.equivariance()``, or several by the name of the model or run.
    variable
        ``"equivariance_error"``, ``"still_error"``, ``"invariance"``, ``"variance"``, or
        ``"whole_patches"``, the ``phase_error`` at phase (0, 0). By default of one Dataset the
        three errors, and of several the first.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Curve`` and ``Area``, as of :func:`by_layer`.

    Raises
    ------
    ArgumentError
        If there is no such variable.
    DataError
        If these are no such Datasets, or they have no layers.
    """
    known = ("equivariance_error", "still_error", "invariance", "variance", _WHOLE)
    if variable is not None and variable not in known:
        raise ArgumentError(f"variable={variable!r}: expected one of {', '.join(known)}.")
    runs = dict(e) if isinstance(e, Mapping) and not isinstance(e, xr.Dataset) else {"": e}
    for one in runs.values():
        if not isinstance(one, xr.Dataset) or "equivariance_error" not in one:
            raise DataError(f"expected results of equivariance; given: {described(one)}. {_REMEDY}")
    if variable is None and len(runs) == 1:
        (one,) = runs.values()
        names = [n for n in _ERRORS if n != _WHOLE or _has_whole(one)]
        drawn = {_ERRORS[n]: _part(one, n) for n in names}
        title = title or "Equivariance, median and quartiles of maps"
        return by_layer(drawn, label="Squared error / chance", line=(1.0, "chance"), title=title)
    variable = variable or "equivariance_error"
    arrays = {name: _part(one, variable) for name, one in runs.items()}
    error = "error" in variable or variable == _WHOLE
    words = {
        _WHOLE: "squared error / chance, whole patches",
        "equivariance_error": "squared error / chance",
        "still_error": "squared error / chance, not rolled",
        "invariance": "intraclass correlation",
    }.get(variable, VARIABLES[variable].meaning if variable in VARIABLES else variable)
    label = words[:1].upper() + words[1:]
    return by_layer(
        arrays.get("", arrays),
        label=label,
        line=(1.0, "chance") if error else None,
        title=title or ("Equivariance" if error else variable.capitalize()),
    )


def _has_whole(e: xr.Dataset) -> bool:
    return (
        "phase_error" in e and bool((e["phase_y"] == 0).any()) and bool((e["phase_x"] == 0).any())
    )


def _part(e: xr.Dataset, variable: str) -> xr.DataArray:
    if variable != _WHOLE:
        return e[variable]
    if not _has_whole(e):
        raise DataError(
            "no shift is one by whole patches: there is no error at phase (0, 0). Extract with a "
            "step that some multiple of the patch is a multiple of."
        )
    return e["phase_error"].sel(phase_y=0, phase_x=0)


def _by_head(array: Any, name: str, quantity: str, uniform: float | None, title: str | None) -> Any:
    """Points of each head over layers, means over everything else, and the heads' mean."""
    hv = holoviews()
    if not isinstance(array, xr.DataArray) or {"layer", "head"} - set(array.dims):
        raise DataError(
            f"the picture needs `{name}` with dims (..., layer, head); given: {described(array)}. "
            f"Give ds.vit.{name}() of an extraction of several layers."
        )
    rest = [d for d in array.dims if d not in ("layer", "head")]
    values = array.mean(rest).transpose("head", "layer")
    drawn, layer = np.asarray(values.values, dtype=np.float64), layers_of(array)
    numbers = array["head"].values if "head" in array.coords else np.arange(len(drawn))
    x, y = hv.Dimension("layer", label="Block"), hv.Dimension("value", label=quantity)
    parts = []
    for k, (head, hue) in enumerate(zip(numbers, categorical(len(drawn)), strict=True)):
        marker, bokeh_marker = MARKERS[k // 8 % len(MARKERS)]
        parts.append(
            styled(
                hv.Scatter((layer, drawn[k]), x, y, label=f"head {head}"),
                both={"color": hue, "alpha": 0.9},
                mpl={"s": 18, "linewidth": 0, "marker": marker},
                bokeh={"size": 7, "marker": bokeh_marker},
            )
        )
    mean = hv.Curve((layer, drawn.mean(axis=0)), x, y, label="mean of heads")
    look = {"mpl": {"linewidth": 1.0}, "bokeh": {"line_width": 1.5}}
    parts.insert(0, styled(mean, both={"color": "#444444"}, **look))
    reach = drawn.ravel()
    if uniform is not None:
        parts.insert(0, _dashed((uniform, "uniform attention"), layer, x, y))
        reach = np.append(reach, uniform)
    return curve_axes(
        hv.Overlay(parts).collate(),
        title=title or quantity.split(" (")[0],
        ylim=_limits(reach),
        **{**_frame(layer, True), "legend_cols": 1 + (len(parts) - 1) // 14},
    )


def attention_distance(
    d: xr.DataArray, *, uniform: float | None = None, title: str | None = None
) -> Any:
    """Draw the mean distance over which each head attends, over layers.

    Parameters
    ----------
    d
        ``attention_distance`` (..., layer, head), from ``ds.vit.attention_distance()``; the mean
        over images and shifts is drawn.
    uniform
        The distance of uniform attention, to be drawn as a dashed line: the mean distance
        of all pairs of patches.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        A ``Scatter`` for each head, and the mean of the heads as a ``Curve``.

    References
    ----------
    Dosovitskiy et al. (2021), An image is worth 16x16 words, ICLR, figure 7, right.
    """
    unit = str(getattr(d, "attrs", {}).get("units", "px"))
    unit = {"patch": "patches"}.get(unit, unit)
    name = f"Mean attention distance ({unit})"
    return _by_head(d, "attention_distance", name, uniform, title)


def attention_entropy(
    h: xr.DataArray, *, uniform: float | None = None, title: str | None = None
) -> Any:
    """Draw the mean entropy of each head's attention, over layers.

    Parameters
    ----------
    h
        ``attention_entropy`` (..., layer, head), from ``ds.vit.attention_entropy()``; the mean
        over images and shifts is drawn.
    uniform
        The entropy of uniform attention, ``ln(tokens)``, to be drawn as a dashed line.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        A ``Scatter`` for each head, and the mean of the heads as a ``Curve``.
    """
    return _by_head(h, "attention_entropy", "Mean attention entropy (nat)", uniform, title)
