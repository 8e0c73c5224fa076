"""Load a model by name, path or module, and say what went wrong.

A name is first turned into a local folder; every folder then goes through the same
loading. A module in memory is used as it is.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitxr.errors import ArgumentError, DependencyError, ModelError
from vitxr.models import timm
from vitxr.models.backbone import Backbone, from_module
from vitxr.models.folder import load_folder, processor_given, processor_of
from vitxr.models.identity import duplicate, versions
from vitxr.models.locate import BUNDLED, locate
from vitxr.models.passes import exclusive
from vitxr.models.preprocess import Preprocess, output_size
from vitxr.models.structure import Adapter, pair, tower

if TYPE_CHECKING:
    import torch
    from transformers.image_processing_base import ImageProcessingMixin

__all__ = ["Reference", "find_device", "load_model"]


def load_model(
    name_or_path_or_module: str | Path | torch.nn.Module,
    revision: str | None = None,
    device: str = "auto",
    input_size: int | tuple[int, int] | None = None,
    adapter: Adapter | None = None,
    preprocess: Preprocess | ImageProcessingMixin | None = None,
) -> Backbone:
    """Load a Vision Transformer.

    Its blocks, prefix tokens and patch grid are found from the model itself and checked by
    running blank frames; what does not come out as believed is an error.

    Parameters
    ----------
    name_or_path_or_module
        ``"digits"``, the small model that comes with vitxr; the id of a model on
        the Hugging Face hub, such as ``"google/vit-base-patch16-224"``; a model of timm's,
        such as ``"timm:vit_base_patch16_224"``; a folder saved by ``save_pretrained`` or
        by ``timm.models.save_for_hf``; or a torch module in memory, which is used as it is
        and never changed. Of a model of images and texts, the image tower is taken.
    revision
        Branch, tag or commit of a hub model; ``"main"`` is the newest. Where it is not given,
        that of ``vitxr/catalogs/models.yaml``, or the newest. The commit it meant is recorded.
    device
        ``"auto"`` (a CUDA device if there is one, else the CPU; a module in memory
        stays where it is), or a torch device name.
    input_size
        Side of the images, or their height and width, where it is not the model's own:
        position embeddings are interpolated as the model itself does it, images are
        preprocessed to that size, and both are recorded.
    adapter
        Where the blocks and the patch grid are, of a module that is not of transformers
        or timm.
    preprocess
        How images become the input of a module in memory: a
        :class:`~vitxr.models.Preprocess`, or an image processor of transformers, which is run
        with Pillow. What is loaded by name has its own. Without it, timm's are known, and those
        of a transformers model that was loaded from a folder which still is there.

    Returns
    -------
    Backbone
        The model, its blocks, prefix tokens, patch grid and image processor.

    Raises
    ------
    ModelError
        If the model cannot be found or reached, has no safetensors weights, needs
        remote code, misses weights, is not a Vision Transformer with one patch grid, or
        takes no images of that size.
    ArgumentError
        If ``input_size`` is no multiple of the patch, or ``revision``, ``adapter`` or
        ``preprocess`` does not go with the model.
    DependencyError
        If torch or transformers (or timm, for its models) is not installed.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.load_model("digits").input_size
    (32, 32)
    >>> vitxr.load_model("digits", input_size=(32, 64)).grid
    (8, 16)
    """
    size = None if input_size is None else pair(input_size, "input_size")
    if adapter is not None and not isinstance(adapter, Adapter):
        raise ArgumentError(f"adapter={adapter!r}: expected a vitxr.models.Adapter.")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "loading a model needs torch and transformers, which are not installed: "
            "pip install 'vitxr[models]'."
        ) from error

    if isinstance(name_or_path_or_module, torch.nn.Module):
        if revision is not None:
            raise ArgumentError(
                f"revision={revision!r} goes with models of the hub, and the model is a module in "
                "memory, which is used as it is. Leave it out."
            )
        return _from_memory(name_or_path_or_module, device, size, adapter, preprocess)
    if not isinstance(name_or_path_or_module, str | Path):
        raise ArgumentError(
            f"the model is a {type(name_or_path_or_module).__name__}; expected a name, a folder or "
            "a torch module. Of a state_dict or a configuration, make the module first."
        )
    name = str(name_or_path_or_module)
    for what, given in (("adapter", adapter), ("preprocess", preprocess)):
        if given is not None:
            own = " (its own is preprocessor_config.json)" if what == "preprocess" else ""
            raise ArgumentError(
                f"{what}= goes with a torch module, and {name!r} is a name{own}: load the module "
                f"yourself and pass it, or leave {what} out."
            )
    if not name or not isinstance(revision, str | None):
        raise ArgumentError(
            f"the model is {name!r} and revision={revision!r}; expected a name or a folder, and a "
            "branch, tag or commit as text, or None."
        )
    target = find_device(device)
    folder, commit = locate(name, revision)
    module, processor = load_folder(folder, name, size, from_hub=bool(commit))
    where = name if commit or name in BUNDLED else str(folder.resolve())
    return from_module(
        module.to(target),
        name=name,
        input_size=size,
        revision=commit,
        processor=processor,
        spec=(where, commit or None, device, "float32", size),
    )


_loading = threading.Lock()


class Reference:
    """A model for tasks: itself in this process, the way to load it in any other.

    Parameters
    ----------
    model
        The model.
    fingerprint
        Of the weights it had, in float32 if it was loaded by name. A worker that loads
        other weights raises.
    """

    def __init__(self, model: Backbone, fingerprint: str):
        self._model: Backbone | None = model
        self._load = None if model.spec is None or model.hooks() else (*model.spec, fingerprint)
        with exclusive():
            self._versions = versions(model.module)
        #: Frames a pass may have, once the device's memory has turned out to be too small for more.
        self.limit: int | None = None

    def model(self) -> Backbone:
        """Return the model, loading it once a process where it is not."""
        if self._model is None:
            assert self._load is not None
            with _loading:  # or threads that come together would load one each
                return _load_once(*self._load)
        return self._model

    def check(self) -> None:
        """Raise if the model's weights or hooks are not those it had; no pass may be under way."""
        if self._model and self._versions and versions(self._model.module) != self._versions:
            raise ModelError(
                "the model's weights or hooks were changed after extract was called, and this "
                "lazy result is computed only now. Call extract again, or .load() its results "
                "before they change."
            )

    def on(self, device: str) -> Reference:
        """Return the same model on another device; it is loaded or moved when it is used."""
        twin = Reference.__new__(Reference)
        twin.limit = None
        twin._load = self._load and (*self._load[:2], device, *self._load[3:])
        twin._model = None if twin._load else self.model().to(device)
        twin._versions = []
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Sent whole only where no other process can load it by name.
        model = self._model if self._load is None else None
        return {"_model": model, "_load": self._load, "limit": None, "_versions": []}


