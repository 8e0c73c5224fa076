"""A place in a model that a variable is taken from, and that of a module named by its path."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vitxr.errors import ArgumentError, ModelError
from vitxr.models.backbone import Backbone

__all__ = [
    "Site",
    "blank_frames",
    "check_pattern",
    "first_tensor",
    "form_of",
    "of_module",
    "resolve",
    "token_count",
]


@dataclass(frozen=True)
class Site:
    """Where a variable is taken.

    Attributes
    ----------
    modules
        Paths in the module: one a wanted layer, or only one.
    takes
        The module's output; what enters it; or the dot product that is computed in it.
    layered
        Whether there is one a layer.
    form
        ``"tokens"``: (frame, token, width); ``"sequence"``: (token, frame, width); ``"map"``:
        (frame, width, row, col) on the patch grid; ``"frame"``: (frame, width); ``"heads"``:
        (frame, head, token, width); ``"weights"``: (frame, head, query, key).
    shape
        Of what is kept of one frame of one layer.
    """

    modules: tuple[str, ...]
    takes: Literal["output", "input", "dot"]
    layered: bool
    form: Literal["tokens", "sequence", "map", "frame", "heads", "weights"]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        names = ", ".join(self.modules)
        what = {"output": "output of", "input": "input of", "dot": "dot product in"}[self.takes]
        return f"{what} {names}"


def token_count(backbone: Backbone) -> int:
    """Tokens of a frame: the prefix, and one a patch."""
    return len(backbone.prefix) + math.prod(backbone.grid)


def blank_frames(backbone: Backbone) -> int:
    """Frames that are tried: two or more, and no number that heads or tokens have."""
    return next(n for n in range(2, 5) if n not in (backbone.heads, token_count(backbone)))


def first_tensor(value: Any) -> Any:
    """Return the first of several outputs or arguments, as a block's or an attention's."""
    return value[0] if isinstance(value, tuple | list) and value else value


def check_pattern(name: str, pattern: Any) -> None:
    """Refuse what is no path of modules."""
    rest = pattern.replace("{layer}", "") if isinstance(pattern, str) else "{"
    if not isinstance(pattern, str) or not pattern or set(rest) & set("{}*"):
        raise ArgumentError(
            f"modules[{name!r}] = {pattern!r}: expected the path of a module as "
            "model.module.named_modules() gives it, or its end, with {layer} where the block's "
            "number stands, such as 'layers.{layer}.mlp.fc1'."
        )


def resolve(named: Mapping[str, Any], name: str, pattern: str, layer: int) -> str:
    """Return the path of the one module that a pattern fits; raise with the nearest if none."""
    path = pattern.replace("{layer}", str(layer))
    found = [path] if path in named else [p for p in named if p.endswith(f".{path}")]
    if len(found) == 1:
        _check_runs(name, pattern, found[0], named[found[0]])
        return found[0]
    if found:
        raise ArgumentError(
            f"modules[{name!r}] = {pattern!r} fits {len(found)} modules: {', '.join(found[:5])}. "
            "Give more of the path."
        )
    near = difflib.get_close_matches(path, named, n=5, cutoff=0.4) or list(named)[:5]
    raise ArgumentError(
        f"modules[{name!r}] = {pattern!r} fits no module of the model. The nearest: "
        f"{', '.join(near)}. model.module.named_modules() lists all."
    )


def _check_runs(name: str, pattern: str, path: str, module: Any) -> None:
    """Refuse a list of modules: it is never called."""
    import torch

    if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
        inside = [f"{path}.{child}" for child, _ in module.named_children()]
        raise ArgumentError(
            f"modules[{name!r}] = {pattern!r}: {path} is a {type(module).__name__}, which only "
            "holds modules and gives nothing itself. Name one of them: "
            f"{', '.join(inside[:3]) or 'it has none'}; of the blocks' list "
            "{layer} stands for the block's number."
        )


#: Shape of a floating-point tensor, or (); and in words.
Form = tuple[tuple[int, ...], str]


def form_of(output: Any) -> Form:
    """Return the form of what a module gives."""
    import torch

    value = first_tensor(output)
    if not isinstance(value, torch.Tensor):
        return (), f"a {type(value).__name__}"
    shape = tuple(value.shape)
    return shape if value.is_floating_point() else (), f"{shape} {value.dtype}"


def of_module(backbone: Backbone, path: str, forms: Sequence[Form], layered: bool) -> Site:
    """Find how to label what a module gives, from the form it has."""
    if len(forms) != 1:
        raise ModelError(
            f"{backbone.name!r}: the module {path} runs {len(forms)} times in a pass; expected "
            "once. "
            + (
                "Name one that is called itself: what encloses it may use its weights only, as "
                "torch's nn.MultiheadAttention does with its out_proj."
                if not forms
                else "Name the module around each of its calls, if there is one."
            )
        )
    shape, given = forms[0]
    grid, tokens, frames = backbone.grid, token_count(backbone), blank_frames(backbone)
    if len(shape) == 3 and shape[:2] == (tokens, frames):  # as out of torch's nn.MultiheadAttention
        return Site((path,), "output", layered, "sequence", (shape[2], *grid))
    if shape[:1] == (frames,):
        if len(shape) == 3 and shape[1] == tokens:
            return Site((path,), "output", layered, "tokens", (shape[2], *grid))
        if len(shape) == 4 and shape[2:] == grid:
            return Site((path,), "output", layered, "map", shape[1:])
        if len(shape) == 2:
            return Site((path,), "output", layered, "frame", shape[1:])
    raise ModelError(
        f"{backbone.name!r}: of {frames} frames the module {path} gives {given}; expected "
        f"(frames, {tokens} tokens, width), (frames, width) or (frames, width, {grid[0]} rows, "
        f"{grid[1]} columns of patches), floating-point. vitxr cannot label it."
    )
