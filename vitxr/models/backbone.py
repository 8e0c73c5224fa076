"""A Vision Transformer whose blocks, tokens and patch grid are known.

Owns :class:`Backbone`: its parts, how it is called and copied, how images are
preprocessed, and a fingerprint of the weights. The module is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitxr.errors import ArgumentError, ModelError
from vitxr.models.calls import call
from vitxr.models.identity import duplicate, fingerprint, hooks
from vitxr.models.preprocess import Preprocess, described, output_size, prepared
from vitxr.models.probe import probe
from vitxr.models.structure import Adapter, find, told

if TYPE_CHECKING:
    import torch

__all__ = ["Backbone"]


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
    how
        What a call needs besides the pixels, such as interpolated positions, and what its blocks
        have first.
    spec
        Name, revision, device, precision and input size with which another process loads
        the same model; None for a module in memory.

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
    prefix: tuple[str, ...]
    channels: int
    heads: int
    patch: tuple[int, int]
    input_size: tuple[int, int]
    classes: tuple[str, ...]
    processor: Any = None
    how: tuple[str, ...] = ()
    spec: tuple[str, str | None, str, str, tuple[int, int] | None] | None = None

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

        Of its class and configuration (without one, its parts and their settings: numbers, names
        and functions that they hold), of where its blocks are and how it is called, and of the
        weights: names, dtypes, shapes, bytes, in name order. How attention is computed does not
        count, nor what does not change numbers.
        """
        laid = (self.block_paths, self.prefix, self.heads, self.patch, self.input_size, self.how)
        return fingerprint(self.module, laid)

    def cast(self, precision: str) -> Backbone:
        """Return this backbone with weights of another precision, copied if they differ."""
        import torch

        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        floating = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        if floating <= {dtype}:
            return self
        spec = self.spec and (*self.spec[:3], precision, self.spec[4])
        return replace(self._with(duplicate(self.module).to(dtype)), spec=spec)

    def to(self, device: str) -> Backbone:
        """Return this backbone on another device, copied."""
        return self._with(duplicate(self.module).to(device))

    def _with(self, twin: torch.nn.Module) -> Backbone:
        """Return this backbone of a copy of its module."""
        return replace(self, module=twin, blocks=tuple(map(twin.get_submodule, self.block_paths)))

    @property
    def block_paths(self) -> tuple[str, ...]:
        """Paths of the blocks in the module."""
        paths = {id(child): path for path, child in self.module.named_modules()}
        return tuple(paths[id(block)] for block in self.blocks)

    def forward(self, batch: torch.Tensor) -> Any:
        """Call the module with a batch of images, (frame, channel, row, col), as it needs.

        A masked autoencoder masks and shuffles nothing; positions are interpolated where the
        input size is not the model's own; SigLIP 2 gets rows of patches.
        """
        return call(self.module, batch, self.how, self.patch)

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
                f"the model {self.name!r} came without its image processor"
                + (
                    ", so preprocess='model' is not known. Give it where you give the module, "
                    "load_model(module, preprocess=vitxr.models.Preprocess(...)) or an image "
                    "processor of transformers,"
                    if self.spec is None
                    else " (preprocessor_config.json), so preprocess='model' is not known. Save "
                    "the processor beside the model and load that folder,"
                )
                + " or pass preprocess='raw' to hand pixel values 0..255 to the model as they are."
            )
        array = prepared(self.processor, image)
        if array.shape[1:] != self.input_size:
            raise ModelError(
                f"the image processor of {self.name!r} makes images of "
                f"{array.shape[1]} x {array.shape[2]} px; the model takes "
                f"{self.input_size[0]} x {self.input_size[1]} px. "
                + (
                    "Give one of that size: load_model(module, preprocess=...)."
                    if self.spec is None
                    else "Correct the size in preprocessor_config.json."
                )
            )
        return array

    @property
    def fixed_size(self) -> bool:
        """Whether preprocessing gives images of one size, whatever theirs."""
        return output_size(self.processor) is not None

    def preprocessing(self) -> dict[str, Any]:
        """Return the image processor's settings, for the record."""
        if self.processor is None:
            return {}
        if isinstance(self.processor, Preprocess):
            return self.processor.settings()
        keep = ("do_", "size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        settings = self.processor.to_dict()
        return {key: settings[key] for key in sorted(settings) if key.startswith(keep)}

    def towards_classes(self) -> str:
        """Say what a user can do where the model has no classes."""
        if type(self.module).__module__.startswith("timm."):
            return "make the model with num_classes"
        if hasattr(self.module, "config"):
            return "load the ...ForImageClassification form of the model"
        return "if the module returns logits, name its classes: Adapter(..., classes=...)"

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that run the model, for the record."""
        import importlib.metadata

        import torch

        used = {type(m).__module__.partition(".")[0] for m in (self.module, self.processor)}
        return {
            "torch_version": torch.__version__,
            **{
                f"{library}_version": importlib.metadata.version(library)
                for library in ("transformers", "timm")
                if library in used
            },
        }

    def hooks(self) -> list[str]:
        """Name the forward hooks that the user has put on the module.

        With a hash of their code and of the values they hold; of one that cannot be pickled, a
        number that never comes again.
        """
        return hooks(self.module)

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
            "preprocessing": described(self.processor),
            "patch": f"{self.patch[0]} x {self.patch[1]} px, grid {rows} x {columns}",
            "classes": f"{len(self.classes) or 'none'}",
            "parameters": f"{sum(p.numel() for p in self.module.parameters()):,}",
            "device": f"{self.device}",
        }

    def __repr__(self) -> str:
        lines = (f"{key:>16}  {value}" for key, value in self.summary().items())
        return "<vitxr Backbone>\n" + "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the module as it is now; its blocks are taken from the copy."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        del known["module"], known["blocks"]
        return _rebuild, (duplicate(self.module), self.block_paths, known)


def _rebuild(module: torch.nn.Module, paths: tuple[str, ...], known: dict[str, Any]) -> Backbone:
    return Backbone(module=module, blocks=tuple(map(module.get_submodule, paths)), **known)


def from_module(
    module: Any,
    *,
    name: str,
    input_size: tuple[int, int] | None = None,
    adapter: Adapter | None = None,
    **known: Any,
) -> Backbone:
    """Make a Backbone of a module, its layout found or told, and checked.

    Parameters
    ----------
    module
        The torch module.
    name
        Its name.
    input_size
        Height and width, where they are not the model's own.
    adapter
        What is told of a module that is not of transformers or timm.
    **known
        The other attributes of the Backbone.
    """
    from vitxr.models import timm

    if adapter is not None:
        layout = told(module, adapter, name)
    else:
        layout = (
            timm.find(module, input_size)
            if timm.is_timm(module)
            else find(module, input_size, output_size(known.get("processor")))
        )
    if (
        input_size is not None
        and any(side % step for side, step in zip(input_size, layout.patch, strict=True))
        # SigLIP's own 384 px are no multiple of its patches of 14 px.
        and (timm.is_timm(module) or input_size != find(module).input_size)
    ):
        raise ArgumentError(
            f"input_size={input_size}: expected multiples of the patch, {layout.patch[0]} x "
            f"{layout.patch[1]} px."
        )
    prefix, channels, how = probe(module, layout, name)
    return Backbone(
        module=module,
        name=name,
        blocks=tuple(map(module.get_submodule, layout.blocks)),
        prefix=prefix,
        channels=channels,
        heads=layout.heads,
        patch=layout.patch,
        input_size=layout.input_size,
        classes=layout.classes,
        how=how,
        **known,
    )