@functools.lru_cache(maxsize=2)
def _load_once(
    name: str,
    revision: str | None,
    device: str,
    precision: str,
    input_size: tuple[int, int] | None,
    fingerprint: str,
) -> Backbone:
    model = load_model(name, revision, device, input_size)
    if model.fingerprint != fingerprint:
        raise ModelError(
            f"model {name!r} loaded by a worker has other weights ({model.fingerprint[:12]}) than "
            f"the run was planned with ({fingerprint[:12]}): it was changed in memory or on disk. "
            "Save the model you mean in a new folder and load that."
        )
    return model.cast(precision)


def find_device(device: str) -> torch.device:
    """Return a torch device, or raise a ModelError if this machine has no such one."""
    import torch

    if not isinstance(device, str):
        raise ArgumentError(f"device={device!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:1'.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
        if target.type == "meta":
            raise RuntimeError("it holds no numbers.")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device={device!r} cannot be used: {str(error).splitlines()[0]} "
            "Pass 'auto', 'cpu', or a device torch finds on this machine."
        ) from error
    return target


def _from_memory(
    module: Any,
    device: str,
    size: tuple[int, int] | None,
    adapter: Adapter | None,
    preprocess: Any,
) -> Backbone:
    if adapter is not None:
        if size not in (None, pair(adapter.input_size, "input_size")):
            raise ArgumentError(
                f"input_size={size} beside an adapter that says {adapter.input_size}: give the "
                "adapter the size the module takes."
            )
        size = None
    module = tower(module)
    origin = str(getattr(module, "name_or_path", "") or "")
    name = origin or type(module).__name__
    _check_weights(module, name)
    if device != "auto" and next(module.parameters()).device != find_device(device):
        module = duplicate(module).to(find_device(device))
    processor: Any = None
    own = module if adapter is None and hasattr(module, "config") else None
    if preprocess is not None:
        processor = processor_given(preprocess, own, size)
    elif adapter is None and timm.is_timm(module):
        processor = timm.preprocess_of(module, size)
    elif own is not None and origin and Path(origin).is_dir():
        processor = processor_of(Path(origin), module, size)
    model = from_module(
        module, name=name, input_size=size, adapter=adapter, revision="", processor=processor
    )
    made = output_size(processor)
    if preprocess is not None and made not in (None, model.input_size):
        raise ArgumentError(
            f"preprocess= makes images of {made[0]} x {made[1]} px; {name!r} takes "
            f"{model.input_size[0]} x {model.input_size[1]} px. Give one of that size, or say with "
            f"{'input_size=' if adapter is None else 'the adapter'} which other size it shall take."
        )
    return model


def _check_weights(module: Any, name: str) -> None:
    """Check that a module has weights to run it with."""
    weights = [p for p in module.parameters() if p.is_floating_point()]
    if not weights or any(p.is_meta for p in weights):
        what = "on torch's meta device, without numbers" if weights else "none of floating point"
        raise ModelError(
            f"{name!r}: its weights are {what}; expected a model that can be run. Load them first."
        )
