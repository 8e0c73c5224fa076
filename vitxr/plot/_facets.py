"""Maps on the patch grid, one a facet: from xarray dims to rows and columns, over the image."""

from __future__ import annotations

import math
from collections.abc import Hashable
from textwrap import wrap
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import SHIFT, order
from vitxr.plot._mosaic import (
    Tiles,
    Words,
    canvas,
    image,
    left_margin,
    scale_for,
    side_bar,
    small,
    tile,
)
from vitxr.plot._select import described, image_titles
from vitxr.plot._style import SMALL, TEXT, VALUES, styled
from vitxr.plot._underlay import Facets, underlay

__all__ = ["GRID", "draw", "facets", "of_facet", "taken"]

GRID = ("patch_row", "patch_col")
_NAMED = {
    "layer": "block",
    "feature_map": "map",
    "class": "for",
    "label": "class",
    "patch_row": "row",
    "patch_col": "column",
}
#: Facets along one dimension stand in rows of at most so many.
_WRAP = 8
#: How much of a map hides the image below it.
_OPACITY = 0.62


def taken(array: Any, name: str, remedy: str, over: tuple[str, ...] = GRID) -> xr.DataArray:
    """Take ``name`` from a Dataset, or a DataArray as it is, and ask for the dims of a facet."""
    if isinstance(array, xr.Dataset):
        if name not in array:
            raise DataError(f"the picture needs `{name}`; given: {described(array)}. {remedy}")
        array = array[name]
    if not isinstance(array, xr.DataArray) or set(over) - set(array.dims):
        raise DataError(
            f"the picture needs `{name}` with dims (..., {', '.join(over)}); given: "
            f"{described(array)}. {remedy}"
        )
    return array


def of_facet(array: xr.DataArray, dim: Hashable, at: int) -> str:
    """What one place along a dimension is called.

    Examples
    --------
    >>> a = xr.DataArray([0.0, 0.0], dims="layer", coords={"layer": [3, 7]})
    >>> of_facet(a, "layer", 1)
    'block 7'
    """
    if dim == "image":
        return image_titles(array, [at])[0]
    offset = {"shift_y": "offset_y", "shift_x": "offset_x"}.get(str(dim))
    if offset and offset in array.coords and array[offset].dims == (dim,):
        return f"{'dy' if dim == 'shift_y' else 'dx'} {int(array[offset].values[at])} px"
    value = array[dim].values[at] if dim in array.coords else at
    if str(dim) not in _NAMED and isinstance(value, str):
        return value
    return f"{_NAMED.get(str(dim), str(dim).replace('_', ' '))} {value}"


def facets(
    array: xr.DataArray,
    over: tuple[str, str] = GRID,
    apart: bool = False,
    rows_of: Hashable | None = None,
) -> Facets:
    """Lay the dims besides those of a map out: one wraps, two are rows and columns.

    With ``apart`` a lone dimension ``image`` is rows as well; ``rows_of`` says which of two is.
    """
    others = [d for d in order(d for d in array.dims if d not in over) if array.sizes[d] > 1]
    others.sort(key=lambda d: d != rows_of)
    if len(others) > 2:
        sizes = ", ".join(f"{d}: {array.sizes[d]}" for d in others)
        raise ArgumentError(
            f"besides the map there are {sizes}; two dims can be rows and columns. Select or "
            f"average the others, as in a.isel({others[0]}=0) or a.mean({str(others[0])!r})."
        )
    array = array.isel({d: 0 for d in array.dims if d not in over and d not in others})
    said = [
        of_facet(array.expand_dims(d), d, 0)
        for d in ("image", "layer", "head", "class", "feature_map")
        if d in array.coords and array[d].ndim == 0
    ]
    if not set(SHIFT) & set(others) and _moved_at_all(array):
        dy, dx = (int(array[n]) for n in ("offset_y", "offset_x"))
        said.append(f"shifted by ({dy}, {dx}) px")
    values = np.asarray(array.transpose(*others, *over).values)
    values = values.astype(np.float64) if values.dtype == bool else values
    height, width = values.shape[-2:]
    named = [[of_facet(array, d, k) for k in range(array.sizes[d])] for d in others]
    words = ", ".join(said)
    if len(others) == 2:
        dims = (others[0], others[1])
        return Facets(values, named[0], named[1], [], dims, words, math.prod(values.shape[:2]))
    count = array.sizes[others[0]] if others else 1
    if others == ["image"] and apart:
        return Facets(values[:, None], named[0], [], [], ("image", None), words, count)
    down = math.ceil(count / _WRAP)
    wide = math.ceil(count / down)
    cells = np.full((down * wide, height, width), np.nan)
    cells[:count] = values.reshape(count, height, width)
    names = named[0] if others else []
    dims_1 = (None, others[0] if others else None)
    return Facets(cells.reshape(down, wide, height, width), [], [], names, dims_1, words, count)


def _moved_at_all(array: xr.DataArray) -> bool:
    offsets = [array[n] for n in ("offset_y", "offset_x") if n in array.coords]
    return len(offsets) == 2 and all(o.ndim == 0 for o in offsets) and any(map(bool, offsets))


