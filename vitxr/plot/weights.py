"""Pictures of a model's first weights: filters of the patch embedding, likeness of positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from vitxr.plot._facets import draw, taken
from vitxr.plot._mosaic import Words, canvas, scale_for, small, tile
from vitxr.plot._style import SIGNED
from vitxr.plot.images import rgb_bytes, rgb_element

__all__ = ["patch_filters", "position_similarity"]

#: Filters of at most so many are numbered.
_NUMBERED = 128


def patch_filters(f: xr.DataArray, *, columns: int | None = None, title: str | None = None) -> Any:
    """Draw the filters of the patch embedding as images in colour, row by row.

    All are on one scale: grey is zero, and black and white are minus and plus the largest
    magnitude of any of them, which the picture names.

    Parameters
    ----------
    f
        ``patch_filter`` (feature_map, row, col, channel), from
        :func:`vitxr.analysis.patch_filters`. Select some with ``f.sel(feature_map=[3, 7])``.
    columns
        Filters a row; by default half as many again as there are rows.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        One ``RGB`` with every filter, ``0.5 + filter / (2 largest)`` in 0 to 255.
    """
    dims = ("feature_map", "row", "col", "channel")
    f = taken(f, "patch_filter", "Give vitxr.analysis.patch_filters(model).", dims)
    values = np.asarray(f.transpose(*dims).values, dtype=np.float64)
    count, height, width, _ = values.shape
    largest = float(np.abs(values).max()) or 1.0
    rgba = rgb_bytes(np.rint(255 * (0.5 + values / (2 * largest))).astype(np.uint8))
    wide = columns or math.ceil(math.sqrt(1.5 * count))
    down = math.ceil(count / wide)
    cells = np.zeros((down * wide, height, width, 4), np.uint8)
    cells[:count] = rgba
    numbered = count <= _NUMBERED
    scale = scale_for(wide * width * 1.1, largest=0.5, cell=max(height, width))
    gap = max(1, math.ceil((0.12 if numbered else 0.03) / scale))
    mosaic, tiles = tile(cells.reshape(down, wide, height, width, 4), gap=gap, fill=0)
    scale = min(scale, 7.2 / tiles.shape[1])
    known = f["feature_map"].values if "feature_map" in f.coords else np.arange(count)
    top = [
        (tiles.x(k % wide), tiles.block(*divmod(k, wide))[0].start - 0.5 - 0.01 / scale, int(n))
        for k, n in enumerate(known)
    ]
    said = f"black, grey, white: {-largest:.2g}, 0, {largest:.2g} a unit of a preprocessed pixel"
    words = [small([(-0.5, tiles.shape[0] - 0.5 + 0.05 / scale, said)], ha="left", va="top")]
    if numbered:
        words.append(Words(top, va="bottom", size=5.0, color="#444444"))
    return canvas(
        [rgb_element(mosaic), *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.03, 0.13, max(0.03, 3.2 - tiles.shape[1] * scale), 0.18),
        title=title or f"Filters of the patch embedding, {count} feature maps",
    )


def position_similarity(s: xr.DataArray, *, title: str | None = None) -> Any:
    """Draw the likeness of position embeddings: a map for each patch, at its place on the grid.

    Parameters
    ----------
    s
        ``position_similarity`` (patch_row, patch_col, other_row, other_col), from
        :func:`vitxr.analysis.position_similarity`.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``: cosines from -1 to 1. The map in row i and column j is that of patch
        (i, j) with all patches.

    References
    ----------
    Dosovitskiy et al. (2021), An image is worth 16x16 words, ICLR, figure 7, centre.
    """
    dims = ("patch_row", "patch_col", "other_row", "other_col")
    s = taken(s, "position_similarity", "Give vitxr.analysis.position_similarity(model).", dims)
    return draw(
        s, "Cosine", title=title or "Similarity of position embeddings",
        over=("other_row", "other_col"), cmap=SIGNED, clim=(-1.0, 1.0),
    )  # fmt: skip
