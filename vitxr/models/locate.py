"""Where a model's files are: bundled, in a folder, or the hub's snapshot of one commit."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from vitxr.errors import ModelError
from vitxr.models import timm
from vitxr.models.catalog import hint, known_models

__all__ = ["BUNDLED", "locate"]

BUNDLED = ("digits",)
_FILES = ("*config.json", "model*.safetensors", "model.safetensors.index.json")


def locate(name: str, revision: str | None) -> tuple[Path, str]:
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
    revision = revision or known_models().get(name, {}).get("revision")
    if name.startswith(timm.PREFIX):
        return _snapshot(timm.hub_id(name), revision)
    if "/" not in name:
        raise ModelError(
            f"no model named {name!r}: expected {' or '.join(map(repr, BUNDLED))} (bundled), a hub "
            "id such as 'google/vit-base-patch16-224', 'timm:' and a name of timm's, or a folder "
            f"written by save_pretrained.{hint(name)}"
        )
    return _snapshot(name, revision)


def _snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        # One quick question first: the download itself retries for minutes.
        commit = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10).sha
        # Of a gated model the question is answered, and the download refused.
        folder = huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=list(_FILES)
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub model {name!r} is gated: accept its terms on its page, then log in with "
            "`hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"the hub has no model {name!r}{at}: check the spelling and the revision; a private "
            f"model needs `hf auth login`.{hint(name)}"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a legal hub id: {error}") from error
    except Exception as error:  # any of several HTTP stacks: not reachable, so look in the cache
        return _cached_snapshot(name, revision, at, error)
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
    except errors.HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a legal hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, OSError):
        raise ModelError(
            f"cannot reach the model hub for {name!r}{at} ({cause}), and no copy is in its local "
            f"cache. On a machine with network run `hf download {name} --local-dir FOLDER`, bring "
            "FOLDER here and call load_model('FOLDER'); or use load_model('digits'), which needs "
            f"no network.{hint(name)}"
        ) from cause
    return Path(folder), Path(folder).name
