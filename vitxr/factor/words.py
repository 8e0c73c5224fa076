"""A word for each entry of a tensor by its flat index, block by block: the generator SplitMix64.

Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators, OOPSLA, 453-472.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["STEP", "WORD", "fingerprint", "mixed", "places", "words_of"]

Array = npt.NDArray[Any]

#: Bytes of the words that are drawn at a time, for a core's own cache.
WORD_BYTES = 256 << 10
#: Of the generator SplitMix64: its step, and shifts and factors of its mixing function.
STEP = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
WORD = 1 << 64


def words_of(rows: Array, columns: Array) -> Iterator[tuple[slice, Array]]:
    """Mix the sums of rows ``(n, 1)`` and columns ``(1, m)``, uint64, a few rows at a time.

    The last shift of the generator is left out; it would change the lower half of the bits alone.
    """
    some = max(1, WORD_BYTES // (8 * columns.shape[1]))
    for low in range(0, len(rows), some):
        where = slice(low, low + some)
        words = rows[where] + columns
        for shift, factor in MIX:
            words ^= words >> np.uint64(shift)
            words *= np.uint64(factor)
        yield where, words


def places(shape: Sequence[int], steps: Sequence[int], mode: int) -> tuple[Array, Array]:
    """Flat indices of the entries of blocks: what the rows, and what the columns add.

    Parameters
    ----------
    shape
        Of the tensor, the mode in front.
    steps
        By how much the index grows along each mode, in the order of the dims.
    mode
        The mode in front, the others behind it in cyclic order.

    Returns
    -------
    numpy.ndarray
        ``(rows, 1)``, uint64.
    numpy.ndarray
        ``(1, product of the others)``, uint64.

    Examples
    --------
    >>> rows, columns = places((3, 2), (3, 1), mode=1)
    >>> (rows + columns).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    n = len(shape)
    parts = [
        np.arange(size, dtype=np.uint64) * np.uint64(steps[(mode + i) % n])
        for i, size in enumerate(shape)
    ]
    columns = np.zeros(1, np.uint64)
    for part in parts[1:]:
        columns = np.add.outer(columns, part).ravel()
    return parts[0][:, None], columns[None]


def fingerprint(rows: Array, columns: Array, kept: Array) -> int:
    """Add up a word of SplitMix64 for each entry that counts, modulo 2**64.

    The sum over all blocks of a mask says which mask it is, in whatever blocks it is read.

    Parameters
    ----------
    rows, columns
        Flat indices, from :func:`places`.
    kept
        Bool, ``(rows, columns)``.

    Examples
    --------
    >>> rows, columns = places((2, 3), (3, 1), mode=0)
    >>> kept = np.array([[True, False, True], [False, True, True]])
    >>> parts = [fingerprint(rows[i:i + 1], columns, kept[i:i + 1]) for i in (0, 1)]
    >>> sum(parts) % 2**64 == fingerprint(rows, columns, kept)
    True
    """
    step = np.uint64(STEP)  # once more than the index: the word of 0 would be 0
    drawn = words_of((rows + np.uint64(1)) * step, columns * step)
    sums = (int(words[kept[where]].sum(dtype=np.uint64)) for where, words in drawn)
    return sum(sums) % WORD


def mixed(word: int) -> int:
    """The mixing function of SplitMix64."""
    for shift, factor in MIX:
        word = ((word ^ (word >> shift)) * factor) % WORD
    return word ^ (word >> 31)
