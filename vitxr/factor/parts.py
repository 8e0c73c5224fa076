"""Factor Datasets as plain arrays: taken apart, matched with a tensor, walked over beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import Pool, Share, blocked_mode, row_blocks, shares
from vitxr.factor.kernels import khatri_rao
from vitxr.factor.masks import Masked
from vitxr.factor.same import difference, label_at, other_source
from vitxr.names import unwritten

__all__ = [
    "Blocks",
    "Parts",
    "Walk",
    "gram",
    "labels_of",
    "match",
    "model_block",
    "project",
    "refuse_difference",
    "take_apart",
]

Array = npt.NDArray[Any]
#: Where each block lies, the block, and which of it counts.
Blocks = Iterator[tuple[tuple[slice, ...], Array, Array | None]]

#: Bytes of a block in float64.
BLOCK_BYTES = 32 << 20
#: Most rows of a block.
MAX_ROWS = 1024


@dataclass(frozen=True)
class Parts:
    """One model: ``core`` is ``weight`` of CP, and has one axis for each of ``dims`` of Tucker.

    Attributes
    ----------
    dims
        Dimensions of the tensor, in its order.
    core, factors
        As they lie in the Dataset, NumPy or Dask; factors are ``(n, rank)``.
    """

    dims: tuple[str, ...]
    core: Any
    factors: tuple[Any, ...]

    @property
    def cp(self) -> bool:
        """Whether the model is a CP model."""
        return bool(self.core.ndim == 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the factors, which is that of the tensor they were fitted to."""
        return np.result_type(*(f.dtype for f in self.factors))

    def exact(self) -> Parts:
        """Return the same in memory, float64, and refuse what is not finite."""
        core = np.asarray(self.core, np.float64)
        factors = tuple(np.asarray(f, np.float64) for f in self.factors)
        if not all(np.isfinite(a).all() for a in (core, *factors)):
            raise DataError(
                "the factors hold NaN or infinite values: the fit has failed; take another one."
            )
        return Parts(self.dims, core, factors)


def take_apart(f: xr.Dataset) -> Parts:
    """Take the parts of one model out of a factor Dataset, without computing them."""
    if not isinstance(f, xr.Dataset):
        raise ArgumentError(
            f"expected a Dataset of factors, not {type(f).__name__}: make one with factorize."
        )
    if "replicate" in f.dims:
        raise ArgumentError(
            "the factors have a replicate dimension: select one, f.sel(replicate=0)."
        )
    head = "core" if "core" in f.data_vars else "weight"
    found = {str(n)[: -len("_factor")]: a for n, a in f.data_vars.items() if _is_factor(n)}
    dims = tuple(found)
    axes = tuple(f"{d}_component" for d in dims) if head == "core" else ("component",) * len(dims)
    fits = all(a.dims == (d, x) for (d, a), x in zip(found.items(), axes, strict=True))
    wanted = axes if head == "core" else ("component",)
    if len(dims) < 2 or not fits or head not in f.data_vars or set(f[head].dims) != set(wanted):
        have = ", ".join(f"{n}({', '.join(map(str, a.dims))})" for n, a in f.data_vars.items())
        raise DataError(
            "expected the factors of a CP or Tucker model, <dim>_factor(dim, component) with "
            f"weight or core; the Dataset has: {have or 'no variables'}."
        )
    core = f[head].transpose(*wanted).data
    return Parts(dims, core, tuple(a.data for a in found.values()))


def _is_factor(name: object) -> bool:
    return str(name).endswith("_factor")


def labels_of(f: xr.Dataset | xr.DataArray, dims: Sequence[str]) -> xr.Coordinates:
    """Keep the coordinates that lie along some of the dimensions, and scalar ones."""
    coords = f.coords.to_dataset()
    beside = [name for name, c in coords.variables.items() if not set(c.dims) <= {*dims}]
    return coords.drop_vars(beside).coords


