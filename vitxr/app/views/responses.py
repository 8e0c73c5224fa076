"""Responses of the selected neurons: on the patch grid, by image, by shift, by feature map."""

from __future__ import annotations

from typing import Any

import numpy as np
import panel as pn

from vitxr.app.grid import Grid
from vitxr.app.views.base import beside, prose
from vitxr.app.views.linked import Linked

__all__ = ["Responses"]


class Responses(Linked):
    """What the selected neurons answer."""

    key = "responses"
    title = "Responses"
    shows = ("selection", "layer", "rank", "image", "shift_y", "shift_x", "means")

    @property
    def controls(self) -> tuple[str, ...]:  # type: ignore[override]
        """Without factors the neurons are those of the layer."""
        return ("rank", "selection") if self.source.has_factors else ("layer", "selection")

    def build(self) -> Any:
        """Make the parts."""
        self.make_parts(tile=96, tall=0)
        self.strength = Grid(
            title="How strongly",
            row_name="patch row",
            col_name="column",
            unit="mean response",
            most=320,
        )
        self.table = prose("")
        return pn.Column(
            beside(self.patches, self.strength, self.shifts, least=220),
            self.images,
            self.table,
            sizing_mode="stretch_width",
        )

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        self.show_linked()
        means = self.app.means()
        e, mask = self.state.neurons(), self.mask
        if means is None:
            return
        at = e["patch_row"].values[mask], e["patch_col"].values[mask]
        total, count = np.zeros(self.source.grid), np.zeros(self.source.grid)
        np.add.at(total, at, means.overall[mask])
        np.add.at(count, at, 1)
        mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        self.strength.show(
            mean,
            about=f"Mean response of {self.who} of each patch, over images and shifts.",
        )
        what = "Neurons" if self.state.selection is None else "Neurons selected"
        self.table.object = _by_map(e["feature_map"].values, mask, means.overall, what)


def _by_map(maps: np.ndarray, mask: np.ndarray, overall: np.ndarray, what: str) -> str:
    """Feature maps with the most selected neurons, as a table."""
    most = 24
    numbers, at = np.unique(maps, return_inverse=True)
    of = np.bincount(at, minlength=len(numbers))
    chosen = np.bincount(at[mask], minlength=len(numbers))
    total = np.bincount(at[mask], weights=overall[mask], minlength=len(numbers))
    order = np.argsort(-chosen, kind="stable")[:most]
    rows = "".join(
        f"<tr><td>{numbers[k]}</td><td>{chosen[k]:,} of {of[k]:,}</td>"
        f"<td>{total[k] / chosen[k]:.3g}</td></tr>"
        for k in order
        if chosen[k]
    )
    shown = int((chosen > 0).sum())
    part = f" ({most} of {shown}, those with the most)" if shown > most else ""
    return (
        f"<h3>By feature map{part}</h3><table><thead><tr><th>Feature map</th>"
        f"<th>{what}</th><th>Mean response</th></tr></thead><tbody>{rows}</tbody></table>"
    )
