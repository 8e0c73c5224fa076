"""The last section: what was run, with which settings, seeds and versions."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.report.page import Page
from vitxr.report.words import count

__all__ = ["add_command", "provenance"]


def provenance(page: Page, results: Mapping[str, Any]) -> None:
    """What was run and how: sizes, attributes, seeds, versions; where to go next."""
    page.section("What was measured, and where to go next")
    rows: list[tuple[str, Any]] = []
    for key in ("activations", "detail"):
        ds = results.get(key)
        if ds is None:
            continue
        ny, nx = ds.sizes.get("shift_y", 1), ds.sizes.get("shift_x", 1)
        rows.append((f"{key}: frames", f"{ds.sizes['image']} images x {ny} x {nx} shifts"))
        if "layer" in ds.coords:
            rows.append(
                (
                    f"{key}: blocks",
                    ", ".join(str(int(v)) for v in np.atleast_1d(ds["layer"].values)),
                )
            )
        rows.append((f"{key}: variables", ", ".join(map(str, ds.data_vars))))
    attrs = dict(results.get("detail", xr.Dataset()).attrs) | dict(
        results.get("activations", xr.Dataset()).attrs
    )
    rows += [(name.replace("_", " "), _plain(value)) for name, value in attrs.items()]
    for key in ("ensembles", "ensembles_2d"):
        for layer, tree in (results.get(key) or {}).items():
            seeds = (
                sorted({int(s) for s in np.ravel(tree["seed"].values)}) if "seed" in tree else []
            )
            start = tree.attrs.get("random_state")
            words = f"random_state {start}; " if start is not None else ""
            few = ", ".join(map(str, seeds[:6])) + (", ..." if len(seeds) > 6 else "")
            rows.append((f"{key}, block {layer}", f"{words}{count(len(seeds), 'seed')}: {few}"))
    for layer, f in (results.get("factors") or {}).items():
        facts = [f"{k} {f.attrs[k]}" for k in ("method", "tol", "max_iter") if k in f.attrs]
        facts += [f"{k} {f[k].item()}" for k in ("seed", "iterations", "converged") if k in f]
        rows.append((f"factors, block {layer}", "; ".join(facts)))
    rows.append(("versions", _versions()))
    page.table(rows, ("Item", "Value"))
    page.say(
        "Next: choose a rank where the residual flattens and replicates still agree; fit it with "
        "more replicates; open the stores with <code>vitxr.open</code> and select a neuron, an "
        "image or a shift by its label."
    )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def _versions() -> str:
    words = [f"vitxr {__version__}", f"Python {platform.python_version()}"]
    for name in (
        "numpy",
        "xarray",
        "dask",
        "zarr",
        "scikit-learn",
        "torch",
        "transformers",
        "holoviews",
        "matplotlib",
    ):
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(words)


def add_command(page: Page, command: str | None) -> None:
    """State how the run was started, or what the caller says it was."""
    if command is None:
        script = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c") else ""
        command = shlex.join([script, *sys.argv[1:]]) if script else "an interactive session"
    page.say(f"Made by <code>{Page.text(command)}</code>.")
