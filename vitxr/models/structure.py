"""Where a model has its blocks and its patch grid: found from the model, or told by an adapter.

What is found here is a guess from names and configurations; :mod:`vitxr.models.probe`
then checks it against what the model does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from vitxr.errors import ArgumentError, ModelError
from vitxr.models.calls import IN_ORDER, INTERPOLATED, PACKED, takes_other_sizes

__all__ = ["Adapter", "Layout", "find", "is_packed", "pair", "told", "tower"]


@dataclass(frozen=True)
class Adapter:
    """What vitxr has to be told of a torch module that is not of transformers or timm.

    It is checked by running the module: each block once, in order, gives (frame, token,
    channel) or (token, frame, channel); a change in one patch of the image changes that patch's
    token; classes are as many as logits. How images become the module's input is said beside it:
    ``load_model(module, adapter=..., preprocess=...)``.

    Attributes
    ----------
    blocks
        Path of the ``ModuleList`` or ``Sequential`` that holds the transformer blocks, such as
        ``"encoder.layers"``; or the path of each block.
    prefix
        Names of the tokens that stand before the patch tokens, in their order, such as
        ``("class",)``; empty for none.
    patch
        Side of a patch, or its height and width, pixels.
    input_size
        Side of the images that the module takes, or their height and width, pixels.
    heads
        Attention heads of a block; they divide its channels.
    classes
        Distinct names of the classes, if the module returns logits (a tensor, or an object with
        ``logits``).

    Raises
    ------
    ArgumentError
        If one of these is of the wrong kind.

    Examples
    --------
    >>> from vitxr.models import Adapter
    >>> Adapter(blocks="blocks", prefix=("class",), patch=16, input_size=(224, 224), heads=12)
    Adapter(blocks='blocks', prefix=('class',), patch=16, input_size=(224, 224), heads=12, \
classes=())
    """

    blocks: str | Sequence[str]
    prefix: Sequence[str]
    patch: int | tuple[int, int]
    input_size: int | tuple[int, int]
    heads: int
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        blocks = [self.blocks] if isinstance(self.blocks, str) else self.blocks
        if not _are_names(blocks) or not blocks:
            raise ArgumentError(
                f"blocks={self.blocks!r}: expected the path of the list of blocks, such as "
                "'encoder.layers', or the path of each block, once."
            )
        if isinstance(self.prefix, str) or not _are_names(self.prefix):
            raise ArgumentError(
                f"prefix={self.prefix!r}: expected distinct names, such as ('class', 'register_0'),"
                " or () if no tokens stand before the patches."
            )
        if isinstance(self.classes, str) or not _are_names(self.classes):
            twice = _first_twice(self.classes)
            raise ArgumentError(
                f"classes={_short(self.classes)}: expected a sequence of distinct names, one for "
                "each logit, or () without"
                + (f"; {twice!r} is there twice: number those." if twice else ".")
            )
        pair(self.patch, "patch")
        pair(self.input_size, "input_size")
        if not _is_count(self.heads):
            raise ArgumentError(
                f"heads={self.heads!r}: expected the number of attention heads of a block."
            )


@dataclass(frozen=True)
class Layout:
    """What is believed of a model before it is run.

    Attributes
    ----------
    blocks
        Paths of the blocks, in order.
    prefix
        Names of the prefix tokens; None to find them.
    patch, input_size
        Height and width, pixels.
    heads
        Attention heads of a block.
    classes
        Names of the classes.
    how
        What a call needs besides the pixels, of :mod:`vitxr.models.calls`.
    """

    blocks: tuple[str, ...]
    prefix: tuple[str, ...] | None
    patch: tuple[int, int]
    input_size: tuple[int, int]
    heads: int
    classes: tuple[str, ...] = ()
    how: tuple[str, ...] = ()


def pair(value: Any, what: str) -> tuple[int, int]:
    """Return (height, width) of a number or a pair of numbers."""
    both = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(both) != 2 or not all(map(_is_count, both)):
        raise ArgumentError(f"{what}={value!r}: expected a number of pixels or (height, width).")
    return int(both[0]), int(both[1])


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _are_names(value: Any) -> bool:
    """Whether it is a sequence of distinct texts, none empty."""
    named = isinstance(value, Sequence) and all(isinstance(v, str) and v for v in value)
    return named and len(set(value)) == len(value)


def _first_twice(value: Any) -> str | None:
    names = list(value) if isinstance(value, list | tuple) else []
    return next((n for i, n in enumerate(names) if isinstance(n, str) and n in names[:i]), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:70]} ..."


def told(module: Any, adapter: Adapter, name: str) -> Layout:
    """Return what an adapter says of a module."""
    import torch

    known = dict(module.named_modules())
    given = [adapter.blocks] if isinstance(adapter.blocks, str) else list(adapter.blocks)
    absent = [path for path in given if path not in known]
    if absent:
        lists = [p for p, m in known.items() if isinstance(m, torch.nn.ModuleList) and len(m)]
        raise ModelError(
            f"{name!r} has no module {', '.join(map(repr, absent))}, which the "
            f"adapter gives as its blocks. Its lists of modules: {', '.join(lists) or 'none'}; "
            "module.named_modules() lists all."
        )
    if isinstance(adapter.blocks, str):
        holder = known[adapter.blocks]
        given = [f"{adapter.blocks}.{child}" for child, _ in holder.named_children()]
        if not given:
            raise ModelError(
                f"{name!r}: the module {adapter.blocks!r}, which the adapter gives as its blocks, "
                f"is a {type(holder).__name__} and holds none; expected a list of blocks. Of one "
                f"block alone, give its path in a list: blocks=[{adapter.blocks!r}]."
            )
    return Layout(
        blocks=tuple(given),
        prefix=tuple(adapter.prefix),
        patch=pair(adapter.patch, "patch"),
        input_size=pair(adapter.input_size, "input_size"),
        heads=int(adapter.heads),
        classes=tuple(adapter.classes),
    )


def tower(module: Any) -> Any:
    """Return the image tower of a transformers model of images and texts, else the model."""
    config = getattr(module, "config", None)
    both = all(getattr(config, key, None) is not None for key in ("vision_config", "text_config"))
    has_tower = getattr(module, "vision_model", None) is not None
    return module.vision_model if both and has_tower and not _classifies(module) else module


def _classifies(module: Any) -> bool:
    title = type(module).__name__
    return "ForImageClassification" in title and module.config.num_labels > 0


def find(
    module: Any,
    input_size: tuple[int, int] | None = None,
    usual: tuple[int, int] | None = None,
) -> Layout:
    """Find the layout of a transformers vision model.

    Parameters
    ----------
    module
        The model.
    input_size
        Size asked for; None for its own.
    usual
        Size that its image processor gives, which stands for its own where it takes any size
        by itself (DINOv2 is made for 518 px and preprocessed to 224).
    """
    config: Any = getattr(module, "config", None)
    title = type(module).__name__
    base = getattr(module, "base_model", module)
    if getattr(config, "vision_config", None) is not None:  # a classifier on an image tower
        base, config = getattr(module, "vision_model", base), config.vision_config
    if getattr(config, "vocab_size", None) and getattr(config, "patch_size", None) is None:
        raise ModelError(
            f"{title} is a model of text (its config has a vocab_size and no patch_size); vitxr "
            "takes models of images. Name a Vision Transformer: docs/models.md lists the families."
        )
    if getattr(config, "depths", None) is not None:
        raise ModelError(
            f"{title} works in stages of {list(config.depths)} blocks, each on a patch grid of "
            "its own; an activation here has one patch grid for all its layers, and vitxr does not "
            "resample. Use a model with one grid: docs/models.md lists the families."
        )
    packed = is_packed(module)
    wanted = ["hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"]
    wanted += [] if packed else ["image_size"]
    missing = [key for key in wanted if getattr(config, key, None) is None]
    if missing:
        raise ModelError(
            f"{title} is not a Vision Transformer vitxr can read: its config has no "
            f"{', '.join(missing)}. Expected a transformers image model with one patch grid; of "
            "another torch module, say where its blocks are: load_model(module, adapter=...)."
        )
    if getattr(config, "num_channels", 3) != 3:
        raise ModelError(
            f"{title} takes images of {config.num_channels} channels; expected 3 (RGB)."
        )
    patch = _size(config.patch_size)
    side = int(config.num_patches**0.5) if packed else 0
    own = (side * patch[0], side * patch[1]) if packed else _size(config.image_size)
    switch = takes_other_sizes(module, base)
    size = input_size or (own if switch or packed or usual is None else usual)
    how = [PACKED] * packed
    if any(hasattr(m, "random_masking") for m in base.modules()):
        how.append(IN_ORDER)
    if size != own and not packed and switch:
        how.append(INTERPOLATED)
        rows, columns = (side // step for side, step in zip(own, patch, strict=True))
        if rows != columns:
            raise ModelError(
                f"{title} was made for images of {own[0]} x {own[1]} px, {rows} x {columns} "
                "patches; transformers interpolates the positions of square grids only, and would "
                "take these for another grid. Leave input_size out."
            )
    classes = _class_names(module) if _classifies(module) else ()
    return Layout(
        blocks=_blocks(module, base, config.num_hidden_layers),
        prefix=None,
        patch=patch,
        input_size=size,
        heads=int(config.num_attention_heads),
        classes=classes,
        how=tuple(how),
    )


def is_packed(module: Any) -> bool:
    """Whether a transformers model takes rows of patches (SigLIP 2), and no image of one size."""
    base = getattr(module, "base_model", module)
    config = getattr(module, "config", None)
    if getattr(config, "vision_config", None) is not None:
        base, config = getattr(module, "vision_model", base), module.config.vision_config
    named = base.__class__.__name__.startswith("Siglip2Vision")
    return named and getattr(config, "image_size", None) is None


def _class_names(module: Any) -> tuple[str, ...]:
    """Names of the classes by their numbers, which must be those of the logits."""
    labels = dict(module.config.id2label or {})
    try:
        return tuple(str(labels[i]) for i in range(len(labels)))
    except KeyError as error:
        numbers = ", ".join(map(str, labels))
        raise ModelError(
            f"{type(module).__name__}: `id2label` of its config names the classes "
            f"{_short(numbers)}; expected the numbers 0 to {len(labels) - 1}, one for each logit. "
            "Correct it."
        ) from error


def _size(value: Any) -> tuple[int, int]:
    try:
        return pair(value, "size")
    except ArgumentError as error:
        raise ModelError(
            f"the config has the size {value!r}; expected a number or (height, width)."
        ) from error


def _blocks(module: Any, base: Any, depth: int) -> tuple[str, ...]:
    import torch

    found = {
        name: child
        for name, child in base.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) == depth
    }
    # Lists inside a block (experts, branches) may have the same length by chance.
    outer = [
        name
        for name in found
        if not any(name.startswith(other + ".") for other in found if other != name)
    ]
    if len(outer) != 1 or depth < 1:
        raise ModelError(
            f"{type(module).__name__}: expected one list of {depth} blocks, found "
            f"{outer or 'none'}; vitxr will not guess which are the transformer blocks. Say it: "
            "load_model(module, adapter=vitxr.models.Adapter(blocks=..., ...))."
        )
    paths = {id(child): name for name, child in module.named_modules()}
    return tuple(paths[id(block)] for block in found[outer[0]])