def match(f: xr.Dataset, t: xr.DataArray, parts: Parts, free: str | None = None) -> xr.DataArray:
    """Check that a tensor has the model's dimensions and labels; bring it into their order.

    The labels of ``free`` may be others, and of a ``neuron`` that is free the layer and the model.
    """
    if not isinstance(t, xr.DataArray):
        raise ArgumentError(f"expected a DataArray with labels, not {type(t).__name__}.")
    if set(map(str, t.dims)) != set(parts.dims):
        raise DataError(
            f"the tensor has dims ({', '.join(map(str, t.dims))}), the model "
            f"({', '.join(parts.dims)}): give a tensor with the same ones (expand_dims brings back "
            "one from which a single label was selected)."
        )
    if t.dtype.kind not in "iuf":
        raise DataError(f"the tensor has dtype {t.dtype}; expected real numbers.")
    if t.size == 0:
        raise DataError("the tensor is empty: select at least one of each dimension.")
    differ = {d: found for d in parts.dims if d != free and (found := difference(f, t, d))}
    if differ:
        refuse_difference(differ)
    if other := other_source(f.attrs, t.attrs, free=free == "neuron"):
        raise DataError(f"{other}.")
    rolls = ("roll_y", "roll_x")
    if "roll_y" in f and not all(
        r in t.coords and np.array_equal(t[r].transpose(*f[r].dims), f[r]) for r in rolls
    ):
        raise DataError(
            "the model is of a tensor whose responses have been rolled, and these have not, or "
            "otherwise: give vitxr.factor.roll(t, f)."
        )
    return t.transpose(*parts.dims)


def refuse_difference(differ: dict[str, tuple[str, str]], allowed: str = "") -> None:
    """Raise a DataError about dimensions in which a tensor and a model differ, and how."""
    kinds: dict[str, list[str]] = {}
    for dim, (kind, _) in differ.items():
        kinds.setdefault(kind, []).append(dim)
    what = " and ".join(f"the {kind} of {', '.join(dims)}" for kind, dims in kinds.items())
    dim, (kind, how) = next(iter(differ.items()))
    remedies = {
        "labels": f"select the model's, in its order, as t.sel({dim}=f.indexes[{dim!r}])",
        "sha256": "images of one name that are not the same: give those that the model is of, or "
        "give others names of their own",
    }
    remedy = remedies.get(kind, "give a tensor of the shifts that the model is of")
    raise DataError(f"the tensor and the model differ in {what}{allowed}: {how}; {remedy}.")


def model_block(core: Array, *factors: Array) -> Array:
    """Multiply out the model, or of a block of it the rows of the factors, in float64.

    Examples
    --------
    >>> model_block(np.array([2.0]), np.ones((2, 1)), np.array([[3.0], [4.0]]))
    array([[6., 8.],
           [6., 8.]])
    """
    core = np.asarray(core, np.float64)
    exact = [np.asarray(f, np.float64) for f in factors]
    if core.ndim == 1:
        model = (exact[0] * core) @ khatri_rao([f.T for f in exact[1:]])
        return model.reshape([len(f) for f in exact])
    for factor in exact:  # each turns the first axis into the last one
        core = np.tensordot(core, factor, (0, 1))
    return core


def project(block: Array, core: Array, factors: Sequence[Array], keep: int) -> Array:
    """Multiply a block by the model without one of its factors, ``X_(n) Z^T``.

    The model is ``A Z`` with ``A`` the factor of mode ``keep``.

    Returns
    -------
    numpy.ndarray
        ``(n_keep, rank)``.

    Examples
    --------
    >>> project(np.eye(2), np.array([2.0]), [np.ones((2, 1)), np.array([[3.0], [4.0]])], keep=0)
    array([[6.],
           [8.]])
    """
    others = [m for m in range(block.ndim) if m != keep]
    if core.ndim > 1:
        for m in others:
            block = np.moveaxis(np.tensordot(block, factors[m], (m, 0)), -1, m)
        return np.tensordot(block, core, (others, others))
    # The product with the longest mode leaves least; the other modes are then summed over.
    longest = max(others, key=lambda m: block.shape[m])
    out = np.tensordot(block, factors[longest], (longest, 0))
    left = [m for m in range(block.ndim) if m != longest]
    for m in [m for m in others if m != longest]:
        out = np.einsum("...ir,ir->...r", np.moveaxis(out, left.index(m), -2), factors[m])
        left.remove(m)
    return out * core


