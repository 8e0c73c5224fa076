"""A small model of each family, made from its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers as tf

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,  # as many as the image tower's
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 8,
}


@dataclass(frozen=True)
class Family:
    """How a small model is made, and what is expected of it."""

    name: str
    make: Callable[[Any], Any]
    prefix: tuple[str, ...]
    #: Paths of the parameters that the prefix tokens come from.
    planted: tuple[str, ...] = ()
    grid: tuple[int, int] = (4, 6)
    #: Class of the image processor, and its settings.
    processor: tuple[str, dict[str, Any]] | None = None
    #: Of a block: projections to queries, keys, values and out; the last layer of its MLP.
    parts: tuple[str, ...] = ()
    #: Whether a call for another image size has to ask for it.
    asks: bool = True
    #: What transformers' own call needs besides the pixels.
    reference: Callable[[Any, torch.Tensor], dict[str, Any]] = field(default=lambda *_: {})

    @property
    def size(self) -> tuple[int, int]:
        return self.grid[0] * 8, self.grid[1] * 8


def _config(name: str, size: Any, **options: Any) -> Any:
    return getattr(tf, name)(**{**SMALL, "image_size": size, **options})


def _vit(size: Any) -> Any:
    return tf.ViTForImageClassification(_config("ViTConfig", size, num_labels=5))


def _deit(size: Any) -> Any:
    config = _config("DeiTConfig", size, num_labels=5)
    return tf.DeiTForImageClassificationWithTeacher(config)


def _beit(size: Any) -> Any:
    config = _config(
        "BeitConfig", size, num_labels=5, use_relative_position_bias=True,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    return tf.BeitForImageClassification(config)


def _mae(size: Any) -> Any:
    config = _config(
        "ViTMAEConfig", size, mask_ratio=0.75, decoder_num_hidden_layers=3,
        decoder_hidden_size=32, decoder_num_attention_heads=4, decoder_intermediate_size=48,
    )  # fmt: skip
    return tf.ViTMAEForPreTraining(config)


def _data2vec(size: Any) -> Any:
    config = _config(
        "Data2VecVisionConfig", size, num_labels=5, use_relative_position_bias=True,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    return tf.Data2VecVisionForImageClassification(config)


def _dinov2(size: Any) -> Any:
    config = _config("Dinov2Config", (64, 64), mlp_ratio=2, num_labels=5)
    return tf.Dinov2ForImageClassification(config)


def _dinov2_registers(size: Any) -> Any:
    config = _config("Dinov2WithRegistersConfig", size, mlp_ratio=2, num_register_tokens=3)
    return tf.Dinov2WithRegistersModel(config)


def _dinov3(size: Any) -> Any:
    return tf.DINOv3ViTModel(_config("DINOv3ViTConfig", size, num_register_tokens=4))


def _clip(size: Any) -> Any:
    vision = {**SMALL, "image_size": size}
    return tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=vision))


def _clip_vision(size: Any) -> Any:
    return tf.CLIPVisionModelWithProjection(_config("CLIPVisionConfig", size))


def _siglip(size: Any) -> Any:
    vision = {**SMALL, "image_size": size}
    return tf.SiglipModel(tf.SiglipConfig(text_config=TEXT, vision_config=vision))


def _siglip_vision(size: Any) -> Any:
    return tf.SiglipVisionModel(_config("SiglipVisionConfig", size))


def _siglip2(_size: Any) -> Any:
    return tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**SMALL, num_patches=16))


def _unmasked(module: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """Transformers' own way to keep patches in order."""
    module.config.mask_ratio = 0.0
    patches = pixels.shape[2] * pixels.shape[3] // 64
    return {"noise": torch.arange(patches).float().expand(len(pixels), -1)}


SIZE = {"height": 32, "width": 48}
VIT = ("ViTImageProcessor", {"size": SIZE})
SQUARE = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}

