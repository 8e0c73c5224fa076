"""What a model says about its tensor: its reconstruction, and how much it explains."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import own_threads
from vitxr.factor.masks import read_mask
from vitxr.factor.parts import (
    Blocks,
    Parts,
    Walk,
    gram,
    labels_of,
    match,
    model_block,
    project,
    take_apart,
)
from vitxr.names import VARIABLES, provenance

__all__ = ["explained", "reconstruct"]

Array = npt.NDArray[Any]


def reconstruct(f: xr.Dataset, components: Hashable | Sequence[Hashable] = None) -> xr.DataArray:
    r"""Multiply out a model, lazily.

    Of a CP model ``sum_r weight[r] * a[:, r] o b[:, r] o c[:, r] ...``, of a Tucker model the
    core multiplied along every dimension by its factor.

    Parameters
    ----------
    f
        Factor Dataset, of one model or with ``replicate``.
    components
        Label of a component of a CP model, or several, which are added up; all by default.

    Returns
    -------
    xarray.DataArray
        ``reconstruction``, a Dask array in the dtype of the factors (products and sums are
        float64), with the dims of the tensor in its order, ``replicate`` in front where there is
        one, and all their coordinates. Nothing of the tensor's size exists before it is computed,
        and then one chunk at a time.

    Raises
    ------
    ArgumentError
        If a component does not exist or is named twice, or one is named of a Tucker model.
    DataError
        If ``f`` does not hold the factors of a model.

    Examples
    --------
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), [[1.0, 0.0], [0.0, 1.0]]),
    ...                 "image_factor": (("image", "component"), [[0.6, 1.0], [0.8, 0.0]]),
    ...                 "weight": ("component", [10.0, 3.0])},
    ...                coords={"image": ["a", "b"], "component": [0, 1]})
    >>> reconstruct(f).values
    array([[6., 8.],
           [3., 0.]])
    >>> reconstruct(f, components=0).sel(image="b").values
    array([8., 0.])
    """
    import dask.array as da

    if components is not None:
        f = _chosen(f, components)
    several = "replicate" in f.dims
    models = [f.isel(replicate=i) for i in range(f.sizes["replicate"])] if several else [f]
    parts = [take_apart(model) for model in models]
    dims = parts[0].dims
    data = da.stack([_lazy(p) for p in parts]) if several else _lazy(parts[0])
    dims = ("replicate", *dims) if several else dims
    out = xr.DataArray(data, dims=dims, coords=labels_of(f, dims), name="reconstruction")
    out.attrs = {**provenance(f.attrs), **VARIABLES["reconstruction"].attrs}
    rolls = {name: f[name] for name in ("roll_y", "roll_x") if name in f}
    return out.assign_coords(rolls)


def explained(f: xr.Dataset, t: xr.DataArray, mask: xr.DataArray | None = None) -> xr.Dataset:
    r"""How much of a tensor a model explains: in all, along each dimension, by each component.

    With ``X`` the tensor and ``M`` the model,

    - ``r2 = 1 - |X - M|^2 / |X|^2``, and ``<dim>_r2`` the same over the entries of one label: of a
      neuron, an image, a shift. It is not centred: a model of zeros has 0, one of means has more.
      (CP models have no intercept, and which mean of a tensor one would take away is arbitrary.)
      Labels whose entries are all zero, or all hidden, have NaN. It may be negative along a
      dimension;
    - ``<dim>_residual_squares = |X_i - M_i|^2`` and ``<dim>_squares = |X_i|^2``, the sums over the
      entries of one label, from which follows the same of any group of them, as
      ``1 - e.neuron_residual_squares.groupby("feature_map").sum() /
      e.neuron_squares.groupby("feature_map").sum()``.

    And of a CP model, with ``M_r`` its component ``r``,

    - ``component_alone = (2 <X, M_r> - |M_r|^2) / |X|^2``, what it would explain by itself, as it
      is;
    - ``component_share = (2 <X, M_r> - <M, M_r>) / |X|^2``; the shares of all components
      add up to ``r2``; what two of them explain in common is divided evenly;
    - ``component_drop = (2 <X, M_r> - 2 <M, M_r> + |M_r|^2) / |X|^2``, by how much ``r2``
      falls when the component is left out and the others stay as they are.

    With a mask ``W`` all of these are over the observed entries alone: ``W X``, ``W M`` and
    ``W M_r`` take the place of ``X``, ``M`` and ``M_r``.

    Parameters
    ----------
    f
        Factor Dataset of one model, CP or Tucker.
    t
        Tensor of the same dimensions, in any order, and the same labels: the one that was
        factorized, or another one. NumPy, or Dask, which is walked over once in its blocks.
    mask
        DataArray of bool, broadcast against ``t``: True where a value is observed. Others may be
        NaN. Give the one that the model was fitted with for its own ``objective``, or its
        complement, where values are known, for what the fit has not seen.

    Returns
    -------
    xarray.Dataset
        float64; with the coordinates of ``f``. ``objective`` is ``|X - M| / |X|``. Residuals are
        taken entry by entry, and no difference of large numbers; ``<X - M, M_r>`` likewise,
        products of components from Gram matrices.

    Raises
    ------
    ArgumentError
        If ``f`` holds several replicates, or has a coordinate with the name of a result, or the
        mask is no bool DataArray.
    DataError
        If dimensions, labels (offsets of shifts and SHA-256 of images included), the source of
        the tensor or what was done to it are not the model's, or it holds values that are not
        finite, or is zero everywhere.

    Examples
    --------
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), np.eye(2)),
    ...                 "image_factor": (("image", "component"), np.eye(2)),
    ...                 "weight": ("component", [4.0, 3.0])})
    >>> e = explained(f, xr.DataArray([[4.0, 0.0], [0.0, 6.0]], dims=("neuron", "image")))
    >>> e.neuron_r2.values, e.component_drop.values.round(3)
    (array([1.  , 0.75]), array([0.308, 0.519]))
    """
    lazy = take_apart(f)
    t = match(f, t, lazy)
    clash = sorted(_results(lazy) & set(map(str, f.coords)))
    if clash:
        raise ArgumentError(
            f"the factors have a coordinate named {', '.join(clash)}, as the result will have a "
            f"variable: rename or drop it first, f.rename({clash[0]}=...)."
        )
    seen = None if mask is None else read_mask(t, mask)
    parts = lazy.exact()
    with own_threads() as pool:
        walk = Walk(t, pool.threads, seen)
        tallies = walk.map(pool, lambda blocks: _tally(blocks, parts))
    tally = functools.reduce(_Tally.plus, tallies)
    total, rest = float(tally.squares[0].sum()), float(tally.residual[0].sum())
    if total == 0:
        raise DataError("the tensor is zero everywhere, so that there is nothing to explain.")
    ds = xr.Dataset(coords=labels_of(f, (*parts.dims, "component")))
    ds["r2"] = 1 - rest / total
    ds["objective"] = np.sqrt(rest / total)
    for dim, residual, squares in zip(parts.dims, tally.residual, tally.squares, strict=True):
        whole = np.where(squares > 0, squares, np.nan)
        ds[f"{dim}_r2"] = (dim, 1 - residual / whole)
        ds[f"{dim}_squares"] = (dim, squares)
        ds[f"{dim}_residual_squares"] = (dim, residual)
    if parts.cp:
        left, cross, own = tally.left, tally.cross, tally.own
        if seen is None:  # <M_r, M_s> of all pairs
            inner = gram(parts.core, parts.factors, 0) * (parts.factors[0].T @ parts.factors[0])
            own, cross = np.diagonal(inner), inner.sum(axis=0)
        ds["component_alone"] = ("component", (2 * (left + cross) - own) / total)
        ds["component_share"] = ("component", (2 * left + cross) / total)
        ds["component_drop"] = ("component", (2 * left + own) / total)
    for name in ds.data_vars:
        ds[name].attrs = dict(_attrs(str(name)))
    ds.attrs = provenance(f.attrs)
    return ds


def _results(parts: Parts) -> set[str]:
    """Names of the variables of :func:`explained`."""
    ends = ("r2", "squares", "residual_squares")
    names = {f"{dim}_{end}" for dim in parts.dims for end in ends}
    shares = {"component_alone", "component_share", "component_drop"} if parts.cp else set()
    return {"r2", "objective"} | names | shares


def _chosen(f: xr.Dataset, components: Any) -> xr.Dataset:
    """Select components by label."""
    if "component" not in f.dims:
        raise ArgumentError(
            "components are those of a CP model; in a Tucker model the columns of one dimension "
            "go with all those of the others: leave components out."
        )
    wanted = np.atleast_1d(np.asarray(components))
    index = f.indexes.get("component", range(f.sizes["component"]))
    labels = wanted.ravel().tolist()
    absent = [c for c in labels if c not in index]
    repeated = len(set(labels)) < len(labels)
    if wanted.ndim != 1 or not labels or wanted.dtype.kind == "b" or absent or repeated:
        raise ArgumentError(
            f"components={components!r}: expected one or more of {', '.join(map(str, index))}, "
            "each once."
        )
    at = [list(index).index(c) for c in labels]
    return f.isel(component=at)


def _lazy(parts: Parts) -> Any:
    """Multiply out a model as a Dask array; every task gets the rows of the factors it needs."""
    import dask.array as da

    n, dtype = len(parts.dims), parts.dtype
    shape = tuple(f.shape[0] for f in parts.factors)
    chunks = da.core.normalize_chunks("auto", shape, dtype=np.float64)
    axes = [n] * n if parts.cp else [n + m for m in range(n)]
    pairs: list[Any] = [da.asarray(parts.core).rechunk(-1), tuple(axes[:1] if parts.cp else axes)]
    for m, factor in enumerate(parts.factors):
        pairs += [da.asarray(factor).rechunk((chunks[m], -1)), (m, axes[m])]

    def block(core: Array, *factors: Array) -> Array:
        return model_block(core, *factors).astype(dtype)

    meta = np.empty((0,) * n, dtype)
    # Chunks agree as they are; aligning them would warn that there are more than factors have.
    return da.blockwise(
        block, tuple(range(n)), *pairs, concatenate=True, align_arrays=False, meta=meta
    )


@dataclass
class _Tally:
    """Sums over blocks of a tensor.

    Attributes
    ----------
    residual, squares
        Squares of the residual and of the tensor, for each mode along it.
    left, cross, own
        Of each component ``<X - M, M_r>``, and under a mask ``<M, M_r>`` and ``|M_r|^2``.
    """

    residual: list[Array]
    squares: list[Array]
    left: Array
    cross: Array
    own: Array

    def plus(self, other: _Tally) -> _Tally:
        """Add two up."""
        lists = ((self.residual, other.residual), (self.squares, other.squares))
        residual, squares = ([a + b for a, b in zip(*pair, strict=True)] for pair in lists)
        left, cross = self.left + other.left, self.cross + other.cross
        return _Tally(residual, squares, left, cross, self.own + other.own)


def _tally(blocks: Blocks, parts: Parts) -> _Tally:
    """Walk over blocks, which are 0 where they are hidden."""
    residual, squares = ([np.zeros(len(f)) for f in parts.factors] for _ in range(2))
    left, cross, own = (np.zeros(parts.core.shape[0]) for _ in range(3))
    for index, block, kept in blocks:
        rows = [f[s] for f, s in zip(parts.factors, index, strict=True)]
        model = model_block(parts.core, *rows)
        if kept is not None:
            model *= kept
            if parts.cp:
                cross += (project(model, parts.core, rows, 0) * rows[0]).sum(axis=0)
                powers = [a * a for a in (parts.core, *rows)]
                own += (project(kept.astype(np.float64), powers[0], powers[1:], 0) * powers[1]).sum(
                    axis=0
                )
        rest = block - model
        if parts.cp:
            left += (project(rest, parts.core, rows, 0) * rows[0]).sum(axis=0)
        for array, sums in ((rest, residual), (block, squares)):
            np.square(array, out=array)
            for m, where in enumerate(index):
                others = tuple(k for k in range(array.ndim) if k != m)
                sums[m][where] += array.sum(axis=others)
    return _Tally(residual, squares, left, cross, own)


def _attrs(name: str) -> dict[str, str]:
    """Attributes of a variable, also for dimensions that the vocabulary does not know."""
    if name in VARIABLES:
        return VARIABLES[name].attrs
    for end in ("_r2", "_residual_squares", "_squares"):
        if name.endswith(end):
            return VARIABLES[f"neuron{end}"].attrs
    raise KeyError(name)