def gram(core: Array, factors: Sequence[Array], keep: int) -> Array:
    """Gram matrix ``Z Z^T`` of what :func:`project` multiplies by, ``(rank, rank)``.

    Examples
    --------
    >>> gram(np.array([2.0]), [np.ones((2, 1)), np.array([[3.0], [4.0]])], keep=0)
    array([[100.]])
    """
    grams = [f.T @ f for f in factors]
    if core.ndim == 1:
        return np.outer(core, core) * np.prod([g for m, g in enumerate(grams) if m != keep], axis=0)
    others = [m for m in range(core.ndim) if m != keep]
    product = core
    for m in others:
        product = np.moveaxis(np.tensordot(product, grams[m], (m, 0)), -1, m)
    return np.tensordot(product, core, (others, others))


class Walk:
    """Walking over a tensor in blocks of all its dimensions, float64, checked for NaN.

    ``shares`` are what each thread walks over. The tensor is read once, and of a Dask array one
    chunk of the mode that its chunks divide most is in memory in each thread. With a mask (bool,
    of the shape of the tensor, NumPy or Dask) a block is 0 where it is hidden, and only what
    counts is checked.

    Examples
    --------
    >>> t = xr.DataArray(np.arange(6.0).reshape(2, 3), dims=("a", "b"))
    >>> walk = Walk(t, threads=1)
    >>> [(index, block.sum()) for index, block, _ in walk.blocks(walk.shares[0])]
    [((slice(0, 2, None), slice(0, 3, None)), np.float64(15.0))]
    """

    def __init__(self, t: xr.DataArray, threads: int, mask: Any = None):
        self._t = t
        self._mode = blocked_mode(t.data)
        self._order = [(self._mode + i) % t.ndim for i in range(t.ndim)]
        self._x = t.data.transpose(self._order)
        self._masked = None if mask is None else Masked(self._x, mask, self._mode)
        columns = math.prod(self._x.shape[1:])
        self._rows = max(1, min(MAX_ROWS, BLOCK_BYTES // (8 * columns)))
        self.shares: list[Share] = shares(self._x, self._rows, threads)

    def map(self, pool: Pool, task: Any) -> list[Any]:
        """Call ``task`` with the blocks of every share; results in the order of the shares."""
        return pool.map(lambda share: task(self.blocks(share)), self.shares)

    def blocks(self, share: Share) -> Blocks:
        """Yield where a block lies, the block, and which of it counts; axes as of the tensor."""
        behind = self._x.shape[1:]
        back = np.argsort(self._order)
        for where, rows, seen in self._read(share):
            turned = rows.reshape(len(rows), *behind)
            chosen = None if seen is None else seen.reshape(turned.shape)
            step = max(1, BLOCK_BYTES * behind[0] // max(1, 8 * turned.size))
            for low in range(0, behind[0], step):
                part = turned[:, low : low + step].astype(np.float64)
                at = [where, slice(low, low + part.shape[1]), *(slice(0, n) for n in behind[1:])]
                index = tuple(at[i] for i in back)
                kept = None
                if chosen is not None:
                    kept = chosen[:, low : low + step]
                    part[~kept] = 0
                    kept = kept.transpose(back)
                block = part.transpose(back)
                self._check(index, block)
                yield index, block, kept

    def _read(self, share: Share) -> Iterator[tuple[slice, Array, Array | None]]:
        if self._masked is None:
            for where, rows in row_blocks(self._x, self._rows, share):
                yield where, rows, None
        else:
            for where, rows, kept, _ in self._masked.walk(self._rows, share):
                yield where, rows, kept

    def _check(self, index: tuple[slice, ...], block: Array) -> None:
        bad = np.argwhere(~np.isfinite(block))
        if not len(bad):
            return
        at = zip(self._t.dims, index, bad[0], strict=True)
        named = ", ".join(label_at(self._t, d, s.start + int(i)) for d, s, i in at)
        raise DataError(
            f"the tensor holds a non-finite value, {block[tuple(bad[0])]}, at {named}; drop or "
            f"fill it, or hide it with mask=t.notnull(){unwritten(self._t)}."
        )
