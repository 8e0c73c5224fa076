"""Type hints resolve: every name in an annotation is one that its module imports."""

import ast
import importlib
import inspect
import typing

import pytest

pytest.importorskip("torch")
pytest.importorskip("holoviews")

import vitxr
from vitxr import accessor, analysis, catalog, factor, models, names, plot, report, stimuli, tensors
from vitxr.stimuli import datasets

ROOMS = (vitxr, analysis, catalog, datasets, factor, models, names, plot, report, stimuli, tensors)
#: What is imported for hints alone, as an import of vitxr must not load it.
SLOW = {
    *("torch", "PIL.Image", "transformers.image_processing_base"),
    *("vitxr.models", "vitxr.models.backbone", "vitxr.extract.cost"),
}


def callables():
    found = {}
    for room in ROOMS:
        for name in room.__all__:
            found[f"{room.__name__}.{name}"] = getattr(room, name)
    for name in accessor.__all__:
        found[f"vitxr.accessor.{name}"] = getattr(accessor, name)
    for name, thing in list(found.items()):
        if inspect.isclass(thing):
            del found[name]
            for method, function in vars(thing).items():
                function = getattr(function, "fget", None) or getattr(
                    function, "__func__", function
                )
                if inspect.isfunction(function) and (method == "__init__" or method[0] != "_"):
                    found[f"{name}.{method}"] = function
    return {
        name: function
        for name, function in found.items()
        if inspect.isfunction(function) and function.__module__.startswith("vitxr.")
    }


CALLABLES = callables()


def for_hints(module):
    """What a module imports under ``TYPE_CHECKING``, as an editor sees it."""
    space, sources = {}, set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                exec(ast.unparse(statement), space)
                for alias in statement.names:
                    source = (
                        statement.module if isinstance(statement, ast.ImportFrom) else alias.name
                    )
                    sources.add(source)
    return space, sources


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_hints_resolve(name):
    function = CALLABLES[name]
    space, _ = for_hints(importlib.import_module(function.__module__))
    hints = typing.get_type_hints(function, {**space, **function.__globals__})
    missing = {
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "cls") and p.name not in hints
    }
    assert not missing
    assert "return" in hints or function.__name__ == "__init__"


def test_only_what_is_slow_is_imported_for_hints_alone():
    modules = {function.__module__ for function in CALLABLES.values()}
    for name in sorted(modules):
        _, sources = for_hints(importlib.import_module(name))
        assert sources <= SLOW, name


def test_there_are_many():
    assert len(CALLABLES) > 120
    assert {
        "vitxr.extract",
        "vitxr.accessor.VitDataset.cka",
        "vitxr.models.Backbone.preprocess",
    } <= set(CALLABLES)
