"""The images below maps that are drawn as facets, moved as the shifts of the maps were."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._mosaic import Tiles
from vitxr.plot.images import rgb_element, seen

__all__ = ["Facets", "underlay"]

#: Pixels of all images below the maps together, at most.
_BELOW = 4_000_000


@dataclass(frozen=True)
class Facets:
    """Facets in rows and columns.

    Attributes
    ----------
    values
        (rows, cols, height, width); NaN where there is no facet.
    rows, cols
        Names of the rows and columns; empty where each facet has a name of its own.
    names
        Name of each facet, row by row, where there are neither rows nor columns.
    dims
        The dimension of the rows and that of the columns.
    said
        Names of what there is one of: "block 4, head 2".
    """

    values: np.ndarray
    rows: list[str]
    cols: list[str]
    names: list[str]
    dims: tuple[Hashable | None, Hashable | None]
    said: str
    count: int


def underlay(
    array: xr.DataArray, cut: Facets, pixels: Any, tiles: Tiles, own: bool, pale: bool
) -> Any:
    """Images below the maps, grey and paled; in the first column as they are."""
    side = max(tiles.height, tiles.width)
    each = max(1, int((_BELOW / (tiles.shape[0] * tiles.shape[1])) ** 0.5))
    each = min(each, max(1, 224 // side))  # pixels a patch
    out = np.zeros((tiles.shape[0] * each, tiles.shape[1] * each, 4), np.uint8)
    read: dict[tuple[int, ...], np.ndarray] = {}

    def put(row: int, col: int, at: dict[Hashable, int], plain: bool) -> None:
        i = at.get("image", 0)
        if (i,) not in read:
            size = (tiles.width * each, tiles.height * each)
            read[(i,)] = _fitted(seen(pixels, array, i), size)
        rgba = read[(i,)]
        rgba = np.roll(rgba, _moved(array, at, rgba.shape), axis=(0, 1))
        if not plain:
            grey = rgba[..., :3].mean(axis=-1, keepdims=True)
            grey = 155 + grey * (100 / 255) if pale else grey
            rgba = np.concatenate([grey.repeat(3, -1), rgba[..., 3:]], axis=-1).astype(np.uint8)
        block = [slice(s.start * each, s.stop * each) for s in tiles.block(row, col)]
        out[tuple(block)] = rgba

    for k in range(cut.count + (own and 1)):
        if own:
            place = {} if k == 0 or cut.dims[1] is None else {cut.dims[1]: k - 1}
            put(*divmod(k, tiles.cols), place, plain=k == 0)
        else:
            i, j = divmod(k, max(1, cut.values.shape[1]))
            at = {d: n for d, n in zip(cut.dims, (i, j), strict=True) if d is not None}
            put(i, j + 1, at, plain=False)
            if j == 0 and (i == 0 or cut.dims[0] in ("image", "shift_y")):
                put(i, 0, {d: n for d, n in at.items() if d == cut.dims[0]}, plain=True)
    rows, cols = tiles.shape
    return rgb_element(out, size=(cols, rows))


def _fitted(rgba: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    grows = rgba.shape[1] <= size[0] and rgba.shape[0] <= size[1]
    how = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(rgba).resize(size, how))


def _moved(array: xr.DataArray, at: dict[Hashable, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """Pixels by which the shift of a facet moves its image, down and to the right."""
    moved = []
    for name, size in zip(("offset_y", "offset_x"), shape[:2], strict=True):
        if name not in array.coords:
            moved.append(0)
            continue
        offset = array[name]
        where = {d: at.get(d, 0) for d in offset.dims}
        dx = float(offset.isel(where))
        if dx and "period" not in offset.attrs:
            raise DataError(
                f"`{name}` has no attribute `period`, the input's size in pixels: the image cannot "
                "be moved as the shift did. Give results of an extraction as they are, or leave "
                "pixels out."
            )
        moved.append(round(dx / float(offset.attrs.get("period", 1)) * size))
    return moved[0], moved[1]
