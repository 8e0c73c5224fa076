"""Well-known models: what to expect of them, and the nearest to a name that is not known."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
from typing import Any

__all__ = ["hint", "known_models"]


@functools.cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the models of ``vitxr/catalogs/models.yaml`` by id.

    Examples
    --------
    >>> known_models()["facebook/dinov2-base"]["patch"]
    14
    """
    import yaml

    text = (importlib.resources.files("vitxr") / "catalogs" / "models.yaml").read_text("utf-8")
    return {
        name: {"id": name, **row["metadata"], "expect": row["description"]}
        for name, row in yaml.safe_load(text)["sources"].items()
    }


def hint(name: str) -> str:
    """Return a sentence that names the known models nearest to a name; empty if none is near.

    Examples
    --------
    >>> hint("ijepa_vith14")
    ' The nearest known: facebook/ijepa_vith14_1k.'
    >>> hint("dinov2")
    ' The nearest known: facebook/dinov2-small, facebook/dinov2-base, facebook/dinov2-large.'
    """
    if name in known_models():
        return ""
    short = {known.rpartition("/")[2].lower(): known for known in (*known_models(), "digits")}
    last = name.rpartition("/")[2].lower().replace("_", "-")
    near = difflib.get_close_matches(name, known_models(), n=3, cutoff=0.75)
    if not near:
        found = difflib.get_close_matches(last, short, n=3, cutoff=0.75)
        near = [short[s] for s in found or [s for s in short if last and last in s][:3]]
    return f" The nearest known: {', '.join(near)}." if near else ""
