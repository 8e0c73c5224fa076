"""One forward pass: what enters the model, what is kept, where it stops.

Hooks are this module's own and are gone after every call, also one that fails.
The pass ends at the deepest block that is wanted; selection and dtype are
applied on the device, before anything is copied to the host.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone

if TYPE_CHECKING:
    import torch

__all__ = ["capture", "exclusive", "frame_shape", "is_out_of_memory"]

#: The process that has run a pass, if this one or its parent has.
_ran_in = 0
#: Whether this process was forked from one that had run a pass.
_forked = False


_lock = threading.RLock()


def _after_fork() -> None:
    """Make a new lock in a forked process: whoever held the old one is not in it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Hold the process's one pass: hooks hang on a module that its threads share.

    In a process that was forked from one that had run a model, torch has one thread
    from then on: its pool does not survive the fork.
    """
    import torch

    global _ran_in, _forked
    with _lock:
        if _ran_in not in (0, os.getpid()):
            torch.set_num_threads(1)
            _forked = True
        _ran_in = os.getpid()
        yield


class _Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Raised by the last hook to end a forward pass."""


def capture(
    backbone: Backbone,
    batch: torch.Tensor,
    layers: Sequence[int],
    variables: Sequence[str],
    channels: np.ndarray | None = None,
    dtype: str = "float32",
    keepbits: int | None = None,
    out: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Run one batch and keep what is asked for.

    Parameters
    ----------
    backbone
        The model.
    batch
        (frame, channel, row, col) on the model's device.
    layers
        Blocks to keep, ascending.
    variables
        Any of ``activation, prefix, embedding, attention, logits``.
    channels
        Channels to keep of ``activation``, (layer, feature_map); None keeps all.
    dtype
        NumPy dtype name of the result.
    keepbits
        Round float32 to this many bits of its mantissa, to nearest, ties to even.
    out
        Arrays to write to, one frame a frame of the batch; made if not given.

    Returns
    -------
    dict of str to numpy.ndarray
        ``out``: each with the leading dimension ``frame``, the others as in
        :data:`vitxr.names.VARIABLES`.
    """
    import torch

    wanted = set(variables)
    kept = 0 if channels is None else channels.shape[1]
    if out is None:
        out = {
            name: np.empty((len(batch), *frame_shape(backbone, name, len(layers), kept)), dtype)
            for name in variables
        }
    host = {name: torch.from_numpy(array) for name, array in out.items()}

    def keep(name: str, value: torch.Tensor, position: int | None = None) -> None:
        target = host[name] if position is None else host[name][:, position]
        if value.shape != target.shape:
            raise ModelError(
                f"{backbone.name!r}: `{name}` of a frame has the shape {tuple(value.shape[1:])}; "
                f"expected {tuple(target.shape[1:])}. vitxr cannot label this model's output."
            )
        if keepbits is not None:
            value = _rounded(value.to(torch.float32), keepbits)
        if value.device.type != "cpu":
            # Cast and laid out over there, so that one contiguous piece crosses over.
            value = value.to(target.dtype).contiguous()
        target.copy_(value)

    def tokens(hidden: Any) -> torch.Tensor:
        return _tokens(backbone, hidden[0] if isinstance(hidden, tuple) else hidden)

    def after_embeddings(_module: Any, _args: Any, output: Any) -> None:
        keep("embedding", _on_grid(backbone, tokens(output)))
        if wanted == {"embedding"}:
            raise _Enough

    def after_block(position: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = tokens(output)
            if "activation" in wanted:
                patches = hidden
                if channels is not None:
                    index = torch.as_tensor(channels[position], device=hidden.device)
                    patches = hidden.index_select(2, index)
                keep("activation", _on_grid(backbone, patches), position)
            if "prefix" in wanted:
                keep("prefix", hidden[:, : len(backbone.prefix)], position)
            if position == len(layers) - 1 and "logits" not in wanted:
                raise _Enough

        return hook

    def after_attention(position: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            keep("attention", _weights(backbone, output), position)

        return hook

    hooks: list[tuple[Any, Any]] = []
    if "embedding" in wanted:
        hooks.append((backbone.embeddings, after_embeddings))
    if wanted - {"embedding"}:
        for position, layer in enumerate(layers):
            block = backbone.blocks[layer]
            if "attention" in wanted:
                hooks.append((_attention_module(backbone, block), after_attention(position)))
            hooks.append((block, after_block(position)))

    with (
        exclusive(),
        _undisturbed(backbone, eager="attention" in wanted),
        contextlib.ExitStack() as undo,
    ):
        if _forked and batch.dtype == torch.bfloat16:
            raise ModelError(
                "bfloat16 crashes in a process that was forked from one that has run a model. "
                "Start processes with multiprocessing's 'spawn' method, or use precision='float32'."
            )
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(hook).remove)
        with contextlib.suppress(_Enough):
            output = backbone.module(batch)
            if "logits" in wanted:
                keep("logits", output.logits)
    return out


def frame_shape(backbone: Backbone, name: str, layers: int, kept: int = 0) -> tuple[int, ...]:
    """Shape of a variable for one frame; ``kept`` feature maps of the activation, 0 for all."""
    tokens = len(backbone.prefix) + math.prod(backbone.grid)
    return {
        "activation": (layers, kept or backbone.channels, *backbone.grid),
        "prefix": (layers, len(backbone.prefix), backbone.channels),
        "embedding": (backbone.channels, *backbone.grid),
        "attention": (layers, backbone.heads, tokens, tokens),
        "logits": (len(backbone.classes),),
    }[name]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass failed because the device's memory is full."""
    import torch

    text = str(error)
    known = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return isinstance(error, known) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )


