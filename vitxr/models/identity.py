"""Which model a module is: a fingerprint of it, its copies, and the hooks its user has put on."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import re
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["duplicate", "fingerprint", "hooks", "versions"]

#: Of a configuration, what changes no number.
_NO_MATTER = ("transformers_version", "dtype", "torch_dtype", "name_or_path", "architectures")
#: Of a part's attributes, likewise: timm says there where weights came from.
_NO_SETTING = ("training", "pretrained_cfg", "default_cfg")


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
        # A part that was exchanged in memory, such as an activation, is not in the configuration.
        for path, part in module.named_modules():
            if next(part.children(), None) is None:
                digest.update(f"{path} {_without_addresses(repr(part))}\n".encode())
    else:
        digest.update(_without_addresses(repr(module)).encode())
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

    Numbers, texts, functions, what holds nothing else, and buffers that are not saved: ``repr``
    shows only some of them. Not tensors, which a pass may leave there.
    """
    import torch

    saved = set(module.state_dict())
    for path, part in module.named_modules():
        for key, value in sorted(vars(part).items()):
            counts = key[0] != "_" and key not in _NO_SETTING
            if counts and (said := _said(value)) is not None:
                yield f"{path}.{key} {said}\n".encode()
    for key, buffer in module.named_buffers():
        if key not in saved:
            yield f"{key} {buffer.dtype} {tuple(buffer.shape)}\n".encode()
            yield buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _said(value: Any) -> str | None:
    """Say what a setting is, the same in every process; None where it may be what a pass left."""
    if isinstance(value, functools.partial):
        return _all_said("partial", (value.func, value.args, tuple(value.keywords.items())))
    if isinstance(value, tuple | list):
        return _all_said(type(value).__name__, value)
    if isinstance(value, Mapping):
        return _all_said("of", tuple(value.items()))
    if isinstance(value, types.FunctionType) and "<" in value.__qualname__:  # that says too little
        given = (value.__defaults__, tuple((value.__kwdefaults__ or {}).items()))
        held = [_said(v) for v in _closed_over(value) if not isinstance(v, types.FunctionType)]
        return f"{value.__qualname__} {_code(value.__code__)} {_said(given)} {held}"
    plain = value is None or isinstance(value, bool | int | float | complex | str | bytes)
    known = plain or hasattr(value, "__qualname__")
    return _without_addresses(repr(value)) if known else None


def _all_said(kind: str, values: Iterable[Any]) -> str | None:
    said = [_said(v) for v in values]
    return None if None in said else f"{kind} {said}"


def _code(code: types.CodeType) -> str:
    """Say what a function does, wherever it was written."""
    held = [
        _code(c) if isinstance(c, types.CodeType) else sorted(map(repr, c))
        if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]  # fmt: skip
    return f"{code.co_code.hex()} {code.co_names} {held}"


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty until its function has run
            yield cell.cell_contents


def hooks(module: torch.nn.Module) -> list[str]:
    """Name the forward hooks on a module, with a hash of each; transformers' own are left out."""
    from vitxr.models.passes import exclusive

    with exclusive():  # or those of a pass in another thread would be among them
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
    from vitxr.models.passes import exclusive

    # A pass in another thread has hooks on the module, which would stay on the copy.
    with exclusive(), contextlib.ExitStack() as undo:
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


def versions(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Say which weights and hooks a module has, at no cost: torch counts what is written in place.

    Equal before and after unless weights were exchanged, trained or loaded, or hooks hung or
    removed between. Not seen is what is written to ``parameter.data``. No pass may be under way.

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
    hooked: list[tuple[Any, ...]] = [
        (id(child), kind, key, id(hook))
        for child in module.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
        for key, hook in getattr(child, kind).items()
        if not _is_recorder(hook)
    ]
    return hooked + [
        (id(p), 0 if p.is_inference() else p._version, p.dtype) for p in module.parameters()
    ]
