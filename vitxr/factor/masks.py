"""Which entries of a tensor count: stored masks, and speckles that are drawn block by block."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import Pool, Share, block_rows, blocked_mode, own_threads, rotate, shares
from vitxr.factor.kernels import khatri_rao
from vitxr.factor.same import difference
from vitxr.factor.words import STEP, WORD, mixed, places, words_of

__all__ = [
    "MASKED_BYTES",
    "Masked",
    "Speckle",
    "Survey",
    "masked_errors",
    "read_mask",
    "survey",
]

Array = npt.NDArray[Any]

#: Bytes of a block where there is a mask: each model fills one of its own.
MASKED_BYTES = 4 << 20


@dataclass(frozen=True)
class Speckle:
    """A mask that holds out single entries, scattered over the tensor, and is never stored.

    Whether an entry is held out depends on the seed and on its flat index in the tensor (C order
    of the dims), by word number ``index`` of the generator SplitMix64: so it does not depend on
    chunks, blocks, threads, or the mode that is walked over.

    Attributes
    ----------
    fraction
        Share of the entries that is held out, between 0 and 1.
    seed
        Integer from 0 to 2**64 - 1. Different seeds hold out different entries.
    observed
        Entries to keep or to hold out, bool, of the shape of the tensor (NumPy or Dask); all by
        default. The others are neither.

    References
    ----------
    Wold (1978), Cross-validatory estimation of the number of components in factor and principal
    components models, Technometrics 20, 397-405. Steele, Lea and Flood (2014), Fast splittable
    pseudorandom number generators, OOPSLA, 453-472.

    Examples
    --------
    >>> Speckle(0.25, seed=4).held((2, 8)).astype(int)
    array([[1, 0, 1, 1, 1, 1, 1, 0],
           [0, 1, 0, 0, 0, 0, 0, 0]])
    """

    fraction: float
    seed: int
    observed: Any = None

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, numbers.Real) and not isinstance(self.fraction, bool)
        if not number or not 0 < self.fraction < 1:
            raise ArgumentError(
                f"the fraction of a Speckle is {self.fraction!r}; expected one between 0 and 1."
            )
        whole = isinstance(self.seed, numbers.Integral) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed < WORD:
            raise ArgumentError(
                f"the seed of a Speckle is {self.seed!r}; expected an integer from 0 to 2**64 - 1."
            )

    def held(self, shape: Sequence[int]) -> Array:
        """Draw all of the mask at a time, True where an entry is held out, for a small tensor."""
        index = np.arange(math.prod(shape), dtype=np.uint64).reshape(1, -1)
        return self.block(np.zeros((1, 1), np.uint64), index).reshape(shape)

    def block(self, rows: Array, columns: Array) -> Array:
        """Draw a block, True where an entry is held out.

        Parameters
        ----------
        rows, columns
            Flat indices, uint64, ``(rows, 1)`` and ``(1, columns)``, whose sums are those of the
            entries.
        """
        key = np.uint64((mixed(int(self.seed)) + STEP) % WORD)
        # Arithmetic of these words is modulo 2**64: the product of a sum is the sum of products.
        rows, columns = rows * np.uint64(STEP) + key, columns * np.uint64(STEP)
        out = np.empty((len(rows), columns.shape[1]), bool)
        bound = np.uint64(int(self.fraction * WORD))
        for where, words in words_of(rows, columns):
            # The last shift of the generator would change the lower half of the bits alone.
            np.less(words, bound, out=out[where])
        return out


class Masked:
    """A tensor in the order it is walked over, and which of its entries count.

    Parameters
    ----------
    data
        The tensor, a mode in front (:func:`vitxr.factor.blocks.rotate`).
    mask
        Bool, in the order of the dims, NumPy or Dask, True where an entry is observed; or a
        :class:`Speckle`.
    mode
        The mode in front.
    """

    def __init__(self, data: Any, mask: Any, mode: int):
        self.data, self.mode = data, mode
        self.speckle = mask if isinstance(mask, Speckle) else None
        observed = mask.observed if isinstance(mask, Speckle) else mask
        n = data.ndim
        shape = tuple(data.shape[(m - mode) % n] for m in range(n))
        if observed is not None:
            if observed.dtype != bool or observed.shape != shape:
                raise TypeError(
                    f"expected a bool mask of shape {shape}, not {observed.dtype} {observed.shape}"
                )
            observed = observed.transpose([(mode + i) % n for i in range(n)])
            if hasattr(observed, "chunks"):
                lazy = hasattr(data, "chunks")
                observed = observed.rechunk(data.chunks) if lazy else observed.compute()
        self.observed = observed
        # Flat indices, in the order of the dims, of the entries of a row, and of the rows.
        if self.speckle is not None:
            steps = np.cumprod([1, *shape[:0:-1]])[::-1].tolist()
            self._rows, self._columns = places(data.shape, steps, mode)

    def walk(
        self, rows: int, share: Share | None = None
    ) -> Iterator[tuple[slice, Array, Array, Array | None]]:
        """Walk over the tensor as :func:`vitxr.factor.blocks.row_blocks` does.

        Yields
        ------
        slice
            The rows.
        numpy.ndarray
            The block, ``(rows, product of the other axes)``; it may hold NaN where it is hidden.
        numpy.ndarray
            Bool, of the same shape: the entries that count.
        numpy.ndarray or None
            Those held out, of a :class:`Speckle`.
        """
        import dask

        if share is None:
            share = [s for part in shares(self.data, rows, 1) for s in part]
        columns = math.prod(self.data.shape[1:])
        for piece in share:
            size = piece.stop - piece.start
            part = self.data[piece]
            seen = None if self.observed is None else self.observed[piece]
            # Together: the mask is often made from the tensor.
            part, seen = dask.compute(part, seen, scheduler="synchronous")
            part = np.asarray(part).reshape(size, columns)
            seen = None if seen is None else np.asarray(seen).reshape(size, columns)
            for low in range(0, size, rows):
                high = min(low + rows, size)
                where = slice(piece.start + low, piece.start + high)
                kept, held = None if seen is None else seen[low:high], None
                if self.speckle is not None:
                    held = self.speckle.block(self._rows[where], self._columns)
                    if kept is None:
                        kept = ~held
                    else:
                        kept, held = kept & ~held, kept & held
                yield where, part[low:high], kept, held  # type: ignore[misc]
            del part, seen


@dataclass
class Survey:
    """What a mask leaves of a tensor.

    Attributes
    ----------
    norm, held_norm
        Norms of the entries that count, and of those held out.
    counts
        For each mode the number of entries that count in each slice.
    """

    norm: float
    held_norm: float
    counts: list[Array]


def survey(masked: Masked, pool: Pool) -> Survey:
    """Count what a mask leaves of a tensor, in one pass.

    Raises
    ------
    DataError
        If a slice has nothing left: a factor cannot be fitted there.
    """
    data, n = masked.data, masked.data.ndim
    rows = block_rows(data.shape, data.dtype.itemsize, MASKED_BYTES)

    def work(share: Share) -> tuple[Array, Array, Array]:
        squares, across = np.zeros(2), np.zeros(math.prod(data.shape[1:]), np.int64)
        down = np.zeros(data.shape[0], np.int64)
        for where, block, kept, held in masked.walk(rows, share):
            for i, entries in enumerate((kept, held)):
                if entries is not None:
                    squares[i] += np.square(np.where(entries, block, 0), dtype=np.float64).sum()
            down[where] += kept.sum(axis=1)
            across += kept.sum(axis=0)
        return squares, down, across

    parts = pool.map(work, shares(data, rows, pool.threads))
    squares, down, across = (sum(part[i] for part in parts) for i in range(3))
    across = across.reshape(data.shape[1:])
    axes = range(n - 1)
    counts = [down, *(across.sum(axis=tuple(k for k in axes if k != m)) for m in axes)]
    counts = [counts[(m - masked.mode) % n] for m in range(n)]
    for mode, count in enumerate(counts):
        if not count.all():
            where = ", ".join(map(str, np.flatnonzero(count == 0)[:3]))
            raise DataError(
                f"the mask leaves nothing of slice {where} of mode {mode}: hold out fewer entries, "
                "or leave such slices out of the tensor."
            )
    return Survey(math.sqrt(squares[0]), math.sqrt(squares[1]), counts)


def masked_errors(
    x: Any,
    models: Sequence[Sequence[Array]],
    mask: Any,
    pool: Pool | None = None,
) -> tuple[Array, Array]:
    """Relative residuals of several models, of the entries that count and of those held out.

    ``|W (X - M)| / |W X|``, computed in float64, all models in one pass over the tensor.

    Parameters
    ----------
    x
        The tensor, NumPy or Dask.
    models
        For each its factors ``(n, rank)``, with their weights in one of them.
    mask
        Bool, True where observed, or a :class:`Speckle`.
    pool
        Threads, from :func:`vitxr.factor.blocks.own_threads`.

    Returns
    -------
    kept, held
        One number for each model; ``held`` is NaN where nothing is held out.

    Examples
    --------
    >>> x = np.arange(12.0).reshape(4, 3)
    >>> kept, held = masked_errors(x, [[np.zeros((4, 1)), np.zeros((3, 1))]], Speckle(0.5, 1))
    >>> kept, held
    (array([1.]), array([1.]))
    """
    if pool is None:
        with own_threads() as pool:
            return masked_errors(x, models, mask, pool)
    mode, n = blocked_mode(x), x.ndim
    masked = Masked(rotate(x, mode), mask, mode)
    turned = [[np.asarray(f[(mode + i) % n], np.float64) for i in range(n)] for f in models]
    pairs = [(f[0], khatri_rao([side.T for side in f[1:]])) for f in turned]
    rows = block_rows(masked.data.shape, 8, MASKED_BYTES)

    def work(share: Share) -> Array:
        out = np.zeros((2, 1 + len(pairs)))
        for where, block, *chosen in masked.walk(rows, share):
            for i, entries in enumerate(chosen):
                if entries is None:
                    continue
                # What does not count becomes 0, NaN as well.
                data = np.where(entries, block, 0).astype(np.float64, copy=False)
                out[i, 0] += np.vdot(data, data)
                for j, (left, right) in enumerate(pairs, start=1):
                    residual = left[where] @ right
                    residual *= entries
                    residual -= data
                    out[i, j] += np.vdot(residual, residual)
        return out

    parts = pool.map(work, shares(masked.data, rows, pool.threads))
    with np.errstate(invalid="ignore"):
        kept, held = (np.sqrt(row[1:] / row[0]) for row in sum(parts))
    return kept, held


def read_mask(t: xr.DataArray, mask: Any) -> Any:
    """Read a mask, and broadcast it against the tensor without a copy.

    Returns
    -------
    numpy.ndarray or dask.array.Array
        Bool, of the shape of ``t``.

    Raises
    ------
    ArgumentError
        If it is no bool DataArray, or has a dimension that ``t`` lacks.
    DataError
        If its labels are others.

    Examples
    --------
    >>> t = xr.DataArray(np.zeros((2, 3)), dims=("neuron", "image"))
    >>> read_mask(t, xr.DataArray([True, False, True], dims="image"))
    array([[ True, False,  True],
           [ True, False,  True]])
    """
    if not isinstance(mask, xr.DataArray):
        raise ArgumentError(
            f"mask is a {type(mask).__name__}; expected a DataArray of bool, True where a value is "
            "observed, such as t.notnull()."
        )
    if mask.dtype != bool:
        raise ArgumentError(
            f"mask has dtype {mask.dtype}; expected bool, True where a value is observed."
        )
    unknown = [str(d) for d in mask.dims if d not in t.dims]
    if unknown:
        raise ArgumentError(
            f"mask has the dimension {', '.join(unknown)}, which the tensor lacks; it has "
            f"{', '.join(map(str, t.dims))}."
        )
    for dim in mask.dims:
        if found := difference(mask, t, dim, ("the mask", "the tensor")):
            kind, how = found
            raise DataError(
                f"mask has other {kind} of {dim} than the tensor ({how}): select the same in both, "
                "mask.reindex_like(t)."
            )
    return mask.variable.set_dims(dict(t.sizes)).transpose(*t.dims).data
