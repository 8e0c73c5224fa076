"""The images as buttons, each with a bar: the component's side on the server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import panel as pn
import param

from vitxr.app.source import Source
from vitxr.errors import VitxrError

if TYPE_CHECKING:
    from vitxr.app.page import App

__all__ = ["Gallery"]

#: Images shown at most, and pixels of the longer side of one.
_MOST, _SIDE = 96, 64


class Gallery(pn.custom.JSComponent):
    """Thumbnails of the images, of which one is chosen, and a value for each."""

    names = param.List([])
    thumbs = param.Bytes(b"", doc="RGBA of every thumbnail.")
    size = param.List([1, 1], doc="Pixels of a thumbnail, down and across.")
    values = param.Bytes(b"", doc="A value an image, float32, or nothing.")
    chosen = param.String("", doc="Name of the image that is chosen.")
    title = param.String("Images")
    about = param.String("")
    tile = param.Integer(84, doc="Pixels of the screen a tile is wide, at least.")
    tall = param.Integer(0, doc="Pixels of the screen in height, then it scrolls; 0: as needed.")
    serial = param.Integer(0)

    _esm = Path(__file__).with_name("gallery.js")

    def __init__(self, app: App, **params: Any):
        params.setdefault("sizing_mode", "stretch_width")
        source = app.source
        self.positions = _few(len(source.images))
        names = [source.images[i] for i in self.positions]
        super().__init__(names=names, size=_size(source), **params)
        self.picked: Callable[[str], None] | None = None

        def made() -> bytes:
            return source.keep("thumbs", lambda: _thumbs(source, names, _size(source)))

        # Files are read beside the page: a hundred photographs take seconds.
        app.beside(
            "thumbs" + str(id(self)),
            lambda tell: made(),
            "reading images",
            lambda: setattr(self, "thumbs", made()),
        )

    def show(self, values: npt.NDArray[Any], about: str) -> None:
        """Show a value for each image of the source."""
        shown = np.asarray(values, dtype=np.float32)[self.positions]
        some = len(self.positions) < len(values)
        part = f" {len(self.positions)} of {len(values)} images." if some else ""
        self.param.update(values=shown.tobytes(), about=about + part, serial=self.serial + 1)

    def _handle_msg(self, data: Any) -> None:
        if self.picked is not None and data.get("name") in self.names:
            self.picked(data["name"])


def _few(count: int) -> list[int]:
    """Positions of the images that are shown: all, or as many as can be, evenly spaced."""
    if count <= _MOST:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, _MOST).round().astype(int)).tolist()


def _size(source: Source) -> list[int]:
    """Pixels of a thumbnail: the model's input, made small."""
    height = int(source.ds.attrs.get("input_height") or _SIDE)
    width = int(source.ds.attrs.get("input_width") or _SIDE)
    share = min(1.0, _SIDE / max(height, width))
    return [max(1, round(height * share)), max(1, round(width * share))]


def _thumbs(source: Source, names: list[str], size: list[int]) -> bytes:
    """Small pictures of the images; nothing where an image cannot be read."""
    from PIL import Image

    parts = []
    for name in names:
        rgba = np.zeros((*size, 4), np.uint8)
        # The view of the stimuli says which cannot be read, and why.
        with contextlib.suppress(VitxrError):
            picture = Image.fromarray(source.pixels(name)).convert("RGBA")
            rgba[:] = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
        parts.append(rgba.tobytes())
    return b"".join(parts)
