"""Ensembles of CP fits over ranks and random starts: all fitted side by side, one tree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks
from vitxr.factor.fits import assemble, check_models, fit_jobs, fit_shuffled, seeds, teller
from vitxr.factor.interrupts import held
from vitxr.factor.methods import INTERRUPTED
from vitxr.factor.resume import kept
from vitxr.factor.shuffle import shuffle
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
    resume: xr.DataTree | None = None,
    floors: bool = False,
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
    resume
        An earlier ensemble of the same tensor and settings, such as one that was interrupted, as
        it was returned or as :func:`vitxr.open` gives it back. Its fits are kept, bit for bit,
        where rank and seed are among those wanted and a model is there; failed and new ones are
        fitted. With a larger ``max_iter`` than before, so are those that had not converged.
    floors
        Fit the same models to the same tensor with every neuron's entries shuffled
        (``vitxr.factor.shuffle.shuffle``): what objective, similarity and factor match score
        are where there is nothing to find. It takes as long again, or longer.
    **options
        Further arguments, as for :func:`vitxr.factor.factorize`.

    Returns
    -------
    xarray.DataTree
        At the root, over ``(rank, replicate)``: ``objective``, ``similarity`` (to the best
        replicate of the rank, which has 1), ``factor_match_score`` (to the same),
        ``dead_components``, ``congruence`` (:func:`vitxr.factor.congruence`), ``degenerate``,
        ``failed``, ``iterations``, ``seconds``, ``converged`` and ``seed``,
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
        are NaN; ``best_replicate`` is -1 where that is all there is. A fit is ``degenerate`` if
        components of it are dead, or the congruence of two is 0.95 or more, or -0.95 or less.
        With ``floors`` the root has ``shuffled_objective``, ``shuffled_similarity`` and
        ``shuffled_factor_match_score``, of the last two NaN for the best replicate. Attributes
        are those of a fit, ``random_state``, the ``norm`` of the tensor, ``interrupted`` (how
        many fits Ctrl-C has left without a model), ``reused`` (how many are those of ``resume``),
        and with floors ``shuffle_seed``.

    Warns
    -----
    RuntimeWarning
        If fits have failed, but not all; if floors were interrupted; if Ctrl-C came when all
        fits were finished (they are put together all the same, and returned); before anything is
        fitted if none of the fits of ``resume`` is of use.

    Raises
    ------
    ArgumentError
        If ranks repeat, ``replicates`` is not a positive integer, the method is not a CP method,
        the ensemble to resume has other settings,
        or for the reasons of :func:`vitxr.factor.factorize`; before anything is fitted.
    DataError
        As :func:`vitxr.factor.factorize`, if the ensemble to resume is one of another tensor, and
        if all fits have failed.
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
    >>> more = fit_ensemble(t, ranks=[1, 2, 3], replicates=2, progress=False, resume=tree)
    >>> bool((more.objective.sel(rank=[1, 2]) == tree.objective).all())
    True
    """
    from tqdm.auto import tqdm

    options, checked = check_models(
        t, ranks, replicates, method, random_state, tol, max_iter, options
    )
    if not isinstance(floors, bool | np.bool_):
        raise ArgumentError(f"floors is {floors!r}; expected True or False.")
    if floors and options.get("mask") is not None:
        raise ArgumentError(
            "floors are True and there is a mask: the entries of a neuron are shuffled, and hidden "
            "ones would come into view; leave one of the two out."
        )
    tensor = checks.prepare(t, method, options)
    settings = {"method": method, "tol": float(tol), "max_iter": int(max_iter), "options": options}
    jobs = [(r, seed) for r in checked for seed in seeds(random_state, r, replicates)]
    have: list[xr.Dataset | None] = [None] * len(jobs)
    if resume is not None:
        have = kept(resume, tensor, jobs, settings, int(random_state))
    missing = [i for i, f in enumerate(have) if f is None]
    total = len(jobs) * (1 + bool(floors))
    done = len(jobs) - len(missing)
    if resume is not None and not done:
        warnings.warn(
            f"none of the fits of the ensemble to resume is of use, and all {len(jobs)} are made "
            f"anew: {_contents(resume)}; wanted: ranks {', '.join(map(str, checked))} with "
            f"{replicates} {'replicate' if replicates == 1 else 'replicates'}, {max_iter} "
            "iterations at most.",
            RuntimeWarning,
            stacklevel=2,
        )
    bar = tqdm(total=total, initial=done, desc=method, unit="fit", disable=not progress, miniters=0)
    with bar:
        new, failures, interrupted = fit_jobs(
            tensor, [jobs[i] for i in missing], settings, teller(bar, [jobs[i] for i in missing])
        )
        for i, f in zip(missing, new, strict=True):
            have[i] = f
        fits = [f for f in have if f is not None]
        if len(failures) == len(fits):
            if interrupted:
                raise KeyboardInterrupt
            raise DataError(failures[0])
        shuffled = None
        shuffle_seed = seeds(random_state, 0, 1)[0]
        if floors and not interrupted:
            try:
                mixed = shuffle(tensor.labelled.copy(data=tensor.data), shuffle_seed)
                null = checks.prepare(mixed, method, options)
                shuffled = fit_shuffled(null, jobs, settings, teller(bar, jobs))
            except KeyboardInterrupt:  # the fits themselves are there
                interrupted = True
    with held() as late:
        tree = assemble(tensor, fits, replicates, settings, int(random_state))
        tree.attrs["interrupted"] = failures.count(INTERRUPTED)
        tree.attrs["reused"] = done
        if shuffled is not None:
            dims = ("rank", "replicate")
            added = {k: (dims, values, VARIABLES[k].attrs) for k, values in shuffled.items()}
            tree.dataset = tree.to_dataset().assign(added)
            tree.attrs["shuffle_seed"] = shuffle_seed
    if floors and shuffled is None:
        warnings.warn(
            "the floors are left out: they were interrupted, or the fits before them. "
            "Give the ensemble as resume=... to have them.",
            RuntimeWarning,
            stacklevel=2,
        )
    if failures:
        again = "; give it as resume=... to fit them again" if INTERRUPTED in failures else ""
        warnings.warn(
            f"{len(failures)} of {len(fits)} fits have no model, and are marked `failed`; of the "
            f"first: {failures[0]}{again}.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif (interrupted or late) and not (floors and shuffled is None):
        warnings.warn(
            "interrupted when all fits were finished: the ensemble is whole.",
            RuntimeWarning,
            stacklevel=2,
        )
    return tree


def _contents(ensemble: xr.DataTree) -> str:
    """Say which fits of an ensemble have a model, and converged."""
    root = ensemble.to_dataset()
    whole = np.isfinite(root["objective"])
    return (
        f"it has ranks {', '.join(map(str, root['rank'].values))} with {root.sizes['replicate']} "
        f"{'replicate' if root.sizes['replicate'] == 1 else 'replicates'}, of which "
        f"{int(whole.sum())} have a model and {int((whole & root['converged']).sum())} converged "
        f"within {ensemble.attrs['max_iter']} iterations"
    )


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
    if not checks.is_int(rank) or rank not in root.indexes["rank"]:
        have = ", ".join(map(str, root.indexes["rank"]))
        raise ArgumentError(f"rank={rank!r} is not in the ensemble, which has {have}.")
    replicate = int(root["best_replicate"].sel(rank=rank))
    if replicate < 0:
        raise DataError(f"no fit of rank {rank} has a model: all are marked `failed`.")
    return ensemble.children[f"rank_{rank}"].to_dataset(inherit=False).sel(replicate=replicate)
