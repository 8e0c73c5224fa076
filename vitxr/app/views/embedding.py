"""The manifold of the neurons: lassoed, and lit up from the patch grid."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import panel as pn

from vitxr.app.points import Points
from vitxr.app.selection import select
from vitxr.app.views.base import beside, prose
from vitxr.app.views.linked import Linked
from vitxr.plot.screen import point_colors

__all__ = ["Embedding"]


class Embedding(Linked):
    """Neurons over two or three axes, linked to patches, images and shifts."""

    key = "embedding"
    title = "Embedding"
    shows = (
        *("selection", "rank", "color", "axes", "theme"),
        *("image", "shift_y", "shift_x", "means"),
    )
    controls = ("rank", "color", "selection")

    def build(self) -> Any:
        """Make the parts."""
        self.make_parts()
        self.points = Points(height=560, sizing_mode="stretch_width")
        self.points.lassoed = self._lasso
        self.legend = prose("")
        left = pn.Column(self.points, self.legend, sizing_mode="stretch_width")
        right = pn.Column(self.patches, self.shifts, sizing_mode="stretch_width")
        self.images.tall = 220
        return pn.Column(
            beside(left, right, least=280, shares=(2, 1)), self.images, sizing_mode="stretch_width"
        )

    def _lasso(self, data: dict[str, Any]) -> None:
        pcs = list(range(1, self.state.axes + 1))
        how = {"polygon": data["polygon"], "camera": data["camera"], "pcs": pcs}
        self.app.join(select(self.state.neurons(), how))

    @property
    def _mask(self) -> np.ndarray:
        chosen = self.state.selection
        if chosen is None:
            return np.zeros(self.state.neurons().sizes["neuron"], bool)
        return np.asarray(chosen.mask)

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        s = self.state
        e = s.neurons()
        if changed & {"axes", "rank"}:
            how = s.selection.how if s.selection is not None else {}
            known = how.get("polygon"), how.get("camera", [])
            fits = bool(known[0]) and len(known[1][0]) == s.axes + 1
            self.points.param.update(
                polygon=known[0] if fits else [], polygon_camera=known[1] if fits else []
            )
            axes = e["score"].transpose("neuron", "pc").values[:, : s.axes].astype(np.float32)
            self.points.place(axes)
            share = ""
            if "explained_variance_ratio" in e:
                ratio = e["explained_variance_ratio"].values[: s.axes]
                share = ", with " + ", ".join(f"{v:.0%}" for v in ratio) + " of the variance"
            self.points.label = (
                f"Embedding of {e.sizes['neuron']:,} neurons of block "
                f"{self.source.factor_layer} over {s.axes} principal axes{share}"
            )
        if changed & {"color", "rank"}:
            colors, key = point_colors(e, s.color)
            self.points.colors = colors.tobytes()
            self._key = key
        elif "selection" in changed:
            self.points.param.update(polygon=[], polygon_camera=[])  # the address's is no more
        if changed & {"selection", "rank", "axes"}:
            self.points.show(self._mask)
        self.points.dark = s.theme == "dark"
        if changed & {"color", "rank", "axes"}:
            self.legend.object = f'<p class="soft">{self.points.label}.</p>' + _legend(self._key)
        if changed - {"color", "axes", "theme"}:
            self.show_linked()


def _legend(key: dict[str, Any]) -> str:
    """The key of the colours as HTML."""
    head = f'<b style="font-size:13px">{html.escape(key["heading"])}</b> '
    if "classes" in key:
        dots = "".join(_dot(name, color) for name, color in key["classes"][:64])
        more = len(key["classes"]) - 64
        return head + dots + (f'<span class="soft">and {more} more</span>' if more > 0 else "")
    if "corners" in key:
        a, b, c, d = key["corners"]
        cell = "display:inline-block;width:14px;height:14px;background:"
        words = ("top left", "top right", "bottom left", "bottom right")
        return head + " ".join(
            f'<span style="{cell}{x}" aria-hidden="true"></span> '
            f'<span style="font-size:12px">{w}</span>'
            for x, w in zip((a, b, c, d), words, strict=True)
        )
    low, high = key["limits"]
    return head + (
        f'<span style="font-size:12px">{low:.3g} <span aria-hidden="true" style="display:'
        f"inline-block;width:120px;height:9px;background:linear-gradient(to right,"
        f'{",".join(key["colors"])})"></span> {high:.3g}, {html.escape(key["label"])}</span>'
    )


def _dot(name: str, color: str) -> str:
    """A class of the key; lighter on a dark page, as the points are."""
    shade = f"color-mix(in srgb, white var(--vx-lift), {color})"
    return (
        '<span style="display:inline-block;margin:0 10px 2px 0;font-size:12px">'
        f'<span aria-hidden="true" style="color:{shade}">&#9679;</span> {html.escape(name)}</span>'
    )
