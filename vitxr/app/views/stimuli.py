"""The images, and the one that is chosen under the shift that is chosen."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import panel as pn

from vitxr.app.gallery import Gallery
from vitxr.app.grid import Grid
from vitxr.app.pixels import at_offset
from vitxr.app.views.base import View, beside, prose
from vitxr.errors import VitxrError

__all__ = ["Stimuli"]


class Stimuli(View):
    """Images, their shifts."""

    key = "stimuli"
    title = "Stimuli"
    shows = ("image", "shift_y", "shift_x")
    controls = ("image", "shift")

    def build(self) -> Any:
        """Make the parts."""
        self.note = prose("", visible=False)
        self.plain = Grid(title="As the model takes it", most=340)
        self.shifted = Grid(title="Shifted", most=340)
        self.lattice = Grid(
            title="Lattice of shifts",
            about="Distance of the shift from none, in pixels (circular). Choose one.",
            mode="cell",
            unit="px",
            most=260,
            **self.source.lattice_names,
        )
        self.lattice.chosen = self._shift
        self.gallery = Gallery(self.app, title="Images", about="Choose one.")
        self.gallery.picked = lambda name: setattr(self.state, "image", name)
        parts = [self.plain]
        if self.source.lattice != (1, 1):
            parts += [self.shifted, self.lattice]
            self._show_lattice()
        return pn.Column(
            self.note, beside(*parts, least=220), self.gallery, sizing_mode="stretch_width"
        )

    def _shift(self, cell: list[int]) -> None:
        self.state.param.update(shift_y=cell[0], shift_x=cell[1])

    def _show_lattice(self) -> None:
        offsets = np.moveaxis(self.source.offsets, 0, -1).astype(float)
        size = np.array(
            [self.source.ds.attrs.get(n) or np.inf for n in ("input_height", "input_width")]
        )
        far = np.hypot(*np.moveaxis(np.minimum(offsets, abs(size - offsets)), -1, 0))
        self.lattice.show(far, "other")

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        s = self.state
        self.gallery.chosen = s.image
        self.lattice.cell = [s.shift_y, s.shift_x]
        try:
            rgb = self.source.pixels(s.image)
        except VitxrError as error:
            said = html.escape(str(error))
            self.note.param.update(object=f'<p class="bad">{said}</p>', visible=True)
            self.plain.visible = self.shifted.visible = False
            return
        self.note.visible = False
        self.plain.visible = self.shifted.visible = True
        size = f"{rgb.shape[0]} x {rgb.shape[1]} px"
        label = self.source.label(s.image)
        self.plain.picture(rgb, about=f"{s.image}{label}, {size}.")
        dy, dx = self.source.offset(s.shift_y, s.shift_x)
        self.shifted.picture(
            at_offset(rgb, (dy, dx)),
            about=f"{dy} px down and {dx} px to the right; what leaves on one side enters on "
            "the other.",
        )
