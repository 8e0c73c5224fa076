"""Find a model by name, path or module, load it safely, and say what went wrong.

A name is first turned into a local folder (the bundled model, a path, or the
hub's snapshot of one commit); every folder then goes through the same loading.
Safetensors only, no remote code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitxr.errors import DependencyError, ModelError
from vitxr.models.backbone import Backbone, duplicate, from_module

if TYPE_CHECKING:
    import torch

__all__ = ["Reference", "find_device", "load_model"]

BUNDLED = ("digits",)
_FILES = ("*config.json", "model*.safetensors", "model.safetensors.index.json")


def load_model(
    name_or_path_or_module: str | Path | torch.nn.Module,
    revision: str | None = None,
    device: str = "auto",
) -> Backbone:
    """Load a Vision Transformer.

    Parameters
    ----------
    name_or_path_or_module
        ``"digits"``, the small model that comes with vitxr; the id of a model on
        the Hugging Face hub, such as ``"google/vit-base-patch16-224"``; a folder
        saved by ``save_pretrained``; or a transformers vision model in memory,
        which is used as it is and never changed.
    revision
        Branch, tag or commit of a hub model. The commit it meant is recorded.
    device
        ``"auto"`` (a CUDA device if there is one, else the CPU; a module in memory
        stays where it is), or a torch device name.

    Returns
    -------
    Backbone
        The model, its blocks, prefix tokens, patch grid and image processor.

    Raises
    ------
    ModelError
        If the model cannot be found or reached, has no safetensors weights, needs
        remote code, misses weights, or is not a Vision Transformer.
    DependencyError
        If torch or transformers is not installed.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.load_model("digits").input_size
    (32, 32)
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "loading a model needs torch and transformers, which are not installed: "
            "pip install 'vitxr[models]'."
        ) from error

    if isinstance(name_or_path_or_module, torch.nn.Module):
        return _from_memory(name_or_path_or_module, device)
    name = str(name_or_path_or_module)
    target = find_device(device)
    folder, commit = _locate(name, revision)
    module, processor = _load_folder(folder, name)
    where = name if commit or name in BUNDLED else str(folder.resolve())
    return from_module(
        module.to(target),
        name=name,
        revision=commit,
        processor=processor,
        spec=(where, commit or None, device, "float32"),
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
    name: str, revision: str | None, device: str, precision: str, fingerprint: str
) -> Backbone:
    model = load_model(name, revision, device)
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


def _from_memory(module: Any, device: str) -> Backbone:
    if device != "auto" and next(module.parameters()).device != find_device(device):
        module = duplicate(module).to(find_device(device))
    origin = getattr(module, "name_or_path", "") or ""
    processor = _processor(Path(origin)) if origin and Path(origin).is_dir() else None
    return from_module(
        module, name=origin or type(module).__name__, revision="", processor=processor
    )


def _locate(name: str, revision: str | None) -> tuple[Path, str]:
    """Turn a name into a local folder and, for hub models, the commit."""
    path = Path(name).expanduser()
    if revision is not None and (name in BUNDLED or path.is_dir()):
        raise ModelError(
            f"revision={revision!r} goes with models of the hub, and {name!r} is "
            f"{'bundled' if name in BUNDLED else 'a folder'}. Leave it out."
        )
    if name in BUNDLED:
        return Path(str(importlib.resources.files("vitxr") / "models" / name)), ""
    if path.is_dir():
        return path, ""
    looks_like_path = (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    )
    if path.exists() or looks_like_path:
        raise ModelError(
            f"no model folder at {name!r}: expected a folder written by save_pretrained, with "
            "config.json and model.safetensors."
        )
    if "/" not in name:
        raise ModelError(
            f"no model named {name!r}: expected {' or '.join(map(repr, BUNDLED))} (bundled), a hub "
            "id such as 'google/vit-base-patch16-224', or a folder written by save_pretrained."
        )
    return _snapshot(name, revision)


def _snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        # One quick question first: the download itself retries for minutes.
        commit = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10).sha
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub model {name!r} is gated: accept its terms on its page, then log in with "
            "`hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"the hub has no model {name!r}{at}: check the spelling and the revision; a private "
            "model needs `hf auth login`."
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a legal hub id: {error}") from error
    except Exception as error:  # any of several HTTP stacks: not reachable, so look in the cache
        return _cached_snapshot(name, revision, at, error)
    folder = huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=list(_FILES))
    return Path(folder), str(commit)


def _cached_snapshot(
    name: str, revision: str | None, at: str, cause: Exception
) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=list(_FILES)
        )
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"cannot reach the model hub for {name!r}{at} ({cause}), and no copy is in its local "
            f"cache. On a machine with network run `hf download {name} --local-dir FOLDER`, bring "
            "FOLDER here and call load_model('FOLDER'); or use load_model('digits'), which needs "
            "no network."
        ) from cause
    return Path(folder), Path(folder).name


def _load_folder(folder: Path, name: str) -> tuple[Any, Any]:
    import torch
    import transformers

    try:
        config_json = json.loads((folder / "config.json").read_text("utf-8"))
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
            "weights. Convert it with transformers' save_pretrained."
        )
    title = (config_json.get("architectures") or ["?"])[0]
    architecture = getattr(transformers, title, None)
    if architecture is None or not hasattr(architecture, "from_pretrained"):
        raise ModelError(
            f"model {name!r} has the architecture {title!r}, which transformers "
            f"{transformers.__version__} does not know. Upgrade transformers, or correct "
            "`architectures` in config.json."
        )
    try:
        with _quiet():
            module, info = architecture.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
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
    return module.eval(), _processor(folder)


def _processor(folder: Path) -> Any:
    """Return the folder's image processor, or None if it holds none."""
    if not any(
        (folder / f).exists() for f in ("preprocessor_config.json", "processor_config.json")
    ):
        return None
    from transformers import AutoImageProcessor

    # One backend everywhere: torchvision's resizing differs from Pillow's.
    with _quiet():
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )


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
