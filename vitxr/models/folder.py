"""A model saved in a folder: its configuration, weights and image processor.

Safetensors only, no remote code; a file that is not what it should be is named.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitxr.errors import ArgumentError, ModelError
from vitxr.models import timm
from vitxr.models.preprocess import Preprocess, at_size, output_size, prepared
from vitxr.models.structure import find, is_packed, pair, tower

__all__ = ["load_folder", "processor_given", "processor_of"]

#: Endings of files with weights that are not loaded.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz")


def load_folder(
    folder: Path, name: str, size: tuple[int, int] | None, from_hub: bool
) -> tuple[Any, Any]:
    """Load the model and the image processor of a folder.

    Parameters
    ----------
    folder
        Written by ``save_pretrained`` or ``timm.models.save_for_hf``.
    name
        What the user called it, for messages.
    size
        Height and width of the images, where they are not the model's own.
    from_hub
        Whether the folder is a copy of the hub's, of which only some files are fetched.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name!r}: {folder} holds no config.json, so no model; expected a folder "
            "written by save_pretrained, with config.json and model.safetensors."
        )
    try:
        config_json = read_object(folder / "config.json")
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
        if not from_hub and not any(f.suffix in _PICKLED for f in folder.iterdir()):
            raise ModelError(
                f"model {name!r}: {folder} holds a config.json and no weights; expected "
                "model.safetensors beside it, as save_pretrained writes it."
            )
        raise ModelError(
            f"model {name!r} has no safetensors weights in {folder}; vitxr loads no pickled "
            "weights (.bin, .pth), which can run code. Where you trust them, load them with "
            "transformers, save_pretrained(FOLDER), and load_model('FOLDER'); a hub model may have "
            "them in a pull request, which its page lists: revision='refs/pr/1'."
        )
    if timm.is_config(config_json):
        return timm.load(folder, config_json, name, size)
    module = tower(_pretrained(folder, name, config_json))
    return module.eval(), processor_of(folder, module, size)


def _pretrained(folder: Path, name: str, config_json: dict[str, Any]) -> Any:
    import torch
    import transformers

    named = config_json.get("architectures")
    title = named[0] if isinstance(named, list) and named else None
    if not isinstance(title, str):
        raise ModelError(
            f"model {name!r}: `architectures` of its config.json is {named!r}; expected the name "
            "of a class of transformers in a list, such as ['ViTModel']. Write the class there "
            "that the weights were saved from."
        )
    architecture: Any = getattr(transformers, title, None)
    known = isinstance(architecture, type)
    if not known or not issubclass(architecture, transformers.PreTrainedModel):
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
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **dtype,
            )
    except Exception as error:
        # Readers of weights and configs raise many kinds; all mean one thing here.
        raise ModelError(
            f"model {name!r} cannot be loaded from {folder}: {type(error).__name__}: {error}. Copy "
            "or download a file again that was cut short or altered, and undo what was edited in "
            "config.json."
        ) from error
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


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; a ValueError if it holds none."""
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def _is_new() -> bool:
    """Whether transformers is of version 5, where some arguments have other names."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def processor_of(folder: Path, module: Any, size: tuple[int, int] | None) -> Any:
    """Return the folder's image processor, for images of a size; None if it holds none.

    Parameters
    ----------
    folder
        The folder.
    module
        The transformers model it goes with; None for another module.
    size
        Height and width of the images, where they are not the model's own.
    """
    files = [folder / f for f in ("preprocessor_config.json", "processor_config.json")]
    present = [path for path in files if path.exists()]
    if not present:
        return None
    packed = find(module, size).input_size if module is not None and is_packed(module) else None
    try:
        processor = _processor(present[0], size, packed)
        # What is wrong in it would else be found in the middle of an extraction.
        prepared(processor, np.zeros((16, 16, 3), np.uint8))
        pair(output_size(processor) or 1, "size")
    except Exception as error:  # any of many kinds, for a file that is not what it should be
        raise ModelError(
            f"the image processor in {folder} cannot be used "
            f"({type(error).__name__}: {error}). Correct {present[0].name}; without that file only "
            "preprocess='raw' is known."
        ) from error
    return processor


def _processor(path: Path, size: tuple[int, int] | None, packed: tuple[int, int] | None) -> Any:
    from transformers import AutoImageProcessor

    settings = read_object(path)
    if str(settings.get("image_processor_type")).startswith("DINOv3"):
        # Transformers has it with torchvision only.
        own = (settings["size"]["height"], settings["size"]["width"])
        return Preprocess.like(settings, size or own, floating=True)
    # One backend everywhere: torchvision's resizing differs from Pillow's.
    pillow: dict[str, Any] = {"backend": "pil"} if _is_new() else {"use_fast": False}
    with _quiet():
        processor = AutoImageProcessor.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False, **pillow
        )
    if packed is not None:
        return Preprocess.like(processor.to_dict(), packed)
    return processor if size is None else at_size(processor, size)


def processor_given(given: Any, module: Any, size: tuple[int, int] | None) -> Any:
    """Return the image processor that a user gives for a module in memory.

    One of transformers' is read as if it were saved beside the model: with Pillow, for
    images of that size.

    Parameters
    ----------
    given
        A Preprocess, or an image processor of transformers.
    module
        The transformers model it goes with; None for another module.
    size
        Height and width of the images, where they are not the model's own.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    if isinstance(given, Preprocess):
        return given
    if not isinstance(given, ImageProcessingMixin):
        inside = " Pass its `image_processor`." if hasattr(given, "image_processor") else ""
        raise ArgumentError(
            f"preprocess={_short(given)}: expected a vitxr.models.Preprocess, or an image "
            f"processor of transformers.{inside}"
        )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(given.to_json_string(), "utf-8")
        try:
            return processor_of(Path(folder), module, size)
        except ModelError as error:
            raise ArgumentError(
                f"preprocess={type(given).__name__}(...) cannot be used: {error.__cause__ or error}"
            ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{type(value).__name__}(...)"


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
