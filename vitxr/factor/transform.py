"""New images, shifts or neurons in a model: one factor by least squares, the others fixed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import own_threads
from vitxr.factor.checks import CONSTRAINTS, METHODS, clipped
from vitxr.factor.masks import read_mask
from vitxr.factor.parts import (
    Blocks,
    Parts,
    Walk,
    gram,
    labels_of,
    match,
    project,
    refuse_difference,
    take_apart,
)
from vitxr.factor.same import difference, label_at
from vitxr.names import PROVENANCE, VARIABLES, provenance

__all__ = ["least_squares", "transform"]

Array = npt.NDArray[Any]


def transform(
    f: xr.Dataset,
    t: xr.DataArray,
    dim: str | None = None,
    nonnegative: bool | None = None,
    mask: xr.DataArray | None = None,
) -> xr.Dataset:
    r"""Find where new images, shifts or neurons lie in a model.

    With all factors but that of ``dim`` as they are, and ``Z`` the model without that factor
    (of CP ``diag(weight) KR(b, c, ...)^T``), each row of the new factor is ::

        a_i = argmin_a |x_i - a Z|,   a >= 0 where the method is nonnegative

    the exact minimum, by the active-set method of Lawson and Hanson, or by least squares. Rows do
    not touch one another. Where components are linearly dependent there are several minima, of
    which one is found. With a mask the norm of each row is over its observed entries alone.

    Parameters
    ----------
    f
        Factor Dataset of one model, CP or Tucker.
    t
        Tensor with the model's dims, of which one has other labels. NumPy, or Dask, which is
        walked over once in its blocks.
    dim
        That dimension; it has to be named where labels do not tell, because they are the model's
        or there are none.
    nonnegative
        Whether the rows are nonnegative; by default as the method's factor of ``dim`` is. It has
        to be given for ``constrained_parafac`` under other constraints, and for models that do
        not say by which method they were found.
    mask
        DataArray of bool, broadcast against ``t``: True where a value is observed. Others, which
        may be NaN, have no part in the minimum. For CP models.

    Returns
    -------
    xarray.Dataset
        ``weight`` (or ``core``) and factors as in ``f``, and the new ``<dim>_factor`` with the
        labels of ``t``. It is scaled so that these weights and factors are the model of ``t``:
        its columns do not have unit norm, and rows compare with those of ``f``. Components of
        weight 0 have zeros. Numbers about the fit are not kept; ``explained`` says how well
        ``t`` is fitted. The attribute ``transformed`` names the dimension.

    Raises
    ------
    ArgumentError
        If ``dim`` is not one of the model's or cannot be told, or ``nonnegative`` cannot, or
        ``f`` holds several replicates, or there is a mask and ``f`` is a Tucker model.
    DataError
        If other dims or labels differ as well, offsets of shifts and SHA-256 of images included;
        if the tensor says that it is rectified, normalised or smoothed in another way or, but for
        new neurons, that it is of another model, preprocessing, precision or layer; if it holds
        values that are not finite, or the mask hides all of a row.

    Notes
    -----
    Penalties are not applied: of a model fitted with them, the rows of the tensor it was fitted
    to come out less shrunk.

    References
    ----------
    Lawson and Hanson (1974), Solving Least Squares Problems, chapter 23; as
    :func:`scipy.optimize.nnls`.

    Examples
    --------
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), [[1.0, 0.0], [0.6, 0.8]]),
    ...                 "image_factor": (("image", "component"), np.eye(2)),
    ...                 "weight": ("component", [2.0, 5.0])}, coords={"image": ["a", "b"]},
    ...                attrs={"method": "ncp_hals"})
    >>> new = xr.DataArray([[2.0], [1.2]], dims=("neuron", "image"), coords={"image": ["c"]})
    >>> g = transform(f, new)
    >>> g.image.values, g.image_factor.values
    (array(['c'], dtype='<U1'), array([[1., 0.]]))
    """
    lazy = take_apart(f)
    if "roll_y" in f:
        raise ArgumentError(
            "the model is of rolled responses, and how new ones are to be rolled depends on their "
            "rows: fit old and new ones together, with factorize_aligned."
        )
    dim = _dim(f, t, lazy.dims, dim)
    t = match(f, t, lazy, free=dim)
    if nonnegative is None:
        nonnegative = _nonnegative(f, dim)
    parts = lazy.exact()
    keep = parts.dims.index(dim)
    seen = None if mask is None else read_mask(t, mask)
    if seen is not None and not parts.cp:
        raise ArgumentError(
            "there is a mask, and the model is a Tucker model: transform takes one for CP models; "
            "drop what is missing, or fill it."
        )
    with own_threads() as pool:
        walk = Walk(t, pool.threads, seen)
        n, masked = t.sizes[dim], seen is not None
        sums = walk.map(pool, lambda blocks: _products(blocks, parts, keep, n, masked))
    rhs, grams, counts = (np.sum(part, axis=0) for part in zip(*sums, strict=True))
    if seen is None:
        factor = least_squares(gram(parts.core, parts.factors, keep), rhs, nonnegative)
    else:
        if not counts.all():
            where = label_at(t, dim, int(np.flatnonzero(counts == 0)[0]))
            raise DataError(
                f"the mask hides all of {where}, of which nothing could be said: leave it out of "
                f"the tensor, t.drop_isel({dim}=...)."
            )
        factor = _rows(grams, rhs, nonnegative)
    return _dataset(f, t, dim, factor.astype(lazy.dtype))


def _products(blocks: Blocks, parts: Parts, keep: int, n: int, masked: bool) -> tuple[Array, ...]:
    """Sum up ``X_(n) Z^T`` and, under a mask, what it leaves of each row.

    Returns
    -------
    numpy.ndarray
        The product, ``(n, rank)``.
    numpy.ndarray
        For each row the sums over its entries that count of the products of two components,
        ``(n, rank (rank + 1) / 2)``, which are its own Gram matrix; without a mask ``(n, 0)``.
    numpy.ndarray
        How many of its entries count, ``(n,)``.
    """
    rank = parts.factors[keep].shape[1]
    left, right = np.triu_indices(rank if masked else 0)
    out, grams, counts = np.zeros((n, rank)), np.zeros((n, len(left))), np.zeros(n, np.int64)
    others = tuple(m for m in range(len(parts.dims)) if m != keep)
    for index, block, kept in blocks:
        rows = [a[s] for a, s in zip(parts.factors, index, strict=True)]
        out[index[keep]] += project(block, parts.core, rows, keep)
        if kept is not None:
            core, *pairs = (a[..., left] * a[..., right] for a in (parts.core, *rows))
            grams[index[keep]] += project(kept.astype(np.float64), core, pairs, keep)
            counts[index[keep]] += kept.sum(axis=others)
    return out, grams, counts


def _rows(grams: Array, rhs: Array, nonnegative: bool) -> Array:
    """Least squares of rows of which each has a Gram matrix, given as its upper triangle."""
    rank = rhs.shape[1]
    left, right = np.triu_indices(rank)
    out, full = np.empty(rhs.shape), np.empty((rank, rank))
    for i, (own, row) in enumerate(zip(grams, rhs, strict=True)):
        full[left, right] = full[right, left] = own
        out[i] = least_squares(full, row[None], nonnegative)[0]
    return out


def least_squares(gram: Array, rhs: Array, nonnegative: bool) -> Array:
    r"""Minimise ``a G a^T / 2 - h a^T`` for each row ``h``, exactly.

    Parameters
    ----------
    gram
        ``G``, ``(rank, rank)``, positive semidefinite.
    rhs
        Rows ``h``, ``(n, rank)``, in the span of ``G``.
    nonnegative
        Whether ``a >= 0``.

    Returns
    -------
    numpy.ndarray
        ``(n, rank)``.

    Notes
    -----
    With ``G = K^T K`` from its eigenvectors this is ``|K a - K^{-T} h|``. Columns are scaled to
    unit norm before, so that the units of weights do not matter, and directions of ``G`` below
    rounding are left out.

    Examples
    --------
    >>> least_squares(np.eye(2), np.array([[1.0, -1.0]]), nonnegative=True)
    array([[1., 0.]])
    """
    from scipy.optimize import nnls

    out = np.zeros(rhs.shape)
    scale = np.sqrt(np.diagonal(gram))
    alive = np.flatnonzero(scale)
    scale = scale[alive]
    values, vectors = np.linalg.eigh(gram[np.ix_(alive, alive)] / np.outer(scale, scale))
    kept = values > len(alive) * np.finfo(np.float64).eps * values.max(initial=0)
    root, vectors = np.sqrt(values[kept]), vectors[:, kept]
    goal = (rhs[:, alive] / scale) @ vectors / root
    if nonnegative:
        k = root[:, None] * vectors.T
        if not k.size:
            return out
        found = np.array([nnls(k, row, maxiter=100 * len(k))[0] for row in goal])
    else:
        found = (goal / root) @ vectors.T
    out[:, alive] = found.reshape(len(rhs), len(alive)) / scale
    return out


def _dim(f: xr.Dataset, t: xr.DataArray, dims: tuple[str, ...], dim: str | None) -> str:
    """Tell which dimension is new."""
    if dim is not None:
        if dim not in dims:
            raise ArgumentError(f"dim={dim!r}; the model has {', '.join(dims)}.")
        return dim
    if not isinstance(t, xr.DataArray) or set(map(str, t.dims)) != set(dims):
        return dims[0]  # refused by what comes next, with the reason
    differ = {d: found for d in dims if (found := difference(f, t, d))}
    if not differ:
        raise ArgumentError(
            f"all labels of the tensor are the model's: say of which dimension the factor is "
            f"wanted, dim={' or '.join(map(repr, dims))}."
        )
    if len(differ) > 1:
        refuse_difference(differ, "; one may")
    return next(iter(differ))


def _nonnegative(f: xr.Dataset, dim: str) -> bool:
    """Whether the method keeps the factor of a dimension nonnegative."""
    method, options = f.attrs.get("method"), json.loads(f.attrs.get("options", "{}"))
    if method not in METHODS:
        raise ArgumentError(
            f"the method of the model is {method!r}, which does not say whether its factors are "
            "nonnegative: give nonnegative=True or False."
        )
    if method == "constrained_parafac":
        given = {name: options[name] for name in CONSTRAINTS & set(options) if options[name]}
        if set(given) <= {"non_negative"}:
            names = [str(n)[: -len("_factor")] for n in f.data_vars if str(n).endswith("_factor")]
            return clipped(given.get("non_negative"), len(names))[names.index(dim)]
        raise ArgumentError(
            f"the model was fitted under {', '.join(sorted(given))}, which rows found by least "
            "squares do not obey: give nonnegative=True or False to have them all the same."
        )
    if options.get("nonnegative") is not None:
        return dim in np.atleast_1d(options["nonnegative"]).tolist()
    return METHODS[method].nonnegative


def _dataset(f: xr.Dataset, t: xr.DataArray, dim: str, factor: Array) -> xr.Dataset:
    """Put the new factor in the place of the old one."""
    name = f"{dim}_factor"
    dims = [str(d) for d in f.dims if d not in (dim, "iteration")]
    own = labels_of(t, (dim,)).to_dataset()
    own = own.drop_vars([n for n, c in own.variables.items() if not c.dims])
    out = xr.Dataset(coords=labels_of(f, dims)).assign_coords(own.coords)
    for key, array in f.data_vars.items():
        if key == name:
            out[name] = (array.dims, factor, VARIABLES["neuron_factor"].attrs)
        elif str(key).endswith("_factor") or key in ("weight", "core"):
            out[key] = array.variable
    attrs = dict(f.attrs)
    if dim == "neuron":  # they may be of another layer, or of another model
        attrs = {k: v for k, v in attrs.items() if k not in PROVENANCE} | provenance(t.attrs)
    out.attrs = {**attrs, "transformed": dim}
    return out
