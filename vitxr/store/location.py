"""Where a store is: a local folder or an fsspec URL, read and written by whole objects.

The one place that knows files from objects. A write is atomic: a reader, or the
next run after a kill, finds the whole object or none.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import ArgumentError, StoreError
from vitxr.store.local import PART, clear, replace

__all__ = ["Location"]

Bytes = npt.NDArray[np.uint8]
Piece = Callable[[int | None, int], Bytes]

#: Bytes that a kernel reads ahead by itself.
_READAHEAD = 128 << 10


class Location:
    """A folder of objects, named by keys with ``/`` as zarr names them.

    Parameters
    ----------
    path
        A folder, or a URL such as ``"s3://bucket/run.zarr"``.

    Raises
    ------
    StoreError
        If fsspec does not know the URL's protocol, or lacks the package for it; or if the path
        looks like a URL that has lost a slash.
    ArgumentError
        If the path is none.
    """

    def __init__(self, path: str | Path):
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ArgumentError(
                f"the path is {path!r} ({type(path).__name__}); expected text or a pathlib.Path: "
                "the name of a folder or file, such as 'run.zarr', or a URL."
            )
        self.path = os.fspath(path)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", self.path):
            raise StoreError(
                f"{self.path!r} looks like a URL with one slash of two, and would be a folder. "
                "Write the URL as text with both, as in 's3://bucket/run.zarr' (pathlib.Path makes "
                f"one of them), or the folder as {'./' + self.path!r}."
            )
        protocol, _, rest = self.path.partition("://")
        if protocol == "file":
            self.path, rest = rest, ""
        #: The local folder; None for an object store.
        self.folder = None if rest else Path(self.path).expanduser().absolute()
        if self.folder is None:
            if set(self.path) & set("*?[]"):
                raise StoreError(
                    f"{self.path!r} has characters of a pattern (* ? [ ]), which would stand for "
                    "other objects as well. Choose a name without them."
                )
            _ = self._remote

    def __str__(self) -> str:
        return self.path

    def __reduce__(self) -> tuple[Any, ...]:
        return Location, (str(self.folder or self.path),)

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
        options = {"use_listings_cache": False}
        return FsspecStore.from_url(self.path, storage_options=options, read_only=True)

    def exists(self) -> bool:
        """Whether a file is there, or a folder with one that is not a half written one of ours."""
        if self.folder is not None:
            return self.folder.is_file() or any(
                path.is_file() and path.suffix != PART for path in self.folder.rglob("*")
            )
        with self._reached() as (fs, root):
            try:
                return bool(fs.info(root))
            except FileNotFoundError:
                return False

    @contextlib.contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        """Give the file system and the root; what its client raises becomes a StoreError."""
        try:
            yield self._remote
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:  # every client has errors of its own
            raise StoreError(
                f"{self.path!r} cannot be reached: {type(error).__name__}: {error}. Check the "
                "network, the address and the credentials, and try again."
            ) from error

    def read(self, key: str) -> bytes | None:
        """Return one object, or None if there is none."""
        if self.folder is not None:
            try:
                return (self.folder / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        with self._reached() as (fs, root):
            try:
                return bytes(fs.cat_file(f"{root}/{key}"))
            except FileNotFoundError:
                return None

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return the objects that are there; those of an object store at the same time."""
        if self.folder is not None:
            found = {key: self.read(key) for key in keys}
            return {key: data for key, data in found.items() if data is not None}
        with self._reached() as (fs, root):
            paths = {f"{root}/{key}": key for key in keys}
            got = fs.cat(list(paths), on_error="return") if paths else {}
            for data in got.values():
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise data
            return {paths[p]: bytes(d) for p, d in got.items() if not isinstance(d, Exception)}

    @contextlib.contextmanager
    def opened(self, key: str, room: Bytes | None = None) -> Iterator[Piece | None]:
        """Open one object to read pieces of it: a function of place and size, None if it is gone.

        The place None means the end: the last so many bytes. With ``room`` a piece may lie in it,
        and is overwritten by the next.
        """
        if self.folder is None:
            yield self._ranges(key)
            return
        try:
            file = (self.folder / key).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            yield None
            return

        def piece(at: int | None, size: int) -> Bytes:
            if at is None:
                at = max(os.fstat(file.fileno()).st_size - size, 0)
            if size > _READAHEAD and hasattr(os, "posix_fadvise"):
                # All of it at once, rather than piece by piece as readahead would.
                os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_WILLNEED)
            file.seek(at)
            out = np.empty(size, np.uint8) if room is None or size > len(room) else room[:size]
            got = 0
            # One call gives at most 2.1 GB.
            while count := file.readinto(out.data[got:]):
                got += count
            return out[:got]

        with file:
            yield piece

    def _ranges(self, key: str) -> Piece | None:
        with self._reached() as (fs, root):
            try:
                whole = int(fs.info(f"{root}/{key}")["size"])
            except FileNotFoundError:
                return None

        def piece(at: int | None, size: int) -> Bytes:
            start = max(whole - size, 0) if at is None else at
            with self._reached() as (fs, root):
                data = fs.cat_file(f"{root}/{key}", start=start, end=min(start + size, whole))
            return np.frombuffer(data, np.uint8)

        return piece

    def write(self, objects: Mapping[str, Any]) -> None:
        """Write whole objects (bytes or arrays of bytes), in order; each is there whole or not."""
        if self.folder is None:
            try:
                with self._reached() as (fs, root):
                    fs.pipe({f"{root}/{key}": bytes(data) for key, data in objects.items()})
            except FileNotFoundError as error:  # of a bucket
                raise StoreError(f"{self.path!r} cannot be written: {error}.") from error
            return
        for key, data in objects.items():
            try:
                replace(self.folder / key, data)
            except OSError as error:
                raise StoreError(f"{self.path!r}: {key} cannot be written: {error}.") from error

    def erase(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there already are no error."""
        for key in keys:
            if self.folder is not None:
                clear(self.folder / key)
            else:
                with contextlib.suppress(FileNotFoundError), self._reached() as (fs, root):
                    fs.rm_file(f"{root}/{key}")

    def sweep(self) -> None:
        """Delete what killed runs have left half written."""
        for here, _, names in os.walk(self.folder or ""):
            for name in names:
                if name.endswith(PART):
                    Path(here, name).unlink(missing_ok=True)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of every object right under a prefix, by key."""
        if self.folder is not None:
            try:
                with os.scandir(self.folder / prefix) as entries:
                    return {f"{prefix}/{e.name}": e.stat().st_size for e in entries if e.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                return {}
        with self._reached() as (fs, root):
            try:
                found = fs.ls(f"{root}/{prefix}", detail=True)
            except FileNotFoundError:
                return {}
        return {
            f"{prefix}/{entry['name'].rsplit('/', 1)[-1]}": int(entry["size"])
            for entry in found
            if entry["type"] == "file"
        }

    def total(self) -> int:
        """Size in bytes of all that is there."""
        if self.folder is not None:
            return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        with self._reached() as (fs, root):
            return int(fs.du(root))

    def remove(self) -> None:
        """Delete everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError), self._reached() as (fs, root):
            fs.rm(root, recursive=True)

    def free(self) -> int | None:
        """Bytes free for writing; None where nobody can tell."""
        if self.folder is None:
            return None
        there = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        return shutil.disk_usage(there).free

    def check_writable(self) -> None:
        """Refuse a local folder that cannot be made or written to.

        Of an object store only writing tells.

        Raises
        ------
        StoreError
            If a file is in the way, or permission is lacking.
        """
        if self.folder is None:
            return
        there = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        if not there.is_dir():
            raise StoreError(
                f"{self.path!r} cannot be written: {str(there)!r} is a file. Choose another path."
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise StoreError(
                f"{self.path!r} cannot be written: there is no permission to write to "
                f"{str(there)!r}. Choose another path, or ask for the permission."
            )

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
        if not self.folder.exists():
            self.check_writable()
        held = self._locked(fcntl)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # goes only if nothing was written
            os.close(held)

    def _locked(self, fcntl: Any) -> int:
        """Make the folder if need be, open it and lock it."""
        assert self.folder is not None
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held = os.open(self.folder, os.O_RDONLY)
            except OSError as error:
                raise StoreError(
                    f"the folder of {self.path!r} cannot be made or read: {error}. Choose another "
                    "path, or ask for the permission."
                ) from error
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(held)
                raise StoreError(
                    f"another run is writing the store {self.path!r}. Wait for it, or stop it; "
                    "what it has finished by then is kept."
                ) from None
            except OSError:
                return held  # a file system without locks
            # A run that has written nothing removes the folder, maybe just now: then once more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held), self.folder.stat()):
                    return held
            os.close(held)
