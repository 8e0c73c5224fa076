"""What a selection means: where it is on the patch grid, which images and shifts it answers."""

from __future__ import annotations

import numpy as np

from vitxr.app.gallery import Gallery
from vitxr.app.grid import Grid
from vitxr.app.selection import select
from vitxr.app.views.base import View

__all__ = ["Linked"]


class Linked(View):
    """Parts that show the selection, and choose by patch, image and shift.

    On the path of a brush nothing is read: the means are in memory, or their parts stay empty
    until they are.
    """

    def make_parts(self, tile: int = 72, tall: int = 300) -> None:
        """Make the patch grid, the lattice and the images."""
        self.patches = Grid(
            mode="box",
            title="On the patch grid",
            row_name="patch row",
            col_name="column",
            unit="neurons",
            most=320,
        )
        self.patches.chosen = self._box
        self.shifts = Grid(
            mode="cell", title="Across shifts", most=320, **self.source.lattice_names
        )
        self.shifts.chosen = lambda c: self.state.param.update(shift_y=c[0], shift_x=c[1])
        self.images = Gallery(self.app, title="Images", tile=tile, tall=tall)
        self.images.picked = lambda name: setattr(self.state, "image", name)
        self.shifts.visible = self.source.lattice != (1, 1)

    def _box(self, box: list[int]) -> None:
        how = {"rows": box[:2], "cols": box[2:]}
        self.app.join(select(self.state.neurons(), how))

    @property
    def mask(self) -> np.ndarray:
        """The neurons that are selected, all where none are."""
        chosen = self.state.selection
        if chosen is None:
            return np.ones(self.state.neurons().sizes["neuron"], bool)
        return np.asarray(chosen.mask)

    def show_linked(self) -> None:
        """Show the selection in all parts."""
        s = self.state
        e, chosen = s.neurons(), s.selection
        rows, cols = self.source.grid
        mask = self.mask
        place = e["patch_row"].values * cols + e["patch_col"].values
        counts = np.bincount(place[mask], minlength=rows * cols).reshape(rows, cols)
        what = "All neurons" if chosen is None else f"The {chosen.count:,} selected neurons"
        how = chosen.how if chosen is not None else {}
        box = [*how["rows"], *how["cols"]] if set(how) == {"rows", "cols"} else []
        self.patches.show(
            counts,
            limits=(0.0, float(counts.max()) or 1.0),
            about=f"{what}, counted over feature maps. Draw a box to select patches.",
            box=[int(v) for v in box],
        )
        self.images.chosen = s.image
        self.shifts.cell = [s.shift_y, s.shift_x]
        means = self.app.means()
        if means is None:
            return
        if not mask.any():
            self.images.show(np.full(len(self.source.images), np.nan), "No neuron is selected.")
            self.shifts.show(np.full(self.source.lattice, np.nan), about="No neuron is selected.")
            return
        by_image, by_shift = means.of(mask)
        self.images.show(by_image, f"Mean response of {self.who} over shifts. Choose one.")
        self.shifts.show(
            by_shift.reshape(self.source.lattice),
            "other",
            about=f"Mean response of {self.who} over images; a shift down a row, right a column. "
            "Choose one.",
            unit="mean response",
        )

    @property
    def who(self) -> str:
        """Whose responses are shown."""
        return "all neurons" if self.state.selection is None else "the selected neurons"
