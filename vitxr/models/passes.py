"""How a model is run: one pass at a time, undisturbed, and its dot products watched.

What is done to a module for a pass (evaluation mode, the attention's implementation,
watching) is undone at its end, also one that fails.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone

if TYPE_CHECKING:
    import torch

__all__ = ["DotProduct", "Enough", "exclusive", "is_out_of_memory", "undisturbed", "watching"]

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


#: Where transformers keeps which implementation of attention a part of a model uses.
_CHOSEN = "_attn_implementation_internal"


class Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Raised by the last hook to end a forward pass."""


@contextlib.contextmanager
def undisturbed(backbone: Backbone, dtype: torch.dtype, dots: bool) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast; all as before at the end.

    ``dots``: attention goes through torch's ``scaled_dot_product_attention``, which
    :func:`watching` sees.
    """
    import torch

    if _forked and dtype == torch.bfloat16:
        raise ModelError(
            "bfloat16 crashes in a process that was forked from one that has run a model. "
            "Start processes with multiprocessing's 'spawn' method, or use precision='float32'."
        )
    module: Any = backbone.module
    training = [m for m in module.modules() if m.training]
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, _CHOSEN)]
    other = any(chosen != "sdpa" for _, chosen in before)
    switch = dots and other and hasattr(module, "set_attn_implementation")
    try:
        module.eval()
        if switch:
            module.set_attn_implementation("sdpa")
        kind = backbone.device.type
        # Not inference_mode: what a model caches in its first pass could never be trained with.
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            yield
    finally:
        if switch:
            for config, chosen in before:
                setattr(config, _CHOSEN, chosen)  # of this part alone
        for m in training:
            m.training = True


@dataclass(frozen=True)
class DotProduct:
    """One call of ``scaled_dot_product_attention``.

    Attributes
    ----------
    query, key, value
        (frame, head, token, head_channel), as they enter it: after biases, norms and
        rotations, and before the division by the square root of their width.
    mask
        What is added to the scores, or where they count, broadcastable to (frame, head,
        query, key); None for nothing.
    scale
        What the dot products are multiplied by.
    causal
        Whether a token attends to earlier ones only.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    causal: bool

    def weights(
        self, heads: torch.Tensor | None = None, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention weights, float32 (frame, head, query, key), of all or some heads and queries.

        ``softmax(scale * query key' + mask)`` over the keys.
        """
        import torch

        query, key, mask = self.query, self.key, self.mask
        shape = (*query.shape[:3], key.shape[2])
        if self.causal:
            mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
        mask = None if mask is None else mask.expand(shape)
        if heads is not None:
            query, key = query.index_select(1, heads), key.index_select(1, heads)
            mask = None if mask is None else mask.index_select(1, heads)
        if queries is not None:
            query = query.index_select(2, queries)
            mask = None if mask is None else mask.index_select(2, queries)
        scores = (query.float() * self.scale) @ key.float().transpose(2, 3)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        return scores.softmax(-1)


def watching(seen: Callable[[DotProduct], Any]) -> contextlib.AbstractContextManager[Any]:
    """Call ``seen`` with every dot product of queries and keys that this thread computes.

    What it returns, if not None, takes the place of the result.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    attend = torch.nn.functional.scaled_dot_product_attention

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is attend:
                instead = seen(_read(*args, **kwargs))
                if instead is not None:
                    return instead
            return func(*args, **kwargs)

    return Watch()


def _read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DotProduct:
    if enable_gqa:  # several queries share a key and a value
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return DotProduct(query, key, value, attn_mask, scale, is_causal)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass failed because the device's memory is full."""
    import torch

    text = str(error)
    known = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return isinstance(error, known) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )
