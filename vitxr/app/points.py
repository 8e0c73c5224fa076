"""Points drawn with WebGL in the browser: the component's side on the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import panel as pn
import param

__all__ = ["Points"]


class Points(pn.custom.JSComponent):
    """Many points in 2-D or 3-D that are turned, zoomed and lassoed in the browser.

    A lasso sends the polygon and the camera; :meth:`show` sends the mask back as bits.
    """

    positions = param.Bytes(b"", doc="Places, float32 (n, 3); the third is 0 in 2-D.")
    colors = param.Bytes(b"", doc="Colours, uint8 (n, 3).")
    mask = param.Bytes(b"", doc="Bits of the mask, the first neuron in the lowest.")
    serial = param.Integer(0, doc="Number of the mask: it changes after the mask has.")
    axes = param.Integer(2, bounds=(2, 3), doc="Axes that are shown.")
    outline = param.List([], doc="Polygon and camera of the lasso that is selected, or nothing.")
    label = param.String("Embedding", doc="What is shown, for screen readers.")
    dark = param.Boolean(False)

    _esm = Path(__file__).with_name("points.js")

    def __init__(self, **params: Any):
        super().__init__(**params)
        self.lassoed: Callable[[dict[str, Any]], None] | None = None

    def place(self, points: npt.NDArray[np.float32]) -> None:
        """Put the points somewhere else; the camera shows them all."""
        full = np.zeros((len(points), 3), np.float32)
        full[:, : points.shape[1]] = points
        self.param.update(axes=points.shape[1], positions=full.tobytes())

    def show(self, mask: npt.NDArray[np.bool_]) -> None:
        """Say which points are selected."""
        bits = np.packbits(mask, bitorder="little").tobytes()
        self.param.update(mask=bits, serial=self.serial + 1)

    def _handle_msg(self, data: Any) -> None:
        if self.lassoed is not None:
            self.lassoed(data)
