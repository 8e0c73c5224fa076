"""What every view is: built when first shown, refreshed when what it shows has changed."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import panel as pn

from vitxr.app.header import WIDGETS

if TYPE_CHECKING:
    from vitxr.app.page import App

__all__ = ["Picture", "View", "beside", "prose"]


class View:
    """A tab.

    Attributes
    ----------
    key, title
        Of the tab.
    shows
        Parameters of the state on which it depends.
    controls
        Those that stand at the side while it is shown.
    """

    key = ""
    title = ""
    shows: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    def __init__(self, app: App):
        self.app, self.state, self.source = app, app.state, app.source
        self.stale = set(self.shows)
        self._layout: Any = None

    @property
    def layout(self) -> Any:
        """What is shown, made once."""
        if self._layout is None:
            self._layout = self.build()
        return self._layout

    def build(self) -> Any:
        """Make the view's parts."""
        raise NotImplementedError

    def refresh(self, changed: set[str]) -> None:
        """Show the state; ``changed`` names what is not what it was."""
        raise NotImplementedError


class Picture(pn.pane.HTML):
    """A picture of :mod:`vitxr.plot`, said in words for those who do not see it."""

    def __init__(self, **params: Any):
        params.setdefault("sizing_mode", "stretch_width")
        super().__init__("", stylesheets=[WIDGETS], **params)

    def show(
        self, app: App, key: Hashable, draw: Callable[[], Any], alt: str, most: int = 900
    ) -> None:
        """Draw it, or take what was drawn for the same key."""
        from vitxr.plot.screen import screen_png

        dark = app.state.theme == "dark"
        png = app.source.keep(("png", key, dark), lambda: screen_png(draw(), dark=dark))
        data = base64.b64encode(png).decode()
        self.object = (
            f'<figure><img alt="{html.escape(alt, quote=True)}" '
            f'style="max-width:min({most}px,100%)" src="data:image/png;base64,{data}"></figure>'
        )


def prose(text: str, **params: Any) -> Any:
    """A piece of HTML in the page's style."""
    params.setdefault("sizing_mode", "stretch_width")
    return pn.pane.HTML(text, stylesheets=[WIDGETS], **params)


def beside(*parts: Any, least: int = 300, shares: tuple[float, ...] = ()) -> Any:
    """Put parts beside each other, below each other where there is no room."""
    for i, part in enumerate(parts):
        share = shares[i] if shares else 1
        part.styles = {
            **part.styles,
            "flex": f"{share} 1 {least * share:.0f}px",
            "min-width": f"min({least}px, 100%)",
        }
    return pn.FlexBox(
        *parts, flex_wrap="wrap", align_items="flex-start", gap="20px", sizing_mode="stretch_width"
    )
