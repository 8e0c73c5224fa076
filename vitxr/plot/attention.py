"""Pictures of attention: whole matrices, and where one patch looks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Words, canvas, image, scale_for, side_bar, tile
from vitxr.plot._select import described, frame, image_positions, prefix_and_grid, variable
from vitxr.plot._style import VALUES, holoviews, styled
from vitxr.plot.images import rgb_element, seen

__all__ = ["attention_matrices", "attention_query"]


def _decades(low: float, high: float) -> tuple[list[float], list[str]]:
    """Whole powers of ten between the limits, with plain labels."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**p for p in powers], [f"{10.0**p:g}" for p in powers]


def _weights(attention: Any) -> xr.DataArray:
    remedy = 'Extract it with variables=("activation", "attention").'
    array = variable(attention, "attention", remedy)
    if {"head", "query", "key"} - set(array.dims):
        raise DataError(
            "the picture needs `attention` with dims ([image, layer,] head, query, key); given: "
            f"{described(attention)}. {remedy}"
        )
    return array


def _heads(array: xr.DataArray) -> list[int]:
    """Numbers of the heads, of which an extraction may keep some."""
    if "head" not in array.coords:
        return list(range(array.sizes["head"]))
    return [int(h) for h in array["head"].values]


def attention_matrices(
    attention: xr.DataArray | xr.Dataset, *, image_at: int | str = 0, title: str | None = None
) -> Any:
    """Mosaic of the attention matrices of one image: a row a layer, a column a head.

    Within a matrix a row is the token that attends (query) and a column the token
    attended to (key), prefix tokens first, then the patches row by row; every row
    sums to 1. The colour is logarithmic, from a tenth of the uniform weight
    ``1 / tokens`` to 1, since a few weights are large and most are tiny.

    Parameters
    ----------
    attention
        ``attention`` (image, [shift_y, shift_x, layer,] head, query, key) or the
        Dataset that holds it; of a lattice the frame nearest to no shift is taken.
    image_at
        Name or position of the image.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` has a pixel a pair of tokens: the weight drawn and, beside it as
        ``weight``, the weight itself, which may be less than the colours reach.

    References
    ----------
    The original notebook, section 3 ("Visualize attention matrix").
    """
    array = _weights(attention)
    if array.sizes["query"] != array.sizes["key"]:
        raise DataError(
            f"the picture needs the attention of all {array.sizes['key']} tokens; this one keeps "
            f"{array.sizes['query']} queries. Extract it without queries=, or draw the rows that "
            "are kept with vitxr.plot.attention_query."
        )
    array = (
        array.isel(image=image_positions(array, image_at)[0]) if "image" in array.dims else array
    )
    array = frame(array)
    if "layer" not in array.dims:
        array = array.expand_dims("layer")
    values = np.asarray(array.transpose("layer", "head", "query", "key").values, dtype=np.float32)
    layers, _, tokens, _ = values.shape
    gap = max(1, round(0.07 * tokens))
    mosaic, tiles = tile(values, gap=gap)
    scale = scale_for(tiles.shape[1], largest=1.1, cell=tokens, room=6.2)
    low = 0.1 / tokens
    ticks, ticklabels = _decades(low, 1.0)
    picture = image(
        np.maximum(mosaic, low),  # zero has no logarithm and would be left blank
        "Attention weight",
        cmap=VALUES,
        clim=(low, 1.0),
        log=True,
        extra={"weight": mosaic},
        hook=side_bar("Attention weight", tiles, scale, ticks=ticks, ticklabels=ticklabels),
    )
    edge = 0.05 / scale
    number = (
        [int(v) for v in array["layer"].values] if "layer" in array.coords else list(range(layers))
    )
    words = [
        Words([(-0.5 - edge, tiles.y(i), f"block {n}") for i, n in enumerate(number)], ha="right"),
        Words(
            [(tiles.x(j), -0.5 - edge, f"head {n}") for j, n in enumerate(_heads(array))],
            va="bottom",
        ),
    ]
    return canvas(
        [picture, *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.52, 0.2, 0.75, 0.04),
        title=title or "Attention matrices (query down, key across)",
    )


