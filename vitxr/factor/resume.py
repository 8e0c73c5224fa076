"""Going on with an ensemble: which of its fits can be kept, and whether it is of this tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import blocked_mode, own_threads, relative_residuals, rotate
from vitxr.factor.checks import Tensor
from vitxr.factor.kernels import khatri_rao
from vitxr.factor.masks import masked_errors
from vitxr.factor.rules import told
from vitxr.factor.same import difference, other_source
from vitxr.names import VARIABLES

__all__ = ["kept", "merged_versions"]

#: Relative difference of norms, and of objectives, that the order of sums explains. Objectives
#: are those of float32 factors, perhaps of another machine's products.
SAME_NORM, SAME_OBJECTIVE = 1e-9, 1e-4
#: What a fit has of its own; all else in a child compares it with other replicates.
OWN = (
    "weight",
    "objective",
    "objective_history",
    "penalized_objective_history",
    "converged",
    "iterations",
    "compressed_iterations",
    "seconds",
    "seed",
)


def kept(
    tree: xr.DataTree,
    tensor: Tensor,
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    random_state: int,
) -> list[xr.Dataset | None]:
    """Fits of an ensemble that need not be made again.

    A fit is kept if its rank and seed are among those wanted, it has a model, and it converged
    or its limit on iterations was the same.

    Parameters
    ----------
    tree
        Ensemble, from :func:`vitxr.factor.fit_ensemble`.
    tensor
        The tensor it has to be one of.
    jobs
        Rank and seed of each fit wanted.
    settings
        ``method``, ``tol``, ``max_iter`` and ``options`` with which they are wanted.
    random_state
        From which the seeds were drawn.

    Returns
    -------
    list
        For each job a factor Dataset as :func:`vitxr.factor.factorize` gave it, bit for bit, or
        None.

    Raises
    ------
    ArgumentError
        If the tree is no ensemble, or one of other settings.
    DataError
        If it is one of another tensor.
    """
    if (
        not isinstance(tree, xr.DataTree)
        or "best_replicate" not in tree
        or "norm" not in tree.attrs
    ):
        what = "another tree" if isinstance(tree, xr.DataTree) else f"a {type(tree).__name__}"
        raise ArgumentError(
            f"resume is {what}; expected an ensemble from fit_ensemble, at its root."
        )
    _check_settings(tree.attrs, settings, random_state, tensor.mask_said)
    _check_tensor(tree, tensor)
    longest = int(tree.attrs["max_iter"])
    out: list[xr.Dataset | None] = []
    children = {rank: child.to_dataset(inherit=False) for rank, child in _children(tree).items()}
    for rank, seed in jobs:
        found = None
        if rank in children:
            child = children[rank]
            where = np.flatnonzero(child["seed"].values == seed)
            if len(where):
                f = child.isel(replicate=where[0])
                iterations = int(f["iterations"])
                ended = longest == settings["max_iter"] or (
                    bool(f["converged"]) and iterations < longest
                )
                if ended and math.isfinite(f["objective"]):
                    found = _alone(f, tensor.labelled, iterations)
        out.append(found)
    _check_objective(tensor, out)
    return out


def merged_versions(*attrs: str) -> str:
    """Versions of packages with which parts of an ensemble were made, as JSON.

    Examples
    --------
    >>> merged_versions('{"numpy": "2.1"}', '{"numpy": "2.2"}', '{"numpy": "2.2"}')
    '{"numpy": "2.1, 2.2"}'
    """
    each = [json.loads(text) for text in attrs]
    names = dict.fromkeys(name for versions in each for name in versions)
    found = {
        name: [part for versions in each for part in versions.get(name, "").split(", ") if part]
        for name in names
    }
    return json.dumps({name: ", ".join(dict.fromkeys(parts)) for name, parts in found.items()})


def _children(tree: xr.DataTree) -> dict[int, xr.DataTree]:
    return {int(rank): tree.children[f"rank_{rank}"] for rank in tree.to_dataset()["rank"].values}


def _check_settings(attrs: Any, settings: dict[str, Any], random_state: int, mask: str) -> None:
    wanted = {**settings, "random_state": random_state}
    wanted["options"] = json.loads(told(settings["options"], mask))
    have = {name: attrs.get(name) for name in wanted}
    have = {k: v.item() if isinstance(v, np.generic) else v for k, v in have.items()}  # netCDF's
    have["options"] = json.loads(have["options"] or "{}")
    mine, its = have["options"], wanted["options"]
    # What differs alone.
    have["options"] = {k: v for k, v in mine.items() if k not in its or its[k] != v}
    wanted["options"] = {k: v for k, v in its.items() if k not in mine or mine[k] != v}
    other = [name for name in wanted if name != "max_iter" and have[name] != wanted[name]]
    if have["max_iter"] is None or have["max_iter"] > wanted["max_iter"]:
        other.append("max_iter")
    if other:
        said = "; ".join(_contrast(name, have[name], wanted[name]) for name in other)
        raise ArgumentError(
            f"the ensemble to resume was fitted with {said}: give the same (max_iter may be "
            "larger), or leave resume out."
        )


def _contrast(name: str, have: Any, wanted: Any) -> str:
    """Say how a setting differs; masks without their fingerprints."""
    if name == "options" and "mask" in {**have, **wanted}:
        mine, its = (o.pop("mask", "none").split(", fingerprint")[0] for o in (have, wanted))
        said = f"mask {mine}, not {its}"
        if mine == its:
            said = f"another mask of the same sizes, with as many True, {mine}"
        return said + ("; " + _contrast(name, have, wanted) if have or wanted else "")
    return f"{name} {have!r}, not {wanted!r}"


def _check_tensor(tree: xr.DataTree, tensor: Tensor) -> None:
    """Compare dims, labels, dtype and norm with those of the ensemble."""
    t = tensor.labelled
    child = next(iter(_children(tree).values())).to_dataset(inherit=False)
    ends = "_factor"
    factors = {
        str(name).removesuffix(ends): child[name]
        for name in child.data_vars
        if str(name).endswith(ends)
    }
    mine = list(map(str, t.dims))
    if sorted(factors) != sorted(mine):
        _refuse(f"has dims {', '.join(factors)}, not {', '.join(mine)}")
    for dim, factor in factors.items():
        if (dim in child.indexes) != (dim in t.indexes):
            _refuse(f"has {'' if dim in child.indexes else 'no '}labels of {dim}")
        if found := difference(child, t, dim, ("it", "this one")):
            kind, how = found
            _refuse(f"has other {kind} of {dim}: {how}")
        if factor.dtype != tensor.data.dtype:
            _refuse(f"is {factor.dtype}, not {tensor.data.dtype}")
    if other := other_source(tree.attrs, t.attrs):
        _refuse(f"was another one: {other}")
    norm = float(tree.attrs["norm"])
    if not math.isclose(norm, tensor.norm, rel_tol=SAME_NORM):
        _refuse(f"has norm {norm:.12g}, not {tensor.norm:.12g}")


def _refuse(what: str) -> None:
    raise DataError(
        f"the ensemble to resume is one of another tensor, which {what}: give the tensor "
        "it was fitted to, or leave resume out."
    )


def _check_objective(tensor: Tensor, fits: Sequence[xr.Dataset | None]) -> None:
    """Compute the objective of one fit again: its model is of this tensor or it is not."""
    f = next((f for f in fits if f is not None), None)
    if f is None:
        return
    factors = [f[f"{dim}_factor"].values.astype(np.float64) for dim in tensor.labelled.dims]
    factors[0] *= f["weight"].values
    with own_threads() as pool:
        if tensor.mask is not None:
            objective = float(masked_errors(tensor.data, [factors], tensor.mask, pool)[0][0])
        else:
            mode = blocked_mode(tensor.data)
            first, *others = factors[mode:] + factors[:mode]
            pair = (first, khatri_rao([factor.T for factor in others]))
            data = rotate(tensor.data, mode)
            objective = relative_residuals(data, [pair], tensor.norm, pool)[0]
    recorded = float(f["objective"])
    if not math.isclose(objective, recorded, rel_tol=SAME_OBJECTIVE, abs_tol=1e-7):
        _refuse(
            f"has the same labels and norm but other values: a fit of it has objective "
            f"{recorded:.8f}, and on this tensor {objective:.8f}"
        )


def _alone(f: xr.Dataset, t: xr.DataArray, iterations: int) -> xr.Dataset:
    """One replicate as factorize gave it: in the order of weights, its history cut to length."""
    order = np.argsort(-f["weight"].values, kind="stable")
    f = f.isel(component=order, iteration=slice(iterations))
    names = [*(f"{dim}_factor" for dim in t.dims), *(name for name in OWN if name in f)]
    coords = {"component": np.arange(len(order)), "iteration": np.arange(iterations)}
    out = xr.Dataset(coords=t.coords).assign_coords(coords)
    for name in names:
        known = VARIABLES.get(name, VARIABLES["neuron_factor"])
        out[name] = (f[name].dims, f[name].values, known.attrs)
    out.attrs = dict(f.attrs)
    return out
