"""Small change of the report: counts and shares in words, a picture drawn, a thing missing."""

from __future__ import annotations

from typing import Any

from vitxr import plot
from vitxr.report.page import Page, Picture

__all__ = ["count", "draw", "listed", "missing", "percent"]


def draw(name: str, element: Any, alt: str, caption: str) -> Picture:
    """Draw an element as PNG and PDF, with its description and caption."""
    return Picture(name, alt, caption, plot.render(element, ("png", "pdf"), dpi=200))


def missing(page: Page, what: str, remedy: str) -> None:
    """Say that something is missing, and the call that makes it."""
    page.say(f'<span class="soft">{what}</span>', f"<code>{Page.text(remedy)}</code>")


def count(n: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 head``, ``4 heads``."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def percent(share: float) -> str:
    """Return a share as a percentage, to two digits or so."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def listed(values: Any) -> str:
    """Join words: ``a, b and c``."""
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