def attention_query(
    attention: xr.DataArray | xr.Dataset,
    query: tuple[int, int],
    *,
    layer: int,
    image_at: int | str = 0,
    grid: tuple[int, int] | None = None,
    pixels: xr.Dataset | xr.DataArray | np.ndarray | None = None,
    title: str | None = None,
) -> Any:
    """Show what one patch attends to, on the patch grid, one panel a head.

    Prefix tokens (class, registers) are left out of the picture, so a panel sums
    to the share that goes to patches. The query patch is outlined. All heads
    share one colour scale, from 0.

    Parameters
    ----------
    attention
        The extraction Dataset, or its ``attention`` with ``grid`` given.
    query
        Row and column of the patch that attends, on the patch grid.
    layer
        Block, 0-based.
    image_at
        Name or position of the image.
    grid
        Rows and columns of the patch grid; known where a Dataset is given.
    pixels
        What to show beside the panels: the stimuli, of which the one image is read, then
        resized and cropped as for the model if a Dataset is given, which says how
        (``preprocess_settings``); or the image itself as the model took it, (row, col,
        channel) uint8.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the panels, one patch a pixel.

    Raises
    ------
    ArgumentError
        If the query lies outside the grid or is not kept, or the grid is unknown.

    References
    ----------
    The original notebook, section 3 ("Visualize attention map").
    """
    hv = holoviews()
    array = _weights(attention)
    at = image_positions(array, image_at)[0] if "image" in array.dims else 0
    tokens = array.sizes["key"]
    prefix, (rows, cols) = prefix_and_grid(attention, tokens, grid)
    row, col = query
    if not (0 <= row < rows and 0 <= col < cols):
        raise ArgumentError(
            f"query={query!r} lies outside the patch grid of {rows} x {cols}: give "
            f"(row, column) with 0 <= row < {rows} and 0 <= column < {cols}."
        )
    number = prefix + row * cols + col
    kept = array["query"].values if "query" in array.coords else np.arange(array.sizes["query"])
    if number not in kept:
        raise ArgumentError(
            f"query={query!r} is token {number}, and the attention keeps the queries "
            f"{', '.join(map(str, kept[:8]))}{', ...' * (len(kept) > 8)}. Extract it with queries= "
            "that have this patch."
        )
    one = array.isel(query=int(np.flatnonzero(kept == number)[0]))
    one = frame(one.isel(image=at) if "image" in one.dims else one, layer=layer)
    values = np.asarray(one.transpose("head", "key").values, dtype=np.float32)[:, prefix:]
    heads = len(values)
    cells = heads + (pixels is not None)
    down = math.ceil(cells / 7)
    wide = math.ceil(cells / down)
    panels = np.full((down * wide, rows, cols), np.nan, dtype=np.float32)
    panels[cells - heads : cells] = values.reshape(heads, rows, cols)
    scale = scale_for(wide * cols * 1.08, largest=1.25, cell=max(rows, cols), room=6.4)
    gap = max(1, math.ceil(0.19 / scale))
    mosaic, tiles = tile(panels.reshape(down, wide, rows, cols), gap=gap)
    scale = min(scale, 6.4 / tiles.shape[1])
    high = float(values.max()) or 1.0
    picture = image(
        mosaic,
        "Attention weight",
        cmap=VALUES,
        clim=(0.0, high),
        hook=side_bar("Attention weight", tiles, scale),
    )
    parts = [picture]
    places = [divmod(k, wide) for k in range(cells)]
    names = ["image"] * (cells - heads) + [f"head {n}" for n in _heads(array)]
    if pixels is not None:
        rgba = seen(pixels, attention, at)
        parts.append(rgb_element(rgba, size=(cols, rows)))
    boxes = []
    for i, j in places:
        across, below = tiles.block(i, j)[::-1]
        x, y = across.start + col, below.start + row
        boxes.append((x - 0.5, y - 0.5, x + 0.5, y + 0.5))
    outline = styled(
        hv.Rectangles(boxes, kdims=["x0", "y0", "x1", "y1"]),
        mpl={"facecolor": "none", "edgecolor": "#ff3b2f", "linewidth": 1.2},
        bokeh={"fill_color": None, "line_color": "#ff3b2f", "line_width": 2},
    )
    edge = 0.04 / scale
    heading = [
        (tiles.x(j), tiles.block(i, j)[0].start - 0.5 - edge, name)
        for (i, j), name in zip(places, names, strict=True)
    ]
    return canvas(
        [*parts, outline, Words(heading, va="bottom")],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.04, 0.19, 0.75, 0.04),
        title=title or f"Attention of patch ({row}, {col}) in block {layer}",
    )
