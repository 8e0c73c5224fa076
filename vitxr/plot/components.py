"""Pictures of factors: where a component sits, which images and shifts drive it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._mosaic import Words, canvas, image, scale_for, small, tile
from vitxr.plot._select import (
    labels_of,
    lattice_offsets,
    neuron_maps,
    one_fit,
    variable,
    with_dims,
)
from vitxr.plot._style import (
    OTHER_VALUES,
    SIGNED,
    SMALL,
    VALUES,
    bar,
    categorical,
    holoviews,
    styled,
)

__all__ = ["factors"]

#: Inches of the columns of :func:`factors` and of the space between them.
_NEURONS, _IMAGES, _SPACE = 4.4, 1.25, 0.12


def factors(f: xr.Dataset, *, components: Any = None, title: str = "Factors") -> Any:
    """Draw the factors of a fit: a row a component, by descending weight.

    At the left the neuron factor as small maps, one a feature map, in the order
    of the tensor; a row has one colour scale, from 0 to the row's largest loading, or if
    any neuron loading is negative, of either sign to its largest magnitude. In the middle
    the loadings of the images as bars from 0, coloured by label. At
    the right, if the tensor had shifts, the shift factor on the lattice of offsets,
    from its least to its largest loading, which are written beside it: loadings
    over shifts often differ little, and a scale from 0 would hide how; where
    some are negative the scale is symmetric about zero.

    Parameters
    ----------
    f
        Factors: ``neuron_factor``, ``image_factor``, and perhaps ``shift_factor``
        and ``weight``, of one fit.
    components
        Positions of the components to show, all by default.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        The first ``Image`` has the neuron loading relative to its row's largest
        and, as ``loading``, the loading; the ``Image`` of each shift map the loadings.

    References
    ----------
    The original notebook, section 7 (``get_tensor_factors_plot``).
    """
    hv = holoviews()
    f = _cp(one_fit(f))
    if components is not None:
        f = f.isel(component=np.atleast_1d(components))
    maps, numbers = neuron_maps(variable(f, "neuron_factor"))
    values = maps.transpose("component", "feature_map", "patch_row", "patch_col").values
    rank, _, height, width = values.shape
    largest = np.nanmax(np.abs(values), axis=(1, 2, 3), keepdims=True)
    signed = bool(np.nanmin(values) < 0)
    relative = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    relative[np.isnan(values)] = np.nan
    gap = max(1, round(0.1 * width))
    mosaic, tiles = tile(relative, gap=gap)
    raw, _ = tile(values, gap=gap)
    scale = scale_for(tiles.shape[1], largest=0.55, cell=max(width, height), room=_NEURONS)
    step = height + gap
    edge, space = 0.05 / scale, _SPACE / scale
    below = tiles.shape[0] - 0.5
    cbar = 0.35 / scale, 0.07 / scale
    parts = [
        image(
            mosaic,
            "Neuron loading / row's largest",
            cmap=SIGNED if signed else VALUES,
            clim=(-1.0 if signed else 0.0, 1.0),
            hook=bar(
                "Loading / row's largest",
                (-0.5, below + cbar[0] - 0.2 / scale, min(tiles.shape[1], 1.5 / scale), cbar[1]),
                ticks=[-1, 0, 1] if signed else [0, 0.5, 1],
                horizontal=True,
            ),
            extra={"loading": raw},
        )
    ]
    head = -0.5 - edge
    widest = max(len(str(n)) for n in numbers) * SMALL / 72 * 0.65 + 0.04
    every = math.ceil(widest / ((width + gap) * scale))
    words = [
        Words([(-0.5 - edge, tiles.y(i), n) for i, n in enumerate(_numbers(f))], ha="right"),
        Words([(-0.5 - 0.26 / scale, (tiles.shape[0] - 1) / 2, "Component")], angle=90),
        small(
            [(tiles.x(j), head, n) for j, n in enumerate(numbers) if j % every == 0], va="bottom"
        ),
        Words(
            [((tiles.shape[1] - 1) / 2, head - 0.12 / scale, "Neurons, by feature map")],
            va="bottom",
        ),
    ]

    left = tiles.shape[1] - 0.5 + space
    right = left + _IMAGES / scale
    image_factor = variable(f, "image_factor").transpose("component", "image")
    parts += _bars(hv, image_factor, left, right, step, height)
    words.append(Words([((left + right) / 2, head - 0.12 / scale, "Images")], va="bottom"))
    words += _label_key(image_factor, left, below + edge, scale)
    end = right

    if "shift_factor" in f:
        shift_factor = f["shift_factor"]
        at_y, at_x, (ny, nx) = lattice_offsets(shift_factor)
        loadings = np.full((rank, ny, nx), np.nan)
        loadings[:, at_y, at_x] = shift_factor.transpose("component", "shift").values
        left = end + space
        pixel = height / max(ny, nx)
        end = left + nx * pixel
        ranges = []
        for i in range(rank):
            low, high = float(np.nanmin(loadings[i])), float(np.nanmax(loadings[i]))
            parts.append(
                image(
                    loadings[i],
                    f"Shift loading {i}",
                    cmap=SIGNED if low < 0 else OTHER_VALUES,
                    clim=_range(low, high),
                    origin=(left + pixel / 2, i * step - 0.5 + pixel / 2),
                    pixel=(pixel, pixel),
                    colorbar=False,
                )
            )
            ranges.append((end + edge, tiles.y(i), _span(low, high)))
        words.append(small(ranges, ha="left", color="#555555"))
        words.append(Words([((left + end) / 2, head - 0.12 / scale, "Shifts")], va="bottom"))
        words += _offset_ticks(shift_factor, left, end, below, edge, scale, ny, nx)
        end += 0.55 / scale
    return canvas(
        [*parts, *words],
        span=(end + 0.5, tiles.shape[0]),
        scale=scale,
        margins=(0.35, 0.32, 0.03, 0.62),
        title=title,
    )


def _cp(f: xr.Dataset) -> xr.Dataset:
    """Check that the factors are those of a CP model."""
    remedy = "Give the factors of one fit, t.vit.factorize(rank=25)."
    for dim in ("neuron", "image", "shift"):
        name = f"{dim}_factor"
        if dim == "shift" and name not in f:
            continue
        array = variable(f, name, remedy)
        if f"{dim}_component" in array.dims:
            raise DataError(
                f"`{name}` has dims ({', '.join(map(str, array.dims))}), as in a Tucker model, "
                "whose components are not common to neurons, images and shifts; expected (neuron, "
                "component). Fit a CP model, method='ncp_hals', or draw one factor at a time with "
                f"factor_curves(f, {dim!r})."
            )
        with_dims(f, name, (dim, "component"), remedy)
    return f


def _numbers(f: xr.Dataset) -> list[int]:
    known = f["component"].values if "component" in f.coords else range(f.sizes["component"])
    return [int(n) for n in known]


def _range(low: float, high: float) -> tuple[float, float]:
    """Limits of the colours: symmetric about zero if loadings are signed."""
    if low < 0:
        return -max(-low, high), max(-low, high)
    # one shade says that all are alike
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _span(low: float, high: float) -> str:
    """Two loadings, to two digits of the larger; what is nothing beside it is 0."""
    most = max(abs(low), abs(high))
    digits = max(0, 1 - int(np.floor(np.log10(most)))) if most > 0 else 0
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if high <= low else f"{first} to {last}"


def _label_colors(labels: list[str]) -> dict[str, str]:
    """The colour of each label, in the order in which they stand; images without one have one."""
    classes = list(pd.unique(np.asarray(labels, dtype=object)))
    return dict(zip(classes, categorical(len(classes)), strict=True))


def _bars(
    hv: Any, array: xr.DataArray, left: float, right: float, step: float, height: int
) -> list[Any]:
    """Bars of the image loadings: one element a label, a base line a row."""
    values = np.asarray(array.values, dtype=np.float64)
    labels = labels_of(array)
    colors = _label_colors(labels)
    each = (right - left) / values.shape[1]
    top, least = np.nanmax(values, axis=1), np.minimum(np.nanmin(values, axis=1), 0.0)
    # the base of the bars: at the foot of the row, or as high as negative ones need
    span = np.maximum(top, 0.0) - least
    base = np.arange(len(values)) * step - 0.5 + height
    base += np.divide(least, span, out=np.zeros_like(span), where=span > 0) * height
    parts = []
    for label in colors:
        boxes = []
        for i, row in enumerate(values):
            for j in np.flatnonzero(np.asarray(labels, dtype=object) == label):
                tall = row[j] / span[i] * height if span[i] > 0 else 0.0
                x = left + j * each
                ends = sorted((base[i] - tall, base[i]))
                boxes.append((x + 0.08 * each, ends[0], x + 0.92 * each, ends[1], row[j]))
        parts.append(
            styled(
                hv.Rectangles(boxes, ["x0", "y0", "x1", "y1"], "loading", label=label or "images"),
                mpl={"facecolor": colors[label], "linewidth": 0},
                bokeh={"fill_color": colors[label], "line_color": None},
            )
        )
    floor = [(left, y, right, y) for y in base]
    parts.append(
        styled(
            hv.Segments(floor, ["x0", "y0", "x1", "y1"]),
            both={"color": "#888888"},
            mpl={"linewidth": 0.5},
            bokeh={"line_width": 1},
        )
    )
    return parts


def _label_key(array: xr.DataArray, x: float, y: float, scale: float) -> list[Words]:
    """Labels in their colours, below the bars, wrapped; at most twelve."""
    colors = {label: color for label, color in _label_colors(labels_of(array)).items() if label}
    words, column, row = [], 0.0, 0
    for label, color in list(colors.items())[:12]:
        text = "■ " + (label if len(label) <= 16 else label[:15] + "…")
        inches = (len(text) + 1.5) * SMALL / 72 * 0.6
        if column and column + inches > _IMAGES + _SPACE:
            column, row = 0.0, row + 1
        words.append(
            small(
                [(x + column / scale, y + row * 0.1 / scale, text)],
                ha="left",
                va="top",
                color=color,
            )
        )
        column += inches
    return words


def _offset_ticks(
    array: xr.DataArray,
    left: float,
    right: float,
    below: float,
    edge: float,
    scale: float,
    ny: int,
    nx: int,
) -> list[Words]:
    """Name the axes of the lattice below the last shift map: what is across, what is down."""
    known = "offset_y" in array.coords and "offset_x" in array.coords
    unit = " px" if known else ""
    named = ("offset_y", "offset_x") if known else ("shift_y", "shift_x")
    dy, dx = (np.broadcast_to(array[n].values, array.sizes["shift"]) for n in named)
    # under "raster" a column has no single horizontal offset
    _, at_x, _ = lattice_offsets(array)
    straight = all(len(set(dx[at_x == j])) == 1 for j in range(nx))
    across = f"dx {int(dx.min())} to {int(dx.max())}{unit}" if straight else "column of the raster"
    lines = [
        f"across: {across}",
        f"down: dy {int(dy.min())} to {int(dy.max())}{unit}",
        "colour: least to largest",
    ]
    return [
        small(
            [(left, below + edge + k * 0.1 / scale, t) for k, t in enumerate(lines)],
            ha="left",
            va="top",
        )
    ]
