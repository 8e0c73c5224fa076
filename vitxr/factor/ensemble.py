"""Ensembles of CP fits over ranks and random starts: all fitted side by side, one tree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks
from vitxr.factor.compare import align, congruence, factor_match_score, similarity
from vitxr.factor.labels import label
from vitxr.factor.methods import INTERRUPTED, fit
from vitxr.factor.resume import kept, merged_versions
from vitxr.factor.shuffle import shuffle
from vitxr.names import VARIABLES

__all__ = ["CONGRUENT", "best", "fit_ensemble"]

Array = npt.NDArray[Any]
Tell = Callable[[int, int, float, bool], object]

#: Absolute congruence of two components from which they count as one, or as cancelling.
CONGRUENT = 0.95
#: Variables at the root for every fit.
OF_FITS = (
    "objective",
    "similarity",
    "factor_match_score",
    "dead_components",
    "congruence",
    "degenerate",
    "failed",
    "iterations",
    "seconds",
    "seed",
    "converged",
)


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
        (:func:`vitxr.factor.shuffle.shuffle`): what objective, similarity and factor match score
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
        many fits Ctrl-C has left without a model), and with floors ``shuffle_seed``.

    Warns
    -----
    RuntimeWarning
        If fits have failed, but not all; if floors were interrupted.

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
    tensor = checks.prepare(t, method, options)
    settings = {"method": method, "tol": float(tol), "max_iter": int(max_iter), "options": options}
    jobs = [(r, seed) for r in checked for seed in seeds(random_state, r, replicates)]
    have: list[xr.Dataset | None] = [None] * len(jobs)
    if resume is not None:
        have = kept(resume, tensor, jobs, settings, int(random_state))
    missing = [i for i, f in enumerate(have) if f is None]
    total = len(jobs) * (1 + bool(floors))
    done = len(jobs) - len(missing)
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
            shuffled = _floors(tensor, jobs, settings, shuffle_seed, teller(bar, jobs))
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
    children: dict[str, xr.Dataset] = {}
    chosen: list[int] = []
    for i, rank in enumerate(checked):
        own = fits[i * replicates : (i + 1) * replicates]
        chosen.append(least([float(f["objective"]) for f in own]))
        children[f"rank_{rank}"] = _stack(own, chosen[-1])

    root = xr.concat(
        [child[list(OF_FITS)] for child in children.values()],
        dim=pd.Index(checked, name="rank"),
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    root = root.drop_vars([name for name in root.coords if name not in ("rank", "replicate")])
    root["best_replicate"] = ("rank", np.array(chosen), VARIABLES["best_replicate"].attrs)
    root.attrs = {k: v for k, v in fits[0].attrs.items() if k != "rank"}
    root.attrs["max_iter"] = int(max_iter)
    root.attrs["versions"] = merged_versions(*dict.fromkeys(f.attrs["versions"] for f in fits))
    root.attrs["random_state"] = int(random_state)
    root.attrs["norm"] = tensor.norm
    root.attrs["interrupted"] = failures.count(INTERRUPTED)
    if shuffled is not None:
        for name, values in shuffled.items():
            root[name] = (("rank", "replicate"), values, VARIABLES[name].attrs)
        root.attrs["shuffle_seed"] = shuffle_seed
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


def check_models(
    t: xr.DataArray,
    ranks: int | Sequence[int],
    replicates: int,
    method: str,
    random_state: int,
    tol: float,
    max_iter: int,
    options: dict[str, Any],
) -> tuple[dict[str, Any], list[int]]:
    """Check what can be seen without reading the tensor; return options and ranks."""
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
    return options, checked


def seeds(random_state: int, rank: int, replicates: int) -> list[int]:
    """Distinct seeds of the replicates of one rank; each depends on nothing that comes later.

    Rank 0, which no model has, is for what is drawn besides.
    """
    out: list[int] = []
    for replicate in range(replicates):
        sequence = np.random.SeedSequence(int(random_state), spawn_key=(rank, replicate))
        words = sequence.generate_state(replicates)
        out.append(next(int(word) for word in words if word not in out))
    return out


def teller(bar: Any, jobs: Sequence[tuple[int, int]]) -> Tell | None:
    """Show on a bar how far each job is; None where nothing is shown."""
    if bar.disable:
        return None

    def tell(number: int, iteration: int, objective: float, done: bool) -> None:
        bar.set_postfix(rank=jobs[number][0], iteration=iteration + 1, refresh=False)
        bar.update(done)

    return tell


def fit_jobs(
    tensor: checks.Tensor,
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    tell: Tell | None = None,
) -> tuple[list[xr.Dataset], list[str], bool]:
    """Fit a model for each rank and seed: factors, reasons of failures, whether interrupted."""
    if not jobs:
        return [], [], False
    options = settings["options"]
    limits = (settings["method"], settings["tol"], settings["max_iter"])
    found, interrupted = fit(
        tensor, [(rank,) for rank, _ in jobs], [seed for _, seed in jobs], *limits, options, tell
    )
    failures = [one.failure for one in found if one.failure]
    return label(tensor, found, *limits, options), failures, interrupted


def least(objectives: Sequence[float]) -> int:
    """Where the least objective is; -1 if none is a number."""
    values = np.array(objectives)
    return int(np.nanargmin(values)) if np.isfinite(values).any() else -1


def _floors(
    tensor: checks.Tensor,
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    seed: int,
    tell: Tell | None,
) -> dict[str, Array] | None:
    """Fit the jobs to shuffled data and compare them; None if interrupted."""
    data = shuffle(tensor.labelled.copy(data=tensor.data), seed)
    null = checks.prepare(data, settings["method"], settings["options"])
    fits, _, interrupted = fit_jobs(null, jobs, settings, tell)
    if interrupted:
        return None
    ranks = list(dict.fromkeys(rank for rank, _ in jobs))
    replicates = len(jobs) // len(ranks)
    out = np.full((3, len(jobs)), np.nan)
    out[0] = [float(f["objective"]) for f in fits]
    for i in range(0, len(jobs), replicates):
        best = least(out[0, i : i + replicates].tolist())
        for j in range(i, i + replicates):
            if best >= 0 and j != i + best and np.isfinite(out[0, j]):
                out[1, j] = similarity(fits[j], fits[i + best])
                out[2, j] = factor_match_score(fits[j], fits[i + best])
    names = ("shuffled_objective", "shuffled_similarity", "shuffled_factor_match_score")
    return dict(zip(names, out.reshape(3, len(ranks), replicates), strict=True))


def _stack(fits: list[xr.Dataset], best: int) -> xr.Dataset:
    """Put aligned replicates into one Dataset, best_replicate's order, histories padded."""
    longest = max(f.sizes["iteration"] for f in fits)
    failed = np.array([not np.isfinite(float(f["objective"])) for f in fits])
    scores = np.full((3, len(fits)), np.nan)
    aligned = list(fits)
    for i in np.flatnonzero(~failed):
        scores[:2, i] = similarity(fits[i], fits[best]), factor_match_score(fits[i], fits[best])
        scores[2, i] = congruence(fits[i])
        if i != best:
            aligned[i] = align(fits[i], fits[best])
    scores[0, best] = np.nan if failed[best] else 1.0
    stacked = xr.concat(
        [f.reindex(iteration=range(longest)) for f in aligned],
        dim=pd.Index(range(len(fits)), name="replicate"),
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    dead = (stacked["weight"] == 0).sum("component").values
    made = {
        "similarity": scores[0],
        "factor_match_score": scores[1],
        "congruence": scores[2],
        "failed": failed,
        "dead_components": dead,
        "degenerate": (dead > 0) | (abs(scores[2]) >= CONGRUENT),
    }
    for name, values in made.items():
        stacked[name] = ("replicate", values, VARIABLES[name].attrs)
    return stacked
