"""How a model is called with a batch of images, where its family needs more than the pixels."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "INTERPOLATED",
    "IN_ORDER",
    "PACKED",
    "TOKENS_FIRST",
    "call",
    "frames_first",
    "takes_other_sizes",
]

#: Nothing is masked and nothing is shuffled (ViT-MAE).
IN_ORDER = "in patch order"
#: Position embeddings are interpolated to another image size.
INTERPOLATED = "interpolated positions"
#: Images enter as rows of flattened patches (SigLIP 2).
PACKED = "packed patches"
#: Blocks take and give (token, frame, channel), as torch's layers do without ``batch_first``.
TOKENS_FIRST = "tokens first"

_INTERPOLATE = "interpolate_pos_encoding"


def call(
    module: Any,
    batch: torch.Tensor,
    how: tuple[str, ...],
    patch: tuple[int, int],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Run a module on images and return what it returns.

    Parameters
    ----------
    module
        The model.
    batch
        (frame, channel, row, col).
    how
        Any of the ways this module names.
    patch
        Patch height and width, for packing.
    weights
        Parameters that stand in for the module's own in this call.
    """
    from torch.func import functional_call

    options: dict[str, Any] = {_INTERPOLATE: True} if INTERPOLATED in how else {}
    if PACKED in how:
        batch, extra = _packed(batch, patch)
        options |= extra
    with _in_order(module) if IN_ORDER in how else contextlib.nullcontext():
        if weights:
            return functional_call(module, dict(weights), (batch,), options)
        return module(batch, **options)


def frames_first(hidden: torch.Tensor, how: tuple[str, ...]) -> torch.Tensor:
    """What enters or leaves a block, as (frame, token, channel)."""
    return hidden.transpose(0, 1) if TOKENS_FIRST in how and hidden.ndim == 3 else hidden


def takes_other_sizes(module: Any, base: Any) -> bool:
    """Whether a transformers model has a switch that interpolates its position embeddings."""
    outer, inner = (inspect.signature(m.forward).parameters for m in (module, base))
    passed_on = any(p.kind is p.VAR_KEYWORD for p in outer.values())
    return _INTERPOLATE in outer or (passed_on and _INTERPOLATE in inner)


def _packed(batch: torch.Tensor, patch: tuple[int, int]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows of patches, each (row, col, channel) flattened; none is padding."""
    import torch

    frames, rows, columns = len(batch), batch.shape[2] // patch[0], batch.shape[3] // patch[1]
    cut = batch[:, :, : rows * patch[0], : columns * patch[1]]
    cells = cut.unflatten(3, (columns, patch[1])).unflatten(2, (rows, patch[0]))
    packed = cells.permute(0, 2, 4, 3, 5, 1).reshape(frames, rows * columns, -1)
    device = batch.device
    return packed, {
        "pixel_attention_mask": torch.ones(packed.shape[:2], dtype=torch.long, device=device),
        "spatial_shapes": torch.tensor([[rows, columns]] * frames, device=device),
    }


@contextlib.contextmanager
def _in_order(module: Any) -> Iterator[None]:
    """Let a masked autoencoder's embeddings keep every patch, where it is.

    The method is shadowed on the object for the length of a call; weights and
    configuration are not touched.
    """
    import torch

    def keep_all(sequence: torch.Tensor, noise: Any = None) -> tuple[torch.Tensor, ...]:
        places = torch.arange(sequence.shape[1], device=sequence.device)
        places = places.expand(sequence.shape[:2])
        return sequence, torch.zeros(sequence.shape[:2], device=sequence.device), places

    shadowed = [
        (m, m.__dict__.get("random_masking"))
        for m in module.modules()
        if hasattr(m, "random_masking")
    ]
    try:
        for m, _ in shadowed:
            m.random_masking = keep_all
        yield
    finally:
        for m, own in shadowed:
            m.__dict__.pop("random_masking", None)
            if own is not None:
                m.random_masking = own
