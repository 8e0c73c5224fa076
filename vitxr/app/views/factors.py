"""Factors of a fit, and how fits of other ranks compare."""

from __future__ import annotations

import html
from typing import Any

import panel as pn

from vitxr.app.views.base import Picture, View, beside, prose

__all__ = ["Factors", "Rank"]


class Factors(View):
    """A row a component: neurons, images, shifts."""

    key = "factors"
    title = "Factors"
    shows = ("rank", "theme")
    controls = ("rank",)

    def build(self) -> Any:
        """Make the parts."""
        self.about = prose("")
        self.rows, self.shifts = Picture(), Picture()
        return pn.Column(self.about, self.rows, self.shifts, sizing_mode="stretch_width")

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        from vitxr.plot import factor_curves, factors

        rank = self.state.rank or None
        f = self.source.factors(rank)
        count = f.sizes["component"]
        self.about.object = (
            f"<p>{count} components of block {self.source.factor_layer}: relative residual "
            f"{float(f['objective']):.3f}, {html.escape(str(f.attrs.get('method', '')))}.</p>"
        )
        self.rows.show(
            self.app,
            ("factors", rank),
            lambda: factors(f),
            f"Factors of {count} components: neurons as maps, images as bars, shifts as maps.",
        )
        if "shift_factor" in f:
            self.shifts.show(
                self.app,
                ("curves", rank),
                lambda: factor_curves(f, "shift"),
                f"Shift factor of {count} components as curves over the lattice.",
                most=720,
            )


class Rank(View):
    """Residual and agreement of the replicates at every rank."""

    key = "rank"
    title = "Rank"
    shows = ("theme",)

    def build(self) -> Any:
        """Make the parts."""
        self.fit, self.agreement = Picture(), Picture()
        self.about = prose(
            '<p class="soft">Choose a rank where the residual flattens and replicates still '
            "agree; the views of factors and of the embedding take the best replicate of the rank "
            "that is chosen there.</p>"
        )
        return pn.Column(
            beside(self.fit, self.agreement, least=300), self.about, sizing_mode="stretch_width"
        )

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        from vitxr.plot import objective_by_rank, similarity_by_rank

        tree = self.source.ensemble
        assert tree is not None
        ranks = ", ".join(map(str, self.source.ranks))
        self.fit.show(
            self.app,
            "objective",
            lambda: objective_by_rank(tree),
            f"Relative residual of every replicate at ranks {ranks}.",
            most=520,
        )
        several = tree.sizes.get("replicate", 1) > 1
        self.agreement.visible = several
        if several:
            self.agreement.show(
                self.app,
                "similarity",
                lambda: similarity_by_rank(tree),
                f"Similarity of the replicates to the best one at ranks {ranks}.",
                most=520,
            )
