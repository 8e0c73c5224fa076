"""Load a model by name, path or module, safely, and say what went wrong.

A name is first turned into a local folder; every folder then goes through the same
loading. Safetensors only, no remote code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitxr.errors import ArgumentError, DependencyError, ModelError
from vitxr.models import timm
from vitxr.models.backbone import Backbone, duplicate, from_module
from vitxr.models.calls import PACKED
from vitxr.models.locate import BUNDLED, locate
from vitxr.models.preprocess import Preprocess, at_size
from vitxr.models.structure import Adapter, find, pair, tower

if TYPE_CHECKING:
    import torch

__all__ = ["Reference", "find_device", "load_model"]


def load_model(
    name_or_path_or_module: str | Path | torch.nn.Module,
    revision: str | None = None,
    device: str = "auto",
    input_size: int | tuple[int, int] | None = None,
    adapter: Adapter | None = None,
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
        Branch, tag or commit of a hub model. The commit it meant is recorded.
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
        If ``input_size`` is no multiple of the patch, or ``adapter`` does not go with the
        model.
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
        return _from_memory(name_or_path_or_module, device, size, adapter)
    if not isinstance(name_or_path_or_module, str | Path):
        raise ArgumentError(
            f"the model is a {type(name_or_path_or_module).__name__}; expected a name, a folder or "
            "a torch module. Of a state_dict or a configuration, make the module first."
        )
    if adapter is not None:
        raise ArgumentError(
            f"adapter= goes with a torch module, and {str(name_or_path_or_module)!r} is a name: "
            "load the module yourself and pass it, or leave adapter out."
        )
    name = str(name_or_path_or_module)
    target = find_device(device)
    folder, commit = locate(name, revision)
    module, processor = _load_folder(folder, name, size)
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
        #: Frames a pass may have, once the device's memory has turned out to be too small for more.
        self.limit: int | None = None

    def model(self) -> Backbone:
        """Return the model, loading it once a process where it is not."""
        if self._model is None:
            assert self._load is not None
            with _loading:  # or threads that come together would load one each
                return _load_once(*self._load)
        return self._model

    def on(self, device: str) -> Reference:
        """Return the same model on another device; it is loaded or moved when it is used."""
        twin = Reference.__new__(Reference)
        twin.limit = None
        twin._load = self._load and (*self._load[:2], device, *self._load[3:])
        twin._model = None if twin._load else self.model().to(device)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Sent whole only where no other process can load it by name.
        model = self._model if self._load is None else None
        return {"_model": model, "_load": self._load, "limit": None}


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

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device={device!r} cannot be used: {str(error).splitlines()[0]} "
            "Pass 'auto', 'cpu', or a device torch finds on this machine."
        ) from error
    return target


def _from_memory(
    module: Any, device: str, size: tuple[int, int] | None, adapter: Adapter | None
) -> Backbone:
    module = tower(module)
    if device != "auto" and next(module.parameters()).device != find_device(device):
        module = duplicate(module).to(find_device(device))
    origin = getattr(module, "name_or_path", "") or ""
    name = origin or type(module).__name__
    processor: Any = None
    if adapter is not None:
        processor = adapter.preprocess
        if size is not None:
            raise ArgumentError(
                f"input_size={size} beside an adapter: give the adapter the size the module takes."
            )
    elif timm.is_timm(module):
        processor = timm.preprocess_of(module)
    elif origin and Path(origin).is_dir():
        processor = _processor(Path(origin), module, size)
    return from_module(
        module, name=name, input_size=size, adapter=adapter, revision="", processor=processor
    )


def _load_folder(folder: Path, name: str, size: tuple[int, int] | None) -> tuple[Any, Any]:
    try:
        config_json = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config_json, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: {folder / 'config.json'} cannot be read ({error}); expected a folder "
            "written by save_pretrained."
        ) from error
    if "auto_map" in config_json:
        raise ModelError(
            f"model {name!r} asks to run code that comes with it (auto_map in config.json); vitxr "
            "never does. Use a model whose architecture is part of transformers."
        )
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"model {name!r} has no safetensors weights in {folder}; vitxr loads no pickled "
            "weights (.bin, .pth), which can run code. Where you trust them, load them with "
            "transformers, save_pretrained(FOLDER), and load_model('FOLDER'); a hub model may have "
            "them in a pull request: revision='refs/pr/1'."
        )
    if timm.is_config(config_json):
        return timm.load(folder, config_json, name, size)
    module = tower(_pretrained(folder, name, config_json))
    return module.eval(), _processor(folder, module, size)


def _pretrained(folder: Path, name: str, config_json: dict[str, Any]) -> Any:
    import torch
    import transformers

    title = (config_json.get("architectures") or ["?"])[0]
    architecture = getattr(transformers, title, None)
    if architecture is None or not hasattr(architecture, "from_pretrained"):
        raise ModelError(
            f"model {name!r} has the architecture {title!r}, which transformers "
            f"{transformers.__version__} does not know. Upgrade transformers, or correct "
            "`architectures` in config.json."
        )
    for chosen in _attentions(config_json):
        if chosen not in ("eager", "sdpa"):
            raise ModelError(
                f"model {name!r}: its config.json asks for the attention {chosen!r}, which "
                "transformers may fetch code for; expected 'eager' or 'sdpa'. Take it out."
            )
    dtype = {"dtype" if _is_new() else "torch_dtype": torch.float32}
    try:
        with _quiet():
            module, info = architecture.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **dtype,
            )
    except Exception as error:
        # Readers of weights and configs raise many kinds; all mean one thing here.
        raise ModelError(f"model {name!r} cannot be loaded from {folder}: {error}") from error
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    mismatched = sorted(str(k) for k in info["mismatched_keys"])
    if missing or mismatched:
        raise ModelError(
            f"model {name!r}: the weights in {folder} do not fit {title}: "
            f"missing {missing[:5]}, of another shape {mismatched[:5]}. Running it would use "
            "random weights; save the whole model again."
        )
    return module


def _attentions(config: dict[str, Any]) -> Iterator[Any]:
    """Every implementation of attention that a config.json names, its parts' too."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _attentions(value)
        elif key in ("attn_implementation", "_attn_implementation") and value is not None:
            yield value


def _is_new() -> bool:
    """Whether transformers is of version 5, where some arguments have other names."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def _processor(folder: Path, module: Any, size: tuple[int, int] | None) -> Any:
    """Return the folder's image processor, for images of a size; None if it holds none."""
    if not any(
        (folder / f).exists() for f in ("preprocessor_config.json", "processor_config.json")
    ):
        return None
    from transformers import AutoImageProcessor

    layout = find(module, size)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if str(settings.get("image_processor_type")).startswith("DINOv3"):
        # Transformers has it with torchvision only.
        own = (settings["size"]["height"], settings["size"]["width"])
        return Preprocess.like(settings, size or own, floating=True)
    # One backend everywhere: torchvision's resizing differs from Pillow's.
    pillow: dict[str, Any] = {"backend": "pil"} if _is_new() else {"use_fast": False}
    try:
        with _quiet():
            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **pillow
            )
    except Exception as error:  # any of many kinds, for a file that is not what it should be
        raise ModelError(
            f"the image processor in {folder} cannot be loaded ({error}). Correct "
            "preprocessor_config.json; without that file only preprocess='raw' is known."
        ) from error
    if PACKED in layout.how:
        return Preprocess.like(processor.to_dict(), layout.input_size)
    return processor if size is None else at_size(processor, size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and chatter off the screen while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
