"""Vision Transformers of timm: loading, layout, preprocessing. The only module that knows timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitxr.errors import DependencyError, ModelError
from vitxr.models.preprocess import Preprocess
from vitxr.models.structure import Layout

__all__ = ["PREFIX", "find", "hub_id", "is_config", "is_timm", "load", "preprocess_of"]

#: What a name of timm's starts with.
PREFIX = "timm:"


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise DependencyError(
            "models of timm need the package timm, which is not installed: "
            "pip install 'vitxr[timm]'."
        ) from error
    return timm


def hub_id(name: str) -> str:
    """Return the hub id of the weights that timm means by ``timm:name``."""
    import difflib

    timm, bare = _timm(), name.removeprefix(PREFIX)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare.partition(".")[0], timm.list_models("vit*"), n=3)
        raise ModelError(
            f"timm {timm.__version__} has no model {bare!r}"
            + (f"; the nearest: {', '.join(PREFIX + n for n in near)}." if near else ".")
            + " timm.list_models(pretrained=True) lists all."
        )
    config = timm.get_pretrained_cfg(bare)
    found = None if config is None else config.hf_hub_id
    if not found:
        raise ModelError(
            f"timm has no weights on the hub for {bare!r}: expected a model of "
            "timm.list_models(pretrained=True). Weights of your own: timm.models.save_for_hf, "
            "and load that folder."
        )
    return str(found)


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that timm wrote."""
    return "architecture" in config and "architectures" not in config


def load(
    folder: Path, config: Mapping[str, Any], name: str, size: tuple[int, int] | None
) -> tuple[Any, Preprocess | None]:
    """Load a folder that timm wrote: config.json and model.safetensors.

    With ``size``, timm resamples the position embeddings to it.
    """
    timm = _timm()
    weights = folder / "model.safetensors"
    title = str(config["architecture"])
    if not timm.is_model(title):
        raise ModelError(
            f"model {name!r} has the architecture {title!r}, which timm {timm.__version__} does "
            "not know. Upgrade timm, or correct `architecture` in config.json."
        )
    options = dict(config.get("model_args") or {})
    kept = ("num_classes", "global_pool")
    options |= {key: config[key] for key in kept if config.get(key) is not None}
    options |= {} if size is None else {"img_size": size}
    given = dict(config.get("pretrained_cfg") or {})
    try:
        module = timm.create_model(
            title,
            pretrained=True,
            pretrained_cfg={**given, "architecture": title, "file": str(weights)},
            **options,
        )
    except Exception as error:  # readers of weights raise many kinds; all mean one thing here
        raise ModelError(f"model {name!r} cannot be loaded from {folder}: {error}") from error
    return module.eval(), preprocess_of(module, name, size)


def is_timm(module: Any) -> bool:
    """Whether a module is a model of timm's."""
    return type(module).__module__.startswith("timm.models.")


def find(module: Any, input_size: tuple[int, int] | None) -> Layout:
    """Find the layout of a Vision Transformer of timm's."""
    title = type(module).__name__
    patches: Any = getattr(module, "patch_embed", None)
    blocks: Any = getattr(module, "blocks", None)
    patch = getattr(patches, "patch_size", None)
    heads = getattr(getattr(next(iter(blocks or ()), None), "attn", None), "num_heads", None)
    if patch is None or heads is None or getattr(module, "stages", None) is not None:
        raise ModelError(
            f"timm's {title} has no `blocks` with attention on one grid of patches; expected a "
            "Vision Transformer (vit_*, deit_*, beit_*, eva02_*). Of another, say where its blocks "
            "are: load_model(module, adapter=...)."
        )
    own = patches.img_size or module.pretrained_cfg["input_size"][1:]
    size = input_size or (int(own[0]), int(own[1]))
    labels = (module.pretrained_cfg or {}).get("label_names") or ()
    count = int(getattr(module, "num_classes", 0))
    if len(labels) != count:
        labels = [f"LABEL_{i}" for i in range(count)]
    return Layout(
        blocks=tuple(f"blocks.{child}" for child, _ in blocks.named_children()),
        prefix=None,
        patch=(int(patch[0]), int(patch[1])),
        input_size=size,
        heads=int(heads),
        classes=tuple(map(str, labels)),
    )


def preprocess_of(module: Any, name: str, size: tuple[int, int] | None = None) -> Preprocess | None:
    """Return what timm's evaluation transform does to images; None if it is not known."""
    settings = dict(module.pretrained_cfg or {})
    if not settings.get("mean"):
        return None
    crop = size or tuple(settings["input_size"][1:])
    part = settings.get("crop_pct") or 0.875
    scaled = tuple(math.floor(side / part) for side in crop)
    mode = settings.get("crop_mode") or "center"
    if mode == "squash":
        resize: Any = scaled
    elif mode == "center" and scaled[0] == scaled[1]:
        resize = scaled[0]
    else:
        raise ModelError(
            f"{name!r}: timm crops images by {mode!r} to {crop[0]} x {crop[1]} px; expected "
            "'center' to a square, or 'squash'. Pass preprocess='raw' and images of that size."
        )
    base = Preprocess(
        resize=resize, crop=crop, mean=tuple(settings["mean"]), std=tuple(settings["std"])
    )
    return replace(base, interpolation=settings.get("interpolation") or "bilinear")
