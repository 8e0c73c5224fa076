"""From elements to files: PNG for the screen, PDF for the page."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from vitxr.errors import ArgumentError
from vitxr.plot._select import described
from vitxr.plot._style import holoviews

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
    """Draw an element into a file, in the format of its ending (png, pdf or svg).

    Raises
    ------
    ArgumentError
        If the element is none, the ending is none of these, or the folder is missing.
    """
    _check_element(element)
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"path is {path!r}; expected a name such as 'picture.pdf'.")
    path = Path(path)
    name = path.suffix.lstrip(".").lower()
    if name not in _FORMATS:
        raise ArgumentError(
            f"cannot tell the format of {str(path)!r}: end the name with .png, .pdf or .svg."
        )
    if not path.parent.is_dir():
        raise ArgumentError(
            f"the folder of {str(path)!r} does not exist: make {str(path.parent)!r} first, or "
            "choose another path."
        )
    content = render(element, (name,), dpi=dpi)[name]
    path.write_bytes(content)
    return path
