"""The widgets at the side: what is shown, and selecting without a pointer."""

from __future__ import annotations

import html
import tempfile
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import panel as pn

from vitxr.app.header import WIDGETS
from vitxr.app.script import script
from vitxr.app.selection import select
from vitxr.app.state import COLORS
from vitxr.app.views.base import prose
from vitxr.errors import VitxrError

if TYPE_CHECKING:
    from vitxr.app.page import App

__all__ = ["JOINS", "Controls"]

#: How a new selection meets the one that is there.
JOINS = {"instead of": "new", "and": "and", "or": "or", "and not": "without"}
_STYLE: dict[str, Any] = {"stylesheets": [WIDGETS], "sizing_mode": "stretch_width"}


#: Where there is no room for a side, side by side above the view.
_NARROW = """@media (max-width: 900px) {
  :host { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr));
    gap: 0 14px; align-items: end; }
  .scroll-button { display: none !important; }
}"""


class Controls:
    """A widget for each parameter, shown where a view has use for it."""

    def __init__(self, app: App):
        self.app, state, source = app, app.state, app.source
        p = state.param
        names = {c: f"{k[0].upper()}{k[1:]}" for k, c in COLORS.items()}
        self.offset = prose("")
        places = source.lattice_names
        down, right = (
            {str(place): i for i, place in enumerate(places.get(labels, range(size)))}
            for labels, size in zip(("row_labels", "col_labels"), source.lattice, strict=True)
        )
        # Chosen from lists: fields for numbers have buttons, and sliders handles, without names.
        self.clusters = _select(p.clusters, "Clusters (k-means)", _up_to(p.clusters))
        self.component = _select(p.component, "Component", _up_to(p.component))
        self.groups: dict[str, list[Any]] = {
            "layer": [_select(p.layer, "Layer", source.layers)],
            "image": [_select(p.image, "Image", source.images)],
            "shift": [
                _select(p.shift_y, "Shift down", down),
                _select(p.shift_x, "Shift right", right),
                self.offset,
            ],
            "feature_map": [_select(p.feature_map, "Feature map", source.feature_maps)],
            "head": [_select(p.head, "Head", p.head.objects)],
            "query": [
                _select(p.query_row, "Query patch, row", _up_to(p.query_row)),
                _select(p.query_col, "Query patch, column", _up_to(p.query_col)),
            ],
            "rank": [_select(p.rank, "Rank", source.ranks)] if source.ranks else [],
            "color": [
                pn.widgets.Select.from_param(
                    p.color, label="Colour by", options={v: k for k, v in names.items()}, **_STYLE
                ),
                self.clusters,
                self.component,
                pn.widgets.Select.from_param(
                    p.axes, label="Axes", options={"2 axes": 2, "3 axes": 3}, **_STYLE
                ),
            ],
        }
        if source.lattice == (1, 1):
            self.groups["shift"] = []
        self.layout = pn.Column(sizing_mode="stretch_width", stylesheets=[_NARROW])
        self.join = pn.widgets.Select(label="New selection", options=JOINS, **_STYLE)
        self.text: Any = None
        self._selection: list[Any] = []

    def show(self, wanted: tuple[str, ...]) -> None:
        """Show the widgets that a view asks for."""
        parts: list[Any] = []
        for name in wanted:
            parts += self.selection() if name == "selection" else self.groups[name]
        self.layout[:] = parts
        self.refresh()

    def refresh(self) -> None:
        """Say what the widgets do not say themselves."""
        s = self.app.state
        dy, dx = self.app.source.offset(s.shift_y, s.shift_x)
        self.offset.object = f'<p class="soft">{dy} px down, {dx} px to the right (circular)</p>'
        self.clusters.visible = s.color == "cluster"
        self.component.visible = s.color == "loading"
        components = list(range(s.rank or self.app.source.components or 1))
        if components != list(self.component.options):
            self.component.options = components
        if self._selection:
            self._refresh_selection()

    def selection(self) -> list[Any]:
        """The widgets of the selection, made once."""
        if self._selection:
            return self._selection
        s = self.app.state
        rows, cols = self.app.source.grid
        maps = self.app.source.maps_of(s.layer, s.rank or None)
        self.maps = pn.widgets.MultiSelect(
            label="Feature maps (none: all)", options=maps, size=min(6, len(maps)), **_STYLE
        )
        self.rows = _span("Rows", rows)
        self.cols = _span("Columns", cols)
        button = pn.widgets.Button(label="Select these", **_STYLE)
        button.on_click(lambda _: self._by_predicate())
        invert = pn.widgets.Button(label="Invert", **_STYLE)
        invert.on_click(lambda _: s.choose(~s.selection) if s.selection is not None else None)
        clear = pn.widgets.Button(label="Clear", **_STYLE)
        clear.on_click(lambda _: s.choose(None))
        self.count = prose("")
        name = pn.widgets.TextInput.from_param(
            s.param.name_of_selection, label="Its name", **_STYLE
        )
        self.export = pn.widgets.FileDownload(
            callback=self._netcdf, filename="selection.nc", label="Labels (.nc)", **_STYLE
        )
        self.download = pn.widgets.FileDownload(
            callback=self._python,
            filename="selection.py",
            label="Script (.py)",
            **_STYLE,
        )
        self.text = pn.widgets.TextAreaInput(
            label="Script that makes it again", rows=5, max_length=200_000, **_STYLE
        )
        copy = pn.widgets.Button(label="Copy the script", **_STYLE)
        copy.js_on_click({"text": self.text}, code="navigator.clipboard.writeText(text.value)")
        self.kept = [name, pn.Row(self.export, self.download, **_STYLE), self.text, copy]
        self._selection = [
            prose("<h3>Selection</h3>"),
            self.count,
            self.maps,
            pn.Row(*self.rows, **_STYLE),
            pn.Row(*self.cols, **_STYLE),
            self.join,
            button,
            pn.Row(invert, clear, **_STYLE),
            *self.kept,
        ]
        return self._selection

    def _by_predicate(self) -> None:
        rows, cols = ([part.value for part in span] for span in (self.rows, self.cols))
        how: dict[str, Any] = {"rows": rows, "cols": cols}
        if self.maps.value:
            how = {"feature_maps": list(self.maps.value), **how}
        try:
            chosen = select(self.app.state.neurons(), how)
        except VitxrError as error:
            self.app.tell(error)
        else:
            self.app.join(chosen)

    def _refresh_selection(self) -> None:
        s = self.app.state
        chosen, e = s.selection, s.neurons()
        maps = self.app.source.maps_of(s.layer, s.rank or None)
        if maps != list(self.maps.options):
            self.maps.param.update(options=maps, value=[])
        whole = e.sizes["neuron"]
        text = f"{0 if chosen is None else chosen.count:,} of {whole:,} neurons are selected."
        problem = f'<p class="bad">{html.escape(s.problem)}</p>' if s.problem else ""
        self.count.object = f'<p role="status">{text}</p>{problem}'
        for part in self.kept:
            part.visible = chosen is not None
        if chosen is not None:
            self.text.value = script(chosen, self.app.opening())
            stem = "".join(c if c.isalnum() else "-" for c in chosen.name) or "selection"
            self.export.filename, self.download.filename = f"{stem}.nc", f"{stem}.py"

    def _python(self) -> StringIO:
        return StringIO(self.text.value)

    def _netcdf(self) -> BytesIO:
        from vitxr.store import save

        s = self.app.state
        with tempfile.TemporaryDirectory() as folder:
            path = save(s.selection.to_dataarray(s.neurons()), Path(folder) / "selection.nc")
            return BytesIO(path.read_bytes())


def _select(parameter: Any, name: str, options: list[Any] | dict[str, Any]) -> Any:
    return pn.widgets.Select.from_param(parameter, label=name, options=options, **_STYLE)


def _up_to(parameter: Any) -> list[int]:
    """All numbers that a parameter may be."""
    low, high = parameter.bounds
    return list(range(low, high + 1))


def _span(name: str, size: int) -> list[Any]:
    """The first and the last."""
    return [
        pn.widgets.Select(label=f"{name}, {end}", options=list(range(size)), value=value, **_STYLE)
        for end, value in (("first", 0), ("last", size - 1))
    ]
