"""Ensembles of CP fits over ranks and random starts: alignment, similarity, one tree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks
from vitxr.factor.methods import fit
from vitxr.names import VARIABLES

__all__ = ["align", "best", "fit_ensemble", "similarity"]

Array = npt.NDArray[Any]


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
        Show a bar over the fits, with their rate and the time left.
    **options
        Further arguments of tensorly's function.

    Returns
    -------
    xarray.DataTree
        At the root, over ``(rank, replicate)``: ``objective``, ``similarity`` (to the best
        replicate of the rank, which has 1), ``iterations``, ``seconds``, ``converged`` and
        ``seed``, with which :func:`vitxr.factor.factorize` repeats the fit; and
        ``best_replicate(rank)``, the one of least objective. Under ``rank_<R>`` the factors as
        :func:`vitxr.factor.factorize` gives them with ``replicate`` in front, and
        ``similarity(replicate)``. The components of the best replicate are in the order of
        descending weight, those of the others follow it (:func:`align`);
        ``objective_history`` is NaN after the end of a fit. ``to_dataset()`` of a child also
        carries the root's coordinate ``rank``, which xarray hands down.

    Raises
    ------
    ArgumentError
        If ranks repeat, ``replicates`` is not a positive integer, the method is not a CP method,
        or for the reasons of :func:`vitxr.factor.factorize`; before anything is fitted.
    DataError
        As :func:`vitxr.factor.factorize`.

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

    children: dict[str, xr.Dataset] = {}
    best: list[int] = []
    total = len(checked) * replicates
    with tqdm(total=total, desc=method, unit="fit", disable=not progress) as bar:
        for rank in checked:
            fits = []
            for seed in _seeds(random_state, rank, replicates):
                bar.set_postfix(rank=rank, refresh=True)
                fits.append(fit(tensor, (rank,), method, seed, tol, int(max_iter), False, options))
                bar.update()
            best.append(int(np.argmin([float(f.objective) for f in fits])))
            children[f"rank_{rank}"] = _stack(fits, best[-1])

    index = pd.Index(checked, name="rank")
    names = ("objective", "similarity", "iterations", "seconds", "seed", "converged")
    root = xr.concat(
        [child[list(names)] for child in children.values()],
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
        If the tree is no ensemble.
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
    return ensemble.children[f"rank_{rank}"].to_dataset(inherit=False).sel(replicate=replicate)


def align(f: xr.Dataset, reference: xr.Dataset) -> xr.Dataset:
    """Reorder the components of a CP model as those of another.

    Components are matched one to one so that the mean over pairs and modes of the absolute
    cosine between columns is largest. The signs of an unconstrained model follow the reference,
    as far as an even number of changes for each component can make them.

    Parameters
    ----------
    f, reference
        Factor Datasets of the same tensor's dimensions and of the same rank, one replicate each.

    Returns
    -------
    xarray.Dataset
        ``f`` with its components in the order of ``reference``, ``weight`` included. Components
        that have died take the places that are left.

    Raises
    ------
    ArgumentError
        If ranks differ, or there is a ``replicate`` dimension.
    DataError
        If the factors are not those of a CP model, or of other dimensions or labels.

    References
    ----------
    Kuhn (1955), The Hungarian method for the assignment problem, Naval Research Logistics
    Quarterly 2, 83-97; Williams et al. (2018), Neuron 98, 1099-1115.

    Examples
    --------
    >>> a = xr.Dataset({"neuron_factor": (("neuron", "component"), np.eye(3)),
    ...                 "image_factor": (("image", "component"), np.eye(3))})
    >>> b = a.isel(component=[2, 0, 1])
    >>> align(b, a).identical(a)
    True
    """
    dims = _same_dims(f, reference)
    rank, expected = f.sizes["component"], reference.sizes["component"]
    if rank != expected:
        raise ArgumentError(
            f"the model has {rank} components, the reference {expected}; align needs as many: "
            "similarity compares models of different rank."
        )
    mine, theirs, cosines = _match(f, reference, dims)
    place = np.full(rank, -1)
    place[theirs] = mine
    place[place < 0] = np.setdiff1d(np.arange(rank), mine)
    out = f.isel(component=place)
    signs = np.where(cosines[:, mine, theirs] < 0, -1, 1)
    signs[0] *= signs.prod(axis=0)  # an even number of changes leaves the model as it is
    for dim, sign in zip(dims, signs, strict=True):
        flips = np.ones(rank, f[f"{dim}_factor"].dtype)
        flips[theirs] = sign
        # A Variable: assigning a DataArray would drop levels of its multi-index.
        factor = out[f"{dim}_factor"].variable
        out[f"{dim}_factor"] = factor.copy(data=factor.values * flips)
    if "component" in reference.coords:
        return out.assign_coords(component=reference["component"])
    return out.drop_vars("component", errors="ignore")


def similarity(f: xr.Dataset, g: xr.Dataset) -> float:
    """Similarity of two CP models, from 0 to 1.

    The mean over matched components and over modes of the absolute cosine between columns, for
    the one-to-one matching for which it is largest. Weights do not count. Components that have
    died are left out, and so are those that the model of larger rank has left over.

    Parameters
    ----------
    f, g
        Factor Datasets of the same tensor's dimensions, of any rank, one replicate each.

    Returns
    -------
    float
        1 for the same components in any order; 0 if a model has no component alive.

    Raises
    ------
    ArgumentError
        If there is a ``replicate`` dimension.
    DataError
        If the factors are not those of a CP model, or of other dimensions or labels.

    References
    ----------
    Williams et al. (2018), Neuron 98, 1099-1115, as in tensortools.

    Examples
    --------
    >>> a = xr.Dataset({"neuron_factor": (("neuron", "component"), np.eye(3)),
    ...                 "image_factor": (("image", "component"), np.eye(3))})
    >>> similarity(a, a.isel(component=[1, 2, 0]))
    1.0
    """
    mine, theirs, cosines = _match(f, g, _same_dims(f, g))
    if not len(mine):
        return 0.0
    return float(min(abs(cosines[:, mine, theirs]).mean(), 1.0))


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
    reference = fits[best]
    likeness = [1.0 if f is reference else similarity(f, reference) for f in fits]
    stacked = xr.concat(
        [
            (f if f is reference else align(f, reference)).reindex(iteration=range(longest))
            for f in fits
        ],
        dim=pd.Index(range(len(fits)), name="replicate"),
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    stacked["similarity"] = ("replicate", np.array(likeness), VARIABLES["similarity"].attrs)
    return stacked


def _same_dims(f: xr.Dataset, g: xr.Dataset) -> list[Hashable]:
    """Dimensions that have a CP factor in both models, checked for equal labels."""
    found: list[list[Hashable]] = []
    for ds in (f, g):
        if "replicate" in ds.dims:
            raise ArgumentError(
                "the factors have a replicate dimension: select one, f.sel(replicate=0)."
            )
        factors = {name: a for name, a in ds.data_vars.items() if str(name).endswith("_factor")}
        found.append([d for a in factors.values() for d in a.dims if d != "component"])
        if not factors or any(a.dims[1:] != ("component",) for a in factors.values()):
            raise DataError(
                "expected the factors of a CP model, <dim>_factor(dim, component); the Dataset "
                f"has: {', '.join(map(str, ds.data_vars)) or 'no variables'}."
            )
    mine, theirs = found
    if set(mine) != set(theirs):
        raise DataError(
            f"the models have factors of other dimensions: {', '.join(map(str, mine))} and "
            f"{', '.join(map(str, theirs))}; compare models of the same tensor."
        )
    for dim in mine:
        indexed = dim in f.indexes and dim in g.indexes
        if f.sizes[dim] != g.sizes[dim] or (indexed and not f.indexes[dim].equals(g.indexes[dim])):
            raise DataError(
                f"the models differ in the labels of {dim}: select or reindex to the same ones."
            )
    return mine


def _match(f: xr.Dataset, g: xr.Dataset, dims: list[Hashable]) -> tuple[Array, Array, Array]:
    """Matched components of two models, and all cosines ``(mode, of f, of g)``."""
    from scipy.optimize import linear_sum_assignment

    cosines = []
    alive = [np.ones(ds.sizes["component"], bool) for ds in (f, g)]
    for dim in dims:
        units = []
        for ds, living in zip((f, g), alive, strict=True):
            factor = np.asarray(ds[f"{dim}_factor"].values, np.float64)
            length = np.linalg.norm(factor, axis=0)
            living &= length > 0
            units.append(factor / np.where(length > 0, length, 1.0))
        cosines.append(units[0].T @ units[1])
    stacked = np.array(cosines)
    own, other = (np.flatnonzero(living) for living in alive)
    score = abs(stacked).mean(axis=0)[np.ix_(own, other)]
    rows, columns = linear_sum_assignment(score, maximize=True)
    return own[rows], other[columns], stacked
