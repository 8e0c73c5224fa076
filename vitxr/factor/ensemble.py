"""Ensembles of CP fits over ranks and random starts: all fitted side by side, one tree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks
from vitxr.factor.compare import align, factor_match_score, similarity
from vitxr.factor.labels import label
from vitxr.factor.methods import fit
from vitxr.names import VARIABLES

__all__ = ["best", "fit_ensemble"]


def fit_ensemble(
    t: xr.DataArray,
    ranks: int | Sequence[int],
    replicates: int = 3,
    method: str = "ncp_hals",
    random_state: int = 0,
    tol: float = 1e-5,
    max_iter: int = 500,
    progress: bool = True,
    **options: Any,
) -> xr.DataTree:
    """Fit CP models of several ranks from several random starts each.

    The plot of objective against rank shows how much each further component explains, that of
    similarity against rank how far the components depend on the start.

    Parameters
    ----------
    t
        Tensor as for :func:`vitxr.factor.factorize`. It is checked, and where it fits read into
        memory, once.
    ranks
        Ranks to fit, one or several, without repetition.
    replicates
        Fits of each rank, from different starts.
    method
        Any CP method of :func:`vitxr.factor.factorize`.
    random_state
        Integer from 0 to 2**32 - 1. The seed of a fit is drawn from it, the rank and the
        number of the replicate alone, so that adding ranks or replicates changes no fit.
    tol, max_iter
        As for :func:`vitxr.factor.factorize`.
    progress
        Show a bar over the fits that are finished, with the iteration of those that are not.
    **options
        Further arguments, as for :func:`vitxr.factor.factorize`.

    Returns
    -------
    xarray.DataTree
        At the root, over ``(rank, replicate)``: ``objective``, ``similarity`` (to the best
        replicate of the rank, which has 1), ``factor_match_score`` (to the same),
        ``dead_components``, ``failed``, ``iterations``, ``seconds``, ``converged`` and ``seed``,
        with which :func:`vitxr.factor.factorize` repeats the fit; and
        ``best_replicate(rank)``, the one of least objective. Under ``rank_<R>`` the factors as
        :func:`vitxr.factor.factorize` gives them with ``replicate`` in front, and
        the same comparisons. The components of the best replicate are in the order of
        descending weight, those of the others follow it (:func:`align`);
        ``objective_history`` is NaN after the end of a fit. ``to_dataset()`` of a child also
        carries the root's coordinate ``rank``, which xarray hands down. With "ncp_hals" all
        models are fitted side by side, so that ``seconds`` of each counts from the start of all.
        A fit without a model is marked ``failed``: it was interrupted by Ctrl-C, which keeps
        those that are finished, or tensorly met a singular system. Its factors and objective
        are NaN; ``best_replicate`` is -1 where that is all there is.

    Warns
    -----
    RuntimeWarning
        If fits have failed, but not all.

    Raises
    ------
    ArgumentError
        If ranks repeat, ``replicates`` is not a positive integer, the method is not a CP method,
        or for the reasons of :func:`vitxr.factor.factorize`; before anything is fitted.
    DataError
        As :func:`vitxr.factor.factorize`, and if all fits have failed.
    KeyboardInterrupt
        If interrupted before any fit was finished.

    References
    ----------
    The original notebook's section 7; Williams et al. (2018), Unsupervised discovery of demixed,
    low-dimensional neural dynamics across multiple timescales through tensor component analysis,
    Neuron 98, 1099-1115.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> data = np.einsum("ir,jr,kr->ijk", *(rng.random((n, 2)) for n in (6, 4, 5)))
    >>> t = xr.DataArray(data, dims=("neuron", "image", "shift"))
    >>> tree = fit_ensemble(t, ranks=[1, 2], replicates=2, progress=False)
    >>> tree.objective.dims, list(tree.children)
    (('rank', 'replicate'), ['rank_1', 'rank_2'])
    >>> best = tree["rank_2"].to_dataset().sel(replicate=int(tree.best_replicate.sel(rank=2)))
    >>> best.neuron_factor.dims
    ('neuron', 'component')
    """
    from tqdm.auto import tqdm

    options = checks.check_arguments(method, random_state, tol, max_iter, options)
    if checks.METHODS[method].form != "cp":
        cp = ", ".join(name for name, m in checks.METHODS.items() if m.form == "cp")
        raise ArgumentError(
            f"{method} cannot be fitted as an ensemble: the factors of a Tucker model are free up "
            f"to a rotation, so that its components cannot be matched one to one. Use one of: {cp}."
        )
    if not checks.is_int(replicates) or replicates < 1:
        raise ArgumentError(f"replicates is {replicates!r}; expected an integer of 1 or more.")
    checks.check_labels(t)
    wanted = [ranks] if np.ndim(ranks) == 0 else list(ranks)  # type: ignore[arg-type]
    checked = [checks.check_rank(t, rank, method)[0] for rank in wanted]
    if not checked or len(set(checked)) < len(checked):
        raise ArgumentError(f"ranks is {ranks!r}; expected one or more ranks, each once.")
    tensor = checks.prepare(t, method, options)

    wide = [rank for rank in checked for _ in range(replicates)]
    seeds = [seed for rank in checked for seed in _seeds(random_state, rank, replicates)]
    with tqdm(total=len(wide), desc=method, unit="fit", disable=not progress, miniters=0) as bar:

        def tell(number: int, iteration: int, objective: float, done: bool) -> None:
            bar.set_postfix(rank=wide[number], iteration=iteration + 1, refresh=False)
            bar.update(done)

        each = [(rank,) for rank in wide]
        found, interrupted = fit(
            tensor, each, seeds, method, tol, int(max_iter), options, tell if progress else None
        )
    failures = [one.failure for one in found if one.failure]
    if len(failures) == len(found):
        if interrupted:
            raise KeyboardInterrupt
        raise DataError(failures[0])
    if failures:
        warnings.warn(
            f"{len(failures)} of {len(found)} fits have no model, and are marked `failed`; of the "
            f"first: {failures[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    fits = label(tensor, found, method, tol, int(max_iter), options)
    children: dict[str, xr.Dataset] = {}
    best: list[int] = []
    for i, rank in enumerate(checked):
        own = fits[i * replicates : (i + 1) * replicates]
        objectives = np.array([float(f["objective"]) for f in own])
        best.append(int(np.nanargmin(objectives)) if np.isfinite(objectives).any() else -1)
        children[f"rank_{rank}"] = _stack(own, best[-1])

    index = pd.Index(checked, name="rank")
    names = ["objective", "similarity", "factor_match_score", "dead_components", "failed"]
    names += ["iterations", "seconds", "seed", "converged"]
    root = xr.concat(
        [child[names] for child in children.values()],
        dim=index,
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    root = root.drop_vars([name for name in root.coords if name not in ("rank", "replicate")])
    root["best_replicate"] = ("rank", np.array(best), VARIABLES["best_replicate"].attrs)
    root.attrs = {k: v for k, v in next(iter(children.values())).attrs.items() if k != "rank"}
    root.attrs["random_state"] = int(random_state)
    return xr.DataTree.from_dict({"/": root, **children})


def best(ensemble: xr.DataTree, rank: int) -> xr.Dataset:
    """Factors of the replicate of least objective.

    Parameters
    ----------
    ensemble
        Tree from :func:`fit_ensemble`.
    rank
        One of its ranks.

    Returns
    -------
    xarray.Dataset
        As :func:`vitxr.factor.factorize` gives it; ``replicate`` is a scalar coordinate.

    Raises
    ------
    DataError
        If the tree is no ensemble, or all fits of that rank have failed.
    ArgumentError
        If it has no such rank.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> t = xr.DataArray(rng.random((6, 4, 5)), dims=("neuron", "image", "shift"))
    >>> tree = fit_ensemble(t, ranks=[1, 2], replicates=2, progress=False)
    >>> best(tree, 2).neuron_factor.dims
    ('neuron', 'component')
    """
    if "best_replicate" not in ensemble:
        raise DataError(
            "the tree has no `best_replicate`; expected an ensemble from fit_ensemble, at its root."
        )
    root = ensemble.to_dataset()
    if rank not in root.indexes["rank"]:
        have = ", ".join(map(str, root.indexes["rank"]))
        raise ArgumentError(f"rank={rank!r} is not in the ensemble, which has {have}.")
    replicate = int(root["best_replicate"].sel(rank=rank))
    if replicate < 0:
        raise DataError(f"no fit of rank {rank} has a model: all are marked `failed`.")
    return ensemble.children[f"rank_{rank}"].to_dataset(inherit=False).sel(replicate=replicate)


def _seeds(random_state: int, rank: int, replicates: int) -> list[int]:
    """Distinct seeds of the replicates of one rank; each depends on nothing that comes later."""
    seeds: list[int] = []
    for replicate in range(replicates):
        sequence = np.random.SeedSequence(int(random_state), spawn_key=(rank, replicate))
        words = sequence.generate_state(replicates)
        seeds.append(next(int(word) for word in words if word not in seeds))
    return seeds


def _stack(fits: list[xr.Dataset], best: int) -> xr.Dataset:
    """Put aligned replicates into one Dataset, best_replicate's order, histories padded."""
    longest = max(f.sizes["iteration"] for f in fits)
    failed = np.array([not np.isfinite(float(f["objective"])) for f in fits])
    likeness = np.full((2, len(fits)), np.nan)
    aligned = list(fits)
    for i in np.flatnonzero(~failed):
        likeness[:, i] = similarity(fits[i], fits[best]), factor_match_score(fits[i], fits[best])
        if i != best:
            aligned[i] = align(fits[i], fits[best])
    likeness[0, best] = np.nan if failed[best] else 1.0
    stacked = xr.concat(
        [f.reindex(iteration=range(longest)) for f in aligned],
        dim=pd.Index(range(len(fits)), name="replicate"),
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    made = {
        "similarity": likeness[0],
        "factor_match_score": likeness[1],
        "failed": failed,
        "dead_components": (stacked["weight"] == 0).sum("component").values,
    }
    for name, values in made.items():
        stacked[name] = ("replicate", values, VARIABLES[name].attrs)
    return stacked
