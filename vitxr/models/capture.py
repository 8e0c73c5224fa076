"""One forward pass: what enters the model, what is kept, where it stops.

Hooks are this module's own and are gone after every call, also one that fails.
The pass ends at the deepest block that is wanted; selection and dtype are
applied on the device, before anything is copied to the host.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone

if TYPE_CHECKING:
    import torch

__all__ = ["capture"]

# Hooks hang on a module that threads share, so a process runs one pass at a time.
_LOCK = threading.RLock()


class _Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Raised by the last hook to end a forward pass."""


def capture(
    backbone: Backbone,
    batch: torch.Tensor,
    layers: Sequence[int],
    variables: Sequence[str],
    channels: np.ndarray | None = None,
    dtype: str = "float32",
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

    Returns
    -------
    dict of str to numpy.ndarray
        Each with the leading dimension ``frame``, the others as in
        :data:`vitxr.names.VARIABLES`.
    """
    import torch

    wanted = set(variables)
    out_dtype = getattr(torch, dtype)
    kept: dict[str, Any] = {name: [None] * len(layers) for name in wanted & set(_PER_LAYER)}

    def tokens(hidden: Any) -> torch.Tensor:
        return _tokens(backbone, hidden[0] if isinstance(hidden, tuple) else hidden)

    def after_embeddings(_module: Any, _args: Any, output: Any) -> None:
        patches = _on_grid(backbone, tokens(output))
        kept["embedding"] = patches.to(out_dtype).cpu().numpy()
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
                kept["activation"][position] = (
                    _on_grid(backbone, patches).to(out_dtype).cpu().numpy()
                )
            if "prefix" in wanted:
                prefix = hidden[:, : len(backbone.prefix)]
                kept["prefix"][position] = prefix.to(out_dtype).cpu().numpy()
            if position == len(layers) - 1 and "logits" not in wanted:
                raise _Enough

        return hook

    def after_attention(position: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            kept["attention"][position] = _weights(backbone, output).to(out_dtype).cpu().numpy()

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

    with _LOCK, _undisturbed(backbone, eager="attention" in wanted), contextlib.ExitStack() as undo:
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(hook).remove)
        with contextlib.suppress(_Enough):
            output = backbone.module(batch)
            if "logits" in wanted:
                kept["logits"] = output.logits.to(out_dtype).cpu().numpy()
    for name in set(_PER_LAYER) & wanted:
        kept[name] = np.stack(kept[name], axis=1)
    return kept


_PER_LAYER = ("activation", "prefix", "attention")


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
    return patches.reshape(*patches.shape[:2], *backbone.grid).contiguous()


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
