"""A Vision Transformer's structure, found from the model itself.

Owns :class:`Backbone`: where the blocks are, which tokens come before the patch
tokens, how large the patch grid is, how images are preprocessed, and a
fingerprint of the weights. The module is never changed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitxr.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["Backbone"]

#: Of a configuration, what changes no number.
_NO_MATTER = ("transformers_version", "dtype", "torch_dtype", "name_or_path", "architectures")
#: Embedding parameters that put tokens before the patches, and the tokens' name.
_PREFIX = {
    "cls_token": "class",
    "class_embedding": "class",
    "distillation_token": "distillation",
    "register_tokens": "register",
}


@dataclass(frozen=True, eq=False, repr=False)
class Backbone:
    """A Vision Transformer ready for extraction, made by :func:`vitxr.load_model`.

    Attributes
    ----------
    name
        The name, path or class the model was loaded from.
    revision
        Commit of the hub repository, or ``""``.
    module
        The torch module. It is used as it is, and left as it was.
    blocks
        The transformer blocks, in order; ``layer`` indexes them.
    embeddings
        The module whose output enters the first block.
    prefix
        Names of the tokens before the patch tokens, such as ``("class",)``.
    channels, heads
        Width of the residual stream; attention heads of a block.
    patch
        Patch height and width, pixels.
    input_size
        Height and width the model takes, pixels.
    classes
        Names of the output classes; empty if there is no classification head.
    processor
        The model's own image processor, or None.
    spec
        Name, revision, device and precision with which another process loads the same
        model; None for a module in memory.

    Examples
    --------
    >>> import vitxr
    >>> model = vitxr.load_model("digits")
    >>> len(model.blocks), model.prefix, model.grid
    (6, ('class',), (8, 8))
    """

    name: str
    revision: str
    module: torch.nn.Module
    blocks: tuple[torch.nn.Module, ...]
    embeddings: torch.nn.Module
    prefix: tuple[str, ...]
    channels: int
    heads: int
    patch: tuple[int, int]
    input_size: tuple[int, int]
    classes: tuple[str, ...]
    processor: Any = None
    spec: tuple[str, str | None, str, str] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self.input_size[0] // self.patch[0], self.input_size[1] // self.patch[1]

    @property
    def device(self) -> torch.device:
        """The device the weights are on."""
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model as it is now.

        Of its class and configuration, and of the weights: names, dtypes, shapes, bytes, in name
        order. How attention is computed does not count, nor what does not change numbers.
        """
        import torch

        digest = hashlib.sha256(type(self.module).__name__.encode())
        config = getattr(self.module, "config", None)
        settings = {} if config is None else config.to_dict()
        kept = {k: v for k, v in settings.items() if k[0] != "_" and k not in _NO_MATTER}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        for key, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
        return digest.hexdigest()

    def cast(self, precision: str) -> Backbone:
        """Return this backbone with weights of another precision, copied if they differ."""
        import torch

        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        floating = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        if floating <= {dtype}:
            return self
        module = duplicate(self.module).to(dtype)
        spec = self.spec and (*self.spec[:3], precision)
        return replace(self, module=module, spec=spec, **_structure(module))

    def to(self, device: str) -> Backbone:
        """Return this backbone on another device, copied."""
        module = duplicate(self.module).to(device)
        return replace(self, module=module, **_structure(module))

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Apply the model's own preprocessing to one image.

        Parameters
        ----------
        image
            uint8 (row, col, channel), any size.

        Returns
        -------
        numpy.ndarray
            float32 (channel, row, col), of the size the model takes.
        """
        if self.processor is None:
            raise ModelError(
                f"the model {self.name!r} came without its image processor "
                "(preprocessor_config.json), so preprocess='model' is not known. Save the "
                "processor beside the model and load that folder, or pass preprocess='raw' "
                "to hand pixel values 0..255 to the model as they are."
            )
        # Without the format, an image three pixels high would be taken for channels first.
        out = self.processor(
            images=[image], return_tensors="np", input_data_format="channels_last"
        )["pixel_values"]
        array = np.ascontiguousarray(np.asarray(out)[0], dtype=np.float32)
        if array.shape[1:] != self.input_size:
            raise ModelError(
                f"the image processor of {self.name!r} makes images of "
                f"{array.shape[1]} x {array.shape[2]} px; the model takes "
                f"{self.input_size[0]} x {self.input_size[1]} px. "
                "Correct the size in preprocessor_config.json."
            )
        return array

    @property
    def fixed_size(self) -> bool:
        """Whether preprocessing gives images of one size, whatever theirs."""
        size = getattr(self.processor, "size", None) or {}
        cropped = getattr(self.processor, "do_center_crop", None)
        return bool(cropped) or {"height", "width"} <= set(dict(size))

    def preprocessing(self) -> dict[str, Any]:
        """Return the image processor's settings, for the record."""
        if self.processor is None:
            return {}
        keep = ("do_", "size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        settings = self.processor.to_dict()
        return {key: settings[key] for key in sorted(settings) if key.startswith(keep)}

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that run the model, for the record."""
        import torch
        import transformers

        return {
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
        }

    def hooks(self) -> list[str]:
        """Name the forward hooks that the user has put on the module.

        With a hash of their code and of the values they hold; of one that cannot be pickled, a
        number that never comes again.
        """
        return [
            f"{name or type(child).__name__}: {getattr(hook, '__qualname__', repr(hook))} "
            f"({_hash_of(hook)})"
            for name, child in self.module.named_modules()
            for hook in (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
            if not _is_recorder(hook)
        ]

    def summary(self) -> dict[str, str]:
        """Describe the model in a few lines."""
        rows, columns = self.grid
        return {
            "model": self.name,
            "revision": self.revision or "-",
            "architecture": type(self.module).__name__,
            "blocks": f"{len(self.blocks)} (layers 0 to {len(self.blocks) - 1})",
            "channels": f"{self.channels}",
            "heads": f"{self.heads}",
            "prefix tokens": ", ".join(self.prefix) or "none",
            "input": f"{self.input_size[0]} x {self.input_size[1]} px",
            "patch": f"{self.patch[0]} x {self.patch[1]} px, grid {rows} x {columns}",
            "classes": f"{len(self.classes) or 'none'}",
            "parameters": f"{sum(p.numel() for p in self.module.parameters()):,}",
            "device": f"{self.device}",
        }

    def __repr__(self) -> str:
        lines = (f"{key:>16}  {value}" for key, value in self.summary().items())
        return "<vitxr Backbone>\n" + "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the module as it is now; its parts are found again."""
        return _rebuild, (
            duplicate(self.module),
            {name: getattr(self, name) for name in ("name", "revision", "processor", "spec")},
        )


def _hash_of(hook: Any) -> str:
    import cloudpickle

    try:
        return hashlib.sha256(cloudpickle.dumps(hook)).hexdigest()[:12]
    except Exception:  # whatever it holds may raise whatever it likes
        return uuid.uuid4().hex[:12]


def _rebuild(module: torch.nn.Module, known: dict[str, Any]) -> Backbone:
    return from_module(module, **known)


def _is_recorder(hook: Any) -> bool:
    """Whether a hook is one that transformers installs to record outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def duplicate(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module, user hooks included, without those transformers leaves behind.

    A call with ``output_hidden_states=True`` installs recording hooks for good, and
    they cannot be copied or pickled. They change no number.
    """
    with contextlib.ExitStack() as undo:
        for child in module.modules():
            for key, hook in list(child._forward_hooks.items()):
                if _is_recorder(hook):
                    undo.callback(child._forward_hooks.__setitem__, key, hook)
                    del child._forward_hooks[key]
        twin = copy.deepcopy(module)
    for child in twin.modules():
        # So that transformers installs them again in the copy when it needs them.
        child.__dict__.pop("_output_capturing_hooks_installed", None)
    return twin


def from_module(module: torch.nn.Module, **known: Any) -> Backbone:
    """Make a Backbone of a transformers vision model; ``known`` are its other attributes."""
    return Backbone(module=module, **known, **_structure(module))


def _pair(value: Any) -> tuple[int, int]:
    both = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(both) != 2 or not all(isinstance(n, int) for n in both):
        raise ModelError(
            f"the config has the size {value!r}; expected a number or (height, width)."
        )
    return both


def _structure(module: Any) -> dict[str, Any]:
    config = getattr(module, "config", None)
    title = type(module).__name__
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    missing = [key for key in wanted if getattr(config, key, None) is None]
    if missing:
        raise ModelError(
            f"{title} is not a Vision Transformer vitxr can read: its config has no "
            f"{', '.join(missing)}. Expected a transformers image model with one patch grid."
        )
    assert config is not None
    if getattr(config, "num_channels", 3) != 3:
        raise ModelError(
            f"{title} takes images of {config.num_channels} channels; expected 3 (RGB)."
        )
    base = module.base_model
    blocks, embeddings = _blocks(base, config.num_hidden_layers), getattr(base, "embeddings", None)
    if embeddings is None:
        raise ModelError(f"{title} has no `embeddings` module, where patches become tokens.")
    if hasattr(embeddings, "random_masking"):
        raise ModelError(
            f"{title} drops and shuffles patches at random, so that its tokens have no place on "
            "the patch grid. Use the encoder's weights in a model that does not."
        )
    has_head = title.endswith("ForImageClassification") and config.num_labels > 0
    return {
        "blocks": blocks,
        "embeddings": embeddings,
        "prefix": _prefix_tokens(embeddings),
        "channels": int(config.hidden_size),
        "heads": int(config.num_attention_heads),
        "patch": _pair(config.patch_size),
        "input_size": _pair(config.image_size),
        "classes": tuple(str(config.id2label[i]) for i in range(config.num_labels))
        if has_head
        else (),
    }


def _blocks(base: Any, depth: int) -> tuple[Any, ...]:
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
    if len(outer) != 1:
        raise ModelError(
            f"{type(base).__name__}: expected one list of {depth} blocks, found "
            f"{outer or 'none'}; vitxr will not guess which are the transformer blocks."
        )
    return tuple(found[outer[0]])


def _prefix_tokens(embeddings: Any) -> tuple[str, ...]:
    names: list[str] = []
    for attribute, name in _PREFIX.items():
        parameter = getattr(embeddings, attribute, None)
        if parameter is None:
            continue
        count = parameter.shape[1] if parameter.ndim == 3 else 1
        names += [name] if name != "register" else [f"register_{i}" for i in range(count)]
    return tuple(names)
