"""What a fit found, with the tensor's labels: unit columns, order of components, objective."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr._version import __version__
from vitxr.factor.blocks import blocked_mode, own_threads, relative_residuals, rotate
from vitxr.factor.checks import METHODS, Tensor
from vitxr.factor.kernels import khatri_rao
from vitxr.factor.masks import masked_errors
from vitxr.factor.rules import told
from vitxr.names import VARIABLES, provenance

__all__ = ["Found", "assemble", "describe", "label", "ordered_cp", "ordered_tucker"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Found:
    """What a fit found: ``core`` (weights of a CP model), factors ``(n, rank)``, how it went.

    ``penalized`` is the objective with its penalty after each iteration, where there is one. A
    fit that broke down or was interrupted says so in ``failure``, and holds NaN.
    """

    core: Array
    factors: Sequence[Array]
    history: Array
    converged: bool
    seconds: float
    seed: int
    compressed_iterations: int = 0
    failure: str = ""
    penalized: Array | None = None


def label(
    tensor: Tensor,
    found: Sequence[Found],
    method: str,
    tol: float,
    max_iter: int,
    options: dict[str, Any],
) -> list[xr.Dataset]:
    """Label models of one tensor; their objectives are computed in one pass over it."""
    cp = METHODS[method].form == "cp"
    dtype = tensor.data.dtype
    signed = [m for m, kept in enumerate(tensor.rules.nonnegative) if not kept]
    turned = signed[0] if signed else 0
    models = [ordered_cp(one, dtype, turned) if cp else ordered_tucker(one, dtype) for one in found]
    with own_threads() as pool:
        mode = blocked_mode(tensor.data) if cp else 0
        pairs = [_pair(core, units, mode) for core, units in models]
        whole = [i for i, one in enumerate(found) if not one.failure]
        objectives = [math.nan] * len(found)
        if tensor.mask is None:
            chosen = [pairs[i] for i in whole]
            residuals = relative_residuals(rotate(tensor.data, mode), chosen, tensor.norm, pool)
        else:
            scaled = [[models[i][0] * models[i][1][0], *models[i][1][1:]] for i in whole]
            residuals = masked_errors(tensor.data, scaled, tensor.mask, pool)[0].tolist()
        for i, residual in zip(whole, residuals, strict=True):
            objectives[i] = residual
    if any(tensor.rules.sparsity):
        _warn_of_nothing([models[i][0] for i in whole], options["sparsity"])
    said = told(options, tensor.mask_said)
    return [
        _dataset(tensor, one, *model, objective, method, tol, max_iter, said)
        for one, model, objective in zip(found, models, objectives, strict=True)
    ]


def _warn_of_nothing(weights: Sequence[Array], sparsity: Any) -> None:
    """Warn of fits that a penalty has left without a component: they end as any others do."""
    empty = sum(not weight.any() for weight in weights)
    if empty:
        given = ", ".join(f"{dim}: {float(weight):g}" for dim, weight in sparsity.items())
        warnings.warn(
            f"{empty} of {len(weights)} fits have no component left: all weights are 0, as "
            f"sparsity ({given}) costs more than any component explains; give smaller numbers.",
            RuntimeWarning,
            stacklevel=2,
        )


def ordered_cp(found: Found, dtype: Any, turned: int = 0) -> tuple[Array, list[Array]]:
    """Weights in descending order and unit columns; a negative weight turns one factor."""
    scaled = [_unit_columns(f) for f in found.factors]
    units = [unit.astype(dtype) for unit, _ in scaled]
    weight = found.core * np.prod([scale for _, scale in scaled], axis=0)
    units[turned] *= np.where(weight < 0, -1, 1).astype(dtype)
    order = np.argsort(-abs(weight), kind="stable")
    return abs(weight)[order], [u[:, order] for u in units]


def ordered_tucker(found: Found, dtype: Any) -> tuple[Array, list[Array]]:
    """Core with its slices of descending norm in front, and unit columns."""
    core = found.core
    units = []
    for mode, factor in enumerate(found.factors):
        unit, scale = _unit_columns(factor)
        units.append(unit.astype(dtype))
        core = np.moveaxis(np.moveaxis(core, mode, -1) * scale, -1, mode)
    for mode in range(core.ndim):
        slices = np.moveaxis(core, mode, 0).reshape(core.shape[mode], -1)
        order = np.argsort(-np.linalg.norm(slices, axis=1), kind="stable")
        core, units[mode] = core.take(order, axis=mode), units[mode][:, order]
    return core, units


def _pair(core: Array, units: Sequence[Array], mode: int) -> tuple[Array, Array]:
    """The model as a product of two matrices, the unfolding along a mode."""
    if core.ndim == 1:
        turned = [units[(mode + i) % len(units)] for i in range(len(units))]
        return turned[0] * core, khatri_rao([u.T.astype(np.float64) for u in turned[1:]])
    for m in range(1, len(units)):
        core = np.moveaxis(np.tensordot(core, units[m], (m, 1)), -1, m)
    return units[0], core.reshape(len(core), -1)


def assemble(t: xr.DataArray, core: Array, units: Sequence[Array]) -> xr.Dataset:
    """Label a model with the coordinates of its tensor: weight or core, and factors."""
    cp = core.ndim == 1
    ds = xr.Dataset(coords=t.coords)
    axes = ["component"] * t.ndim if cp else [f"{d}_component" for d in t.dims]
    if cp:
        ds["weight"] = ("component", core)
    else:
        ds["core"] = (axes, core)
    ds = ds.assign_coords({a: np.arange(n) for a, n in zip(axes, core.shape, strict=False)})
    for dim, axis, unit in zip(t.dims, axes, units, strict=True):
        ds[f"{dim}_factor"] = ((dim, axis), unit)
    return ds


def describe(ds: xr.Dataset) -> None:
    """Give variables their meaning and unit, by the vocabulary."""
    for variable in ds.data_vars:
        known = VARIABLES.get(str(variable), VARIABLES["neuron_factor"])
        ds[variable].attrs.update(known.attrs)


def _dataset(
    tensor: Tensor,
    found: Found,
    core: Array,
    units: Sequence[Array],
    objective: float,
    method: str,
    tol: float,
    max_iter: int,
    options: str,
) -> xr.Dataset:
    t, cp = tensor.labelled, METHODS[method].form == "cp"
    variables: dict[str, Any] = {"objective": objective}
    variables["objective_history"] = ("iteration", np.asarray(found.history, np.float64))
    if any(tensor.rules.sparsity):
        penalized = np.empty(0) if found.penalized is None else found.penalized
        variables["penalized_objective_history"] = ("iteration", penalized)
    variables["converged"] = bool(found.converged)
    variables["iterations"] = len(found.history)
    if method == "ncp_hals":
        variables["compressed_iterations"] = found.compressed_iterations
    variables["seconds"] = found.seconds
    variables["seed"] = np.int64(found.seed)
    # All at once: each time all indexes are compared.
    ds = assemble(t, core, units).assign(variables)
    ds = ds.assign_coords(iteration=np.arange(len(found.history)))
    describe(ds)
    used = {"vitxr": __version__, "numpy": np.__version__, "tensorly": version("tensorly")}
    ds.attrs = {
        **provenance(t.attrs),
        "method": method,
        "rank": core.shape[0] if cp else list(core.shape),
        "tol": float(tol),
        "max_iter": int(max_iter),
        "options": options,
        "versions": json.dumps(used),
    }
    return ds


def _unit_columns(factor: Array) -> tuple[Array, Array]:
    """Columns of unit norm whose largest entry is positive, and what they were divided by."""
    factor = np.asarray(factor, np.float64)
    length = np.linalg.norm(factor, axis=0)
    largest = factor[abs(factor).argmax(axis=0), np.arange(factor.shape[1])]
    scale = np.where(largest < 0, -length, length)
    return factor / np.where(length > 0, scale, 1.0), scale
