"""Many small maps as one image: the arithmetic of the tiles, and its drawing.

One image draws some 25 times faster than as many plots, and its rows and
columns line up by themselves. Coordinates are pixels of the mosaic: x to the
right, y downwards, pixel centres on whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitxr.plot._style import SCREEN, SMALL, TEXT, TITLE, WIDTH, bar, holoviews, styled

__all__ = [
    "Tiles",
    "Words",
    "canvas",
    "image",
    "left_margin",
    "scale_for",
    "side_bar",
    "small",
    "tile",
]


@dataclass(frozen=True)
class Tiles:
    """Where the maps of a mosaic lie: ``rows x cols`` maps of ``height x width`` pixels.

    Examples
    --------
    >>> tiles = Tiles(2, 3, 4, 5, gap=1)
    >>> tiles.shape
    (9, 17)
    >>> tiles.block(1, 2)
    (slice(5, 9, None), slice(12, 17, None))
    """

    rows: int
    cols: int
    height: int
    width: int
    gap: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels of the mosaic, down and across."""
        return (
            self.rows * (self.height + self.gap) - self.gap,
            self.cols * (self.width + self.gap) - self.gap,
        )

    def block(self, row: int, col: int) -> tuple[slice, slice]:
        """The pixels of one map."""
        top, left = row * (self.height + self.gap), col * (self.width + self.gap)
        return slice(top, top + self.height), slice(left, left + self.width)

    def x(self, col: int) -> float:
        """Centre of a column of maps."""
        return col * (self.width + self.gap) + (self.width - 1) / 2

    def y(self, row: int) -> float:
        """Centre of a row of maps."""
        return row * (self.height + self.gap) + (self.height - 1) / 2


def tile(maps: np.ndarray, gap: int = 1, fill: float = np.nan) -> tuple[np.ndarray, Tiles]:
    """Lay maps of shape (rows, cols, height, width, ...) side by side.

    Examples
    --------
    >>> mosaic, tiles = tile(np.ones((1, 2, 2, 2)))
    >>> mosaic
    array([[ 1.,  1., nan,  1.,  1.],
           [ 1.,  1., nan,  1.,  1.]])
    """
    rows, cols, height, width = maps.shape[:4]
    tiles = Tiles(rows, cols, height, width, gap)
    dtype = np.result_type(maps.dtype, np.float32) if fill != fill else maps.dtype
    out = np.full((*tiles.shape, *maps.shape[4:]), fill, dtype=dtype)
    for row in range(tiles.rows):
        for col in range(tiles.cols):
            out[tiles.block(row, col)] = maps[row, col]
    return out, tiles


def image(
    values: np.ndarray,
    name: str,
    unit: str = "",
    *,
    cmap: Any,
    clim: tuple[float, float],
    log: bool = False,
    origin: tuple[float, float] = (0.0, 0.0),
    pixel: tuple[float, float] = (1.0, 1.0),
    hook: Any = None,
    colorbar: bool = True,
    extra: dict[str, np.ndarray] | None = None,
) -> Any:
    """Draw an array as an ``hv.Image`` on mosaic coordinates; NaN is left blank.

    ``extra`` are further values of each pixel, not drawn, shown on hovering.
    """
    hv = holoviews()
    rows, cols = values.shape
    # one pixel has no spacing of its own: bounds say the same and always suffice
    (x, y), (dx, dy) = origin, pixel
    bounds = (x - dx / 2, y - dy / 2, x + (cols - 0.5) * dx, y + (rows - 0.5) * dy)
    stack = [values, *(extra or {}).values()]
    vdims = [hv.Dimension(name, unit=unit or None), *(extra or {})]
    element = hv.Image(
        # an array's first row belongs to the largest y; the axis is turned over
        np.dstack([part[::-1] for part in stack]) if len(stack) > 1 else values[::-1],
        bounds=bounds,
        kdims=["x", "y"],
        vdims=vdims,
    )
    return styled(
        element,
        both={"cmap": cmap, "clim": clim, "cnorm": "log" if log else "linear"},
        mpl={
            "clipping_colors": {"NaN": (0, 0, 0, 0)},
            "hooks": [hook] if hook else [],
            "interpolation": "nearest",
            # more data than pixels: average, or thin structure is lost at random
            **({"interpolation": "antialiased"} if max(values.shape) > 1200 else {}),
        },
        bokeh={
            "clipping_colors": {"NaN": "rgba(0,0,0,0)"},
            "tools": ["hover"],
            "colorbar": colorbar,
            "colorbar_opts": {"title": f"{name} ({unit})" if unit else name},
        },
    )


