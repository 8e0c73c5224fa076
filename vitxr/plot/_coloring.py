"""What the points of an embedding are coloured by, and the key that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._style import SIGNED, SMALL, TEXT, VALUES, cyclic, data_uri

__all__ = [
    "LABELS",
    "Coloring",
    "class_key",
    "coloring",
    "number_key",
    "patch_colors",
    "period",
    "said",
]

#: What the points of an embedding may be coloured by, the default first.
_BY: dict[str, tuple[str, ...]] = {
    "neuron": (
        "feature_map",
        "patch_row",
        "patch_col",
        "both",
        "edge_distance",
        "label",
        "cluster",
        "response_maximum",
    ),
    "image": ("label", "image", "cluster"),
    "shift": ("offset_y", "offset_x", "cluster"),
}
#: What is said of a point on hovering, where it is known.
LABELS: dict[str, tuple[str, ...]] = {
    "neuron": ("feature_map", "patch_row", "patch_col"),
    "image": ("image", "label"),
    "shift": ("offset_y", "offset_x"),
}
_CLASSES = ("feature_map", "label", "image", "cluster")
_NAMES = {
    "patch_row": "Patch row (0 at the top)",
    "patch_col": "Patch column (0 at the left)",
    "edge_distance": "Patches to the border",
    "response_maximum": "Largest response",
    "offset_y": "Shift down, dy (px, circular)",
    "offset_x": "Shift right, dx (px, circular)",
}
_HEADINGS = {"both": "row and column", "patch_col": "patch column"}
# Corners of the map of places: top left, top right, bottom left, bottom right. Of
# like lightness on the diagonals, and apart with red-green blindness as well.
_CORNERS = np.array(
    [[0x2B, 0x4B, 0x9B], [0x58, 0xC4, 0xDD], [0xB5, 0x3A, 0x2A], [0xF5, 0xC2, 0x42]]
)


def patch_colors(rows: Any, cols: Any) -> np.ndarray:
    """Colour of places on the patch grid, by row and column at once, as RGB bytes.

    The four corners have colours of their own and the places between are their
    bilinear mixture.

    Parameters
    ----------
    rows, cols
        Places, scaled to 0..1 (top to bottom, left to right), of one shape.

    Examples
    --------
    >>> patch_colors(0.0, 0.0)
    array([ 43,  75, 155], dtype=uint8)
    """
    v, u = np.asarray(rows, dtype=float)[..., None], np.asarray(cols, dtype=float)[..., None]
    a, b, c, d = _CORNERS
    mixed = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
    return np.rint(mixed).astype(np.uint8)


@dataclass(frozen=True)
class Coloring:
    """Colours of points: of classes, of numbers, or of places on the patch grid.

    Attributes
    ----------
    name
        The coordinate, or ``"both"``.
    kind
        ``"class"``, ``"number"`` or ``"place"``.
    heading
        ``"By feature map"``.
    values
        Number of the class, or the number, or the colour, of every point.
    groups
        The classes, in the order in which they stand.
    cmap, clim
        Of numbers.
    key
        Matplotlib hook that draws the bar or the map of places beside the points.
    panel
        Bokeh hook that draws the map of places.
    grid
        Of places: the colours of the patch grid, (row, column, 3) uint8.
    """

    name: str
    kind: str
    heading: str
    values: np.ndarray
    groups: list[Any] = field(default_factory=list)
    cmap: Any = None
    clim: tuple[float, float] = (0.0, 1.0)
    label: str = ""
    key: Callable[[Any, Any], None] | None = None
    panel: Callable[[Any, Any], None] | None = None
    grid: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))


def coloring(e: xr.Dataset, dim: str, color: str | xr.DataArray | None) -> Coloring:
    """Colours of the points of an embedding of ``dim``, by ``color`` or the dimension's default."""
    if isinstance(color, xr.DataArray):
        return _given(e, dim, color)
    allowed = _BY[dim]
    if color is None:
        color = "image" if dim == "image" and "label" not in e.coords else allowed[0]
    if color not in allowed:
        raise ArgumentError(
            f"color={color!r}: an embedding of dim {dim!r} is coloured by one of "
            f"{', '.join(map(repr, allowed))}."
        )
    needed = ("patch_row", "patch_col") if color == "both" else (color,)
    for name in needed:
        if name not in e.coords or e[name].dims != (dim,):
            have = [n for n in allowed if n in e.coords]
            raise DataError(
                f"the embedding has no coordinate `{name}` along {dim}; it can be coloured by "
                f"{', '.join(have) or 'nothing'}. Embed the factors of a tensor made with "
                "ds.vit.neuron_tensor, which labels them, or assign the coordinate."
            )
    words = "By " + _HEADINGS.get(color, color.replace("_", " "))
    if color == "both":
        rows, cols = (np.asarray(e[n].values) for n in needed)
        rgb = patch_colors(_place(rows), _place(cols)).reshape(-1, 3)
        hexes = np.array([f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb], dtype=object)
        grid = patch_colors(
            *np.meshgrid(*(_place(np.arange(v.min(), v.max() + 1)) for v in (rows, cols)),
                         indexing="ij")
        )  # fmt: skip
        key, panel = _place_key(grid), _place_panel(grid)
        return Coloring(color, "place", words, hexes, key=key, panel=panel, grid=grid)
    values = np.asarray(e[color].values)
    if color in _CLASSES:
        groups, codes = _classes(values, ordered=color == "cluster")
        return Coloring(color, "class", words, codes, groups=groups)
    if dim == "shift":
        words = "By vertical shift" if color == "offset_y" else "By horizontal shift"
        limits: tuple[float, float] = (0.0, period(e, color))
        palette: Any = cyclic()
    else:
        limits, palette = (float(values.min()), float(values.max())), VALUES
        limits = limits if limits[1] > limits[0] else (limits[0] - 0.5, limits[0] + 0.5)
    label = _NAMES[color]
    key = number_key(label, whole=color != "response_maximum")
    return Coloring(color, "number", words, values, [], palette, limits, label, key)


