"""The manifold of the neurons: lassoed, and lit up from the patch grid."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import panel as pn
import xarray as xr

from vitxr.app.points import Points
from vitxr.app.selection import select
from vitxr.app.views.base import beside, prose
from vitxr.app.views.linked import Linked
from vitxr.errors import VitxrError
from vitxr.plot.screen import data_uri, point_colors

__all__ = ["Embedding"]


class Embedding(Linked):
    """Neurons over two or three axes, linked to patches, images and shifts."""

    key = "embedding"
    title = "Embedding"
    shows = (
        *("selection", "rank", "color", "clusters", "component", "axes", "theme"),
        *("image", "shift_y", "shift_x", "means"),
    )
    controls = ("rank", "color", "selection")

    def build(self) -> Any:
        """Make the parts."""
        self.make_parts()
        self.points = Points(height=560, sizing_mode="stretch_width")
        self.points.lassoed = self._lasso
        self._drawn: list[Any] = []
        self.legend = prose("")
        left = pn.Column(self.points, self.legend, sizing_mode="stretch_width")
        right = pn.Column(self.patches, self.shifts, sizing_mode="stretch_width")
        self.images.tall = 220
        return pn.Column(
            beside(left, right, least=280, shares=(2, 1)), self.images, sizing_mode="stretch_width"
        )

    def _lasso(self, data: dict[str, Any]) -> None:
        # The axes are those of its camera: others may be shown by the time that it arrives.
        pcs = list(range(1, len(data["camera"][0])))
        how = {"polygon": data["polygon"], "camera": data["camera"], "pcs": pcs}
        try:
            chosen = select(self.state.neurons(), how)
        except VitxrError as error:
            self.points.show(self._mask)
            self.app.tell(error)
            return
        # It stays in sight, joined with others or not, until something else is selected.
        self._drawn = [data["polygon"], data["camera"]]
        self.app.join(chosen)
        self._drawn = []

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
            fits = "polygon" in how and len(how["camera"][0]) == s.axes + 1
            self.points.outline = [how["polygon"], how["camera"]] if fits else []
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
        elif "selection" in changed:
            self.points.outline = self._drawn
        if changed & {"color", "rank", "clusters", "component"}:
            self._paint(e)
        if changed & {"selection", "rank", "axes"}:
            self.points.show(self._mask)
        self.points.dark = s.theme == "dark"
        if changed & {"color", "rank", "clusters", "component", "axes"}:
            self.legend.object = f'<p class="soft">{self.points.label}.</p>' + _legend(self._key)
        if changed - {"color", "clusters", "component", "axes", "theme"}:
            self.show_linked()

    def _paint(self, e: xr.Dataset) -> None:
        """Colour the points, grey where what colours them is not there."""
        s = self.state
        found: xr.Dataset | None = e
        by: str | xr.DataArray = s.color
        if s.color == "cluster":
            found = self.app.clusters()
        elif s.color == "loading":
            by = self.source.factors(s.rank or None)["neuron_factor"].isel(component=s.component)
        if found is None:
            colors = np.full((e.sizes["neuron"], 3), 0x8C, np.uint8)
            self._key = {"heading": "By cluster"}
        else:
            colors, self._key = point_colors(found, by)
        self.points.colors = colors.tobytes()


def _legend(key: dict[str, Any]) -> str:
    """The key of the colours as HTML."""
    head = f'<b style="font-size:13px">{html.escape(key["heading"])}</b> '
    if "classes" in key:
        dots = "".join(_dot(name, color) for name, color in key["classes"][:64])
        more = len(key["classes"]) - 64
        return head + dots + (f'<span class="soft">and {more} more</span>' if more > 0 else "")
    if "grid" in key:
        return head + _places(key["grid"], key["label"])
    if "limits" not in key:
        return head
    low, high = key["limits"]
    stops = ",".join(map(_lifted, key["colors"]))
    said = "" if key["label"].lower() in head.lower() else f", {html.escape(key['label'])}"
    return head + (
        f'<span style="font-size:12px">{low:.3g} <span aria-hidden="true" style="display:'
        f"inline-block;width:120px;height:9px;background:linear-gradient(to right,{stops})"
        f'"></span> {high:.3g}{said}</span>'
    )


def _lifted(color: str) -> str:
    """A colour of the key, lighter on a dark page, as the points are."""
    return f"color-mix(in srgb, white var(--vx-lift), {color})"


def _dot(name: str, color: str) -> str:
    """A class of the key."""
    return (
        '<span style="display:inline-block;margin:0 10px 2px 0;font-size:12px">'
        f'<span aria-hidden="true" style="color:{_lifted(color)}">&#9679;</span> '
        f"{html.escape(name)}</span>"
    )


def _places(grid: np.ndarray, label: str) -> str:
    """The patch grid in the colours of its places."""
    rows, cols = grid.shape[:2]
    size = f"width:{72 * cols / max(rows, cols):.0f}px;height:{72 * rows / max(rows, cols):.0f}px"
    return (
        '<span style="display:inline-flex;gap:8px;align-items:center;font-size:12px;'
        'vertical-align:middle"><span style="display:inline-block;background:#fff">'
        f'<img alt="{html.escape(label)}" src="{data_uri(grid)}" '
        f'style="display:block;{size};image-rendering:pixelated;'
        'opacity:calc(100% - var(--vx-lift))"></span>patch row downwards,<br>'
        "patch column to the right</span>"
    )
