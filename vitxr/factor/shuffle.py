"""Data without structure: every neuron's entries shuffled, eager or lazily."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import DataError

__all__ = ["shuffle"]

Array = npt.NDArray[Any]


def shuffle(t: xr.DataArray, seed: int = 0) -> xr.DataArray:
    """Shuffle the entries of every neuron, each by a permutation of its own.

    A neuron, an index of the first dimension, keeps all its values, and so its mean, its variance
    and its share of zeros. To which image and shift a value belongs is drawn anew for each
    neuron, so that neurons have nothing in common any more but that they respond at all. What
    models of such data agree on is what models agree on by chance.

    Neighbouring shifts, which are alike in real data, become independent as well.

    Parameters
    ----------
    t
        A tensor whose first dimension is that of neurons. Of a Dask array a block of neurons is
        in memory at a time, with all that lies beside it.
    seed
        The permutation of a neuron depends on it and on the neuron's position alone: not on
        chunks.

    Returns
    -------
    xarray.DataArray
        Of the same labels, dtype and name; lazy where ``t`` is.

    Raises
    ------
    DataError
        If ``t`` has fewer than two dimensions.

    Examples
    --------
    >>> t = xr.DataArray(np.arange(6.0).reshape(2, 3), dims=("neuron", "image"))
    >>> sorted(shuffle(t).values[1].tolist())
    [3.0, 4.0, 5.0]
    """
    if t.ndim < 2:
        raise DataError(
            f"the tensor has dims ({', '.join(map(str, t.dims))}); shuffling the entries of each "
            "neuron needs a second one."
        )
    if t.chunks is None:
        return t.copy(data=_permuted(np.asarray(t.values), 0, seed))
    whole = t.data.rechunk(dict.fromkeys(range(1, t.ndim), -1))

    def of_block(block: Array, block_info: Any = None) -> Array:
        start = block_info[0]["array-location"][0][0] if block_info else 0
        return _permuted(block, start, seed)

    return t.copy(data=whole.map_blocks(of_block, dtype=t.dtype, meta=whole._meta))


def _permuted(x: Array, start: int, seed: int) -> Array:
    """Rows of an array, each in an order of its own."""
    flat = x.reshape(len(x), -1)
    out = np.empty_like(flat)
    for row, values in enumerate(flat):
        # The key, not the counter: streams of neighbouring counters overlap.
        bits = np.random.Philox(key=[seed, start + row])
        out[row] = np.random.Generator(bits).permutation(values)
    return out.reshape(x.shape)
