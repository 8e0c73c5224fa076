"""What the store holds, where it comes from, how large it is."""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping
from typing import Any

import panel as pn

from vitxr.app.views.base import View, prose

__all__ = ["Contents"]


class Contents(View):
    """Variables, sizes, provenance."""

    key = "store"
    title = "Store"
    shows = ("rank",)

    def build(self) -> Any:
        """Make the parts."""
        self.text = prose("")
        return pn.Column(self.text, sizing_mode="stretch_width")

    def refresh(self, changed: set[str]) -> None:
        """Show the state."""
        ds, source = self.source.ds, self.source
        rows = [
            (n, ", ".join(f"{d} {k}" for d, k in v.sizes.items()), str(v.dtype), _amount(v.nbytes))
            for n, v in ds.data_vars.items()
        ]
        where = source.where[0] if source.where else "a Dataset in memory"
        parts = [
            f"<h2>{html.escape(where)}</h2>",
            _table(("Variable", "Dimensions", "Type", "Size unpacked"), rows),
            "<h3>Where it comes from</h3>",
            _table(("Attribute", "Value"), _given(ds.attrs)),
        ]
        if source.has_factors:
            f = source.factors(self.state.rank or None)
            name = source.where[1] if source.where and source.where[1] else "Factors"
            parts += [
                f"<h3>{html.escape(name)}</h3>",
                _table(("Attribute", "Value"), _given(f.attrs)),
            ]
        else:
            parts.append(
                '<p class="soft">No factors were given, so there is no embedding. Make them with '
                "<code>vitxr factorize</code> and give them with <code>--factors</code>.</p>"
            )
        self.text.object = "".join(parts)


def _given(attrs: Mapping[Hashable, Any]) -> list[tuple[Any, ...]]:
    return [(name, value) for name, value in attrs.items() if str(value) != ""]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def line(cells: tuple[Any, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _amount(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
