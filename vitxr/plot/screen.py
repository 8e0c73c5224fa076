"""Colours for a screen that draws its own pixels: what a map and points look like as bytes.

The same colour maps and palettes as in the pictures, for the browser of a store, which sends
bytes where a picture would be too slow.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError
from vitxr.plot._coloring import coloring, said
from vitxr.plot._style import OTHER_VALUES, SIGNED, VALUES, categorical, data_uri

__all__ = ["Scale", "data_uri", "point_colors", "scale_bytes", "screen_png", "shades"]

Scale = Literal["values", "other", "signed"]
_MAPS = {"values": VALUES, "other": OTHER_VALUES, "signed": SIGNED}
Bytes = npt.NDArray[np.uint8]


def shades(
    values: npt.ArrayLike, limits: tuple[float, float] | None = None, scale: Scale = "values"
) -> tuple[Bytes, tuple[float, float]]:
    """Colours of values as RGBA bytes; what is not a number is transparent.

    Parameters
    ----------
    values
        Numbers, of any shape.
    limits
        Values of the first and the last colour; by default the least and the largest, of
        ``"signed"`` the largest magnitude on both sides of zero.
    scale
        ``"values"`` for nonnegative quantities, ``"other"`` for a second one beside it,
        ``"signed"`` for signed ones.

    Returns
    -------
    tuple
        The colours, of the shape of `values` and 4, and the limits.

    Examples
    --------
    >>> colors, limits = shades([[0.0, 1.0, np.nan]])
    >>> colors[0].tolist(), limits
    ([[68, 1, 84, 255], [253, 231, 36, 255], [0, 0, 0, 0]], (0.0, 1.0))
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    if limits is None:
        low, high = (
            (float(array[known].min()), float(array[known].max())) if known.any() else (0.0, 1.0)
        )
        if scale == "signed":
            high = max(abs(low), abs(high))
            low = -high
        limits = (low, high)
    low, high = limits
    # One value only has the colour of the middle, as in the pictures.
    at = (array - low) / (high - low) if high > low else np.full(array.shape, 0.5)
    # 256 equal steps, the last with its upper end: Matplotlib's rule.
    index = np.clip(np.where(known, at, 0.0) * 256, 0, 255)
    colors = scale_bytes(scale)[index.astype(int)]
    alpha = np.where(known, 255, 0).astype(np.uint8)[..., None]
    return np.concatenate([np.where(alpha > 0, colors, 0).astype(np.uint8), alpha], -1), limits


def scale_bytes(scale: Scale = "values") -> Bytes:
    """The 256 colours of a scale, (256, 3) uint8."""
    import matplotlib as mpl

    if scale not in get_args(Scale):
        raise ArgumentError(f"scale={scale!r}: expected one of {get_args(Scale)}.")
    rgb = mpl.colormaps[_MAPS[scale]](np.arange(256) / 255.0, bytes=True)
    return np.asarray(rgb[:, :3], dtype=np.uint8)


def point_colors(
    e: xr.Dataset, color: str | xr.DataArray | None = None
) -> tuple[Bytes, dict[str, Any]]:
    """Colours of the neurons of an embedding, as :func:`vitxr.plot.embedding` has them.

    Parameters
    ----------
    e
        Embedding of neurons.
    color
        As for :func:`vitxr.plot.embedding`.

    Returns
    -------
    tuple
        (neuron, 3) uint8, and the key: ``heading``, and for classes ``classes`` (name and
        colour of each), for numbers ``limits``, ``label`` and ``colors`` (of equal steps), for
        places on the patch grid ``grid`` (row, column, 3), the colour of each, and ``label``,
        which says it in words.

    Examples
    --------
    >>> e = xr.Dataset(coords={"feature_map": ("neuron", [5, 7, 5])})
    >>> colors, key = point_colors(e, "feature_map")
    >>> colors.tolist(), key["classes"]
    ([[0, 114, 178], [230, 159, 0], [0, 114, 178]], [('5', '#0072b2'), ('7', '#e69f00')])
    """
    look = coloring(e, "neuron", color)
    key: dict[str, Any] = {"heading": look.heading, "kind": look.kind}
    if look.kind == "class":
        hexes = categorical(len(look.groups))
        key["classes"] = [(str(g), h) for g, h in zip(look.groups, hexes, strict=True)]
        return _rgb(hexes)[look.values], key
    if look.kind == "place":
        key |= {"grid": look.grid, "label": said(look.grid)}
        return _rgb(look.values.tolist()), key
    scale: Scale = "signed" if look.cmap == SIGNED else "values"
    colors, limits = shades(look.values, look.clim, scale)
    key |= {"limits": limits, "label": look.label, "colors": _hexes(scale_bytes(scale)[::17])}
    return colors[:, :3], key


def _rgb(hexes: list[str]) -> Bytes:
    data = bytes.fromhex("".join(h.lstrip("#") for h in hexes))
    return np.frombuffer(data, np.uint8).reshape(-1, 3)


def _hexes(colors: Bytes) -> list[str]:
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colors.tolist()]


def screen_png(element: Any, *, dark: bool = False, dpi: int = 130) -> bytes:
    """Draw a picture for a screen as PNG: on the page's own ground, light or dark.

    What is grey or black (text, axes, ticks) becomes light on the dark ground; colours that
    stand for something stay as they are.

    Examples
    --------
    >>> from vitxr.plot import explained_variance
    >>> e = xr.Dataset({"explained_variance_ratio": ("pc", [0.6, 0.3])})
    >>> screen_png(explained_variance(e), dark=True, dpi=40)[1:4]
    b'PNG'
    """
    from io import BytesIO

    from vitxr.plot.output import figure

    drawn = figure(element)
    ground = "#1d2024" if dark else "#ffffff"
    if dark:
        _lighten(drawn, ground)
    buffer = BytesIO()
    drawn.savefig(
        buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.06, facecolor=ground
    )
    return buffer.getvalue()


def _lighten(figure: Any, ground: str) -> None:
    """Turn the greys of a figure over."""
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D
    from matplotlib.spines import Spine
    from matplotlib.text import Text

    def turned(color: Any) -> Any:
        r, g, b, a = to_rgba(color)
        grey = max(r, g, b) - min(r, g, b) < 0.08
        light = 0.92 - 0.6 * r
        return (light, light, light, a) if grey and r < 0.6 else color

    figure.patch.set(facecolor=ground, alpha=1.0)
    for artist in figure.findobj():
        if isinstance(artist, Axes):
            panes: Any = artist
            if to_rgba(artist.get_facecolor())[3] > 0:
                artist.set_facecolor(ground)
            if artist.name == "3d":
                for axis in (panes.xaxis, panes.yaxis, panes.zaxis):
                    axis.set_pane_color((0.2, 0.21, 0.23, 1.0))
        elif isinstance(artist, Text | Line2D):
            artist.set_color(turned(artist.get_color()))
        elif isinstance(artist, Spine):
            artist.set_edgecolor(turned(artist.get_edgecolor()))
