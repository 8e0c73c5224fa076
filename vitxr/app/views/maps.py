"""Feature maps of one frame as a mosaic, and one of them across blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import panel as pn

from vitxr.app.grid import Grid
from vitxr.app.views.base import Picture, View, beside

__all__ = ["FeatureMaps"]


class FeatureMaps(View):
    """All maps of a block, one chosen."""

    key = "maps"
    title = "Feature maps"
    shows = ("layer", "image", "shift_y", "shift_x", "feature_map", "theme")
    controls = ("layer", "image", "shift", "feature_map")

    def build(self) -> Any:
        """Make the parts."""
        self.mosaic = Grid(mode="cell", most=760, unit="mean")
        self.mosaic.chosen = self._choose
        self.one = Grid(most=340)
        self.across = Picture()
        return pn.Column(
            beside(self.mosaic, self.one, least=260, shares=(2, 1)),
            self.across,
            sizing_mode="stretch_width",
        )

    @property
    def _columns(self) -> int:
        return math.ceil(math.sqrt(len(self.source.feature_maps) * 1.5))

    def _choose(self, cell: list[int]) -> None:
        at = cell[0] * self._columns + cell[1]
        if at < len(self.source.feature_maps):
            self.state.feature_map = self.source.feature_maps[at]

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        from vitxr.plot import feature_map_layers

        s, source = self.state, self.source
        frame = source.frame(s.layer, s.image, s.shift_y, s.shift_x)
        dy, dx = source.offset(s.shift_y, s.shift_x)
        at = source.feature_maps.index(s.feature_map)
        where = f"block {s.layer}, {s.image}, shifted by ({dy}, {dx}) px"
        if changed - {"feature_map", "theme"}:
            self._show_mosaic(frame.values, where)
        self.mosaic.cell = list(divmod(at, self._columns))
        channel = source.channel(s.layer, s.feature_map)
        self.one.show(
            frame.values[at],
            "signed",
            title=f"Channel {channel}",
            about=f"Activation on the patch grid: {where}.",
            row_name="patch row",
            unit="activation",
            col_name="column",
        )
        if not (changed - {"shift_y", "shift_x", "layer"}):
            return
        if "channel" in source.ds.coords or len(source.layers) < 2:
            self.across.visible = False
            return
        images = [s.image]
        self.across.show(
            self.app,
            ("across", s.feature_map, s.image),
            lambda: feature_map_layers(source.ds, s.feature_map, images=images),
            f"Channel {s.feature_map} of {s.image} on the patch grid, a column a block.",
            most=560,
        )

    def _show_mosaic(self, values: np.ndarray, where: str) -> None:
        """Every map divided by its own largest magnitude, as in the pictures of one channel."""
        count, rows, cols = values.shape
        across = self._columns
        down = math.ceil(count / across)
        top = np.nanmax(np.abs(values), axis=(1, 2), keepdims=True, initial=0)
        each = np.divide(values, top, out=np.zeros_like(values, np.float32), where=top > 0)
        each[np.isnan(values)] = np.nan
        cells = np.full((down * across, rows + 1, cols + 1), np.nan, np.float32)
        cells[:count, :rows, :cols] = each
        tiled = cells.reshape(down, across, rows + 1, cols + 1).swapaxes(1, 2)
        picture = tiled.reshape(down * (rows + 1), across * (cols + 1))
        self.mosaic.show(picture, "signed", limits=(-1.0, 1.0))
        mean = np.full(down * across, np.nan, np.float32)
        mean[:count] = np.maximum(values, 0).mean(axis=(1, 2))
        names = [str(v) for v in self.source.feature_maps]
        self.mosaic.param.update(
            rows=down,
            cols=across,
            values=mean.tobytes(),
            title=f"{count} feature maps",
            about=f"{where}. Each is divided by its largest magnitude. Choose one.",
            unit="mean of the positive part",
            key_unit="activation / map's largest",
            row_name=f"maps {names[0]} to {names[-1]}, line",
            serial=self.mosaic.serial + 1,
        )
