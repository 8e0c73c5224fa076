"""Choosing the rank: every criterion of every rank, with what shuffled data give, in one table."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks
from vitxr.factor.blocks import own_threads
from vitxr.factor.consistency import core_consistencies, why_undefined
from vitxr.factor.fits import assemble, check_models, fit_jobs, fit_shuffled, seeds, teller
from vitxr.factor.halves import split_half
from vitxr.factor.held_out import held_out
from vitxr.factor.interrupts import held
from vitxr.factor.methods import INTERRUPTED
from vitxr.factor.shuffle import shuffle
from vitxr.names import VARIABLES

__all__ = ["choose_rank"]

#: What it computes besides an ensemble, and over which dimensions.
CRITERIA: dict[str, tuple[str, ...]] = {
    name: VARIABLES[name].dims[0]
    for name in (
        "core_consistency",
        "shuffled_objective",
        "shuffled_similarity",
        "shuffled_factor_match_score",
        "split_half_score",
        "shuffled_split_half_score",
        "train_error",
        "test_error",
    )
}


def choose_rank(
    t: xr.DataArray,
    ranks: int | Sequence[int],
    replicates: int = 3,
    splits: int = 3,
    method: str = "ncp_hals",
    random_state: int = 0,
    tol: float = 1e-5,
    max_iter: int = 500,
    progress: bool = True,
    **options: Any,
) -> xr.Dataset:
    """Compute what helps to choose the number of components, for several numbers of them.

    No number is called the right one. Of each rank there are

    - the objective of every replicate, which always falls; it falls less from the rank on at
      which there is only noise left to describe;
    - how alike the replicates are (:func:`vitxr.factor.fit_ensemble`);
    - how alike models of two random halves of the neurons are in the factors that the halves
      share, images and shifts: whether components are properties of the data or of the neurons
      that were looked at;
    - the core consistency of every replicate (:func:`vitxr.factor.core_consistency`);
    - how well models of nine tenths of the entries predict the tenth that is held out, drawn
      entry by entry (speckled cross-validation): from some rank on they describe the noise of
      what they see, and predict less;

    and the first three of a tensor with every neuron's entries shuffled
    (``vitxr.factor.shuffle.shuffle``). Scores of nonnegative models are far above 0 where
    there is nothing to find: only what is above those of shuffled data says anything.

    Parameters
    ----------
    t
        Tensor as for :func:`vitxr.factor.factorize`, its first dimension that of neurons.
    ranks
        Ranks to compare, one or several, without repetition.
    replicates
        Fits of each rank, from different starts, here and of each half of the neurons.
    splits
        Random divisions of the neurons into halves, and of the entries into kept and held out.
    method, random_state, tol, max_iter
        As for :func:`vitxr.factor.fit_ensemble`, which gives the same fits.
    progress
        Show a bar over all fits.
    **options
        As for :func:`vitxr.factor.factorize`, but for masks, and models to start from.

    Returns
    -------
    xarray.Dataset
        Over ``(rank, replicate)``: ``objective``, ``similarity``, ``factor_match_score``,
        ``dead_components``, ``congruence``, ``degenerate``, ``failed``, ``iterations``,
        ``seconds``, ``seed``, ``converged``, ``shuffled_objective``, ``shuffled_similarity``
        and ``shuffled_factor_match_score``, all as at the root of an ensemble with floors, and
        ``core_consistency``. Over ``(rank, split)``: ``split_half_score`` and
        ``shuffled_split_half_score``, the factor match scores without neurons and weights of the
        best fits of two halves. Over ``(rank, replicate, split)``: ``train_error`` and
        ``test_error``, the relative residuals of the entries kept and held out.
        ``best_replicate(rank)``; ``split_seed(split)``. Core consistency
        is NaN where it is not defined, and its attribute ``undefined`` says why; so are the
        errors of methods other than "ncp_hals", which take no masks, and of a split that leaves
        nothing of a neuron, an image or a shift, as happens where a neuron has few entries; and
        the scores of a division of which one half cannot be fitted, its neurons being silent.
        Attributes as of an ensemble; ``interrupted`` is how many fits Ctrl-C has left out. What
        depends on them is NaN, as its attribute ``undefined`` says, and what was computed before
        is kept; it cannot be resumed.

    Warns
    -----
    RuntimeWarning
        If fits have failed, but not all; if a half cannot be fitted; if interrupted.

    Raises
    ------
    ArgumentError
        As :func:`vitxr.factor.fit_ensemble`; if ``splits`` is not a positive integer, or a rank is
        too large for half of the neurons; for a mask. Before anything is fitted.
    DataError
        As :func:`vitxr.factor.fit_ensemble`; if there are fewer than four neurons.
    KeyboardInterrupt
        If interrupted before any fit was finished.

    Notes
    -----
    For R ranks, n replicates and s splits ``R n (2 + 5 s)`` fits. Of each split four are of half
    of the neurons, and cost half as much; one is masked, and takes several times as long. A Dask
    tensor too large for memory is read in each pass of each fit; its chunks have to divide
    neurons, with all images and shifts of a neuron in one.

    References
    ----------
    Williams et al. (2018), Neuron 98, 1099-1115; Bro and Kiers (2003), Journal of Chemometrics
    17, 274-286; Wold (1978), Cross-validatory estimation of the number of components in factor
    and principal components models, Technometrics 20, 397-405; Adali et al. (2022),
    Reproducibility in matrix and tensor decompositions, IEEE Signal Processing Magazine 39(4),
    8-24.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> data = np.einsum("ir,jr,kr->ijk", *(rng.random((n, 2)) for n in (20, 4, 5)))
    >>> t = xr.DataArray(data, dims=("neuron", "image", "shift"))
    >>> found = choose_rank(t, ranks=[1, 2, 3], replicates=2, splits=2, progress=False)
    >>> found.objective.dims, found.split_half_score.dims
    (('rank', 'replicate'), ('rank', 'split'))
    """
    from tqdm.auto import tqdm

    options, checked = check_models(
        t, ranks, replicates, method, random_state, tol, max_iter, options
    )
    if options.get("client") is not None:
        raise ArgumentError(
            "choose_rank takes no client: it holds entries out by a mask, which workers of a "
            "cluster do not take; leave it out."
        )
    if options.get("device") is not None:
        raise ArgumentError(
            "choose_rank takes no device: it holds entries out by a mask, which the pass on a "
            "device does not take; leave it out."
        )
    if options.get("mask") is not None:
        raise ArgumentError(
            "choose_rank takes no mask: data are shuffled and halved, and hidden values would come "
            "into view; compare fits of fit_ensemble(..., mask=...), or fill the values."
        )
    _check_splits(t, checked, splits, method)
    tensor = checks.prepare(t, method, options, maskable=False)
    settings = {"method": method, "tol": float(tol), "max_iter": int(max_iter), "options": options}
    jobs = [(rank, seed) for rank in checked for seed in seeds(random_state, rank, replicates)]
    drawn = seeds(random_state, 0, 1 + splits)
    total = len(jobs) * (2 * (1 + 2 * splits) + splits * (method == "ncp_hals"))
    sizes = {"rank": len(checked), "replicate": replicates, "split": splits}
    values = {name: np.full([sizes[d] for d in dims], np.nan) for name, dims in CRITERIA.items()}
    steps = {name: splits if "split" in dims else 1 for name, dims in CRITERIA.items()}
    why: dict[str, list[str]] = {name: [] for name in CRITERIA}
    with tqdm(total=total, desc=method, unit="fit", disable=not progress, miniters=0) as bar:
        fits, failures, interrupted = fit_jobs(tensor, jobs, settings, teller(bar, jobs))
        if len(failures) == len(fits):
            if interrupted:
                raise KeyboardInterrupt
            raise DataError(failures[0])
        with held() as late:
            found = assemble(tensor, fits, replicates, settings, int(random_state)).to_dataset()
        interrupted = interrupted or bool(late)
        left = total - len(jobs) + failures.count(INTERRUPTED)
        try:
            # What was not reached when Ctrl-C came is NaN; all before it is kept.
            for one in () if interrupted else _criteria(tensor, fits, jobs, settings, drawn, bar):
                where: Any = ... if one.split is None else (..., one.split)
                values[one.name][where] = np.reshape(one.values, values[one.name][where].shape)
                why[one.name].extend(one.why)
                steps[one.name] -= 1
                left -= one.fits
        except KeyboardInterrupt:
            interrupted = True

    for name, dims in CRITERIA.items():
        found[name] = (dims, values[name], VARIABLES[name].attrs)
        reasons = why[name] + [INTERRUPTED] * (steps[name] > 0)
        if reasons:
            found[name].attrs["undefined"] = "; ".join(dict.fromkeys(reasons))
    found["split_seed"] = ("split", np.array(drawn[1:]), VARIABLES["split_seed"].attrs)
    found = found.assign_coords(split=np.arange(splits))
    found.attrs["shuffle_seed"] = drawn[0]
    found.attrs["interrupted"] = left
    if why["split_half_score"]:
        warnings.warn(
            f"split_half_score is NaN for {len(why['split_half_score'])} of {splits} divisions: "
            f"{'; '.join(why['split_half_score'])}",
            RuntimeWarning,
            stacklevel=2,
        )
    if interrupted:
        missing = ", ".join(name for name, more in steps.items() if more) or "nothing"
        warnings.warn(
            f"interrupted: {left} of {total} fits are left out; NaN, in whole or in part: "
            f"{missing}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


@dataclass(frozen=True)
class _Criterion:
    """What was computed of a criterion: all of it, or of one split; why some of it is NaN."""

    name: str
    values: Any
    why: Sequence[str] = ()
    split: int | None = None
    fits: int = 0


def _criteria(
    tensor: checks.Tensor,
    fits: list[xr.Dataset],
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    drawn: Sequence[int],
    bar: Any,
) -> Iterator[_Criterion]:
    """Compute what an ensemble has not, one after the other."""
    method, options, tell = settings["method"], settings["options"], teller(bar, jobs)
    yield _Criterion("core_consistency", *_consistencies(tensor, fits))
    fits.clear()  # their memory is for those that follow
    data = tensor.labelled.copy(data=tensor.data)
    null = checks.prepare(shuffle(data, drawn[0]), method, options)
    floors = fit_shuffled(null, jobs, settings, tell)
    if floors is None:
        raise KeyboardInterrupt
    for i, (name, values) in enumerate(floors.items()):
        yield _Criterion(name, values, fits=0 if i else len(jobs))
    shuffled = null.labelled.copy(data=null.data)
    for name, one in (("split_half_score", data), ("shuffled_split_half_score", shuffled)):
        for i, seed in enumerate(drawn[1:]):
            before = bar.n
            scores, reason = split_half(one, jobs, settings, seed, tell)
            if reason:
                bar.update(before + 2 * len(jobs) - bar.n)
            why = [f"split {i}: {reason}"] if reason else []
            yield _Criterion(name, scores, why, i, 2 * len(jobs))
    for i, seed in enumerate(drawn[1:]):
        errors = np.full((2, len(jobs)), np.nan)
        reason = ""
        if method != "ncp_hals":
            reason = f"{method} takes no masks; ncp_hals does"
        else:
            try:
                errors = np.asarray(held_out(tensor, jobs, settings, seed, tell))
            except DataError:
                bar.update(len(jobs))
                reason = (
                    f"split {i}: one entry in ten held out leaves nothing of a slice of the "
                    "tensor, of which there are too few entries"
                )
        why = [reason] if reason else []
        count = len(jobs) * (method == "ncp_hals")
        yield _Criterion("train_error", errors[0], why, i, count)
        yield _Criterion("test_error", errors[1], why, i)


def _check_splits(t: xr.DataArray, ranks: Sequence[int], splits: int, method: str) -> None:
    if not checks.is_int(splits) or splits < 1:
        raise ArgumentError(f"splits is {splits!r}; expected an integer of 1 or more.")
    if "split" in t.dims or "split" in t.coords:
        raise ArgumentError(
            "the tensor has a dimension or coordinate named split, as the result will have: "
            "rename or drop it first, t.rename(split=...)."
        )
    dim, n = t.dims[0], t.shape[0]
    if n < 4:
        raise DataError(
            f"the tensor has {n} of {dim}, its first dimension, along which it is halved; expected "
            "4 or more: bring the dimension of neurons to the front, t.transpose(...)."
        )
    for rank in ranks:
        try:
            checks.check_rank(t.isel({dim: slice(n // 2)}), rank, method)
        except ArgumentError as error:
            raise ArgumentError(f"of half of {dim}: {error}") from None


def _consistencies(
    tensor: checks.Tensor, fits: Sequence[xr.Dataset]
) -> tuple[list[float], list[str]]:
    """Core consistency of each fit, NaN where it is not defined, and reasons why not."""
    why = [why_undefined(tensor.labelled, f.sizes["component"]) for f in fits]
    defined = [i for i, f in enumerate(fits) if not why[i] and np.isfinite(float(f["objective"]))]
    out = [float("nan")] * len(fits)
    with own_threads() as pool:
        values = core_consistencies(tensor, [fits[i] for i in defined], pool)
    for i, value in zip(defined, values, strict=True):
        out[i] = value
    return out, list(dict.fromkeys(reason for reason in why if reason))
