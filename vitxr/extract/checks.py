"""The arguments of an extraction: what is legal, and what to do about what is not."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.models.backbone import Backbone
from vitxr.models.site import check_pattern, token_count
from vitxr.models.sites import SITES
from vitxr.names import DIMS, VARIABLES, is_name, validate

__all__ = [
    "CAPTURED",
    "Storage",
    "check_batch",
    "check_channels",
    "check_heads",
    "check_layers",
    "check_modules",
    "check_preprocess",
    "check_queries",
    "check_stimuli",
    "check_storage",
    "check_variables",
    "plain_strings",
]

#: What can be captured.
CAPTURED = ("activation", "prefix", "embedding", *SITES, "logits")
#: What has heads.
_WITH_HEADS = [name for name in CAPTURED if "head" in VARIABLES[name].dims[0]]


@dataclass(frozen=True)
class Storage:
    """How values are stored.

    Attributes
    ----------
    dtype
        NumPy dtype name.
    keepbits
        Bits of a float32's mantissa that are kept (of 23), or None for all.
    """

    dtype: str
    keepbits: int | None = None

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes that state the error that storing makes."""
        if self.keepbits is not None:
            return {
                "quantization": "bitround",
                "quantization_keepbits": self.keepbits,
                "quantization_maximum_relative_error": 2.0 ** -(self.keepbits + 1),
            }
        if self.dtype == "float16":
            return {
                "quantization": "float16",
                "quantization_maximum_relative_error": 2.0**-11,
                "quantization_maximum_absolute_error_of_subnormals": 2.0**-25,
            }
        return {}


def check_storage(storage_dtype: str) -> Storage:
    """Read ``storage_dtype``: float32, float16, or bitroundN."""
    if storage_dtype in ("float32", "float16"):
        return Storage(storage_dtype)
    found = re.fullmatch(r"bitround(\d{1,2})", str(storage_dtype))
    if not found or not 1 <= int(found[1]) <= 22:
        raise ArgumentError(
            f"storage_dtype={storage_dtype!r}: expected 'float32', 'float16', or 'bitroundN', "
            "which is float32 rounded to N of its 23 mantissa bits (1 to 22) and compressed, "
            "such as 'bitround7'."
        )
    return Storage("float32", int(found[1]))


def check_stimuli(stim: xr.Dataset) -> None:
    """Refuse what is no stimuli Dataset, is empty, or names an image twice."""
    if not isinstance(stim, xr.Dataset) or "image" not in stim.dims:
        raise ArgumentError(
            f"stim is a {type(stim).__name__} without the dimension `image`; expected the Dataset "
            "that vitxr.open_images makes."
        )
    validate(stim, require=["image", "source", "sha256", "height", "width"])
    if stim.sizes["image"] == 0:
        raise DataError("stim holds no images: nothing to extract. Widen the selection.")
    index = stim.indexes["image"]
    if not index.is_unique:
        twice = index[index.duplicated()].unique()[:5].tolist()
        raise DataError(
            f"stim has image names that occur more than once: {twice}. Give each image its own "
            "name, for example stim.assign_coords(image=...)."
        )


def plain_strings(stim: xr.Dataset) -> xr.Dataset:
    """Make object strings of those that Zarr gave."""
    strings = {str(n): v.astype(object) for n, v in stim.coords.items() if v.dtype.kind == "T"}
    return stim.assign_coords(strings)


