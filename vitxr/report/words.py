"""Small change of the report: counts and shares in words, a thing missing."""

from __future__ import annotations

from typing import Any

from vitxr.report.page import Page

__all__ = ["count", "listed", "missing", "ordinal", "percent"]


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


def ordinal(n: int) -> str:
    """Return ``every``, ``every 2nd``, ``every 3rd``, ``every 4th`` ...: what is shown."""
    if n == 1:
        return "every"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th") if n % 100 // 10 != 1 else "th"
    return f"every {n}{ending}"
