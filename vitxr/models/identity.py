"""Which model a module is: a fingerprint of it, its copies, and the hooks its user has put on."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["duplicate", "fingerprint", "hooks", "versions"]

#: Of a configuration, what changes no number.
_NO_MATTER = ("transformers_version", "dtype", "torch_dtype", "name_or_path", "architectures")


def fingerprint(module: torch.nn.Module, laid: tuple[Any, ...]) -> str:
    """Return the SHA-256 of a module as it is now.

    Parameters
    ----------
    module
        The module.
    laid
        Where its blocks are and how it is called.
    """
    import torch

    digest = hashlib.sha256(type(module).__name__.encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        settings = {k: v for k, v in config.to_dict().items() if k[0] != "_"}
        kept = {k: v for k, v in settings.items() if k not in _NO_MATTER}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    else:
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(module)).encode())
        for line in _settings(module):
            digest.update(line)
    digest.update(f"{laid}\n".encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _settings(module: torch.nn.Module) -> Iterator[bytes]:
    """What the parts of a module without configuration hold beside their weights.

    Numbers, texts, functions, and buffers that are not saved: ``repr`` shows only some of them.
    """
    import torch

    saved = set(module.state_dict())
    for path, part in module.named_modules():
        for key, value in sorted(vars(part).items()):
            if key[0] != "_" and key != "training" and _is_plain(value):
                text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
                yield f"{path}.{key} {text}\n".encode()
    for key, buffer in module.named_buffers():
        if key not in saved:
            yield f"{key} {buffer.dtype} {tuple(buffer.shape)}\n".encode()
            yield buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or hasattr(value, "__qualname__")
    )


def hooks(module: torch.nn.Module) -> list[str]:
    """Name the forward hooks on a module, with a hash of each; transformers' own are left out."""
    return [
        f"{name or type(child).__name__}: {getattr(hook, '__qualname__', repr(hook))} "
        f"({_hash_of(hook)})"
        for name, child in module.named_modules()
        for hook in (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
        if not _is_recorder(hook)
    ]


def _hash_of(hook: Any) -> str:
    import cloudpickle

    try:
        return hashlib.sha256(cloudpickle.dumps(hook)).hexdigest()[:12]
    except Exception:  # whatever it holds may raise whatever it likes
        return uuid.uuid4().hex[:12]


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


def versions(module: torch.nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """Say which weights a module has, at no cost: torch counts what is written to each in place.

    Equal before and after unless weights were exchanged, trained or loaded between. Not seen is
    what is written to ``parameter.data``.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> before = versions(layer)
    >>> layer.load_state_dict(layer.state_dict())
    <All keys matched successfully>
    >>> versions(layer) == before
    False
    """
    return [(id(p), 0 if p.is_inference() else p._version, p.dtype) for p in module.parameters()]
