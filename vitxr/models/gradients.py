"""Gradients of a class's logit with respect to attention weights, and the relevance they give.

Attention is computed in the open for this one pass: torch's fused dot product, which
transformers, timm and torch's own layers call, is replaced by softmax and matrix product, so
that its weights have gradients. Parameters have none meanwhile. All is as before at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone
from vitxr.models.calls import frames_first
from vitxr.models.passes import exclusive, undisturbed
from vitxr.models.watch import KNOWN, DotProduct, Written, watching

if TYPE_CHECKING:
    import torch

__all__ = ["attention_gradients", "attention_relevance"]


def attention_gradients(
    backbone: Backbone, frames: np.ndarray, classes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention weights of every block, and the gradients of a logit with respect to them.

    Parameters
    ----------
    backbone
        The model, with a classification head.
    frames
        (frame, channel, row, col), as the model takes them.
    classes
        Number of the class, a frame.

    Returns
    -------
    weights, gradients
        (frame, layer, head, query, key), float32.
    logits
        (frame, class), float32.
    """
    import torch

    chosen = torch.as_tensor(np.asarray(classes), device=backbone.device)[:, None]
    with _pass(backbone, frames) as (weights, _, logits):
        gradients = torch.autograd.grad(logits.gather(1, chosen).sum(), weights)
        both = (torch.stack(list(t), 1).detach() for t in (weights, gradients))
        first, second = (t.float().cpu().numpy() for t in both)
        return first, second, logits.detach().float().cpu().numpy()


def attention_relevance(
    backbone: Backbone, frames: np.ndarray, classes: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Relevance of every patch for classes: one forward pass, one backward pass a class.

    Of ``R_L ... R_1 R_0`` with ``R_l = I + mean over heads of max(0, A_l * dA_l)``, less the
    identity, the rows of the tokens that the classification head reads. Rows are vectors all the
    way down, so that no product of matrices is made.

    Parameters
    ----------
    backbone
        The model, with a classification head.
    frames
        (frame, channel, row, col), as the model takes them.
    classes
        Numbers of classes; None for the class of the largest logit, a frame's own.

    Returns
    -------
    relevance
        (frame, class, patch_row, patch_col), float32; with None one class.
    predicted
        (frame,) number of the class of the largest logit.
    read
        Names of the prefix tokens that the head reads and whose rows were averaged; empty if it
        reads patches only, and theirs were.
    """
    import torch

    with _pass(backbone, frames) as (weights, hidden, logits):
        best = logits.argmax(1)
        wanted = [best] if classes is None else [torch.full_like(best, c) for c in classes]
        out: list[np.ndarray] = []
        read: tuple[str, ...] = ()
        for number, target in enumerate(wanted):
            *gradients, at_end = torch.autograd.grad(
                logits.gather(1, target[:, None]).sum(),
                [*weights, hidden],
                retain_graph=number < len(wanted) - 1,
            )
            with torch.no_grad():
                row, read = _start(backbone, at_end)
                row = row.expand(len(logits), 1, -1)
                start = row
                for weight, gradient in zip(reversed(weights), reversed(gradients), strict=True):
                    row = row + row @ (weight * gradient).clamp_(min=0).mean(1)
                patches = (row - start)[:, 0, len(backbone.prefix) :]
                out.append(patches.unflatten(1, backbone.grid).float().cpu().numpy())
        return np.stack(out, 1), best.cpu().numpy(), read


def _start(backbone: Backbone, at_end: torch.Tensor) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Mean over the tokens that the head reads: those whose last state changes the logit."""
    at_end = frames_first(at_end, backbone.how)
    read = at_end.abs().amax((0, 2)) > 0
    prefix = len(backbone.prefix)
    names = tuple(n for n, yes in zip(backbone.prefix, read[:prefix].tolist(), strict=True) if yes)
    if names:
        read[prefix:] = False
    if not read.any():
        raise ModelError(
            f"{backbone.name!r}: the logit does not depend on what the last block gives, so that "
            "no token has relevance."
        )
    return (read / read.sum()).to(at_end.dtype), names


@contextlib.contextmanager
def _pass(
    backbone: Backbone, frames: np.ndarray
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Run a batch; give each block's weights, the last block's output, and the logits."""
    import torch

    weights: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    inside: list[int] = []
    counts = [0] * len(backbone.blocks)

    def attend(dot: DotProduct | Written) -> torch.Tensor | None:
        if not inside:
            return None
        weight = dot.scores().softmax(-1)  # in the model's own precision, with gradients
        if not weight.requires_grad:  # the first: nothing before it has gradients
            weight = weight.detach().requires_grad_()
        counts[inside[-1]] += 1
        weights.append(weight)
        return weight

    def enter(layer: int) -> Any:
        return lambda *_: inside.append(layer)

    def leave(_module: Any, _args: Any, output: Any) -> None:
        last[:] = [output[0] if isinstance(output, tuple) else output]
        inside.clear()

    with exclusive(), _open(backbone), contextlib.ExitStack() as undo:
        for layer, block in enumerate(backbone.blocks):
            undo.callback(block.register_forward_pre_hook(enter(layer)).remove)
            undo.callback(block.register_forward_hook(leave).remove)
        parameter = next(p for p in backbone.module.parameters() if p.is_floating_point())
        batch = torch.as_tensor(frames).to(parameter)
        with watching(attend):
            output = backbone.forward(batch)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if logits is None or logits.ndim != 2:
            raise ModelError(
                f"{backbone.name!r} gives no logits; relevance is for a class. Load a model with a "
                "classification head."
            )
        if any(n != 1 for n in counts):
            raise ModelError(
                f"{backbone.name!r}: its blocks compute attention {counts} times; expected once "
                f"each. {KNOWN}"
            )
        tokens = len(backbone.prefix) + backbone.grid[0] * backbone.grid[1]
        expected = (len(batch), backbone.heads, tokens, tokens)
        if any(tuple(w.shape) != expected for w in weights):
            raise ModelError(
                f"{backbone.name!r}: attention weights are {tuple(weights[0].shape)}; expected "
                f"{expected}: (frames, heads, tokens, tokens)."
            )
        yield weights, last[0], logits


@contextlib.contextmanager
def _open(backbone: Backbone) -> Iterator[None]:
    """As :func:`undisturbed`, with gradients of activations only; all as before at the end."""
    import torch

    learning = [p for p in backbone.module.parameters() if p.requires_grad]
    dtype = next(p.dtype for p in backbone.module.parameters() if p.is_floating_point())
    try:
        for parameter in learning:
            parameter.requires_grad = False
        with (
            undisturbed(backbone, dtype, dots=True),
            torch.enable_grad(),
        ):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad = True