@dataclass(frozen=True)
class Words:
    """Text of one kind: positions in mosaic coordinates and what stands there."""

    items: Iterable[tuple[float, float, object]]
    ha: str = "center"
    va: str = "center"
    size: float = TEXT
    color: str = "#222222"
    angle: float = 0.0

    def element(self) -> Any:
        """Draw as ``hv.Labels``."""
        hv = holoviews()
        items = [(float(x), float(y), str(text)) for x, y, text in self.items]
        columns = tuple(list(column) for column in zip(*items, strict=True)) or ([], [], [])
        baseline = {"center": "middle"}.get(self.va, self.va)
        return styled(
            hv.Labels(columns, ["x", "y"], "text"),
            mpl={
                "size": self.size,
                "color": self.color,
                "horizontalalignment": self.ha,
                "verticalalignment": self.va,
                "rotation": self.angle,
            },
            bokeh={
                "text_font_size": f"{self.size}pt",
                "text_color": self.color,
                "text_align": self.ha,
                "text_baseline": baseline,
                "angle": self.angle,
            },
        )


def canvas(
    parts: Sequence[Any],
    *,
    span: tuple[float, float],
    scale: float,
    margins: tuple[float, float, float, float],
    title: str,
) -> Any:
    """Overlay the parts on a bare axis with equal aspect and y downwards.

    Parameters
    ----------
    parts
        Elements, or :class:`Words`.
    span
        Width and height of the content in mosaic pixels.
    scale
        Inches a mosaic pixel.
    margins
        Inches left, top, right and bottom of the content, for labels.
    title
        Title of the picture.
    """
    hv = holoviews()
    drawn = [part.element() if isinstance(part, Words) else part for part in parts]
    left, top, right, bottom = (inches / scale for inches in margins)
    x0, x1 = -0.5 - left, span[0] - 0.5 + right
    y0, y1 = -0.5 - top, span[1] - 0.5 + bottom
    width, height = (x1 - x0) * scale, (y1 - y0) * scale
    return styled(
        hv.Overlay(drawn).collate(),
        both={
            "xlim": (x0, x1),
            "ylim": (y0, y1),
            "invert_yaxis": True,
            "xaxis": None,
            "yaxis": None,
            "title": title,
            "show_legend": False,
        },
        mpl={
            "fig_inches": (width, height),
            "fig_bounds": (0, 0, 1, 1),
            "aspect": "equal",
            "show_frame": False,
            "bgcolor": (0, 0, 0, 0),
            "fontsize": {"title": TITLE},
        },
        bokeh={
            "frame_width": max(1, round(width * SCREEN)),
            "frame_height": max(1, round(height * SCREEN)),
        },
    )


def scale_for(units: float, *, largest: float, cell: float, room: float = WIDTH) -> float:
    """Inches a mosaic pixel: ``units`` fill ``room``, yet a ``cell`` is at most ``largest``."""
    return min(room / units, largest / cell)


def side_bar(
    label: str,
    tiles: Tiles,
    scale: float,
    *,
    offset: float = 0.12,
    length: float = 1.2,
    **ticks: Any,
) -> Any:
    """Colour bar at the right of a mosaic, at its top, in inches."""
    rows, cols = tiles.shape
    height = min(rows, length / scale)
    return bar(label, (cols - 0.5 + offset / scale, -0.5, 0.09 / scale, height), **ticks)


def small(items: Iterable[tuple[float, float, object]], **options: Any) -> Words:
    """Text of the smaller size."""
    return Words(items, size=SMALL, **options)


def left_margin(names: list[str]) -> float:
    """Inches that names at the left need."""
    return max((len(n) for n in names), default=0) * TEXT / 72 * 0.56 + 0.1