def _classes(values: np.ndarray, ordered: bool = False) -> tuple[list[Any], np.ndarray]:
    """Classes in the order in which they stand, or by number, and the class of every point."""
    number = values.dtype.kind in "iu"
    values = values if number else values.astype(str)
    found = np.unique(values) if ordered else pd.unique(values)
    groups = [int(v) if number else str(v) for v in found]
    return groups, pd.Index(groups).get_indexer(values)


def _given(e: xr.Dataset, dim: str, color: xr.DataArray) -> Coloring:
    """Colours by an array of the user's: numbers by a colour map, anything else by class."""
    if color.dims != (dim,) or color.sizes[dim] != e.sizes[dim]:
        sizes = ", ".join(f"{d}: {n}" for d, n in color.sizes.items())
        raise ArgumentError(
            f"color has the dims ({sizes}); expected one number or name for each point, ({dim}: "
            f"{e.sizes[dim]}), such as f.{dim}_factor.sel(component=0)."
        )
    same = dim not in color.indexes or dim not in e.indexes
    if not same and not color.indexes[dim].equals(e.indexes[dim]):
        raise ArgumentError(
            f"color is labelled by other {dim}s than the embedding, or in another order: take it "
            "from what was embedded."
        )
    name, values = str(color.name or "color"), np.asarray(color.values)
    label = str(color.attrs.get("long_name", name.replace("_", " ")))
    for one in ("component", "pc"):
        if one in color.coords and color[one].ndim == 0:
            label += f" of {one} {int(color[one])}"
    words, label = f"By {label}", label[:1].upper() + label[1:]
    if values.dtype.kind not in "fiu":
        groups, codes = _classes(values)
        return Coloring(name, "class", words, codes, groups=groups)
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    palette = VALUES
    if low < 0 < high:
        palette, high = SIGNED, max(-low, high)
        low = -high
    limits = (low, high) if high > low else (low - 0.5, low + 0.5)
    return Coloring(name, "number", words, values, [], palette, limits, label, number_key(label))