def _rounded(value: torch.Tensor, keepbits: int) -> torch.Tensor:
    """Round a float32 tensor's mantissas, to nearest, ties to even."""
    import torch

    drop = 23 - keepbits
    bits = value.contiguous().view(torch.int32)
    nearest = bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)
    nearest = nearest & ~((1 << drop) - 1)
    # A NaN's bits may carry over into a number.
    return torch.where(value.isnan(), value, nearest.view(torch.float32))


def _tokens(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Check that the tokens are the prefix and one a patch; raise if not."""
    rows, columns = backbone.grid
    expected = len(backbone.prefix) + rows * columns
    if hidden.ndim != 3 or hidden.shape[1] != expected or hidden.shape[2] != backbone.channels:
        raise ModelError(
            f"{backbone.name!r}: a block gives {tuple(hidden.shape)}; expected (frames, "
            f"{expected}, {backbone.channels}) = {len(backbone.prefix)} prefix tokens "
            f"{backbone.prefix} and a grid of {rows} x {columns} patches. vitxr cannot "
            "label this model's tokens."
        )
    return hidden


def _on_grid(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """(frame, token, channel) -> (frame, channel, patch_row, patch_col)."""
    patches = hidden[:, len(backbone.prefix) :].transpose(1, 2)
    return patches.unflatten(2, backbone.grid)


def _attention_module(backbone: Backbone, block: Any) -> Any:
    """Return the module inside a block that gives the attention weights."""
    recorded = getattr(backbone.module.base_model, "_can_record_outputs", None) or {}
    target = recorded.get("attentions")
    target = getattr(target, "target_class", target)
    found = [m for m in block.modules() if isinstance(target, type) and isinstance(m, target)]
    if len(found) != 1:
        raise ModelError(
            f"{backbone.name!r}: expected one attention module in each block, found {len(found)}; "
            "its attention weights cannot be captured."
        )
    return found[0]


def _weights(backbone: Backbone, output: Any) -> torch.Tensor:
    """Return the attention weights of an attention module's output, never silently none."""
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    tokens = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
    expected = (backbone.heads, tokens, tokens)
    if weights is None or tuple(weights.shape[1:]) != expected:
        got = None if weights is None else tuple(weights.shape)
        raise ModelError(
            f"{backbone.name!r}: a block's attention gives {got}; expected (frames, "
            f"{', '.join(map(str, expected))}). This model computes no attention weights "
            "that can be captured."
        )
    return weights


@contextlib.contextmanager
def _undisturbed(backbone: Backbone, eager: bool) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast; all as before at the end."""
    import torch

    module: Any = backbone.module
    training = [m for m in module.modules() if m.training]
    implementation = module.config._attn_implementation
    switch = eager and implementation != "eager"
    try:
        module.eval()
        if switch:
            # The fused kernels return no weights; the eager one computes the same sums.
            module.set_attn_implementation("eager")
        kind = backbone.device.type
        with torch.inference_mode(), torch.autocast(kind, enabled=False):
            yield
    finally:
        if switch:
            module.set_attn_implementation(implementation)
        for m in training:
            m.training = True
