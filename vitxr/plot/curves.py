"""Curves of one factor: the loading against the place in the tensor."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._select import image_titles, labels_of, one_fit, variable
from vitxr.plot._style import MARKERS, categorical, curve_axes, holoviews, shorten, styled

__all__ = ["factor_curves"]

_MODES = ("neuron", "image", "shift")


def factor_curves(
    f: xr.Dataset, mode: str = "shift", *, overlay: bool = False, title: str | None = None
) -> Any:
    """Draw one factor along its dimension: a small row a component, or all in one frame.

    Neurons and shifts are curves in the order of the tensor, their axis marked where
    a feature map or a row of the shift lattice begins; images have no order, so
    their loadings are bars (in one frame: points) named by label or image. A row
    reaches from 0 to the component's largest magnitude, written at its right.
    :func:`factors` draws the same loadings on the patch grid and the lattice.

    Parameters
    ----------
    f
        Factors of one fit, of a CP or a Tucker model.
    mode
        ``"shift"``, ``"image"`` or ``"neuron"``: which ``<mode>_factor``.
    overlay
        Put all components into one frame with one scale, as the original notebook
        does.
    title
        Title of the picture.

    Returns
    -------
    holoviews.NdOverlay
        A ``Curve``, of images ``Rectangles`` or (in one frame) ``Scatter``, a
        component, keyed by ``component``, with its ``loading``.

    Raises
    ------
    ArgumentError
        If `mode` is none of these, or there is more than one fit.
    DataError
        If the fit has no such factor, as a fit to a matrix has no shift factor.

    References
    ----------
    The original notebook, section 7 (``plt.plot(neuron_factor)``).
    """
    if mode not in _MODES:
        raise ArgumentError(f"mode={mode!r}: expected one of {', '.join(map(repr, _MODES))}.")
    remedy = "A fit to a neuron matrix has no shift factor; a fit to a tensor has all three."
    array = variable(one_fit(f), f"{mode}_factor", remedy)
    if array.ndim != 2 or mode not in array.dims:
        raise DataError(
            f"`{mode}_factor` has dims ({', '.join(map(str, array.dims))}); expected ({mode}, "
            "component). Give the factors of one fit, t.vit.factorize(rank=25)."
        )
    array = array.transpose(mode, ...)
    column = array.dims[1]
    values = np.asarray(array.values, dtype=np.float64)
    known = array[column].values if column in array.coords else range(values.shape[1])
    number = [int(n) for n in known]
    ticks, label = _ticks(array, mode)
    draw = _together if overlay else _in_rows
    parts, frame = draw(values, number, mode, label)
    wide = max((len(text) for _, text in ticks), default=0) > 3
    return curve_axes(
        holoviews().NdOverlay(parts, kdims=["component"]),
        title=title or f"{mode.capitalize()} factor",
        xticks=ticks,
        xrotation=90 if wide else 0,
        xlim=(-0.6, len(values) - 0.4),
        **frame,
    )


def _ticks(array: xr.DataArray, mode: str) -> tuple[list[tuple[float, str]], str]:
    """Where something begins along the dimension, and what: at most some thirty names."""
    size = array.sizes[mode]
    what = f"{mode.capitalize()} (position in the tensor)"
    names = None
    if mode == "neuron" and "feature_map" in array.coords:
        names, what = array["feature_map"].values, "Neuron, by feature map"
    elif mode == "image":
        labels = labels_of(array)
        runs = 1 + sum(a != b for a, b in pairwise(labels))
        if any(labels) and runs == len(set(labels)) and runs < size:
            # the classes stand together: name each in its middle
            codes, classes = pd.factorize(np.asarray(labels, dtype=object))
            middle = [float(np.flatnonzero(codes == k).mean()) for k in range(len(classes))]
            marks = [(x, shorten(c or "none", 16)) for x, c in zip(middle, classes, strict=True)]
            return marks[:: math.ceil(len(marks) / 30)], "Image, by label"
        names, what = np.array(image_titles(array, list(range(size)))), "Image"
    elif mode == "shift" and "offset_y" in array.coords:
        names, what = array["offset_y"].values, "Shift, by dy (px); dx runs within"
    if names is None:
        step = max(1, size // 10)
        return [(float(i), str(i)) for i in range(0, size, step)], what
    starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
    starts = starts[:: math.ceil(len(starts) / 30)]
    return [(float(i), str(names[i])) for i in starts], what


def _together(
    values: np.ndarray, number: list[int], mode: str, label: str
) -> tuple[dict[int, Any], dict[str, Any]]:
    """All components in one frame: curves, or points where there is no order."""
    hv = holoviews()
    x, y = hv.Dimension(f"{mode}_position", label=label), hv.Dimension("loading", label="Loading")
    places, parts = np.arange(len(values)), {}
    for k, (n, hue) in enumerate(zip(number, categorical(len(number)), strict=True)):
        turn = k // 8 % 3
        if mode == "image":
            marker, name = MARKERS[k // 8 % len(MARKERS)]
            parts[n] = styled(
                hv.Scatter((places, values[:, k]), x, y),
                both={"color": hue},
                mpl={"s": 14, "linewidth": 0, "marker": marker},
                bokeh={"size": 6, "marker": name},
            )
        else:
            parts[n] = styled(
                hv.Curve((places, values[:, k]), x, y),
                both={"color": hue},
                mpl={"linewidth": 0.9, "linestyle": ("-", "--", ":")[turn]},
                bokeh={"line_width": 1.5, "line_dash": ("solid", "dashed", "dotted")[turn]},
            )
    columns = 1 + (len(number) - 1) // 13
    return parts, {"size": (5.6, 2.4), "legend_position": "right", "legend_cols": columns}


def _in_rows(
    values: np.ndarray, number: list[int], mode: str, label: str
) -> tuple[dict[int, Any], dict[str, Any]]:
    """Draw a row a component, the first on top, each with its own scale from 0."""
    hv = holoviews()
    x = hv.Dimension(f"{mode}_position", label=label)
    y = hv.Dimension("height", label="Component (largest loading)")
    places, rank = np.arange(len(values)), len(number)
    largest = np.abs(values).max(axis=0)
    zero, reach = (0.42, 0.42) if (values < 0).any() else (0.0, 0.84)
    parts, rows = {}, []
    for k, (n, hue) in enumerate(zip(number, categorical(rank), strict=True)):
        base = rank - 1 - k + zero
        top = base + reach * values[:, k] / (largest[k] or 1.0)
        rows.append((base, f"{n} ({largest[k]:.2g})"))
        if mode == "image":
            low, high = np.minimum(top, base), np.maximum(top, base)
            corners = (places - 0.4, low, places + 0.4, high, values[:, k])
            parts[n] = styled(
                hv.Rectangles(corners, [x, y, "x1", "y1"], "loading"),
                mpl={"facecolor": hue, "linewidth": 0},
                bokeh={"fill_color": hue, "line_color": None},
            )
        else:
            parts[n] = styled(
                hv.Curve((places, top, values[:, k]), x, [y, "loading"]),
                both={"color": hue},
                mpl={"linewidth": 0.7},
                bokeh={"line_width": 1.2},
            )
    return parts, {
        "size": (5.6, max(1.0, 0.3 * rank)),
        "yticks": rows,
        "ylim": (-0.08, rank),
        "show_legend": False,
    }