def _plain_array(value: Any) -> np.ndarray:
    """Make an array; of what is ragged, an empty one, which is refused."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.empty(0)


def check_layers(layers: Any, depth: int) -> tuple[int, ...]:
    """Return the blocks, ascending."""
    if isinstance(layers, str):
        if layers != "all":
            raise ArgumentError(f"layers={layers!r}: expected block numbers or 'all'.")
        return tuple(range(depth))
    listed = np.atleast_1d(_plain_array(layers))
    if listed.ndim != 1 or listed.size == 0 or listed.dtype.kind not in "iu":
        raise ArgumentError(
            f"layers={layers!r}: expected one block number, a sequence of them, or 'all'."
        )
    outside = [int(i) for i in listed if not 0 <= i < depth]
    if outside:
        raise ArgumentError(
            f"layers: {outside} out of range; the model has {depth} blocks, 0 to {depth - 1}."
        )
    if twice := _twice(listed.tolist()):
        raise ArgumentError(f"layers={layers!r} names a block twice: {twice}.")
    return tuple(sorted(int(i) for i in listed))


def _twice(numbers: Sequence[int]) -> str:
    """What occurs more than once, in words; empty if nothing does."""
    return ", ".join(str(n) for n, times in Counter(numbers).items() if times > 1)


def check_variables(
    variables: Sequence[str], model: Backbone, modules: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names to capture, in the order of the vocabulary; none if modules are enough."""
    if isinstance(variables, str):
        variables = [variables]
    names = list(variables) if isinstance(variables, list | tuple | set) else []
    nothing = not names and not (modules and isinstance(variables, list | tuple | set))
    if nothing or not set(names) <= set(CAPTURED):
        unknown = [str(name) for name in names if name not in CAPTURED]
        near = {n: difflib.get_close_matches(n, CAPTURED, n=1, cutoff=0.5) for n in unknown}
        meant = ", ".join(f"{to[0]!r} for {n!r}" for n, to in near.items() if to)
        raise ArgumentError(
            f"variables={variables!r}: expected some of {', '.join(CAPTURED)}."
            + (f" Perhaps {meant}?" if meant else "")
        )
    if "logits" in variables and not model.classes:
        raise ArgumentError(
            f"variables: the model {model.name!r} has no classification head that is known, so no "
            f"`logits`. Leave them out, or {model.towards_classes()}."
        )
    if "prefix" in variables and not model.prefix:
        raise ArgumentError(
            f"variables: the model {model.name!r} has no prefix tokens. Leave `prefix` out."
        )
    return tuple(v for v in CAPTURED if v in variables)


def check_modules(modules: Any, stim: xr.Dataset) -> dict[str, str]:
    """Return paths of modules by the names of their variables."""
    if modules is None:
        return {}
    if not isinstance(modules, Mapping) or not modules:
        raise ArgumentError(
            f"modules={modules!r}: expected a dict of names and paths, such as "
            "{'mlp_gate': 'layers.{layer}.mlp.fc1'}, or None."
        )
    taken = {*DIMS, *VARIABLES, *map(str, stim.variables)}
    units = {f"{name}_unit" for name in modules}
    for name, pattern in modules.items():
        if not is_name(name) or name in taken | units or f"{name}_unit" in taken:
            clash = name if name in taken | units else f"{name}_unit"
            why = (
                f"{clash!r} is a dimension, variable or coordinate already"
                + ("" if clash == name else ", and would be its width")
                if is_name(name)
                else "expected a letter, then letters, digits and underscores"
            )
            raise ArgumentError(
                f"modules: {name!r} cannot be the name of a variable: {why}. Give it another name."
            )
        check_pattern(name, pattern)
    return dict(modules)


def check_heads(heads: Any, names: Sequence[str], have: int) -> np.ndarray | None:
    """Return the heads chosen; None for all."""
    if heads is None:
        return None
    if not set(names) & set(_WITH_HEADS):
        raise ArgumentError(
            f"heads={heads!r} chooses heads of {', '.join(_WITH_HEADS)}, and variables="
            f"{list(names)} has none of them. Add one, or leave heads out."
        )
    chosen = np.atleast_1d(_plain_array(heads))
    legal = chosen.ndim == 1 and chosen.size and chosen.dtype.kind in "iu"
    if not legal or not all(0 <= h < have for h in chosen) or _twice(chosen.tolist()):
        again = _twice(chosen.tolist()) if legal else ""
        raise ArgumentError(
            f"heads={heads!r}: expected distinct heads, 0 to {have - 1}."
            + (f" Named twice: {again}." if again else "")
        )
    return chosen.astype(np.int64)


def check_queries(queries: Any, names: Sequence[str], model: Backbone) -> np.ndarray | None:
    """Return the numbers of the tokens chosen; None for all."""
    if queries is None:
        return None
    if "attention" not in names:
        raise ArgumentError(
            f"queries={queries!r} chooses rows of `attention`, which is not among variables="
            f"{list(names)}. Add it, or leave queries out."
        )
    prefix, (rows, columns), tokens = len(model.prefix), model.grid, token_count(model)
    if isinstance(queries, tuple) and len(queries) == 2 and not any(map(np.iterable, queries)):
        raise ArgumentError(
            f"queries={queries!r} can be read in two ways: write queries=[{queries!r}] for the "
            f"patch in that row and column, or queries={list(queries)!r} for two tokens by their "
            "numbers."
        )
    if isinstance(queries, str):
        chosen = {"prefix": range(prefix), "patches": range(prefix, tokens)}.get(queries, range(0))
        numbers: list[int | None] = list(chosen)
    else:
        numbers = [
            _token(query, prefix, rows, columns)
            for query in (queries if np.iterable(queries) else [queries])
        ]
    legal = {n for n in numbers if n is not None and 0 <= n < tokens}
    if not numbers or len(legal) < len(numbers):
        again = _twice([n for n in numbers if n in legal])
        raise ArgumentError(
            f"queries={queries!r}: expected 'prefix', 'patches', or distinct tokens: numbers, 0 to "
            f"{tokens - 1} (prefix tokens {model.prefix} first), or (row, column) of a patch on "
            f"the grid of {rows} x {columns}." + (f" Named twice: token {again}." if again else "")
        )
    return np.array(numbers, np.int64)


