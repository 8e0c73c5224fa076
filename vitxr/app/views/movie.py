"""The responses of feature maps to one image, played over all shifts."""

from __future__ import annotations

from typing import Any

import panel as pn

from vitxr.app.views.base import View, prose
from vitxr.errors import VitxrError

__all__ = ["Film"]

#: Feature maps beside the chosen one, at most.
_MOST = 12


class Film(View):
    """A player that runs in the browser; the frames are sent once."""

    key = "movie"
    title = "Movie"
    shows = ("layer", "image", "feature_map", "rank", "theme")
    controls = ("layer", "image", "feature_map")

    def build(self) -> Any:
        """Make the parts."""
        self.player = prose("")
        return pn.Column(self.player, sizing_mode="stretch_width")

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        from vitxr.plot import movie
        from vitxr.tensors import neuron_tensor

        s, source = self.state, self.source
        chosen = source.channel(s.layer, s.feature_map)

        def make() -> Any:
            maps = source.maps_of(s.layer, s.rank or None)
            # the factors may be of another block, which may keep other channels
            have = {source.channel(s.layer, m) for m in source.feature_maps}
            wanted = [m for m in dict.fromkeys([chosen, *maps]) if m in have][: _MOST + 1]
            one = source.ds.sel(image=[s.image])
            t = neuron_tensor(one, s.layer, wanted)
            try:
                pixels = source.pixels(s.image)
            except VitxrError:
                pixels = None  # the view of the stimuli says why
            return movie(t, wanted, pixels=pixels)

        rank = s.rank if source.has_factors else None
        made = source.keep(("movie", s.layer, s.image, chosen, rank), make)
        when = "all" if s.theme == "dark" else "not all"
        page = made.html.replace("@media (prefers-color-scheme: dark)", f"@media {when}")
        page = page.replace("color-scheme: light dark", f"color-scheme: {s.theme}")
        self.player.object = type(made)(made.frames, page)._repr_html_()
