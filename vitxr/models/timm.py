"""Vision Transformers of timm: loading, layout, preprocessing. The only module that knows timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitxr.errors import DependencyError, ModelError
from vitxr.models.preprocess import Preprocess
from vitxr.models.structure import Layout, pair

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
    except Exception as error:  # torchvision, which timm needs, fits one version of torch
        raise DependencyError(
            f"timm cannot be imported: {error}. It needs a torchvision that was built for the "
            "torch that is installed: reinstall both together."
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


#: Arguments of timm.create_model that load weights from elsewhere, pickled ones among them.
_ELSEWHERE = {
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "scriptable",
}
#: Entries of a pretrained_cfg that say what the model takes and gives.
_DESCRIBES = {
    "classifier",
    "crop_mode",
    "crop_pct",
    "first_conv",
    "fixed_input_size",
    "input_size",
    "interpolation",
    "label_descriptions",
    "label_names",
    "license",
    "mean",
    "min_input_size",
    "num_classes",
    "pool_size",
    "std",
    "tag",
    "test_crop_pct",
    "test_input_size",
}


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
    elsewhere = sorted(_ELSEWHERE & set(options))
    if elsewhere:
        raise ModelError(
            f"model {name!r}: `model_args` of its config.json names {', '.join(elsewhere)}, which "
            "would load other weights than those of the folder. Take them out."
        )
    kept = ("num_classes", "global_pool")
    options |= {key: config[key] for key in kept if config.get(key) is not None}
    # Only what describes images and classes: the rest says where else weights are.
    cfg = dict(config.get("pretrained_cfg") or {})
    given = {key: value for key, value in cfg.items() if key in _DESCRIBES}
    if size is not None:
        own = pair(options.get("img_size") or tuple(given["input_size"][1:]), "img_size")
        if own[0] != own[1] and size != own:
            raise ModelError(
                f"model {name!r} was made for images of {own[0]} x {own[1]} px; timm interpolates "
                "the positions of square grids only, and would take these for another grid. "
                "Leave input_size out."
            )
        options["img_size"] = size
    try:
        module = timm.create_model(
            title,
            pretrained=True,
            pretrained_cfg={**given, "architecture": title, "file": str(weights)},
            **options,
        )
    except Exception as error:  # readers of weights raise many kinds; all mean one thing here
        raise ModelError(f"model {name!r} cannot be loaded from {folder}: {error}") from error
    return module.eval(), preprocess_of(module)


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
    staged = getattr(module, "stages", None) is not None
    if patch is None or heads is None or staged or not hasattr(patches, "img_size"):
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
        patch=pair(patch, "patch_size"),
        input_size=size,
        heads=int(heads),
        classes=tuple(map(str, labels)),
    )


def preprocess_of(module: Any, size: tuple[int, int] | None = None) -> Preprocess | None:
    """Return what timm's evaluation transform does to images; None if it is not known.

    It resizes to the model's input (or ``size``, which a model with ``dynamic_img_size`` takes)
    divided by its crop share, and cuts the centre.
    """
    settings = dict(module.pretrained_cfg or {})
    mode = settings.get("crop_mode") or "center"
    own = size or getattr(getattr(module, "patch_embed", None), "img_size", None)
    own = own or (settings.get("input_size") or ())[1:]
    if not settings.get("mean") or not own or mode not in ("center", "squash"):
        return None
    crop = (int(own[0]), int(own[1]))
    scaled = [math.floor(side / (settings.get("crop_pct") or 0.875)) for side in crop]
    exact = mode == "squash" or scaled[0] != scaled[1]
    return Preprocess(
        resize=(scaled[0], scaled[1]) if exact else scaled[0],
        crop=crop,
        interpolation=settings.get("interpolation") or "bilinear",
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        cover=exact and mode == "center",
    )