def _token(query: Any, prefix: int, rows: int, columns: int) -> int | None:
    """Return the number of a token that is given by it, or by its place on the grid."""
    place = _plain_array(query)
    if place.dtype.kind not in "iu":
        return None
    if place.ndim == 0:
        return int(place)
    if place.shape != (2,) or not (0 <= place[0] < rows and 0 <= place[1] < columns):
        return None
    return prefix + int(place[0]) * columns + int(place[1])


def check_preprocess(stim: xr.Dataset, model: Backbone, preprocess: str) -> None:
    """Refuse images or processors that do not give what the model takes."""
    if preprocess == "model":
        # Blank images of each size through the same call: it raises with the remedy.
        for height, width in sorted(
            set(zip(stim["height"].values, stim["width"].values, strict=True))
        ):
            model.preprocess(np.zeros((height, width, 3), np.uint8))
            if model.fixed_size:
                break
        return
    height, width = model.input_size
    wrong = np.flatnonzero((stim["height"].values != height) | (stim["width"].values != width))
    if wrong.size:
        first = stim.isel(image=int(wrong[0]))
        raise DataError(
            f"preprocess='raw' hands images to the model as they are, and it takes {height} x "
            f"{width} px (height x width); {wrong.size} of {stim.sizes['image']} images differ, "
            f"such as {first['image'].item()!r} with {first['height'].item()} x "
            f"{first['width'].item()}. Open them with size=({height}, {width}), or use "
            "preprocess='model'."
        )


def check_channels(feature_maps: Any, names: Sequence[str], have: int) -> np.ndarray | None:
    """Return the channel numbers listed; None for a count or for all."""
    if feature_maps is None:
        return None
    if "activation" not in names:
        raise ArgumentError(
            f"feature_maps={feature_maps!r} selects channels of `activation`, which is not among "
            f"variables={list(names)}. Add it, or leave feature_maps out."
        )
    if {"prefix", "embedding", "attention_output"} & set(names):
        raise ArgumentError(
            "feature_maps selects channels of `activation` only, while `prefix`, `embedding` and "
            "`attention_output` share its dimension feature_map: extract them in a call of their "
            "own."
        )
    if isinstance(feature_maps, bool):
        raise ArgumentError(f"feature_maps={feature_maps!r}: expected a count, a list or None.")
    if isinstance(feature_maps, int | np.integer):
        if not 1 <= feature_maps <= have:
            raise ArgumentError(
                f"feature_maps={feature_maps}: the model has {have} feature maps; expected 1 to "
                f"{have}, a sequence of channel numbers, or None for all."
            )
        return None
    fixed = _plain_array(feature_maps)
    if fixed.ndim != 1 or fixed.size == 0 or fixed.dtype.kind not in "iu":
        raise ArgumentError(
            f"feature_maps={feature_maps!r}: expected a count, a sequence of channel numbers, or "
            "None for all."
        )
    outside = [int(c) for c in fixed if not 0 <= c < have]
    again = _twice(fixed.tolist())
    if outside or again:
        raise ArgumentError(
            f"feature_maps={feature_maps!r}: expected distinct channel numbers, 0 to {have - 1}."
            + (f" Named twice: {again}." if again else "")
        )
    return fixed.astype(np.int64)


def check_batch(batch_size: int | str, model: Backbone, precision: str) -> int:
    """Return the number of frames a forward pass takes."""
    if batch_size == "auto":
        # Bytes of a block's output. What does not stay in a CPU's caches takes up to a tenth more
        # time: 4 frames of a ViT-B, 8 in bfloat16; 256 on a GPU.
        budget = 2_500_000 if model.device.type == "cpu" else 160_000_000
        tokens = len(model.prefix) + math.prod(model.grid)
        itemsize = 4 if precision == "float32" else 2
        return int(np.clip(budget // (tokens * model.channels * itemsize), 1, 256))
    if (
        isinstance(batch_size, bool)
        or not isinstance(batch_size, int | np.integer)
        or batch_size < 1
    ):
        raise ArgumentError(f"batch_size={batch_size!r}: expected a number of frames or 'auto'.")
    return int(batch_size)
