"""Where in a model a variable is taken: found by watching two frames pass, never by name.

The attention of a block is the one dot product of queries and keys that it computes, in one of
the ways that :mod:`vitxr.models.watch` knows; its attention sublayer is the part of the block
that this happens in; its MLP's hidden units are what enters the last linear layer outside that
part. Where a block has not exactly one such
place, the site is refused, with what there is. Modules that the user names are found by
their path.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone
from vitxr.models.passes import exclusive, undisturbed, unhooked
from vitxr.models.site import (
    Form,
    Site,
    blank_frames,
    first_tensor,
    form_of,
    of_module,
    resolve,
    token_count,
)
from vitxr.models.watch import KNOWN, DotProduct, Written, watching

if TYPE_CHECKING:
    import torch

__all__ = ["DOTS", "SITES", "find_sites"]

#: Variables that are taken in a block's dot product.
DOTS = ("attention", "attention_query", "attention_key", "attention_value")
#: Variables whose place in a block has to be found.
SITES = (*DOTS, "attention_output", "mlp_hidden")


def find_sites(
    backbone: Backbone,
    layers: Sequence[int],
    variables: Sequence[str],
    modules: Mapping[str, str] | None = None,
) -> dict[str, Site]:
    """Find where variables are taken, by running a few blank frames, without the user's hooks.

    Parameters
    ----------
    backbone
        The model.
    layers
        Blocks that are wanted, ascending.
    variables
        Names of variables; those that need no finding are passed over.
    modules
        Paths by name.

    Raises
    ------
    ModelError
        If a block has not exactly one place for a variable, or a module gives what has no
        place on the patch grid.
    ArgumentError
        If a path fits no module, or several.
    """
    named = {name: module for name, module in backbone.module.named_modules() if name}
    wanted = [name for name in variables if name in SITES]
    paths = {
        name: tuple(
            resolve(named, name, pattern, layer)
            for layer in (layers if "{layer}" in pattern else layers[:1])
        )
        for name, pattern in (modules or {}).items()
    }
    if not wanted and not paths:
        return {}
    found, forms = _watch(backbone, named, layers if wanted else (), wanted, paths)
    for name, pattern in (modules or {}).items():
        layered = "{layer}" in pattern
        found[name] = [
            of_module(backbone, path, forms.get(path, []), layered) for path in paths[name]
        ]
    return {name: _same(backbone, name, sites) for name, sites in found.items()}


@dataclass
class _Call:
    """One call of a module: its path in the block, what entered it, what it gave."""

    path: str
    module: Any
    entered: Any
    gave: Any = None

    def __str__(self) -> str:
        linear = (
            f" {self.module.in_features} -> {self.module.out_features}" if _linear(self) else ""
        )
        return f"{self.path} ({type(self.module).__name__}{linear})"


@dataclass
class _Trace:
    """What ran in one block: calls in the order they began, and dot products."""

    layer: int
    path: str
    calls: list[_Call] = field(default_factory=list)
    running: list[_Call] = field(default_factory=list)
    #: Each with the calls that it is in, outermost first, and the number of calls begun before it.
    dots: list[tuple[DotProduct | Written, list[_Call], int]] = field(default_factory=list)

    def inside(self, call: _Call, part: _Call) -> bool:
        return call.path == part.path or call.path.startswith(f"{part.path}.")


def _watch(
    backbone: Backbone,
    named: Mapping[str, Any],
    layers: Sequence[int],
    wanted: Sequence[str],
    paths: Mapping[str, tuple[str, ...]],
) -> tuple[dict[str, list[Site]], dict[str, list[Form]]]:
    """Run blank frames; return the sites in the blocks, and what the named modules gave."""
    import torch

    found: dict[str, list[Site]] = {name: [] for name in wanted}
    forms: dict[str, list[Form]] = {}
    at: list[_Trace] = []

    def enter(layer: int, path: str) -> Any:
        return lambda *_: at.append(_Trace(layer, path))

    def leave(*_: Any) -> None:
        # Looked at here, so that the tensors of one block only are held.
        trace = at.pop()
        for name in wanted:
            found[name].append(_SITE[name](backbone, trace))

    def begin(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if not at:
                return
            call = _Call(path, module, first_tensor((*args, *kwargs.values())))
            at[-1].calls.append(call)
            at[-1].running.append(call)

        return hook

    def end(_module: Any, _args: Any, output: Any) -> None:
        if at:
            at[-1].running.pop().gave = output

    def seen(dot: DotProduct | Written) -> None:
        if at:
            at[-1].dots.append((dot, [*at[-1].running], len(at[-1].calls)))

    def keep(path: str) -> Any:
        return lambda _module, _args, output: forms.setdefault(path, []).append(form_of(output))

    path_of = {id(module): path for path, module in named.items()}
    weights = next(backbone.module.parameters())
    shape = (blank_frames(backbone), 3, *backbone.input_size)
    blank = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
    hooked: set[Any] = set()
    with (
        exclusive(),
        unhooked(backbone.module),
        undisturbed(backbone, weights.dtype, dots=bool(wanted)),
        contextlib.ExitStack() as undo,
    ):
        for layer in layers:
            block = backbone.blocks[layer]
            before = block.register_forward_pre_hook(enter(layer, path_of[id(block)]))
            undo.callback(before.remove)
            for path, part in block.named_modules():
                if path and part not in hooked:  # blocks may share one
                    hooked.add(part)
                    before = part.register_forward_pre_hook(begin(path), with_kwargs=True)
                    undo.callback(before.remove)
                    undo.callback(part.register_forward_hook(end).remove)
            undo.callback(block.register_forward_hook(leave).remove)
        for path in {path for every in paths.values() for path in every}:
            undo.callback(named[path].register_forward_hook(keep(path)).remove)
        if wanted:
            undo.enter_context(watching(seen))
        backbone.forward(blank)
    return found, forms


def _linear(call: _Call) -> bool:
    import torch

    return isinstance(call.module, torch.nn.Linear)


def _refuse(backbone: Backbone, trace: _Trace, what: str) -> ModelError:
    return ModelError(f"{backbone.name!r}, block {trace.layer}: {what}")


def _dot(backbone: Backbone, trace: _Trace) -> tuple[DotProduct | Written, list[_Call], int]:
    """Return the one dot product of a block; raise if there is none, or another form of it."""
    if len(trace.dots) != 1:
        raise _refuse(
            backbone, trace,
            f"expected one dot product of queries and keys; found {len(trace.dots)}, so that its "
            f"attention cannot be captured. {KNOWN} In a block of your own, write it as out = "
            "torch.nn.functional.scaled_dot_product_attention(q, k, v), in a part of its own. "
            "modules={...} captures any module's output.",
        )  # fmt: skip
    dot = trace.dots[0][0]
    frames, tokens = blank_frames(backbone), token_count(backbone)
    if isinstance(dot, DotProduct):
        shapes = {"queries": dot.query.shape, "keys": dot.key.shape, "values": dot.value.shape}
    else:
        shapes = {"scores": dot.given.shape, "values": dot.value.shape}
    for what, shape in shapes.items():
        last = tokens if what == "scores" else shape[-1]
        if tuple(shape) != (frames, backbone.heads, tokens, last):
            raise _refuse(
                backbone, trace,
                f"its attention has {what} of the shape {tuple(shape)}; expected ({frames} frames, "
                f"{backbone.heads} heads, {tokens} tokens, "
                f"{'tokens' if what == 'scores' else 'width'}), of "
                f"{len(backbone.prefix)} prefix tokens and a grid of {backbone.grid[0]} x "
                f"{backbone.grid[1]} patches. Attention in windows has no such form.",
            )  # fmt: skip
    return trace.dots[0]


def _weights(backbone: Backbone, trace: _Trace) -> Site:
    _dot(backbone, trace)
    tokens = token_count(backbone)
    return Site((trace.path,), "dot", True, "weights", (backbone.heads, tokens, tokens))


def _projected(backbone: Backbone, trace: _Trace, *, value: bool = False) -> Site:
    dot, _, _ = _dot(backbone, trace)
    query, key = dot.query, dot.key
    if not value and (query is None or key is None):
        raise _refuse(
            backbone, trace,
            "it writes its attention out, and what enters the softmax is not the product of "
            "queries and keys over the square root of their width, so that their scale is not "
            "known. `attention` and `attention_value` can be captured; for the others write it as "
            "out = torch.nn.functional.scaled_dot_product_attention(q, k, v), of queries that are "
            "not scaled yet.",
        )  # fmt: skip
    widths = [tensor.shape[3] for tensor in (query, key, dot.value) if tensor is not None]
    if len(set(widths)) > 1:
        raise _refuse(
            backbone, trace,
            f"its queries, keys and values have {widths} channels a head, which one dimension "
            "head_channel cannot label.",
        )  # fmt: skip
    shape = (backbone.heads, widths[0], *backbone.grid)
    return Site((trace.path,), "dot", True, "heads", shape)


def _sublayer(backbone: Backbone, trace: _Trace) -> tuple[_Call, _Call, int]:
    """Return the part of a block that its dot product is in, the innermost, the calls before."""
    _, within, begun = _dot(backbone, trace)
    if not within:
        raise _refuse(
            backbone, trace,
            "the block computes its attention itself, not in a part of its own, so that it is not "
            "known where the attention ends. Name the module you mean with modules={...}.",
        )  # fmt: skip
    return within[0], within[-1], begun


def _output(backbone: Backbone, trace: _Trace) -> Site:
    """Find the attention's output: of the sublayer, whose last step is its output projection.

    That of torch's ``nn.MultiheadAttention`` is part of itself; it may give (token, frame,
    channel).
    """
    import torch

    part, innermost, begun = _sublayer(backbone, trace)
    after = [
        call
        for call in trace.calls[begun:]
        if trace.inside(call, part) and any(True for _ in call.module.parameters(recurse=False))
    ]
    multihead = type(innermost.module).forward is torch.nn.MultiheadAttention.forward
    last = [innermost, *after] if multihead else after
    frames, tokens = blank_frames(backbone), token_count(backbone)
    forms: dict[tuple[int, ...], Literal["tokens", "sequence"]] = {
        (frames, tokens, backbone.channels): "tokens",
        (tokens, frames, backbone.channels): "sequence",
    }
    gave = first_tensor(part.gave)
    shape = tuple(gave.shape) if isinstance(gave, torch.Tensor) else ()
    if not (len(last) == 1 and (multihead or _linear(last[0])) and shape in forms) or not _same_of(
        gave, first_tensor(last[0].gave)
    ):
        raise _refuse(
            backbone, trace,
            f"expected its attention, {part}, to end with one output projection to (frames, "
            f"{tokens}, {backbone.channels}); it gives {shape or type(gave).__name__}, and after "
            f"its dot product runs {', '.join(map(str, after)) or 'no module with weights'}. "
            "Name the module you mean with modules={...}.",
        )  # fmt: skip
    kept = (backbone.channels, *backbone.grid)
    return Site((f"{trace.path}.{part.path}",), "output", True, forms[shape], kept)


def _same_of(gave: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether two outputs are one, frames and tokens in either order."""
    import torch

    return torch.equal(gave, given) or (
        given.ndim == 3 and torch.equal(gave, given.transpose(0, 1))
    )


