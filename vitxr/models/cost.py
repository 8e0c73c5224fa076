"""What one forward pass costs: operations counted from the shapes that occur, and time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vitxr.models.passes import exclusive, undisturbed, unhooked
from vitxr.models.watch import watching

if TYPE_CHECKING:
    import torch

    from vitxr.models.backbone import Backbone

__all__ = ["operations", "seconds"]


def operations(model: Backbone) -> int:
    """Count the floating-point operations of one frame, two for each multiplication and addition.

    Of matrix products and convolutions, in the shapes that occur in a pass; what is done value
    by value (norms, activations, softmax) is not counted. A transformer of n tokens, c channels
    and h hidden units a layer makes ``8 n c² + 4 n² c + 4 n c h`` a block.

    Examples
    --------
    >>> import vitxr
    >>> operations(vitxr.load_model("digits")) // 10**6
    26
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention is not counted on all devices, nor torch's fast path of whole layers, which
    # is not taken while attention is watched; in plain products it is the same sum.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain, watching(lambda _: None):
        _pass(model, torch.zeros((1, 3, *model.input_size)))
    return counter.get_total_flops()


def seconds(model: Backbone, repeats: int = 3) -> float:
    """Measure the shortest time of one frame's forward pass on the model's device, in seconds."""
    import torch

    frame = torch.zeros((1, 3, *model.input_size))
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        _pass(model, frame)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _pass(model: Backbone, frame: torch.Tensor) -> None:
    """Run blank frames; the module is left as it was."""
    weight = next(p for p in model.module.parameters() if p.is_floating_point())
    with exclusive(), unhooked(model.module), undisturbed(model, weight.dtype, dots=False):
        model.forward(frame.to(weight))
