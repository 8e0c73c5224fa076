"""The page: head, side and view; who refreshes whom, and what runs beside the page."""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Callable
from typing import Any

import panel as pn
import param
import xarray as xr

from vitxr.app.controls import Controls
from vitxr.app.header import Header
from vitxr.app.means import Means
from vitxr.app.selection import Selection
from vitxr.app.source import Source
from vitxr.app.state import State
from vitxr.app.views.attention import Attention
from vitxr.app.views.base import View, prose
from vitxr.app.views.contents import Contents
from vitxr.app.views.embedding import Embedding
from vitxr.app.views.factors import Factors, Rank
from vitxr.app.views.maps import FeatureMaps
from vitxr.app.views.movie import Film
from vitxr.app.views.responses import Responses
from vitxr.app.views.stimuli import Stimuli
from vitxr.errors import VitxrError

__all__ = ["ADDRESS", "App", "problem_page"]

#: What of the state the address carries, and under what name.
ADDRESS = {
    **{n: n for n in ("tab", "layer", "image", "shift_y", "shift_x", "feature_map", "head")},
    "query_row": "row",
    "query_col": "col",
    "rank": "rank",
    **{n: n for n in ("color", "clusters", "component")},
    "axes": "axes",
    "theme": "theme",
    "name_of_selection": "name",
    "how": "select",
}

#: Where there is no room for the side, it stands above the view.
_NARROW = """@media (max-width: 900px) {
  .vx-side { flex: 1 1 100% !important; max-width: none !important; }
}"""


def _views(source: Source) -> list[type[View]]:
    """The tabs that the source has something for."""
    views: list[type[View]] = [Stimuli]
    if "attention" in source.ds:
        views.append(Attention)
    views.append(FeatureMaps)
    if source.lattice != (1, 1):
        views.append(Film)
    if source.has_factors:
        views += [Factors, *([Rank] if source.ensemble is not None else []), Embedding]
    return [*views, Responses, Contents]