_NEW = (*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc2")
_OPENAI = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc2")
_OLD = (
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention.output.dense", "output.dense",
)  # fmt: skip
_PARTS = {
    "DINOv3 ViT": (*_NEW[:4], "mlp.down_proj"), "CLIP": _OPENAI, "CLIP vision": _OPENAI,
    "SigLIP": _OPENAI, "SigLIP vision": _OPENAI, "SigLIP2 NaFlex": _OPENAI,
    "Data2Vec vision": _OLD,
}  # fmt: skip

FAMILIES = [
    Family("ViT", _vit, ("class",), ("cls_token",), processor=VIT),
    Family(
        "DeiT", _deit, ("class", "distillation"), ("cls_token", "distillation_token"),
        processor=("DeiTImageProcessor", {"size": {"height": 36, "width": 50}, "crop_size": SIZE}),
    ),
    Family(
        "BEiT", _beit, ("class",), ("cls_token",), (4, 4),
        ("BeitImageProcessor", {**SQUARE, "do_center_crop": False}),
    ),
    Family(
        "ViT-MAE", _mae, ("class",), ("cls_token",), (4, 4), ("ViTImageProcessor", SQUARE),
        reference=_unmasked,
    ),
    Family(
        "MSN", lambda size: tf.ViTMSNModel(_config("ViTMSNConfig", size)), ("class",),
        ("cls_token",), processor=VIT,
    ),
    Family("I-JEPA", lambda size: tf.IJepaModel(_config("IJepaConfig", size)), (), processor=VIT),
    Family(
        "DINOv2", _dinov2, ("class",), ("cls_token",), (4, 4), ("BitImageProcessor", CROP),
        asks=False,
    ),
    Family(
        "DINOv2 with registers", _dinov2_registers,
        ("class", "register_0", "register_1", "register_2"), ("cls_token", "register_tokens"),
        (4, 4), ("BitImageProcessor", CROP), asks=False,
    ),
    Family(
        "DINOv3 ViT", _dinov3, ("class", *(f"register_{i}" for i in range(4))),
        ("cls_token", "register_tokens"), asks=False,
        processor=("DINOv3ViTImageProcessor", {"size": SIZE}),
    ),
    Family("CLIP", _clip, ("class",), ("class_embedding",), (4, 4), ("CLIPImageProcessor", CROP)),
    Family(
        "CLIP vision", _clip_vision, ("class",), ("class_embedding",), (4, 4),
        ("CLIPImageProcessor", CROP),
    ),
    Family("SigLIP", _siglip, (), (), (4, 4), ("SiglipImageProcessor", SQUARE)),
    Family("SigLIP vision", _siglip_vision, (), (), (4, 4), ("SiglipImageProcessor", SQUARE)),
    Family(
        "SigLIP2 NaFlex", _siglip2, (), (), (4, 4),
        ("Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 16}), asks=False,
    ),
    Family(
        "Data2Vec vision", _data2vec, ("class",), ("cls_token",), (4, 4),
        ("BeitImageProcessor", {**SQUARE, "do_center_crop": False}),
    ),
]  # fmt: skip
FAMILIES = [replace(family, parts=_PARTS.get(family.name, _NEW)) for family in FAMILIES]


def random_weights(module: Any) -> Any:
    """Give every parameter values, also those a fresh model starts at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.rand(parameter.shape, generator=generator) - 0.1
    return module.eval()


def save(family: Family, folder: Any, size: Any = None) -> Any:
    """Save a small model with its processor's settings, as it would come from the hub."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        height, width = size or family.size
        # Not all families take a pair.
        module = random_weights(family.make(height if height == width else (height, width)))
    module.save_pretrained(folder)
    if family.processor is not None:
        title, settings = family.processor
        text = json.dumps({"image_processor_type": title, **_DEFAULTS, **settings})
        (folder / "preprocessor_config.json").write_text(text, "utf-8")
    return folder


_DEFAULTS = {
    "do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3],
}  # fmt: skip
