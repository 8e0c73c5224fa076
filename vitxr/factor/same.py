"""Whether labelled things are of the same data: their labels, shifts, images, source, treatment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from vitxr.names import PROVENANCE

__all__ = ["difference", "label_at", "other_source"]

#: Coordinates that say what a label stands for: equal labels may stand for other things.
MEANING = ("offset_y", "offset_x", "sha256")
#: Attributes by which two tensors show that they come from other activations.
SOURCE = ("model_fingerprint", "preprocess", "precision", "variable", "head", "layer")
#: Attributes by which they show that something else was done to these.
TREATMENT = ("rectify", "normalize", "smoothing")

Labelled = xr.DataArray | xr.Dataset


def difference(
    a: Labelled, b: Labelled, dim: Any, names: tuple[str, str] = ("the model", "the tensor")
) -> tuple[str, str] | None:
    """Find the first difference of two things along a dimension.

    Compared are sizes, labels, and where both have them the offsets of shifts and the SHA-256 of
    images.

    Parameters
    ----------
    a, b
        What is compared, both with the dimension.
    names
        What they are called.

    Returns
    -------
    tuple of str, or None
        What differs, and how, in words; None if nothing does.

    Examples
    --------
    >>> a = xr.DataArray([1, 2], dims="image", coords={"image": ["cat", "dog"]})
    >>> difference(a, a.assign_coords(image=["cat", "cow"]), "image")
    ('labels', 'at 1 of image the model has dog, the tensor cow')
    """
    one, other = names
    if a.sizes[dim] != b.sizes[dim]:
        return "labels", f"{one} has {a.sizes[dim]} of {dim}, {other} {b.sizes[dim]}"
    mine, its = a.indexes.get(dim), b.indexes.get(dim)
    if mine is not None and its is not None and not mine.equals(its):
        at = next(i for i, (x, y) in enumerate(zip(mine, its, strict=True)) if x != y)
        has = f"{one} has {_text(mine, at)}, {other} {_text(its, at)}"
        return "labels", f"at {at} of {dim} {has}"
    for name in MEANING:
        if not all(name in x.coords and x[name].dims == (dim,) for x in (a, b)):
            continue
        x, y = a[name], b[name]
        if name == "sha256":
            pairs = zip(x.values.tolist(), y.values.tolist(), strict=True)
            unlike = [bool(v and w) and v != w for v, w in pairs]  # where both have one
        else:
            unlike = (x.values != y.values).tolist()
        if any(unlike):
            at = unlike.index(True)
            values = [str(v.values[at]) for v in (x, y)]
            if name == "sha256":
                values = [f"{v[:12]}..." for v in values]
            has = f"{one} has {name} {values[0]}, {other} {values[1]}"
            return name, f"at {label_at(a, dim, at)} {has}"
        periods = [v.attrs.get("period") for v in (x, y)]
        if None not in periods and periods[0] != periods[1]:
            has = f"{one} a period of {periods[0]} px, {other} of {periods[1]}"
            return name, f"in {name} {has}"
    return None


def other_source(f: Mapping[Any, Any], t: Mapping[Any, Any], free: bool = False) -> str:
    """Say in what the attributes of factors and of a tensor contradict each other.

    What only one of them says is no contradiction; but where both say where they come from, the
    one without ``smoothing`` is not smoothed.

    Parameters
    ----------
    f, t
        Attributes of the factors, and of the tensor.
    free
        Whether the neurons may come from other activations. What was done to these, of which the
        scale of the numbers depends, is compared in any case.

    Returns
    -------
    str
        Nothing if there is no contradiction.

    Examples
    --------
    >>> other_source({"layer": 3}, {"layer": 5})
    'the factors are of layer 3, the tensor of 5: give a tensor of the same activations'
    """
    for key in () if free else SOURCE:
        if key in f and key in t and f[key] != t[key]:
            return (
                f"the factors are of {key} {_plain(f[key])!r}, the tensor of {_plain(t[key])!r}: "
                "give a tensor of the same activations"
            )
    told = all(any(key in attrs for key in PROVENANCE) for attrs in (f, t))
    for key in TREATMENT:
        known = told if key == "smoothing" else key in f and key in t
        if known and f.get(key) != t.get(key):
            mine, its = (_made(key, attrs.get(key)) for attrs in (f, t))
            return (
                f"the factors are of a tensor {mine}, and this one is {its}: make it in the same "
                "way; or, if this is meant, take away what it says: t.drop_attrs(deep=False)"
            )
    return ""


def label_at(t: Labelled, dim: Any, place: int) -> str:
    """Name an element of a dimension.

    Examples
    --------
    >>> label_at(xr.DataArray([1, 2], dims="image", coords={"image": ["cat", "dog"]}), "image", 1)
    'image dog'
    """
    return f"{dim} {_text(t.indexes[dim], place) if dim in t.indexes else place}"


def _text(index: Any, place: int) -> str:
    label: object = index[place]
    if not isinstance(label, tuple):
        return str(label)
    levels = zip(index.names, label, strict=True)
    return "(" + ", ".join(f"{name} {value}" for name, value in levels) + ")"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _made(key: str, value: Any) -> str:
    if key == "smoothing":
        return "without smoothing" if value is None else f"with smoothing {value}"
    return f"made with {key}={bool(value)}"