def _place(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return (values - values.min()) / span if span else np.zeros(len(values))


def period(e: xr.DataArray | xr.Dataset, name: str) -> float:
    """Pixels after which a shift is none: the input's size, else one step past the last."""
    known = e[name].attrs.get("period")
    offsets = np.unique(e[name].values)
    step = float(np.diff(offsets).min()) if len(offsets) > 1 else 1.0
    return float(known) if known else float(offsets[-1]) + step


def number_key(label: str, whole: bool = False) -> Any:
    """Matplotlib hook: a slim colour bar beside the scatter."""

    def hook(plot: Any, element: Any) -> None:
        axis, artist = plot.handles["axis"], plot.handles["artist"]
        if any(child.get_label() == label for child in axis.child_axes):
            return
        inset = axis.inset_axes((_right(axis), 0.0, 0.035, 0.6), label=label)
        colorbar = axis.figure.colorbar(artist, cax=inset)
        colorbar.outline.set_visible(False)
        if whole:
            inset.yaxis.get_major_locator().set_params(integer=True)
        inset.tick_params(labelsize=SMALL, length=2, width=0.5, pad=1.5)
        colorbar.set_label(label, fontsize=TEXT, labelpad=3)
        if label.startswith("Patch row"):
            inset.invert_yaxis()

    return hook


def _place_key(grid: np.ndarray) -> Any:
    """Matplotlib hook: the patch grid in its colours, beside the scatter."""

    def hook(plot: Any, element: Any) -> None:
        axis = plot.handles["axis"]
        if any(child.get_label() == "key" for child in axis.child_axes):
            return
        inset = axis.inset_axes((_right(axis) + 0.01, 0.0, 0.22, 0.22), label="key")
        inset.imshow(grid, interpolation="nearest")
        inset.set(xticks=[], yticks=[])
        inset.set_xlabel("patch column", fontsize=SMALL, labelpad=2)
        inset.set_ylabel("patch row", fontsize=SMALL, labelpad=2)
        for spine in inset.spines.values():
            spine.set_visible(False)

    return hook


def _place_panel(grid: np.ndarray) -> Any:
    """Bokeh hook: the same, in the margin to the right of the scatter."""

    def hook(plot: Any, element: Any) -> None:
        from bokeh.models import Node
        from bokeh.models.dom import HTML
        from bokeh.models.ui import Panel

        figure = plot.handles["plot"]
        if any(isinstance(one, Panel) for one in figure.elements):
            return
        rows, cols = grid.shape[:2]
        size = [round(80 * n / max(rows, cols)) for n in (cols, rows)]
        words = "font:11px sans-serif;color:#444;text-align:center"
        key = (
            f'<div style="display:grid;grid-template-columns:auto {size[0]}px;gap:3px;'
            f'align-items:end;{words}">'
            '<span style="writing-mode:vertical-rl;transform:rotate(180deg)">patch row</span>'
            f'<img src="{data_uri(grid)}" alt="{said(grid)}" style="width:{size[0]}px;'
            f'height:{size[1]}px;image-rendering:pixelated"><span></span>'
            "<span>patch column</span></div>"
        )
        figure.min_border_right = size[0] + 40
        corner = Node(target="frame", symbol="bottom_right", offset=0)
        figure.elements.append(
            Panel(position=corner, anchor="bottom_left", elements=[HTML(html=key)])
        )

    return hook


def said(grid: np.ndarray) -> str:
    """The key of places in words."""
    return (
        f"Patch grid of {grid.shape[0]} rows and {grid.shape[1]} columns, each patch in its "
        "colour: blue top left, light blue top right, red bottom left, yellow bottom right"
    )


def class_key(title: str, names: list[str], colors: list[str]) -> Any:
    """Matplotlib hook: the classes and their colours, for a scatter without a key of its own."""

    def hook(plot: Any, element: Any) -> None:
        from matplotlib.lines import Line2D

        axis = plot.handles["axis"]
        if axis.get_legend() is None:
            dots = [
                Line2D([], [], linestyle="", marker="o", markersize=4, color=hue, label=name)
                for name, hue in zip(names, colors, strict=True)
            ]
            axis.legend(
                handles=dots,
                title=title,
                loc="center left",
                bbox_to_anchor=(_right(axis), 0.5),
                ncols=1 + (len(names) - 1) // 14,
                frameon=False,
                fontsize=SMALL + 0.5,
                title_fontsize=SMALL + 0.5,
                columnspacing=1.0,
            )

    return hook


def _right(axis: Any) -> float:
    """Where the key begins: the labels of a 3-D axis reach beyond it."""
    return 1.08 if axis.name == "3d" else 1.04
