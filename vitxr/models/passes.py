"""How a model is run: one pass at a time, undisturbed.

What is done to a module for a pass (evaluation mode, the attention's implementation, hooks set
aside) is undone at its end, also one that fails.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vitxr.errors import ModelError

if TYPE_CHECKING:
    import torch

    from vitxr.models.backbone import Backbone

__all__ = ["Enough", "exclusive", "is_out_of_memory", "undisturbed", "unhooked"]

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


class Enough(BaseException):
    """Raised by the last hook to end a forward pass; no error, that a model might catch."""


@contextlib.contextmanager
def undisturbed(backbone: Backbone, dtype: torch.dtype, dots: bool) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast; all as before at the end.

    ``dots``: attention goes through torch's ``scaled_dot_product_attention``, which
    :func:`vitxr.models.watch.watching` sees.
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
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(kind, enabled=False),
        ):
            yield
    finally:
        if switch:
            for config, chosen in before:
                setattr(config, _CHOSEN, chosen)  # of this part alone
        for m in training:
            m.training = True


@contextlib.contextmanager
def unhooked(module: Any) -> Iterator[None]:
    """Set the user's hooks aside: what they record or count is of frames, and not of blank ones."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooked = [(m, kind, getattr(m, kind)) for m in module.modules() for kind in kinds]
    hooked = [(m, kind, hooks) for m, kind, hooks in hooked if hooks]
    try:
        for m, kind, hooks in hooked:
            setattr(m, kind, type(hooks)())
        yield
    finally:
        for m, kind, hooks in hooked:
            setattr(m, kind, hooks)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass failed because the device's memory is full."""
    import torch

    text = str(error)
    known = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return isinstance(error, known) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )
