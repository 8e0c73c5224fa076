"""The head of the page: title, tabs, light and dark, what is being worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import panel as pn
import param

__all__ = ["WIDGETS", "Header"]

#: Style of the widgets, which know the page's colours by its variables only.
WIDGETS = Path(__file__).with_name("widgets.css").read_text("utf-8")


class Header(pn.custom.JSComponent):
    """Title, a tab list that arrow keys walk, a button for light and dark, a busy sign."""

    heading = param.List(["", ""], doc="The title, and what is written small behind it.")
    tabs = param.List([], doc="Key and label of each.")
    tab = param.String("")
    theme = param.String("light")
    busy = param.String("", doc="What is being worked on, or nothing.")
    page_style = param.String(Path(__file__).with_name("page.css").read_text("utf-8"))

    _esm = Path(__file__).with_name("header.js")

    def __init__(self, **params: Any):
        super().__init__(sizing_mode="stretch_width", **params)
