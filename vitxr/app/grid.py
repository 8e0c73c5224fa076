"""A picture made of cells, in the browser: the component's side on the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import panel as pn
import param

from vitxr.plot.screen import Scale, scale_bytes, shades

__all__ = ["Grid"]


class Grid(pn.custom.JSComponent):
    """Cells in colours of :mod:`vitxr.plot`, one or a box of which can be chosen.

    By pointer, or by arrow keys and Enter. What is under the pointer is written below.
    """

    pixels = param.Bytes(b"", doc="RGBA, uint8 (height, width, 4).")
    values = param.Bytes(b"", doc="Value of each cell, float32 (rows, cols), or nothing.")
    scale = param.Bytes(b"", doc="Colours of the key, uint8 (256, 3), or nothing.")
    limits = param.List([0.0, 1.0], doc="Values at the ends of the key.")
    shape = param.List([1, 1], doc="Pixels, down and across.")
    rows = param.Integer(1)
    cols = param.Integer(1)
    cell = param.List([], doc="The cell that is chosen: row and column.")
    box = param.List([], doc="First and last row and column that are chosen.")
    mode = param.Selector(default="none", objects=["none", "cell", "box"])
    title = param.String("")
    about = param.String("")
    unit = param.String("", doc="Of the values.")
    key_unit = param.String("", doc="Of the key, where that is another.")
    row_name = param.String("row")
    col_name = param.String("column")
    row_labels = param.List([])
    col_labels = param.List([])
    most = param.Integer(360, doc="Pixels of the screen across, at most.")
    serial = param.Integer(0, doc="Number of the picture: it changes after the picture has.")

    _esm = Path(__file__).with_name("grid.js")

    def __init__(self, **params: Any):
        params.setdefault("sizing_mode", "stretch_width")
        super().__init__(**params)
        self.chosen: Callable[[list[int]], None] | None = None

    def show(
        self,
        values: npt.NDArray[Any],
        scale: Scale = "values",
        limits: tuple[float, float] | None = None,
        **params: Any,
    ) -> None:
        """Show one value a cell."""
        colors, limits = shades(values, limits, scale)
        rows, cols = values.shape
        self.param.update(
            pixels=colors.tobytes(),
            shape=[rows, cols],
            rows=rows,
            cols=cols,
            values=np.ascontiguousarray(values, dtype=np.float32).tobytes(),
            scale=scale_bytes(scale).tobytes(),
            limits=list(limits),
            **params,
            serial=self.serial + 1,
        )

    def picture(
        self, rgb: npt.NDArray[np.uint8], cells: Sequence[int] = (1, 1), **params: Any
    ) -> None:
        """Show an image, divided into cells."""
        alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
        self.param.update(
            pixels=np.concatenate([rgb, alpha], axis=2).tobytes(),
            shape=list(rgb.shape[:2]),
            rows=cells[0],
            cols=cells[1],
            values=b"",
            scale=b"",
            **params,
            serial=self.serial + 1,
        )

    def _handle_msg(self, data: Any) -> None:
        if self.chosen is not None:
            self.chosen([int(v) for v in data.get("cell", data.get("box", []))])
