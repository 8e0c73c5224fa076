"""The look of every picture: palettes, colour maps, sizes, options for both backends.

Nothing here runs at import. HoloViews is loaded by :func:`holoviews`, together
with the option tables of Matplotlib and Bokeh, so that an element carries its
looks to either; the backend in use is left as it was.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from vitxr.errors import DependencyError

__all__ = [
    "MARKERS",
    "OTHER_VALUES",
    "SIGNED",
    "SMALL",
    "TEXT",
    "TITLE",
    "VALUES",
    "WIDTH",
    "bar",
    "beside",
    "categorical",
    "curve_axes",
    "cyclic",
    "data_uri",
    "holoviews",
    "shorten",
    "styled",
]

#: Nonnegative quantities: perceptually uniform, monotone in lightness.
VALUES = "viridis"
#: A second sequential map, for a quantity that stands beside one drawn with VALUES.
OTHER_VALUES = "cividis"
#: Signed quantities, always drawn with zero in the middle.
SIGNED = "RdBu_r"
#: Width of a picture in inches: a full page of a journal.
WIDTH = 7.2
#: Point sizes, so that text stays legible when the picture is printed at WIDTH.
TEXT, SMALL, TITLE = 7.0, 6.0, 8.5
#: Matplotlib markers and their Bokeh names; one a round of the palette's eight hues.
MARKERS = (
    ("o", "circle"),
    ("^", "triangle"),
    ("s", "square"),
    ("D", "diamond"),
    ("v", "inverted_triangle"),
)
#: Pixels per inch of a Bokeh picture.
SCREEN = 110.0

# Okabe and Ito's hues, black as dark grey; a darker yellow would be their orange to red-green
# blind eyes. Then the same hues darker and lighter. With MARKERS, a class is told by hue and shape.
_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#3a3a3a")


def holoviews() -> Any:
    """Load HoloViews with the option tables of both backends, and return the module.

    Raises
    ------
    DependencyError
        If HoloViews or Matplotlib is not installed.
    """
    try:
        import holoviews as hv

        backend = hv.Store.current_backend
        import holoviews.plotting.bokeh
        import holoviews.plotting.mpl
    except ImportError as error:
        raise DependencyError(
            f"pictures need HoloViews and Matplotlib, and {error.name!r} is missing: "
            "install them with `pip install 'vitxr[plot]'`."
        ) from error
    if hv.Store.current_backend != backend:  # costs a tenth of a second
        hv.Store.set_current_backend(backend)
    return hv


def categorical(n: int) -> list[str]:
    """Colours for ``n`` classes as hex strings: eight hues, then darker, then lighter.

    The first eight are told apart with any common colour vision. Beyond them the
    lightness changes; the pictures change the marker as well, so that no class
    is told by colour alone.

    Examples
    --------
    >>> categorical(2)
    ['#0072b2', '#e69f00']
    >>> len(set(categorical(24)))
    24
    """
    colors = []
    for i in range(n):
        hue = np.array([int(_HUES[i % 8][k : k + 2], 16) for k in (1, 3, 5)], dtype=float)
        # rounds: as is, then alternately towards black and white, less each time
        turn, power = (i // 8 + 1) // 2, (i // 8) % 2
        share = 0.0 if i < 8 else 0.45 / turn
        target = 0.0 if power else 255.0
        r, g, b = np.rint(hue + share * (target - hue)).astype(int)
        colors.append(f"#{r:02x}{g:02x}{b:02x}")
    return colors


def cyclic() -> list[str]:
    """Colours for circular quantities: the last is next to the first, none is near white."""
    import colorcet  # comes with HoloViews

    return list(colorcet.palette["cyclic_mrybm_35_75_c68"])


def data_uri(pixels: np.ndarray) -> str:
    """Pixels (row, col, 3 or 4), uint8, as a PNG that a page holds in itself."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def shorten(text: str, limit: int) -> str:
    """Cut text to so many characters, the last being an ellipsis."""
    return text if len(text) <= limit else text[: max(1, limit - 1)] + "…"


def styled(
    element: Any,
    *,
    both: dict[str, Any] | None = None,
    mpl: dict[str, Any] | None = None,
    bokeh: dict[str, Any] | None = None,
) -> Any:
    """Give a HoloViews element its options for both backends."""
    both = both or {}
    element = element.opts(**both, **(mpl or {}), backend="matplotlib", clone=True)
    return element.opts(**both, **(bokeh or {}), backend="bokeh", clone=False)


def bar(
    label: str,
    box: tuple[float, float, float, float],
    ticks: Sequence[float] | None = None,
    ticklabels: Sequence[str] | None = None,
    horizontal: bool = False,
) -> Callable[[Any, Any], None]:
    """Matplotlib hook: a colour bar for the image it is attached to.

    ``box`` is (x, y, width, height) in data coordinates of an axis whose y runs
    downwards, y being the upper edge. HoloViews runs hooks more than once on an
    overlaid element, so the bar is drawn only if it is not there yet.
    """

    def hook(plot: Any, element: Any) -> None:
        axis, artist = plot.handles["axis"], plot.handles["artist"]
        name = f"bar:{label}:{box}"
        if any(child.get_label() == name for child in axis.child_axes):
            return
        x, y, width, height = box
        inset = axis.inset_axes((x, y, width, height), transform=axis.transData, label=name)
        colorbar = axis.figure.colorbar(
            artist, cax=inset, orientation="horizontal" if horizontal else "vertical"
        )
        colorbar.outline.set_visible(False)
        if ticks is not None:
            colorbar.set_ticks(list(ticks), labels=ticklabels)
        colorbar.minorticks_off()
        inset.tick_params(labelsize=SMALL, length=2, width=0.5, pad=1.5)
        colorbar.set_label(label, fontsize=TEXT, labelpad=3)

    return hook


def beside(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that leave the outermost points whole."""
    low, high = float(np.min(values)), float(np.max(values))
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _open_frame(plot: Any, element: Any) -> None:
    """Matplotlib hook: only the left and lower spines, thin."""
    axis = plot.handles["axis"]
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_linewidth(0.6)
    axis.tick_params(width=0.6, length=2.5)
    legend = axis.get_legend()
    if legend is not None:
        legend.set_frame_on(False)
        legend.set_title(legend.get_title().get_text().replace("_", " ").capitalize())


def curve_axes(
    element: Any, *, title: str, size: tuple[float, float] = (3.4, 2.4), **both: Any
) -> Any:
    """Give a picture with ordinary axes its size, title and fonts."""
    fonts = {"title": TITLE, "labels": TEXT + 0.5, "ticks": TEXT, "legend": SMALL + 0.5}
    width, height = size
    return styled(
        element,
        both={"title": title, **both},
        mpl={
            "fig_inches": size,
            "aspect": width / height,
            "fig_bounds": (0, 0, 1, 1),
            "fontsize": {**fonts, "legend_title": SMALL + 0.5},
            "hooks": [_open_frame],
        },
        bokeh={"frame_width": round(width * SCREEN), "frame_height": round(height * SCREEN)},
    )
