"""Core consistency (CORCONDIA): how far a CP model is the Tucker model with its factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import (
    Pool,
    Share,
    block_rows,
    blocked_mode,
    own_threads,
    rotate,
    row_blocks,
    shares,
)
from vitxr.factor.checks import Tensor, check_labels, prepare
from vitxr.factor.parts import match, take_apart

__all__ = ["core_consistencies", "core_consistency", "why_undefined"]

Array = npt.NDArray[Any]

#: Bytes of the sums of models that share a pass over the tensor; of more models, more passes.
PASS_BYTES = 1 << 30


def core_consistency(t: xr.DataArray, f: xr.Dataset) -> float:
    r"""Core consistency of a CP model, in percent.

    The factors of a CP model are also those of a Tucker model, of which the core that fits the
    data best is ``G = X x_1 A^+ x_2 B^+ x_3 C^+`` (pseudo-inverses; the weights are in ``A``).
    If the components are as independent as CP says, ``G`` is the superdiagonal array of ones,
    ``T``. The core consistency is ::

        100 (1 - |G - T|^2 / R)

    100 for a perfect CP structure; near 0 or negative, however far, where components share what
    they describe, as from some rank on they do. A nonnegative model is not the best one without
    that constraint, so that its core consistency is lower than that of the best model, even at
    the right rank.

    Parameters
    ----------
    t
        The tensor that was factorized, with three or more dimensions; of a Dask tensor too large
        for memory, a block at a time.
    f
        Factors of a CP model of it, one replicate.

    Returns
    -------
    float
        In percent, 100 at most.

    Raises
    ------
    ArgumentError
        If the model has more components than a dimension has entries (the factor then has no
        left inverse, and the core is not determined), there is a ``replicate`` dimension, or
        the factors are no Dataset.
    DataError
        If the tensor has fewer than three dimensions (the factors of a matrix may be rotated into
        one another), or holds values that are not finite (there is no core of observed entries
        alone: no mask is taken), or the factors are not those of a CP model of such a tensor.

    References
    ----------
    Bro and Kiers (2003), A new efficient method for determining the number of components in
    PARAFAC models, Journal of Chemometrics 17, 274-286. Their normalization, tlviz's default.

    Examples
    --------
    >>> from vitxr.factor import factorize
    >>> rng = np.random.default_rng(0)
    >>> data = np.einsum("ir,jr,kr->ijk", *(rng.random((n, 2)) for n in (6, 4, 5)))
    >>> t = xr.DataArray(data, dims=("neuron", "image", "shift"))
    >>> bool(core_consistency(t, factorize(t, rank=2, tol=1e-9, max_iter=5000)) > 99)
    True
    """
    check_labels(t)
    if not isinstance(f, xr.Dataset):
        of = ", one of its ranks, tree.vit.best(rank)" if isinstance(f, xr.DataTree) else ""
        raise ArgumentError(
            f"the factors are a {type(f).__name__}; expected the Dataset of a CP model, as "
            f"t.vit.factorize(rank) gives it{of}."
        )
    if "replicate" in f.dims:
        raise ArgumentError(
            "the factors have a replicate dimension: select one, f.sel(replicate=0)."
        )
    for dim in t.dims:
        name = f"{dim}_factor"
        if name not in f or f[name].dims != (dim, "component") or f.sizes[dim] != t.sizes[dim]:
            raise DataError(
                f"expected factors of a CP model of the tensor, with {name} ({dim}: "
                f"{t.sizes[dim]}, component); the Dataset has: {', '.join(map(str, f.data_vars))}."
            )
    rank = f.sizes["component"]
    if reason := why_undefined(t, rank):
        refused = DataError if t.ndim < 3 else ArgumentError
        raise refused(f"core consistency is not defined: {reason}.")
    t = match(f, t, take_apart(f))
    tensor = prepare(
        t, "ncp_hals", {"nonnegative": ()}, maskable=False
    )  # which reads a large one in blocks
    with own_threads() as pool:
        return core_consistencies(tensor, [f], pool)[0]


def why_undefined(t: xr.DataArray, rank: int) -> str:
    """Say why models of a rank have no core consistency; nothing if they have one."""
    if t.ndim < 3:
        return (
            f"the tensor has {t.ndim} dimensions, and it takes three (the factors of a matrix may "
            "be rotated into one another)"
        )
    small = [f"{dim} ({n})" for dim, n in t.sizes.items() if n < rank]
    if small:
        return f"rank {rank} exceeds the size of {', '.join(small)}: the core is not determined"
    return ""


def core_consistencies(tensor: Tensor, fits: Sequence[xr.Dataset], pool: Pool) -> list[float]:
    """Core consistencies of several models, in as few passes over the tensor as memory allows.

    For a block of rows of the longest mode ``Y += A_b^+ X_b``, in float64; the other modes are
    then multiplied one component of ``A`` at a time. Neither a Kronecker product nor a core of
    all components is formed.
    """
    dims, mode = tensor.labelled.dims, blocked_mode(tensor.data)
    turned = [dims[(mode + i) % len(dims)] for i in range(len(dims))]
    data = rotate(tensor.data, mode)
    columns = math.prod(data.shape[1:])
    out: list[float] = []
    while len(out) < len(fits):
        batch: list[list[Array]] = []
        room = PASS_BYTES
        for f in fits[len(out) :]:
            room -= f.sizes["component"] * columns * 8 * (1 + pool.threads)
            if batch and room < 0:
                break
            weights = {dims[0]: f["weight"].values}
            factors = [
                np.asarray(f[f"{dim}_factor"].values, np.float64) * weights.get(dim, 1.0)
                for dim in turned
            ]
            batch.append([np.linalg.pinv(factor) for factor in factors])
        projected = _project(data, np.concatenate([inverse[0] for inverse in batch]), pool)
        start = 0
        for inverses in batch:
            rank = len(inverses[0])
            mine = projected[start : start + rank].reshape(rank, *data.shape[1:])
            out.append(100 - 100 * _distance(mine, inverses[1:]) / rank)
            start += rank
    return out


def _project(x: Any, left: Array, pool: Pool) -> Array:
    """``left @ X``, the unfolding of the first mode, in one pass over the tensor."""
    rows = block_rows(x.shape, x.dtype.itemsize)

    def work(share: Share) -> Array:
        y = np.zeros((len(left), math.prod(x.shape[1:])))
        for where, block in row_blocks(x, rows, share):
            y += left[:, where] @ block.astype(np.float64)
        return y

    total: Array = sum(pool.map(work, shares(x, rows, pool.threads)))
    return total


def _distance(projected: Array, inverses: Sequence[Array]) -> float:
    """``|G - T|^2``, from the tensor multiplied by the first pseudo-inverse."""
    total = 0.0
    for r, part in enumerate(projected):
        core = part
        for inverse in inverses:  # takes the first axis, and puts the component last
            core = np.tensordot(core, inverse, (0, 1))
        core[(r,) * core.ndim] -= 1
        total += float(np.square(core).sum())
    return total
