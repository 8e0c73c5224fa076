"""One forward pass: what enters the model, what is kept, where it stops.

Hooks are this module's own and are gone after every call, also one that fails.
The pass ends as soon as all that is wanted is kept; selection and dtype are applied
on the device, before anything is copied to the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone
from vitxr.models.calls import frames_first
from vitxr.models.passes import Enough, exclusive, is_out_of_memory, undisturbed
from vitxr.models.site import Site, first_tensor, token_count
from vitxr.models.sites import find_sites
from vitxr.models.watch import DotProduct, Written, watching

if TYPE_CHECKING:
    import torch

__all__ = ["capture", "exclusive", "frame_shape", "is_out_of_memory"]


def capture(
    backbone: Backbone,
    batch: torch.Tensor,
    layers: Sequence[int],
    variables: Sequence[str],
    channels: np.ndarray | None = None,
    dtype: str = "float32",
    keepbits: int | None = None,
    out: dict[str, np.ndarray] | None = None,
    sites: Mapping[str, Site] | None = None,
    heads: np.ndarray | None = None,
    queries: np.ndarray | None = None,
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
        Any of ``activation, prefix, embedding, logits``, of :data:`vitxr.models.sites.SITES`,
        and names of ``sites``.
    channels
        Channels to keep of ``activation``, (layer, feature_map); None keeps all.
    dtype
        NumPy dtype name of the result.
    keepbits
        Round float32 to this many bits of its mantissa, to nearest, ties to even.
    out
        Arrays to write to, one frame a frame of the batch; made if not given.
    sites
        Where variables are taken, by :func:`vitxr.models.sites.find_sites`; found if not given.
    heads
        Heads to keep of what has heads; None keeps all.
    queries
        Tokens whose rows of ``attention`` to keep; None keeps all.

    Returns
    -------
    dict of str to numpy.ndarray
        ``out``: each with the leading dimension ``frame``, the others as in
        :data:`vitxr.names.VARIABLES`.
    """
    import torch

    wanted = set(variables)
    if sites is None:
        sites = find_sites(backbone, layers, variables)
    sites = {name: site for name, site in sites.items() if name in wanted}
    if out is None:
        out = {
            name: np.empty(
                (
                    len(batch),
                    *frame_shape(
                        backbone, name, len(layers), channels, sites.get(name), heads, queries
                    ),
                ),
                dtype,
            )
            for name in variables
        }
    with torch.inference_mode(False):  # or nothing could be written to them outside of it
        host = {name: torch.from_numpy(array) for name, array in out.items()}
    layered = {"activation", "prefix"} | {name for name, site in sites.items() if site.layered}
    left = {
        (name, position)
        for name in wanted
        for position in (range(len(layers)) if name in layered else [None])
    }

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
        left.discard((name, position))
        if not left:
            raise Enough

    def before_blocks(_module: Any, args: Any, kwargs: Any) -> None:
        hidden = first_tensor((*args, *kwargs.values()))
        keep("embedding", _on_grid(backbone, _tokens(backbone, hidden)))

    def after_block(position: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = _tokens(backbone, first_tensor(output))
            if "prefix" in wanted:
                keep("prefix", hidden[:, : len(backbone.prefix)], position)
            if "activation" in wanted:
                patches = hidden
                if channels is not None:
                    index = torch.as_tensor(channels[position], device=hidden.device)
                    patches = hidden.index_select(2, index)
                keep("activation", _on_grid(backbone, patches), position)

        return hook

    def hang(module: Any, name: str, site: Site, position: int | None) -> Any:
        def take(value: Any) -> None:
            value = first_tensor(value)
            if site.form == "sequence":
                value = value.transpose(0, 1)
            tokens = site.form in ("tokens", "sequence")
            keep(name, _on_grid(backbone, value) if tokens else value, position)

        if site.takes == "output":
            return module.register_forward_hook(lambda _m, _args, output: take(output))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: take((*args, *kwargs.values())), with_kwargs=True
        )

    at: list[int] = []
    chosen = [
        None if n is None else torch.as_tensor(n, device=backbone.device) for n in (heads, queries)
    ]

    def at_dot_product(dot: DotProduct | Written) -> None:
        if not at:
            return
        for name, site in sites.items():
            if site.takes != "dot":
                continue
            if site.form == "weights":
                keep(name, dot.weights(*chosen), at[-1])
                continue
            what = name.removeprefix("attention_")
            projected = dot.queries if what == "query" else getattr(dot, what)
            if projected is None:
                raise ModelError(
                    f"{backbone.name!r}: the scores of these frames are not the product of its "
                    "queries and keys over the square root of their width, as those of blank "
                    "frames were. Leave `attention_query` and `attention_key` out."
                )
            if chosen[0] is not None:
                projected = projected.index_select(1, chosen[0])
            patches = projected[:, :, len(backbone.prefix) :].transpose(2, 3)
            keep(name, patches.unflatten(3, backbone.grid), at[-1])

    dots = any(site.takes == "dot" for site in sites.values())
    with (
        exclusive(),
        undisturbed(backbone, batch.dtype, dots),
        contextlib.ExitStack() as undo,
    ):
        if "embedding" in wanted:
            enter = backbone.blocks[0].register_forward_pre_hook(before_blocks, with_kwargs=True)
            undo.callback(enter.remove)
        for name, site in sites.items():
            for position, path in enumerate(site.modules if site.takes != "dot" else ()):
                module = backbone.module.get_submodule(path)
                at_layer = position if site.layered else None
                undo.callback(hang(module, name, site, at_layer).remove)
        for position, layer in enumerate(layers):
            block = backbone.blocks[layer]
            if dots:
                enter = block.register_forward_pre_hook(lambda *_, p=position: at.append(p))
                undo.callback(enter.remove)
                undo.callback(block.register_forward_hook(lambda *_: at.clear()).remove)
            if wanted & {"activation", "prefix"}:
                undo.callback(block.register_forward_hook(after_block(position)).remove)
        if dots:
            undo.enter_context(watching(at_dot_product))
        with contextlib.suppress(Enough):
            output = backbone.forward(batch)
            if "logits" in wanted:
                keep("logits", output if isinstance(output, torch.Tensor) else output.logits)
    if left:
        raise ModelError(
            f"{backbone.name!r}: a pass did not come to "
            f"{', '.join(sorted({str(name) for name, _ in left}))}."
        )
    return out


def frame_shape(
    backbone: Backbone,
    name: str,
    layers: int,
    channels: np.ndarray | None = None,
    site: Site | None = None,
    heads: np.ndarray | None = None,
    queries: np.ndarray | None = None,
) -> tuple[int, ...]:
    """Shape of a variable for one frame, of all or the chosen channels, heads and queries."""
    if site is not None:
        shape = list(site.shape)
        if site.takes == "dot" and heads is not None:
            shape[0] = len(heads)
        if site.form == "weights" and queries is not None:
            shape[1] = len(queries)
        return (layers, *shape) if site.layered else tuple(shape)
    kept = backbone.channels if channels is None else channels.shape[1]
    return {
        "activation": (layers, kept, *backbone.grid),
        "prefix": (layers, len(backbone.prefix), backbone.channels),
        "embedding": (backbone.channels, *backbone.grid),
        "logits": (len(backbone.classes),),
    }[name]


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
    """Return (frame, token, channel), checked: the tokens are the prefix and one a patch."""
    hidden = frames_first(hidden, backbone.how)
    rows, columns = backbone.grid
    expected = token_count(backbone)
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