def _hidden(backbone: Backbone, trace: _Trace) -> Site:
    """Find the MLP's hidden units: what enters the last linear layer outside the attention.

    All linear layers before it take one and the same input.
    """
    part, _, _ = _sublayer(backbone, trace)
    calls = [c for c in trace.calls if _linear(c) and not trace.inside(c, part)]
    up, down = calls[:-1], calls[-1:]
    inputs = {(c.entered.data_ptr(), tuple(c.entered.shape)) for c in up}
    frames, tokens = blank_frames(backbone), token_count(backbone)
    known = (
        len(inputs) == 1
        and (down[0].entered.data_ptr(), tuple(down[0].entered.shape)) not in inputs
        and tuple(down[0].entered.shape[:2]) in ((frames, tokens), (tokens, frames))
        and tuple(down[0].gave.shape) == (*down[0].entered.shape[:2], backbone.channels)
        and len({c.path for c in calls}) == len(calls)
    )
    if not known:
        raise _refuse(
            backbone, trace,
            "expected, outside the attention, an MLP of linear layers that take the same input, "
            f"and one more, which makes {backbone.channels} channels of what they give; found "
            f"{', '.join(map(str, calls)) or 'no linear layer'}. Name the module you mean with "
            "modules={...}.",
        )  # fmt: skip
    shape = (down[0].entered.shape[2], *backbone.grid)
    form: Literal["tokens", "sequence"] = (
        "tokens" if down[0].entered.shape[0] == frames else "sequence"
    )
    return Site((f"{trace.path}.{down[0].path}",), "input", True, form, shape)


_SITE: dict[str, Callable[[Backbone, _Trace], Site]] = {
    "attention": _weights,
    "attention_query": _projected,
    "attention_key": _projected,
    "attention_value": functools.partial(_projected, value=True),
    "attention_output": _output,
    "mlp_hidden": _hidden,
}


def _same(backbone: Backbone, name: str, sites: Sequence[Site]) -> Site:
    """Join the sites of all layers; raise if their forms differ."""
    forms = {(site.takes, site.form, site.shape) for site in sites}
    if len(forms) > 1:
        shapes = ", ".join(f"{site.modules[0]}: {site.shape}" for site in sites)
        raise ModelError(
            f"{backbone.name!r}: `{name}` has other shapes in other layers ({shapes}). Extract "
            "layers of one shape at a time."
        )
    first = sites[0]
    modules = tuple(path for site in sites for path in site.modules)
    return Site(modules, first.takes, first.layered, first.form, first.shape)