class App(pn.viewable.Viewer):
    """One session's page.

    Parameters
    ----------
    source
        What is browsed, common to all sessions.
    """

    state = param.ClassSelector(class_=State)

    def __init__(self, source: Source, **params: Any):
        views = _views(source)
        self.source = source
        super().__init__(state=State(source, [v.key for v in views]), **params)
        self.header = Header(
            heading=["vitxr", source.title],
            tabs=[[v.key, v.title] for v in views],
            tab=self.state.tab,
            theme=self.state.theme,
        )
        self.views = {v.key: v(self) for v in views}
        self.controls = Controls(self)
        self.main = pn.Column(sizing_mode="stretch_width", min_height=400)
        self._working: dict[str, str] = {}
        self._unread: set[tuple[int, int | None]] = set()
        self._undivided: set[tuple[int | None, int]] = set()
        self._document = pn.state.curdoc
        side = pn.Column(
            self.controls.layout,
            styles={"flex": "0 1 240px", "min-width": "200px"},
            max_width=320,
            css_classes=["vx-side"],
        )
        self.main.styles = {"flex": "1 1 560px", "min-width": "min(420px, 100%)"}
        body = pn.FlexBox(
            side,
            self.main,
            align_items="flex-start",
            gap="22px",
            sizing_mode="stretch_width",
            styles={"padding": "14px 16px"},
            stylesheets=[_NARROW],
        )
        self.side = side
        self.notice = prose("", visible=False, styles={"padding": "8px 16px 0"})
        self._layout = pn.Column(self.header, self.notice, body, sizing_mode="stretch_width")
        self.header.param.watch(lambda e: setattr(self.state, "tab", e.new), "tab")
        self.header.param.watch(lambda e: setattr(self.state, "theme", e.new), "theme")
        watched = [n for n in self.state.param if n not in ("name", "selection", "how")]
        self.state.param.watch(self._changed, [*watched, "selection"])

    def __panel__(self) -> Any:
        return self._layout

    def start(self) -> None:
        """Show the first view."""
        self.header.param.update(tab=self.state.tab, theme=self.state.theme)
        self._show()

    def tell_address(self, wrong: dict[str, Any]) -> None:
        """Say what of the address cannot be shown here."""
        parts = ", ".join(f"{ADDRESS[name]}={str(value)[:60]}" for name, value in wrong.items())
        text = html.escape(f"Of the address this was left out, as the store has no such: {parts}.")
        self._notify(f'<p class="bad">{text}</p>')

    def tell_too_long(self) -> None:
        """Say that the address does not follow."""
        self._notify(
            '<p class="bad">The selection is joined of more than an address can hold, which stays '
            "as it was. Export the labels to keep it.</p>"
        )

    def tell(self, error: Exception, before: str = "") -> None:
        """Say above the view what went wrong."""
        self._notify(f'<p class="bad" role="alert">{html.escape(f"{before}{error}")}</p>')

    def _notify(self, text: str) -> None:
        """Say something above the view."""
        self.notice.param.update(object=text, visible=True)

    @property
    def view(self) -> View:
        """The view that is shown."""
        return self.views[self.state.tab]

    def _changed(self, *events: param.parameterized.Event) -> None:
        names = {e.name for e in events}
        for view in self.views.values():
            view.stale |= names & set(view.shows)
        if names & {"tab", "theme"}:
            self.header.param.update(tab=self.state.tab, theme=self.state.theme)
        if "tab" in names:
            # The old view must not stand under the new tab while that is made.
            self.main[:] = []
            self._say("view", "drawing")
            self._later(self._show)
        else:
            self._refresh()

    def _show(self) -> None:
        try:
            self.controls.show(self.view.controls)
            self.side.visible = bool(len(self.controls.layout))
            self._refresh()
        except VitxrError as error:
            self.main[:] = [_told(error)]
        finally:
            self._say("view", "")

    def _refresh(self) -> None:
        view = self.view
        changed, view.stale = view.stale, set()
        try:
            self.controls.refresh()
            layout = view.layout
            if changed:
                view.refresh(changed)
        except VitxrError as error:
            view.stale = set(view.shows)
            layout = _told(error)
        if list(self.main) != [layout]:
            self.main[:] = [layout]

    def join(self, new: Selection) -> None:
        """Select neurons, in the way in which a new selection is to meet the old one."""
        self.notice.visible = False  # of what was not to be selected before
        old, how = self.state.selection, self.controls.join.value
        if old is not None and how != "new":
            new = {"and": old & new, "or": old | new, "without": old & ~new}[how]
        self.state.choose(new)

    def means(self) -> Means | None:
        """Mean responses of the neurons; None while they are read, beside the page.

        What could not be read is said once, and not tried again by this page.
        """
        layer, rank = self.state.layer, self.state.rank or None
        found = self.source.known_means(layer, rank)
        if found is not None or (layer, rank) in self._unread:
            return found

        def ready() -> None:
            for view in self.views.values():
                view.stale |= {"means"} & set(view.shows)
            self._refresh()

        def failed() -> None:
            self._unread.add((layer, rank))
            ready()  # by now others may be wanted

        self.beside(
            "means",
            lambda tell: self.source.means(layer, rank, tell),
            "reading responses",
            ready,
            failed,
        )
        return None

    def clusters(self) -> xr.Dataset | None:
        """The neurons with their clusters; None while these are found, beside the page."""
        rank, count = self.state.rank or None, self.state.clusters
        found = self.source.known_clusters(rank, count)
        if found is not None or (rank, count) in self._undivided:
            return found

        def ready() -> None:
            for view in self.views.values():
                view.stale |= {"clusters"} & set(view.shows)
            self._refresh()

        def failed() -> None:
            self._undivided.add((rank, count))
            ready()

        self.beside(
            "clusters",
            lambda _: self.source.clustered(rank, count),
            f"finding {count} clusters",
            ready,
            failed,
        )
        return None

    def beside(
        self,
        key: str,
        work: Callable[[Callable[[int, int], None]], Any],
        what: str,
        done: Callable[[], None],
        failed: Callable[[], None] | None = None,
    ) -> None:
        """Run work in a thread, say how far it is, then go on in the page.

        Work that is under way already is not begun again. Where it fails, the page says so above
        the view, which may by then be another.
        """
        if key in self._working:
            return
        self._say(key, what)
        ended = False

        def tell(count: int, of: int) -> None:
            self._later(
                lambda: None if ended else self._say(key, f"{what}: {count} of {of} images")
            )

        def finish(error: Exception | None) -> None:
            nonlocal ended  # callbacks of a document do not run in the order in which they came
            ended = True
            self._say(key, "")
            if error is None:
                done()
                return
            if failed is not None:
                failed()
            self.tell(error, f"While {what}: ")

        def run() -> None:
            problem: Exception | None = None
            try:
                work(tell)
            except Exception as error:  # of another thread: the page says it, or nobody would
                problem = error
                if not isinstance(error, VitxrError):
                    logging.getLogger("vitxr").exception("while %s", what)
            self._later(lambda: finish(problem))

        threading.Thread(target=run, daemon=True, name=f"vitxr-beside-{key}").start()

    def _say(self, key: str, what: str) -> None:
        """Say in the head of the page what is being worked on."""
        self._working.pop(key, None)
        if what:
            self._working[key] = what
        self.header.busy = next(iter(reversed(self._working.values())), "")

    def _later(self, act: Callable[[], None]) -> None:
        """Do it when the page has been sent what there is; at once where there is no server."""
        if self._document is None or self._document.session_context is None:
            act()
        else:
            self._document.add_next_tick_callback(act)

    def opening(self) -> str:
        """Lines of a script that open the neurons of a selection."""
        store, factors = self.source.where or ("run.zarr", "factors.nc")
        if not self.source.has_factors:
            return (
                f"ds = vitxr.open({store!r})\ne = ds.vit.neuron_tensor(layer={self.state.layer}, "
                f"feature_maps={min(20, len(self.source.feature_maps))})"
            )
        best = f".vit.best({self.state.rank})" if self.source.ranks else ""
        count = self.state.neurons().sizes["pc"]
        return f"f = vitxr.open({factors!r}){best}\ne = f.vit.embed(n_components={count})"


def _told(error: Exception) -> Any:
    return prose(
        f'<h2>This cannot be shown</h2><p class="bad" role="alert">{html.escape(str(error))}</p>'
    )


def problem_page(error: Exception, store: str) -> Any:
    """A page that says why a store cannot be opened, and what to do."""
    header = Header(heading=["vitxr", store], tabs=[], tab="")
    told = _told(error)
    told.styles = {"padding": "20px", "max-width": "60em"}
    return pn.Column(header, told, sizing_mode="stretch_width")
