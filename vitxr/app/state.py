"""What is shown and selected: one object, which views watch and the address carries."""

from __future__ import annotations

import json
from typing import Any

import param

from vitxr.app.selection import Selection, select
from vitxr.app.source import Source
from vitxr.errors import ArgumentError, VitxrError

__all__ = ["COLORS", "State"]

#: What the points of the embedding may be coloured by.
COLORS = {
    "feature map": "feature_map",
    "row": "patch_row",
    "column": "patch_col",
    "row and column": "both",
    "cluster": "cluster",
    "loading of a component": "loading",
}


class State(param.Parameterized):
    """Layer, image, shift, query patch, feature map, head, selection, theme.

    A view changes a parameter, every view that shows it follows. ``how`` is the selection as
    the address has it; ``selection`` is made from it.
    """

    tab = param.Selector(default="stimuli", objects=["stimuli"])
    layer = param.Selector(default=0, objects=[0], doc="Block, 0-based.")
    image = param.Selector(default="", objects=[""], doc="Name of the image.")
    shift_y = param.Integer(0, bounds=(0, 0), doc="Row of the lattice of shifts.")
    shift_x = param.Integer(0, bounds=(0, 0), doc="Column of the lattice of shifts.")
    query_row = param.Integer(0, bounds=(0, 0), doc="Row of the patch that attends.")
    query_col = param.Integer(0, bounds=(0, 0), doc="Column of the patch that attends.")
    feature_map = param.Selector(default=0, objects=[0])
    head = param.Selector(default=0, objects=[0])
    rank = param.Selector(default=0, objects=[0], doc="Of an ensemble; 0 where there is none.")
    color = param.Selector(default="feature_map", objects=list(COLORS.values()))
    clusters = param.Integer(6, bounds=(2, 24), doc="Clusters that neurons are coloured by.")
    component = param.Integer(0, bounds=(0, 0), doc="Its loading is what neurons are coloured by.")
    axes = param.Selector(default=2, objects=[2, 3], doc="Axes of the embedding.")
    theme = param.Selector(default="light", objects=["light", "dark"])
    name_of_selection = param.String("selection")
    how = param.Dict({}, doc="How the selection was made; empty where there is none.")
    selection = param.Parameter(None, doc="The selection, or None.")
    problem = param.String("", doc="Why a selection could not be made.")

    def __init__(self, source: Source, tabs: list[str], **params: Any):
        self.source = source
        ds = source.ds
        choices: dict[str, list[Any]] = {
            "tab": list(tabs),
            "layer": source.layers,
            "image": source.images,
            "feature_map": source.feature_maps,
            "head": [int(h) for h in ds["head"].values] if "head" in ds.coords else [0],
            "rank": source.ranks or [0],
        }
        for name, objects in choices.items():
            self.param[name].objects = objects
            self.param[name].default = objects[0]
            params.setdefault(name, objects[0])
        rows, cols = source.grid
        for name, size in {
            "shift_y": source.lattice[0],
            "shift_x": source.lattice[1],
            "query_row": rows,
            "query_col": cols,
            "component": max(source.components, 1),
        }.items():
            self.param[name].bounds = (0, size - 1)
        params.setdefault("query_row", rows // 2)
        params.setdefault("query_col", cols // 2)
        super().__init__(**params)
        self._among = source.neurons_key(self.layer, self.rank or None)
        if self.how:
            self._remake()

    def choose(self, selection: Selection | None) -> None:
        """Select neurons, or none."""
        if selection is None:
            self.param.update(selection=None, how={}, problem="")
        else:
            named = selection.called(self.name_of_selection)
            self.param.update(selection=named, how=named.how, problem="")

    def neurons(self) -> Any:
        """The neurons that can be selected now."""
        return self.source.neurons(self.layer, self.rank or None)

    @param.depends("how", "layer", "rank", watch=True)
    def _remake(self) -> None:
        """Make the selection that ``how`` tells of, among the neurons that are shown now.

        What was selected among others stays selected where it can: a lasso cannot.
        """
        among = self.source.neurons_key(self.layer, self.rank or None)
        moved, self._among = among != self._among, among
        if not self.how:
            self.selection = None
            return
        same = self.selection is not None and self.selection.how == self.how
        if same and not moved:
            return
        try:
            if same and '"polygon"' in json.dumps(self.how):
                raise ArgumentError(
                    "the lasso was around points of another embedding: draw it again."
                )
            made = select(self.neurons(), self.how, self.name_of_selection)
        except VitxrError as error:
            self.param.update(selection=None, how={}, problem=str(error))
        else:
            self.param.update(selection=made, problem="")

    @param.depends("rank", "component", watch=True)
    def _component_of_rank(self) -> None:
        """A rank has as many components: past them the last is taken."""
        if self.rank and self.component >= self.rank:
            self.component = self.rank - 1

    @param.depends("name_of_selection", watch=True)
    def _rename(self) -> None:
        if self.selection is not None:
            self.selection = self.selection.called(self.name_of_selection)
