"""How patches become tokens: the patch embedding's filters and the position embeddings, as arrays.

Both are found from what the model does: the filters are the convolution that steps by one
patch, the positions what is added to its output whatever the image.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone
from vitxr.models.passes import exclusive, undisturbed, unhooked

__all__ = ["patch_filters", "position_embeddings"]


def patch_filters(backbone: Backbone) -> np.ndarray:
    """Weights of the patch embedding, (feature_map, channel, row, col), float32."""
    return _projection(backbone)[1].weight.detach().float().cpu().numpy()


def position_embeddings(backbone: Backbone) -> np.ndarray:
    """What the model adds to each patch, (feature_map, patch_row, patch_col), float32.

    Of a blank and of a random image: the difference between the tokens and the patch embedding,
    at the first place before the first block where it is the same for both and not zero. It is
    what the model adds at its input size, interpolated if it does so.

    Raises
    ------
    ModelError
        If there is no such place, as with rotary or relative positions.
    """
    import torch

    path, _ = _projection(backbone)
    rows, columns = backbone.grid
    patches = rows * columns
    height, width = backbone.input_size
    parameter = next(p for p in backbone.module.parameters() if p.is_floating_point())
    batch = torch.zeros(2, 3, height, width)
    batch[1] = torch.rand((3, height, width), generator=torch.Generator().manual_seed(0)) - 0.5
    embedded: list[torch.Tensor] = []
    states: list[torch.Tensor] = []

    class _Done(Exception):  # noqa: N818 (a signal, not an error)
        pass

    def see(value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) and value else value
        fits = isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) == 2
        if (
            embedded
            and fits
            and value.shape[1] >= patches
            and value.shape[2] == len(embedded[0][0])
        ):
            states.append(value[:, value.shape[1] - patches :])

    def enter(_module: Any, args: Any, kwargs: Any) -> None:
        see((*args, *kwargs.values()))
        raise _Done

    module = backbone.module
    with (
        exclusive(),
        undisturbed(backbone, parameter.dtype, dots=False),
        unhooked(backbone.module),
        contextlib.ExitStack() as undo,
    ):
        for name, child in module.named_modules():
            if name == path:
                hook = child.register_forward_hook(lambda _m, _a, out: embedded.append(out))
            else:
                hook = child.register_forward_hook(lambda _m, _a, out: see(out))
            undo.callback(hook.remove)
        first = backbone.blocks[0]
        undo.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        with contextlib.suppress(_Done):
            backbone.forward(batch.to(parameter))
    if embedded and tuple(embedded[0].shape[2:]) == (rows, columns):
        plain = embedded[0].flatten(2).transpose(1, 2)
        for state in states:
            added = state - plain
            size = added.abs().max()
            same = (added[0] - added[1]).abs().max() <= 1e-5 * max(size, plain.abs().max())
            if same and size > 1e-6 * plain.abs().max():
                return added[0].T.reshape(-1, rows, columns).float().cpu().numpy()
    raise ModelError(
        f"{backbone.name!r} adds nothing to its patches before the first block that is the same "
        "for all images: it has no absolute position embedding (its positions are rotary, relative "
        "or absent)."
    )


def _projection(backbone: Backbone) -> tuple[str, Any]:
    """Return the convolution from pixels to patches, and its path."""
    import torch

    found = [
        (name, child)
        for name, child in backbone.module.named_modules()
        if isinstance(child, torch.nn.Conv2d)
        and child.kernel_size == child.stride == backbone.patch
        and child.in_channels == 3
    ]
    if len(found) != 1:
        raise ModelError(
            f"{backbone.name!r}: expected one convolution from 3 colours with kernel and stride of "
            f"one patch ({backbone.patch[0]} x {backbone.patch[1]} px), found "
            f"{[name for name, _ in found] or 'none'}; its patch embedding has no filters that can "
            "be shown as images."
        )
    return found[0]
