"""Attention: every matrix of a frame, and what the chosen patch attends to."""

from __future__ import annotations

from typing import Any

import numpy as np
import panel as pn

from vitxr.app.grid import Grid
from vitxr.app.pixels import at_offset
from vitxr.app.views.base import Picture, View, beside, prose
from vitxr.errors import VitxrError
from vitxr.plot._select import prefix_and_grid

__all__ = ["Attention"]


class Attention(View):
    """The query patch is chosen on the image, or by row and column."""

    key = "attention"
    title = "Attention"
    shows = ("layer", "image", "shift_y", "shift_x", "head", "query_row", "query_col", "theme")
    controls = ("layer", "image", "shift", "head", "query")

    def build(self) -> Any:
        """Make the parts."""
        self.note = prose("", visible=False)
        self.query = Grid(mode="cell", title="Query patch", most=340, row_name="patch row")
        self.query.chosen = lambda c: self.state.param.update(query_row=c[0], query_col=c[1])
        self.map = Grid(most=340, row_name="patch row", col_name="column", unit="attention weight")
        self.heads = Picture()
        self.matrices = Picture()
        return pn.Column(
            self.note,
            beside(self.query, self.map, least=240),
            self.heads,
            self.matrices,
            sizing_mode="stretch_width",
        )

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        from vitxr.plot import attention_matrices, attention_query

        s, source = self.state, self.source
        rows, cols = source.grid
        one = source.attention(s.layer, s.image, s.shift_y, s.shift_x)
        prefix, _ = prefix_and_grid(source.ds, one.sizes["key"], None)
        token = prefix + s.query_row * cols + s.query_col
        kept = one["query"].values if "query" in one.coords else np.arange(one.sizes["query"])
        found = np.flatnonzero(kept == token)
        self._show_query()
        where = f"patch ({s.query_row}, {s.query_col}), block {s.layer}, {s.image}"
        for part in (self.map, self.heads):
            part.visible = bool(found.size)
        if not found.size:
            self.note.param.update(
                object='<p class="bad">The store keeps the attention of some queries only, and '
                "not of this patch. Choose another.</p>",
                visible=True,
            )
        else:
            self.note.visible = False
            row = (
                one.isel(query=int(found[0])).sel(head=s.head)
                if "head" in one.coords
                else (one.isel(query=int(found[0]), head=0))
            )
            weights = np.asarray(row.values, dtype=np.float32)
            patches = weights[prefix:].reshape(rows, cols)
            self.map.show(
                patches,
                limits=(0.0, float(patches.max()) or 1.0),
                title=f"What it attends to, head {s.head}",
                about=f"{where}. {patches.sum():.0%} of the attention goes to patches, the rest to "
                f"{prefix} prefix token{'s' * (prefix != 1)}.",
            )
            query = (s.query_row, s.query_col)
            frame = one.expand_dims(layer=[s.layer])
            key = (s.layer, s.image, s.shift_y, s.shift_x)
            self.heads.show(
                self.app,
                ("heads", *key, *query),
                lambda: attention_query(frame, query, layer=s.layer, grid=source.grid),
                f"What {where} attends to, one panel a head.",
            )
        if one.sizes["query"] == one.sizes["key"] and changed - {"head", "query_row", "query_col"}:
            matrices = one.expand_dims(layer=[s.layer])
            self.matrices.show(
                self.app,
                ("matrices", s.layer, s.image, s.shift_y, s.shift_x),
                lambda: attention_matrices(
                    matrices, title=f"Attention matrices of {s.image} (query down, key across)"
                ),
                f"Attention matrices of block {s.layer} of {s.image}, one a head.",
            )

    def _show_query(self) -> None:
        s, source = self.state, self.source
        self.query.cell = [s.query_row, s.query_col]
        about = f"{s.image}. Choose the patch that attends."
        try:
            rgb = at_offset(source.pixels(s.image), source.offset(s.shift_y, s.shift_x))
        except VitxrError as error:
            self.query.show(np.full(source.grid, np.nan), about=f"{about} ({error})")
        else:
            self.query.picture(rgb, source.grid, about=about)
