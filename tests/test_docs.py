"""The documentation names everything public, and its picture of the rooms is theirs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("holoviews")

import vitxr
from vitxr import (
    accessor,
    analysis,
    catalog,
    errors,
    factor,
    matlab,
    models,
    names,
    plot,
    report,
    stimuli,
    tensors,
)
from vitxr.stimuli import datasets

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api" / "index.md").read_text("utf-8")
#: Listed under another name, or no object with a page.
ELSEWHERE = {"__version__", "datasets", "plot", "errors", "names", "METHODS", "report.RESULTS"}


def entries(module):
    """Names that the page lists under a module's heading, qualified."""
    pattern = rf"currentmodule:: {re.escape(module)}\n(.*?)```"
    blocks = re.findall(pattern, API, re.DOTALL)
    return {line.strip() for block in blocks for line in block.splitlines()}


def public():
    for room, listed in ((vitxr, "vitxr"), (factor, "vitxr.factor"), (analysis, "vitxr.analysis"),
                         (plot, "vitxr.plot")):  # fmt: skip
        for name in room.__all__:
            if not inspect.ismodule(getattr(room, name)):
                yield listed, name
    for room in (catalog, datasets, matlab, models, report, stimuli, tensors):
        for name in room.__all__:
            if name not in vitxr.__all__ or room is catalog:
                yield "vitxr", f"{room.__name__.removeprefix('vitxr.')}.{name}"
    for name in errors.__all__:
        yield "vitxr", f"errors.{name}"
    for name in names.__all__:
        if callable(getattr(names, name)):
            yield "vitxr", f"names.{name}"
    for title in accessor.__all__:
        for name in vars(getattr(accessor, title)):
            if not name.startswith("_"):
                yield "vitxr.accessor", f"{title}.{name}"


@pytest.mark.parametrize(("module", "name"), sorted(public()))
def test_every_public_name_has_a_page(module, name):
    if name in ELSEWHERE:
        return
    also = {"vitxr": "vitxr.factor"}.get(module, module)
    assert name in entries(module) | entries(also), f"docs/api/index.md does not list {name}"


def test_the_page_lists_nothing_that_is_not_there():
    listed = 0
    for module in ("vitxr", "vitxr.accessor", "vitxr.factor", "vitxr.analysis", "vitxr.plot"):
        for name in entries(module):
            if name and not name.startswith((".", ":")):
                thing = __import__(module, fromlist=["_"])
                for part in name.split("."):
                    thing = getattr(thing, part)
                listed += 1
    assert listed > 80


def calls(text):
    """Calls in the Python blocks and the code spans of a page: function's name, keywords."""
    blocks = re.findall(r"```(?:python|\{code-cell\})\n(.*?)```", text, re.DOTALL)
    code = ["\n".join(ln for ln in block.splitlines() if ln[:1] not in ":!") for block in blocks]
    for source in code + re.findall(r"`([^`\n]+\([^`\n]*\))`", text):
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a formula
            assert source not in code
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                yield name, {k.arg for k in node.keywords if k.arg}


def test_calls_in_pages_have_arguments_that_are_there():
    known = {}
    rooms = (vitxr, analysis, catalog, datasets, factor, models, plot, report, tensors)
    for room in (*rooms, *(getattr(accessor, title) for title in accessor.__all__)):
        for name, thing in vars(room).items():
            if inspect.isfunction(thing) or (inspect.isclass(thing) and name in room.__all__):
                known.setdefault(name, []).append(inspect.signature(thing).parameters.values())
    seen = 0
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for name, given in calls(path.read_text("utf-8")):
            if name in known:
                seen += 1
                assert any(
                    given <= {p.name for p in parameters}
                    or any(p.kind is p.VAR_KEYWORD for p in parameters)
                    for parameters in known[name]
                ), f"{path.name}: {name} has no {given}"
    assert seen > 300


def test_whats_new_names_what_is_there():
    text = (ROOT / "docs" / "whats-new.md").read_text("utf-8")
    assert f"\n## {vitxr.__version__}" in text
    said = {name.split(".")[-1] for name in re.findall(r"`([\w.]+)", text)}
    wanted = set(vitxr.__all__) - {"__version__", "analysis", "errors", "factor", "models", "names"}
    wanted -= {"stimuli", "store", "tensors", "datasets"}
    for title in accessor.__all__:
        wanted |= {name for name in vars(getattr(accessor, title)) if not name.startswith("_")}
    assert not wanted - said


def test_the_picture_of_the_rooms_is_up_to_date():
    script = ROOT / "scripts" / "rooms.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
