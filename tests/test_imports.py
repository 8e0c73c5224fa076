"""What an import loads, who imports whom, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitxr

ROOT = Path(vitxr.__file__).parent
#: Top to bottom: a module imports only from rooms above its own, and from its own.
ROOMS = [
    "_version",
    "errors",
    "memory",
    "names",
    "stimuli",
    "models",
    "store",
    "catalog",
    "extract",
    "tensors",
    "matlab",
    "factor",
    "analysis",
    "plot",
    "report",
    "app",
    "accessor",
    "__init__",
    "demo",
    "cli",
    "__main__",
]


def test_import_is_light():
    heavy = "torch transformers holoviews panel matplotlib tensorly sklearn distributed bokeh"
    code = (
        "import sys, vitxr, xarray as xr; xr.Dataset().vit; xr.DataArray().vit;"
        f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "analysis.embed",
        "factor.choose_rank",
        "models.Backbone",
        "plot.save",
        "report.write_report",
        "stimuli.ShiftGrid",
        "store.verify",
        "tensors.neuron_tensor",
    ],
)
def test_a_room_needs_no_import_of_its_own(name):
    room, attribute = name.split(".")
    code = f"import vitxr; print({room!r} in dir(vitxr), vitxr.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", attribute]


def room(path):
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vitxr":
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                for alias in node.names:
                    yield alias.name if alias.name in ROOMS else "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "vitxr":
                    yield parts[1] if len(parts) > 1 else "__init__"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_from_above(path):
    own = ROOMS.index(room(path))
    if room(path) in ("accessor", "__init__"):
        return  # the accessor delegates to every room, the package shows them
    below = {r for r in imported_rooms(path) if ROOMS.index(r) > own}
    assert not below


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_its_room_knows_a_library(path):
    text = path.read_text("utf-8")
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if not (isinstance(node, ast.ImportFrom) and node.module is None)
    }
    allowed = {
        "torch": {"models", "extract", "factor/device.py"},
        "transformers": {"models"},
        "zarr": {"store"},
        "panel": {"app"},
        "bokeh": {"app", "plot"},
    }
    for library, rooms in allowed.items():
        here = {room(path), path.relative_to(ROOT).as_posix()}
        assert library not in roots or here & rooms, (library, path)


def test_every_public_name_is_there():
    for name in vitxr.__all__:
        assert getattr(vitxr, name) is not None
    assert set(vitxr.__all__) <= set(dir(vitxr))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vitxr.nothing
