"""Where a store is: a local folder or an fsspec URL, read and written by whole objects.

The one place that knows files from objects. A write is atomic: a reader, or the
next run after a kill, finds the whole object or none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import StoreError

__all__ = ["Location"]

Bytes = npt.NDArray[np.uint8]

#: Bytes that a kernel reads ahead by itself.
_READAHEAD = 128 << 10

#: Ending of a local file that is being written.
PART = ".part"


class Location:
    """A folder of objects, named by keys with ``/`` as zarr names them.

    Parameters
    ----------
    path
        A folder, or a URL such as ``"s3://bucket/run.zarr"``.

    Raises
    ------
    StoreError
        If fsspec does not know the URL's protocol, or lacks the package for it.
    """

    def __init__(self, path: str | Path):
        self.path = os.fspath(path)
        protocol, _, rest = self.path.partition("://")
        if protocol == "file":
            self.path, rest = rest, ""
        #: The local folder; None for an object store.
        self.folder = None if rest else Path(self.path)
        if self.folder is None:
            _ = self._remote

    def __str__(self) -> str:
        return self.path

    def __reduce__(self) -> tuple[Any, ...]:
        return Location, (self.path,)

    @cached_property
    def _remote(self) -> tuple[Any, str]:
        import fsspec

        try:
            # Listings of another moment would hide what other workers have written.
            return fsspec.core.url_to_fs(self.path, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StoreError(
                f"{self.path!r} cannot be opened: {error}. Expected a folder, or a URL that fsspec "
                "knows and whose package is installed (s3fs for s3://, gcsfs for gs://)."
            ) from error

    @property
    def key_value(self) -> Any:
        """The same as a Zarr store, for reading."""
        from zarr.storage import FsspecStore, LocalStore

        if self.folder is not None:
            return LocalStore(self.folder, read_only=True)
        return FsspecStore.from_url(self.path, read_only=True)

    def exists(self) -> bool:
        """Whether anything is there, an empty folder excepted."""
        if self.folder is not None:
            return self.folder.is_file() or (
                self.folder.is_dir() and next(self.folder.iterdir(), None) is not None
            )
        fs, root = self._remote
        return bool(fs.exists(root))

    def read(self, key: str) -> bytes | None:
        """Return one object, or None if there is none."""
        if self.folder is not None:
            try:
                return (self.folder / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        fs, root = self._remote
        try:
            return bytes(fs.cat_file(f"{root}/{key}"))
        except FileNotFoundError:
            return None

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return the objects that are there; those of an object store at the same time."""
        if self.folder is not None:
            found = {key: self.read(key) for key in keys}
            return {key: data for key, data in found.items() if data is not None}
        fs, root = self._remote
        paths = {f"{root}/{key}": key for key in keys}
        if not paths:
            return {}
        got = fs.cat(list(paths), on_error="return")
        for path, data in got.items():
            if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise OSError(f"reading {path!r} failed: {data}") from data
        return {paths[p]: bytes(d) for p, d in got.items() if not isinstance(d, Exception)}

    @contextlib.contextmanager
    def opened(self, key: str) -> Iterator[Callable[[int | None, int], Bytes] | None]:
        """Open one object to read pieces of it: a function of place and size, None if it is gone.

        The place None means the end: the last so many bytes.
        """
        if self.folder is None:
            yield self._ranges(key)
            return
        try:
            file = (self.folder / key).open("rb", buffering=0)
        except FileNotFoundError:
            yield None
            return

        def piece(at: int | None, size: int) -> Bytes:
            if at is None:
                at = max(os.fstat(file.fileno()).st_size - size, 0)
            if size > _READAHEAD and hasattr(os, "posix_fadvise"):
                # All of it at once, rather than piece by piece as readahead would.
                os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_WILLNEED)
            file.seek(at)
            out = np.empty(size, np.uint8)
            return out[: file.readinto(out.data)]

        with file:
            yield piece

    def _ranges(self, key: str) -> Callable[[int | None, int], Bytes] | None:
        fs, root = self._remote
        path = f"{root}/{key}"
        if not fs.exists(path):
            return None

        def piece(at: int | None, size: int) -> Bytes:
            start, end = (-size, None) if at is None else (at, at + size)
            return np.frombuffer(fs.cat_file(path, start=start, end=end), np.uint8)

        return piece

    def write(self, objects: Mapping[str, Any]) -> None:
        """Write whole objects (bytes or arrays of bytes), in order; each is there whole or not."""
        if self.folder is None:
            fs, root = self._remote
            fs.pipe({f"{root}/{key}": bytes(data) for key, data in objects.items()})
            return
        for key, data in objects.items():
            target = self.folder / key
            # Two runs may write one object; each has a name of its own for it until it is whole.
            draft = target.with_name(f"{target.name}.{os.getpid()}{PART}")
            try:
                try:
                    draft.write_bytes(data)
                except FileNotFoundError:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    draft.write_bytes(data)
                draft.replace(target)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise

    def erase(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there already are no error."""
        for key in keys:
            if self.folder is not None:
                (self.folder / key).unlink(missing_ok=True)
            else:
                fs, root = self._remote
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{key}")

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of every object right under a prefix, by key."""
        if self.folder is not None:
            try:
                with os.scandir(self.folder / prefix) as entries:
                    return {f"{prefix}/{e.name}": e.stat().st_size for e in entries if e.is_file()}
            except FileNotFoundError:
                return {}
        fs, root = self._remote
        try:
            found = fs.ls(f"{root}/{prefix}", detail=True)
        except FileNotFoundError:
            return {}
        return {
            f"{prefix}/{entry['name'].rsplit('/', 1)[-1]}": int(entry["size"])
            for entry in found
            if entry["type"] == "file"
        }

    def remove(self) -> None:
        """Delete everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        fs, root = self._remote
        with contextlib.suppress(FileNotFoundError):
            fs.rm(root, recursive=True)

    def free(self) -> int | None:
        """Bytes free for writing; None where nobody can tell."""
        if self.folder is None:
            return None
        there = next(
            p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists()
        )
        return shutil.disk_usage(there).free

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a local folder for one run, making it if need be; a killed run lets go of it.

        Object stores, and file systems without locks, have none: two runs then write the
        same bytes twice, each object whole.

        Raises
        ------
        StoreError
            If another run holds it.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows
            fcntl = None  # type: ignore[assignment]
        if self.folder is None or fcntl is None or self.folder.is_file():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"another run is writing the store {self.path!r}. Wait for it, or stop it; "
                    "what it has finished by then is kept."
                ) from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(held)
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # goes only if nothing was written
