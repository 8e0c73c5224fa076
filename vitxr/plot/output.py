"""From elements to files: PNG for the screen, PDF for the page, HTML to look into."""

from __future__ import annotations

import base64
import html
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from vitxr.errors import ArgumentError
from vitxr.plot._select import described
from vitxr.plot._style import holoviews
from vitxr.plot.movie import Movie

__all__ = ["figure", "render", "save"]

_FORMATS = ("png", "pdf", "svg")


def figure(element: Any) -> Any:
    """Draw an element of this room with Matplotlib and return the ``Figure``.

    The figure does not belong to pyplot: nothing is shown, and nothing has to be
    closed.
    """
    hv = holoviews()
    return hv.Store.renderers["matplotlib"].get_plot(element).state


def render(
    element: Any, formats: tuple[str, ...] = ("png",), *, dpi: int = 200
) -> dict[str, bytes]:
    r"""Draw an element once and encode it in each of the formats.

    Parameters
    ----------
    element
        What a function of this room returned.
    formats
        Of ``"png"``, ``"pdf"`` and ``"svg"``.
    dpi
        Pixels per inch of a PNG.

    Returns
    -------
    dict of str to bytes
        The encoded picture by format. No date and no host name is in it: the
        same element gives the same bytes.

    Examples
    --------
    >>> import xarray as xr
    >>> e = xr.Dataset({"explained_variance_ratio": ("pc", [0.6, 0.3])})
    >>> from vitxr.plot import explained_variance
    >>> render(explained_variance(e), dpi=50)["png"][:4]
    b'\x89PNG'
    """
    unknown = [f for f in formats if f not in _FORMATS]
    if unknown:
        raise ArgumentError(f"formats={formats!r}: expected any of {', '.join(_FORMATS)}.")
    import matplotlib as mpl

    _check_element(element)
    drawn = figure(element)
    undated: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    out = {}
    # Type 42 fonts: text in the PDF stays text, as journals ask
    with mpl.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "vitxr", "svg.fonttype": "none"}):
        for name in formats:
            buffer = BytesIO()
            drawn.savefig(
                buffer,
                format=name,
                dpi=dpi,
                bbox_inches="tight",
                pad_inches=0.05,
                facecolor="white",
                metadata=undated.get(name, {"Software": None}),
            )
            out[name] = buffer.getvalue()
    return out


def _check_element(element: Any) -> None:
    if not isinstance(element, holoviews().core.Dimensioned):
        raise ArgumentError(
            f"the element is {'None' if element is None else described(element)}; expected what "
            "a function of vitxr.plot returns, such as vitxr.plot.factors(f)."
        )


def save(element: Any, path: str | Path, *, dpi: int = 200) -> Path:
    """Draw an element into a file, in the format of its ending (png, pdf, svg or html).

    A page (html) is drawn with Bokeh: it can be zoomed into and tells values on hovering. All that
    it needs is in it, so that it opens without a network. What has three axes is a still
    picture there as well. A movie is a page only.

    Raises
    ------
    ArgumentError
        If the element is none, the ending is none of these, or the folder is missing.
    """
    if not isinstance(element, Movie):
        _check_element(element)
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"path is {path!r}; expected a name such as 'picture.pdf'.")
    path = Path(path)
    name = path.suffix.lstrip(".").lower()
    if name not in (*_FORMATS, "html"):
        raise ArgumentError(
            f"cannot tell the format of {str(path)!r}: end the name with .png, .pdf, .svg or .html."
        )
    if isinstance(element, Movie) and name != "html":
        raise ArgumentError(
            f"a movie cannot be written to {str(path)!r}: end the name with .html, or draw its "
            "frames side by side with vitxr.plot.filmstrip."
        )
    if not path.parent.is_dir():
        raise ArgumentError(
            f"the folder of {str(path)!r} does not exist: make {str(path.parent)!r} first, or "
            "choose another path."
        )
    if name == "html":
        page = element.html if isinstance(element, Movie) else _page(element, dpi)
        path.write_text(page, encoding="utf-8")
    else:
        content = render(element, (name,), dpi=dpi)[name]
        path.write_bytes(content)
    return path


def _page(element: Any, dpi: int) -> str:
    """One page with Bokeh's own scripts in it, or with a still picture."""
    hv = holoviews()
    title = str(element.opts.get("plot", backend="matplotlib").kwargs.get("title", "")) or "vitxr"
    if element.traverse(lambda x: x, ["Scatter3D"]):  # of which Bokeh has none
        png = base64.b64encode(render(element, ("png",), dpi=dpi)["png"]).decode("ascii")
        said = html.escape(title)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{said}</title>'
            f'</head><body><img style="max-width:100%" alt="{said}" '
            f'src="data:image/png;base64,{png}"></body></html>\n'
        )
    from bokeh.embed import components
    from bokeh.models import Plot
    from bokeh.resources import Resources

    drawn = hv.Store.renderers["bokeh"].get_plot(element).state
    for plot in drawn.select({"type": Plot}):
        plot.sizing_mode = None  # the frame has a size, which is enough
    # Not Bokeh's own page: that asks for the scripts of any extension that is loaded, as Panel's.
    script, division = components(drawn)
    raw = Resources(mode="inline", components=["bokeh"]).js_raw
    scripts = "".join(f'<script type="text/javascript">{one}</script>' for one in raw)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title>{scripts}</head><body>{division}{script}</body></html>\n"
    )
