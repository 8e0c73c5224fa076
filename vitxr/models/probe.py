"""A model's layout checked by running it on blank frames, before anything is extracted.

What enters the first block says how many tokens there are, which of them each patch of the
image reaches, and which of them come from the class token and its like. A guess that the
model does not bear out is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vitxr.errors import ModelError
from vitxr.models.calls import TOKENS_FIRST, call, frames_first
from vitxr.models.structure import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["first_of", "probe"]

#: Parameters that put tokens before the patches, by the last part of their path, and their names.
_PREFIX = {
    "cls_token": "class",
    "class_token": "class",
    "class_embedding": "class",
    "distillation_token": "distillation",
    "dist_token": "distillation",
    "register_tokens": "register",
    "reg_token": "register",
}


class _Seen(BaseException):
    """Ends a pass once all that is wanted has been seen."""


def probe(module: Any, layout: Layout, name: str) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Run a model on blank frames and compare with its layout.

    Parameters
    ----------
    module
        The model. It is left as it was; hooks of the user's are not called.
    layout
        What is believed of it.
    name
        Its name, for messages.

    Returns
    -------
    prefix : tuple of str
        Names of the prefix tokens, in their order.
    channels : int
        Width of the blocks' output.
    how : tuple of str
        What a call needs besides the pixels, and whether blocks have tokens first.

    Raises
    ------
    ModelError
        If the model does not take images of that size, its blocks do not run once each and in
        order, its tokens are not the prefix and then the patches row by row, a prefix token
        has no known origin, or its classes are not as many as its logits.
    """
    from vitxr.models.capture import exclusive

    rows, columns = (n // p for n, p in zip(layout.input_size, layout.patch, strict=True))
    if not rows or not columns:
        raise ModelError(
            f"{name!r}: images of {_by(layout.input_size)} px are smaller than one patch "
            f"({_by(layout.patch)} px)."
        )
    with exclusive(), _blank(module):
        batch = _frames(module, layout)
        hidden = _entering(module, layout, batch, name)
        if len(hidden) != len(batch) == hidden.shape[1]:
            layout = replace(layout, how=(*layout.how, TOKENS_FIRST))
            hidden = frames_first(hidden, layout.how)
        channels = _check_whole_pass(module, layout, tuple(hidden.shape[1:]), name)
        first = _check_grid(hidden, rows, columns, layout, name)
        prefix = _prefix(module, layout, hidden[:1], first, name)
        if layout.prefix is not None and prefix is not None and prefix != layout.prefix:
            raise ModelError(
                f"{name!r}: its parameters put the tokens {prefix} before the patches; the adapter "
                f"says {layout.prefix}. Correct prefix=."
            )
    names = prefix if layout.prefix is None else layout.prefix
    if names is None or len(names) != first:
        raise ModelError(
            f"{name!r}: {first} tokens stand before the patches; "
            + (
                f"the adapter names {len(names)}: {names}."
                if names is not None
                else "not all of them come from a parameter that is known as a class, distillation "
                f"or register token ({', '.join(_PREFIX)}). Name them with an adapter."
            )
        )
    return names, channels, layout.how


def first_of(value: Any) -> Any:
    """Return the first of several arguments or outputs."""
    return value[0] if isinstance(value, tuple | list) and value else value


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


@contextlib.contextmanager
def _blank(module: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, nobody's hooks; all as before at the end."""
    import torch

    from vitxr.models.passes import unhooked

    training = [m for m in module.modules() if m.training]
    device = next(module.parameters()).device.type
    try:
        module.eval()
        with unhooked(module), torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for m in training:
            m.training = True


def _frames(module: Any, layout: Layout) -> torch.Tensor:
    """Blank frames; all but the first have something in one patch: first, end of row, late row."""
    import torch

    weight = next(p for p in module.parameters() if p.is_floating_point())
    (height, width), (tall, wide) = layout.input_size, layout.patch
    rows, columns = height // tall, width // wide
    something = torch.rand((3, tall, wide), generator=torch.Generator().manual_seed(0))
    frames = torch.zeros((4, 3, height, width))
    for i, (row, column) in enumerate(_places(rows, columns), 1):
        top, left = row * tall, column * wide
        frames[i, :, top : top + tall, left : left + wide] = something
    return frames.to(weight)


def _places(rows: int, columns: int) -> list[tuple[int, int]]:
    # Of the last two rows, the one that a serpentine order would run through backwards.
    return [(0, 0), (0, columns - 1), (max(rows - 1 - rows % 2, 0), 0)]


def _entering(
    module: Any,
    layout: Layout,
    batch: torch.Tensor,
    name: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return what enters the first block, (frame, token, channel)."""
    import torch

    block = module.get_submodule(layout.blocks[0])
    seen: list[Any] = []

    def enter(_module: Any, args: Any, kwargs: Any) -> None:
        seen.append(first_of((*args, *kwargs.values())))
        raise _Seen

    hook = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        _call(module, layout, batch, name, weights)
    finally:
        hook.remove()
    if not seen or not isinstance(seen[0], torch.Tensor) or seen[0].ndim != 3:
        what = tuple(seen[0].shape) if seen and isinstance(seen[0], torch.Tensor) else seen[:1]
        raise ModelError(
            f"{name!r}: what enters the block {layout.blocks[0]} is {what or 'never seen'}; "
            "expected (frames, tokens, channels). vitxr cannot label this model's tokens."
        )
    return frames_first(seen[0], layout.how)


def _call(
    module: Any,
    layout: Layout,
    batch: torch.Tensor,
    name: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Return what the module returns; None if a hook has seen enough before."""
    try:
        return call(module, batch, layout.how, layout.patch, weights)
    except _Seen:
        return None
    except Exception as error:  # whatever a model's code may raise means one thing here
        raise ModelError(
            f"{name!r} does not take images of {_by(layout.input_size)} px: "
            f"{type(error).__name__}: {error}{_mixed(module)}"
        ) from error


def _mixed(module: Any) -> str:
    """What to do where weights have several dtypes, which a model has to bring together itself."""
    first: dict[str, str] = {}
    for path, parameter in module.named_parameters():
        if parameter.is_floating_point():
            first.setdefault(str(parameter.dtype).removeprefix("torch."), path)
    if len(first) < 2:
        return ""
    kinds = ", ".join(f"{dtype} ({path}, ...)" for dtype, path in first.items())
    return (
        f". Its weights have several dtypes: {kinds}. Make them one, module.float(), and choose "
        "the precision with extract(precision=...)."
    )


def _check_grid(hidden: torch.Tensor, rows: int, columns: int, layout: Layout, name: str) -> int:
    """Check that patches have their tokens row by row, at the end; return how many stand before."""
    change = (hidden[1:] - hidden[:1]).abs().amax(2)
    found = change.argmax(1).tolist() if change.any(1).all() else []
    tokens = hidden.shape[1]
    first = tokens - rows * columns
    expected = [first + row * columns + column for row, column in _places(rows, columns)]
    if first < 0 or found != expected:
        places = dict(zip(_places(rows, columns), found, strict=False))
        raise ModelError(
            f"{name!r}: an image of {_by(layout.input_size)} px and patches of {_by(layout.patch)} "
            f"px have {rows} x {columns} = {rows * columns} patches; the first block takes "
            f"{tokens} tokens, and patches (row, column) change the tokens {places or 'nowhere'}. "
            "Expected prefix tokens, then one token a patch, row by row. vitxr cannot label "
            "this model's tokens."
        )
    return first


def _prefix(
    module: Any, layout: Layout, blank: torch.Tensor, first: int, name: str
) -> tuple[str, ...] | None:
    """Find which parameter each prefix token comes from, by changing it; None if one has none."""
    import torch

    inside = tuple(f"{path}." for path in layout.blocks)
    frame = _frames(module, layout)[:1]
    names: dict[int, str] = {}
    for path, parameter in module.named_parameters():
        kind = _PREFIX.get(path.rpartition(".")[2])
        if kind is None or path.startswith(inside) or not parameter.numel():
            continue
        # Not the same in all channels: a norm would take it away.
        other = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
        changed = _entering(module, layout, frame, name, {path: parameter + other.to(parameter)})
        at = (changed - blank)[0].abs().amax(1).nonzero()[:, 0].tolist()
        if any(i >= first or i in names for i in at):
            raise ModelError(
                f"{name!r}: the parameter {path} reaches the tokens {at}, of which "
                f"the first {first} stand before the patches. vitxr cannot name this model's "
                "prefix tokens."
            )
        names |= {i: f"register_{n}" if kind == "register" else kind for n, i in enumerate(at)}
    if sorted(names) != list(range(first)) or len(set(names.values())) < first:
        return None
    return tuple(names[i] for i in range(first))


def _check_whole_pass(module: Any, layout: Layout, form: tuple[int, ...], name: str) -> int:
    """Check a pass from end to end; return the width of the blocks.

    The blocks run once each, in order, and keep the tokens; heads divide the width; classes are
    as many as logits.
    """
    import torch

    ran: list[tuple[int, Any]] = []

    def after(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden, shape = first_of(output), None
            if isinstance(hidden, torch.Tensor):
                shape = tuple(frames_first(hidden, layout.how).shape)
            ran.append((layer, shape))
            if len(ran) > len(layout.blocks):
                raise _Seen

        return hook

    with contextlib.ExitStack() as undo:
        for layer, path in enumerate(layout.blocks):
            block = module.get_submodule(path)
            undo.callback(block.register_forward_hook(after(layer)).remove)
        output = _call(module, layout, _frames(module, layout)[:1], name)
    order = [layer for layer, _ in ran]
    if order != list(range(len(layout.blocks))):
        raise ModelError(
            f"{name!r}: its {len(layout.blocks)} blocks run in the order {order[:20]}; expected "
            "each once, first to last."
        )
    wrong = {layer: shape for layer, shape in ran if shape != (1, *form)}
    if wrong:
        raise ModelError(
            f"{name!r}: what enters the first block is (frames, {form[0]}, {form[1]}), and blocks "
            f"give {wrong}; expected the same of every block. vitxr cannot label this model's "
            "tokens."
        )
    if layout.prefix is not None and form[1] % layout.heads:
        raise ModelError(
            f"{name!r}: its blocks have {form[1]} channels, and the adapter says heads="
            f"{layout.heads}; expected a divisor of them. Correct heads=."
        )
    if layout.classes:
        _check_classes(output, layout, name)
    return form[1]


def _check_classes(output: Any, layout: Layout, name: str) -> None:
    import torch

    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (1, len(layout.classes)):
        if isinstance(logits, torch.Tensor):
            what = f"logits of the shape {tuple(logits.shape)}"
        else:
            what = f"a {type(output).__name__} without logits"
        where = "classes=" if layout.prefix is not None else "`id2label` or `num_labels`"
        raise ModelError(
            f"{name!r}: {len(layout.classes)} classes are named ({layout.classes[0]!r}, ...), and "
            f"of one frame the module returns {what}; expected (1, {len(layout.classes)}). Correct "
            f"{where}, or leave the names out where it returns none."
        )
