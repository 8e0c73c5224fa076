"""Many fits of one tensor: what is fitted, with which seeds, and how the fits compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError
from vitxr.factor import checks
from vitxr.factor.compare import align, congruence, factor_match_score, similarity
from vitxr.factor.interrupts import held
from vitxr.factor.labels import label
from vitxr.factor.methods import fit
from vitxr.factor.resume import merged_versions
from vitxr.names import VARIABLES

__all__ = [
    "CONGRUENT",
    "Tell",
    "assemble",
    "check_models",
    "fit_jobs",
    "fit_shuffled",
    "least",
    "seeds",
    "teller",
]

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
    if options.get("start") is not None:
        raise ArgumentError(
            "start is one model, from which all fits of a rank would be the same: give it to "
            "factorize."
        )
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
    """Fit a model for each rank and seed: factors, reasons of failures, whether interrupted.

    An interruption while the fits are labelled comes too late to end one, and is only told.
    """
    if not jobs:
        return [], [], False
    options = settings["options"]
    limits = (settings["method"], settings["tol"], settings["max_iter"])
    found, interrupted = fit(
        tensor, [(rank,) for rank, _ in jobs], [seed for _, seed in jobs], *limits, options, tell
    )
    failures = [one.failure for one in found if one.failure]
    with held() as late:
        fits = label(tensor, found, *limits, options)
    return fits, failures, interrupted or bool(late)


def least(objectives: Sequence[float]) -> int:
    """Where the least objective is; -1 if none is a number."""
    values = np.array(objectives)
    return int(np.nanargmin(values)) if np.isfinite(values).any() else -1


def fit_shuffled(
    null: checks.Tensor,
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    tell: Tell | None,
) -> dict[str, Array] | None:
    """Fit the jobs to a shuffled tensor and compare them; None if interrupted."""
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


def assemble(
    tensor: checks.Tensor,
    fits: Sequence[xr.Dataset],
    replicates: int,
    settings: dict[str, Any],
    random_state: int,
) -> xr.DataTree:
    """Put fits, one rank after the other, into the tree of an ensemble."""
    children: dict[str, xr.Dataset] = {}
    chosen: list[int] = []
    for i in range(0, len(fits), replicates):
        own = list(fits[i : i + replicates])
        rank = int(own[0].attrs["rank"])
        chosen.append(least([float(f["objective"]) for f in own]))
        children[f"rank_{rank}"] = _stack(own, chosen[-1])

    root = xr.concat(
        [child[list(OF_FITS)] for child in children.values()],
        dim=pd.Index([int(child.attrs["rank"]) for child in children.values()], name="rank"),
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    root = root.drop_vars([name for name in root.coords if name not in ("rank", "replicate")])
    root["best_replicate"] = ("rank", np.array(chosen), VARIABLES["best_replicate"].attrs)
    root.attrs = {k: v for k, v in fits[0].attrs.items() if k != "rank"}
    root.attrs["max_iter"] = settings["max_iter"]
    root.attrs["versions"] = merged_versions(*dict.fromkeys(f.attrs["versions"] for f in fits))
    root.attrs["random_state"] = random_state
    root.attrs["norm"] = tensor.norm
    return xr.DataTree.from_dict({"/": root, **children})


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
    # All at once: each time all indexes are compared.
    return stacked.assign(
        {name: ("replicate", values, VARIABLES[name].attrs) for name, values in made.items()}
    )
