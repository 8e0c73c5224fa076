"""Zarr's shards as bytes: which there are, what they are called, how they are encoded.

An array of a store lies in shards of the ``sharding_indexed`` codec: inner chunks
in C order, each ending with a CRC-32C, then the index of their places, which ends
with one as well. Encoding is done here, in one copy, and is tested byte for byte
against zarr, whose own writing takes five times as long.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_CHUNK_BYTES", "MOST_SHARD_BYTES", "Shards", "crc32c"]

Bytes = npt.NDArray[np.uint8]

_CRC = 4
#: Most bytes of a shard: one row of a lattice of one image's attention may have gigabytes.
MOST_SHARD_BYTES = 1 << 36
#: Most bytes that Blosc takes at once.
MOST_CHUNK_BYTES = 2**31 - 1 - 16
#: Most bytes that Blosc adds to what it cannot compress.
_BLOSC_EXTRA = 64
#: Place and size of a chunk that is not there.
_NO_CHUNK = 2**64 - 1


def crc32c(data: Bytes) -> int:
    """CRC-32C of contiguous bytes, RFC 3720.

    Examples
    --------
    >>> hex(crc32c(np.frombuffer(b"123456789", np.uint8)))
    '0xe3069283'
    """
    import google_crc32c

    return int(google_crc32c.value(data))


@dataclass(frozen=True)
class Shards:
    """The shards of one array.

    Attributes
    ----------
    name, dims, shape, dtype
        Of the array.
    shard, chunk
        Shapes of a shard and of a chunk inside it.
    compressor
        Configuration of the Blosc codec of a chunk, or None.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    compressor: Mapping[str, Any] | None

    @classmethod
    def of(cls, name: str, metadata: bytes) -> Shards:
        """Read them from the array's ``zarr.json``."""
        meta = json.loads(metadata)
        sharding = meta["codecs"][0]["configuration"]
        blosc = [c["configuration"] for c in sharding["codecs"] if c["name"] == "blosc"]
        out = cls(
            name=name,
            dims=tuple(meta["dimension_names"]),
            shape=tuple(meta["shape"]),
            dtype=np.dtype(meta["data_type"]),
            shard=tuple(meta["chunk_grid"]["configuration"]["chunk_shape"]),
            chunk=tuple(sharding["chunk_shape"]),
            compressor=blosc[0] if blosc else None,
        )
        out._check()
        return out

    def _check(self) -> None:
        """Refuse, before memory is taken, what no store of ours has; ValueError."""
        sizes = (self.shape, self.shard, self.chunk)
        if not all(len(s) == len(self.dims) for s in sizes):
            raise ValueError(f"{self.name}: {sizes} do not fit the dims {self.dims}")
        if not all(type(n) is int and n >= 1 for s in sizes for n in s):
            raise ValueError(f"{self.name}: {sizes} are not positive whole numbers")
        if any(s % c for s, c in zip(self.shard, self.chunk, strict=True)):
            raise ValueError(f"{self.name}: chunks {self.chunk} do not fit shards {self.shard}")
        if self.dtype.kind != "f" or math.prod(self.shard) * self.dtype.itemsize > MOST_SHARD_BYTES:
            raise ValueError(f"{self.name}: shards of {self.shard} {self.dtype} are too large")

    def within(self, region: Mapping[str, slice]) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Walk over the shards of a region, which cuts none.

        Yields
        ------
        str
            Key in the store.
        tuple of slice
            Where the shard lies in the array, clipped to it.
        """
        ranges = []
        for dim, size, step in zip(self.dims, self.shape, self.shard, strict=True):
            part = region.get(dim, slice(0, size))
            if part.start % step or (part.stop % step and part.stop != size):
                raise ValueError(f"{self.name}: {dim} {part} cuts shards of {step}")
            ranges.append(range(part.start // step, math.ceil(part.stop / step)))
        for index in itertools.product(*ranges):
            yield (
                self.key(index),
                tuple(
                    slice(i * step, min((i + 1) * step, size))
                    for i, step, size in zip(index, self.shard, self.shape, strict=True)
                ),
            )

    def key(self, index: tuple[int, ...]) -> str:
        """Name of a shard in the store."""
        return f"{self.name}/c." + ".".join(map(str, index))

    @property
    def index_bytes(self) -> int:
        """Size of the index at a shard's end."""
        chunks = math.prod(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        return 16 * chunks + _CRC

    def decode_index(self, raw: Bytes) -> npt.NDArray[np.uint64]:
        """Read places and sizes of a shard's chunks, (chunk, 2); ValueError if damaged."""
        if len(raw) != self.index_bytes or not _signed(raw):
            raise ValueError("is cut short, or its index is altered (checksum)")
        return raw[:-_CRC].view("<u8").reshape(-1, 2)

    def decode(self, raw: Bytes) -> npt.NDArray[Any]:
        """Read one chunk's values; ValueError if it is damaged."""
        size = math.prod(self.chunk) * self.dtype.itemsize
        if not _signed(raw) or (self.compressor is None and len(raw) != size + _CRC):
            raise ValueError("is altered (a chunk's checksum)")
        if self.compressor is None:
            return self._native(raw[:-_CRC].view(self._stored).reshape(self.chunk))
        values = np.empty(self.chunk, self._stored)
        _blosc(self.compressor).decode(raw[:-_CRC], values)
        return self._native(values)

    @property
    def _stored(self) -> np.dtype[Any]:
        return self.dtype.newbyteorder("<")

    def _native(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.view(self.dtype) if sys.byteorder == "little" else values.astype(self.dtype)

    @property
    def most_of_chunk(self) -> int:
        """Bytes that no encoded chunk exceeds."""
        # Blosc may need a few bytes more than it was given.
        extra = _BLOSC_EXTRA if self.compressor else 0
        return math.prod(self.chunk) * self.dtype.itemsize + extra + _CRC

    @property
    def most_bytes(self) -> int:
        """Bytes that no encoded shard exceeds."""
        chunks = math.prod(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        return chunks * self.most_of_chunk + self.index_bytes

    def encode(self, block: npt.NDArray[Any], out: Bytes) -> Bytes:
        """Encode what a shard holds; at the array's end it may be less than a whole one.

        What lies beyond the array is NaN within a chunk; chunks wholly beyond it are left out.
        ``out`` has at least :attr:`most_bytes`; the result is the part of it that is used.
        """
        grid = [s // c for s, c in zip(self.shard, self.chunk, strict=True)]
        size = math.prod(self.chunk) * self.dtype.itemsize
        index = np.full((math.prod(grid), 2), _NO_CHUNK, "<u8")
        at = 0
        for number, place in enumerate(np.ndindex(*grid)):
            inside = tuple(
                slice(p * c, min((p + 1) * c, n))
                for p, c, n in zip(place, self.chunk, block.shape, strict=True)
            )
            if any(s.start >= s.stop for s in inside):
                continue
            length = self._chunk(block[inside], out[at : at + size + _BLOSC_EXTRA])
            at = _sign(out, at, length)
            index[number] = at - length - _CRC, length + _CRC
        out[at : at + index.nbytes] = index.view(np.uint8).ravel()
        return out[: _sign(out, at, index.nbytes)]

    def checksum(self, raw: Bytes) -> int:
        """CRC-32C of the checksums of a shard's chunks and of its index's places and sizes.

        Not of all bytes: a CRC over bytes that are followed by their own CRC is a constant.

        Raises
        ------
        ValueError
            If the index is damaged.
        """
        entries = self._entries(raw)
        words = [raw[at + size - _CRC : at + size] for at, size in entries]
        return crc32c(np.concatenate([*words, raw[-self.index_bytes : -_CRC]]))

    def is_whole(self, raw: Bytes) -> bool:
        """Whether every chunk has its checksum, and so the index."""
        try:
            return all(_signed(raw[at : at + size]) for at, size in self._entries(raw))
        except ValueError:
            return False

    def _entries(self, raw: Bytes) -> list[tuple[int, int]]:
        """Places and sizes of the chunks that are there."""
        index = self.decode_index(raw[-self.index_bytes :])
        return [(at, size) for at, size in index.tolist() if at != _NO_CHUNK]

    def _chunk(self, values: npt.NDArray[Any], out: Bytes) -> int:
        """Write one chunk's bytes; return how many."""
        size = math.prod(self.chunk) * self.dtype.itemsize
        if self.compressor is None:
            whole = out[:size].view(self._stored).reshape(self.chunk)
        else:
            whole = np.empty(self.chunk, self._stored)
        if values.shape != self.chunk:
            whole[...] = np.nan
        np.copyto(whole[tuple(slice(n) for n in values.shape)], values)
        if self.compressor is None:
            return size
        packed = np.frombuffer(_blosc(self.compressor).encode(whole), np.uint8)
        out[: len(packed)] = packed
        return len(packed)


def _sign(out: Bytes, at: int, length: int) -> int:
    """Append the CRC-32C of what was written; return where it ends."""
    end = at + length
    out[end : end + _CRC] = np.frombuffer(crc32c(out[at:end]).to_bytes(_CRC, "little"), np.uint8)
    return end + _CRC


def _signed(raw: Bytes) -> bool:
    """Whether bytes end with their CRC-32C."""
    return len(raw) > _CRC and crc32c(raw[:-_CRC]) == int.from_bytes(
        raw[-_CRC:].tobytes(), "little"
    )


def _blosc(configuration: Mapping[str, Any]) -> Any:
    from numcodecs.blosc import Blosc

    shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[configuration["shuffle"]]
    return Blosc(
        cname=configuration["cname"],
        clevel=configuration["clevel"],
        shuffle=shuffle,
        blocksize=configuration["blocksize"],
    )