def draw(
    array: xr.DataArray,
    quantity: str,
    *,
    title: str,
    unit: str = "",
    over: tuple[str, str] = GRID,
    cmap: Any = VALUES,
    clim: tuple[float, float] | None = None,
    pixels: Any = None,
    relative: bool = False,
    colorbar: bool = True,
    boxes: tuple[int, int] | None = None,
    rows_of: Hashable | None = None,
    ticks: tuple[list[tuple[float, str]], list[tuple[float, str]]] | None = None,
    axes: tuple[str, str] | None = None,
    pale: bool = True,
    lines: list[float] | None = None,
) -> Any:
    """Draw maps as facets, over the images if there are any.

    Parameters
    ----------
    array
        Maps, with at most two dims of more than one besides ``over``.
    quantity, unit
        What the colours are.
    clim
        Limits of the colours, from 0 (or the least value, if that is less) to the largest by
        default.
    pixels
        Stimuli whose images lie below the maps, as the shift has moved them; each image stands
        alone at the left as well.
    relative
        Divide each map by its own largest value.
    boxes
        Row and column of a patch to outline in each facet.
    rows_of
        The dimension of the rows, where there are two and it is not the first.
    ticks, axes
        Positions and names along a map's columns and rows, and what they are.
    pale
        Pale the images, so that they change the maps' lightness little.
    lines
        Positions of lines across each map, both ways.
    """
    cut = facets(array, over, apart=pixels is not None, rows_of=rows_of)
    values = raw = cut.values
    if relative:
        largest = np.nanmax(values, axis=(2, 3), keepdims=True, initial=0)
        values = np.divide(raw, largest, out=np.zeros_like(raw), where=largest > 0)
        values[np.isnan(raw)] = np.nan
    if clim is None:
        low, high = min(0.0, float(np.nanmin(values))), float(np.nanmax(values))
        clim = (low, high if high > low else low + 1.0)
    first = pixels is not None  # the column of images
    own = bool(cut.names) or not (cut.rows or cut.cols)
    if first and own:
        values, raw = (_with_cell(v, cut.count) for v in (values, raw))
    elif first:
        blank = np.full((len(values), 1, *values.shape[2:]), np.nan)
        values, raw = (np.concatenate([blank, v], axis=1) for v in (values, raw))
    rows, cols, height, width = values.shape
    left, foot = _room(ticks, axes)
    largest_cell = {1: 2.2, 2: 1.6, 3: 1.4}.get(max(rows, cols), 1.15)
    scale = scale_for(cols * width * 1.06, largest=largest_cell, cell=max(height, width), room=6.3)
    gap = max(1, math.ceil((0.2 if ticks is None or rows == 1 else 0.2 + foot) / scale))
    if not own:
        gap = max(1, round(0.06 * width))
    mosaic, tiles = tile(values, gap=gap)
    scale = min(scale, 6.3 / tiles.shape[1])
    exact = {} if raw is values else {"value": tile(raw, gap=gap)[0]}
    label = f"{quantity} ({unit})" if unit else quantity
    tall = min(tiles.shape[0] * scale, 1.2)
    short = "\n".join(wrap(label, max(8, int(tall / (TEXT / 72 * 0.58)))))
    hook = side_bar(short, tiles, scale) if colorbar else None
    picture = image(
        mosaic, quantity, unit, cmap=cmap, clim=clim, hook=hook, extra=exact, colorbar=colorbar
    )
    parts = [picture]
    if first:
        said = {"title": label, "scale_alpha": _OPACITY}
        picture = styled(picture, both={"alpha": _OPACITY}, bokeh={"colorbar_opts": said})
        parts = [underlay(array, cut, pixels, tiles, own, pale), picture]
    if boxes is not None:
        parts.append(_outlines(tiles, cut.count + first if own else rows * cols, boxes))
    edge = 0.05 / scale
    words, names = _headings(cut, tiles, edge, left / scale, first, own)
    if ticks is not None:
        words += _ticked(tiles, ticks, axes, scale, own, cut.count)
    inner = values.reshape(-1, height, width)[: cut.count] if own and not first else values
    if np.isnan(inner).any() and not first:  # or a map with gaps has no edge
        parts.insert(0, _frames(tiles, cut.count if own else rows * cols))
    if lines:
        parts.append(_lines(tiles, cut.count if own else rows * cols, lines))
    return canvas(
        [*parts, *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(names + left, 0.19, 0.85 if colorbar else 0.04, 0.04 + foot),
        title=title + (f", {cut.said}" if cut.said else ""),
    )


def _with_cell(values: np.ndarray, count: int) -> np.ndarray:
    """Put a blank cell before the wrapped facets."""
    cells = values.reshape(-1, *values.shape[2:])[:count]
    cells = np.concatenate([np.full_like(cells[:1], np.nan), cells])
    down = math.ceil(len(cells) / _WRAP)
    wide = math.ceil(len(cells) / down)
    out = np.full((down * wide, *cells.shape[1:]), np.nan)
    out[: len(cells)] = cells
    return out.reshape(down, wide, *cells.shape[1:])


def _headings(
    cut: Facets, tiles: Tiles, edge: float, left: float, first: bool, own: bool
) -> tuple[list[Words], float]:
    """Names of facets above each, or of rows and columns; inches that those of rows need."""
    if own:
        names = ["image"] * first + (cut.names or [""] * cut.count)
        places = [divmod(k, tiles.cols) for k in range(len(names))]
        items = [
            (tiles.x(j), tiles.block(i, j)[0].start - 0.5 - edge, name)
            for (i, j), name in zip(places, names, strict=True)
            if name
        ]
        return [small(items, va="bottom")] if items else [], 0.04
    heads = ["image"] * first + cut.cols
    words = [
        Words([(tiles.x(j), -0.5 - edge, name) for j, name in enumerate(heads)], va="bottom"),
        Words(
            [(-0.5 - edge - left, tiles.y(i), name) for i, name in enumerate(cut.rows)], ha="right"
        ),
    ]
    return words, left_margin(cut.rows)


def _room(
    ticks: tuple[list[tuple[float, str]], list[tuple[float, str]]] | None,
    axes: tuple[str, str] | None,
) -> tuple[float, float]:
    """Inches that ticks and the names of axes need at the left and below."""
    if ticks is None:
        return 0.0, 0.0
    widest = max((len(text) for _, text in ticks[1]), default=0) * SMALL / 72 * 0.6 + 0.06
    return widest + (0.14 if axes else 0.0), 0.13 + (0.12 if axes else 0.0)


def _ticked(
    tiles: Tiles,
    ticks: tuple[list[tuple[float, str]], list[tuple[float, str]]],
    axes: tuple[str, str] | None,
    scale: float,
    own: bool,
    count: int,
) -> list[Words]:
    """Ticks below the lowest map of each column and at the left of each row."""
    edge = 0.04 / scale
    below, beside, names_x, names_y = [], [], [], []
    left = _room(ticks, None)[0] / scale
    for j in range(tiles.cols):
        if own and j >= count:
            continue
        last = (count - 1 - j) // tiles.cols if own else tiles.rows - 1
        y = tiles.block(last, j)[0].stop - 0.5 + edge
        start = tiles.block(0, j)[1].start
        below += [(start + x, y, text) for x, text in ticks[0]]
        names_x.append((tiles.x(j), y + 0.11 / scale, axes[0] if axes else ""))
    for i in range(tiles.rows):
        start = tiles.block(i, 0)[0].start
        beside += [(-0.5 - edge, start + y, text) for y, text in ticks[1]]
        names_y.append((-0.5 - left - 0.06 / scale, tiles.y(i), axes[1] if axes else ""))
    words = [small(below, va="top"), small(beside, ha="right")]
    if axes:
        words += [small(names_x, va="top"), small(names_y, angle=90)]
    return words


def _lines(tiles: Tiles, count: int, at: list[float]) -> Any:
    """Thin lines across the maps."""
    from vitxr.plot._style import holoviews

    ends = []
    for k in range(count):
        below, across = tiles.block(*divmod(k, tiles.cols))
        top, left = below.start - 0.5, across.start - 0.5
        for x in at:
            ends.append((left + x + 0.5, top, left + x + 0.5, top + tiles.height))
            ends.append((left, top + x + 0.5, left + tiles.width, top + x + 0.5))
    return styled(
        holoviews().Segments(ends, ["x0", "y0", "x1", "y1"]),
        both={"color": "#ffffff"},
        mpl={"linewidth": 0.5},
        bokeh={"line_width": 1},
    )


def _frames(tiles: Tiles, count: int) -> Any:
    """Pale ground below each map."""
    from vitxr.plot._style import holoviews

    boxes = []
    for k in range(count):
        below, across = tiles.block(*divmod(k, tiles.cols))
        boxes.append((across.start - 0.5, below.start - 0.5, across.stop - 0.5, below.stop - 0.5))
    return styled(
        holoviews().Rectangles(boxes, kdims=["x0", "y0", "x1", "y1"]),
        mpl={"facecolor": "#ececec", "linewidth": 0},
        bokeh={"fill_color": "#ececec", "line_color": None},
    )


def _outlines(tiles: Tiles, count: int, patch: tuple[int, int]) -> Any:
    from vitxr.plot._style import holoviews

    boxes = []
    for k in range(count):
        below, across = tiles.block(*divmod(k, tiles.cols))
        x, y = across.start + patch[1], below.start + patch[0]
        boxes.append((x - 0.5, y - 0.5, x + 0.5, y + 0.5))
    return styled(
        holoviews().Rectangles(boxes, kdims=["x0", "y0", "x1", "y1"]),
        mpl={"facecolor": "none", "edgecolor": "#ff3b2f", "linewidth": 1.2},
        bokeh={"fill_color": None, "line_color": "#ff3b2f", "line_width": 2},
    )
