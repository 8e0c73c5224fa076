"""A Zarr store as it will be when it is finished: with the root metadata it lacks."""

from __future__ import annotations

from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

__all__ = ["Rooted"]

_ROOT = "zarr.json"


class Rooted(WrapperStore[Store]):
    """A store that answers for the root's ``zarr.json``, and for nothing else, itself."""

    def __init__(self, store: Store, root: bytes):
        super().__init__(store)
        self._root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return Rooted, (self._store, self._root)

    def _with_store(self, store: Store) -> Rooted:
        return Rooted(store, self._root)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object; the root's metadata from memory."""
        if key == _ROOT:
            return prototype.buffer.from_bytes(self._root)
        return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether an object is there; the root's metadata is."""
        return key == _ROOT or await super().exists(key)
