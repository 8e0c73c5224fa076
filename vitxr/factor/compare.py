"""Comparing CP models: matching of components, similarity, factor match score, congruence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.same import difference

__all__ = ["align", "congruence", "factor_match_score", "similarity"]

Array = npt.NDArray[Any]


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
    turned = {}
    for dim, sign in zip(dims, signs, strict=True):
        flips = np.ones(rank, f[f"{dim}_factor"].dtype)
        flips[theirs] = sign
        # A Variable: assigning a DataArray would drop levels of its multi-index.
        factor = out[f"{dim}_factor"].variable
        turned[f"{dim}_factor"] = factor.copy(data=factor.values * flips)
    out = out.assign(turned)  # all at once: each time all indexes are compared
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


def factor_match_score(f: xr.Dataset, g: xr.Dataset, skip: Hashable | None = None) -> float:
    """Factor match score of two CP models, from 0 to 1.

    The mean over matched components of ::

        (1 - |w - v| / max(w, v)) prod_m |cos(a_m, b_m)|

    with ``w`` and ``v`` their weights and ``a_m``, ``b_m`` their columns of mode ``m``, for the
    one-to-one matching for which it is largest. Stricter than :func:`similarity`: one mode that
    differs is enough for a low score. A component that has died matches none, not even itself, and
    counts as 0; those that the model of larger rank has left over do not count.

    Parameters
    ----------
    f, g
        Factor Datasets of the same tensor's dimensions, of any rank, one replicate each.
    skip
        A dimension to leave out, whose labels may differ: where the models are of two halves of
        the neurons, "neuron". The weights then do not count, for without one of the factors the
        scale of a component is not defined.

    Returns
    -------
    float
        1 for the same components in any order if all are alive. With itself a model of which
        ``d`` of ``R`` components have died has ``1 - d / R``: components that say nothing are no
        agreement, and tlviz, without weights, counts them in the same way (with weights it divides
        0 by 0).

    Raises
    ------
    ArgumentError
        If there is a ``replicate`` dimension, or no factor of the dimension to skip.
    DataError
        If the factors are not those of a CP model, or of other dimensions or labels.

    References
    ----------
    Acar, Dunlavy, Kolda and Morup (2011), Scalable tensor factorizations for incomplete data,
    Chemometrics and Intelligent Laboratory Systems 106, 41-56; as in tlviz, ``skip`` as its
    ``skip_mode``.

    Examples
    --------
    >>> a = xr.Dataset({"neuron_factor": (("neuron", "component"), np.eye(2)),
    ...                 "image_factor": (("image", "component"), np.eye(2)),
    ...                 "weight": ("component", [2.0, 1.0])})
    >>> b = a.assign(weight=("component", [2.0, 0.5]))
    >>> factor_match_score(a, b), factor_match_score(a, b, skip="neuron")
    (0.75, 1.0)
    """
    from scipy.optimize import linear_sum_assignment

    cosines, alive = _cosines(f, g, _same_dims(f, g, skip))
    score = abs(cosines).prod(axis=0) * np.outer(*alive)
    if skip is None:
        w, v = (np.asarray(ds["weight"].values, np.float64) for ds in (f, g))
        larger = np.maximum(w[:, None], v)
        score *= 1 - abs(w[:, None] - v) / np.where(larger > 0, larger, 1.0)
    return float(min(score[linear_sum_assignment(score, maximize=True)].mean(), 1.0))


def congruence(f: xr.Dataset) -> float:
    """Congruence of the two components of a CP model that are most alike, from -1 to 1.

    The product over modes of the cosine between their columns, of the pair for which its
    absolute value is largest; weights do not count. Near 1 the two are one component split into
    two. Near -1, which a nonnegative model cannot reach, they cancel each other: the two-factor
    degeneracy of CP.

    Parameters
    ----------
    f
        Factor Dataset of a CP model, one replicate.

    Returns
    -------
    float
        NaN if fewer than two components are alive.

    Raises
    ------
    ArgumentError
        If there is a ``replicate`` dimension.
    DataError
        If the factors are not those of a CP model.

    References
    ----------
    Kruskal, Harshman and Lundy (1989), How 3-MFA data can cause degenerate PARAFAC solutions,
    among other relationships, in Multiway Data Analysis, 115-122; the least of these products is
    tlviz's ``degeneracy_score``.

    Examples
    --------
    >>> a = np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> congruence(xr.Dataset({"neuron_factor": (("neuron", "component"), a),
    ...                        "image_factor": (("image", "component"), abs(a))}))
    -1.0
    """
    cosines, (alive, _) = _cosines(f, f, _same_dims(f, f))
    product = cosines.prod(axis=0)[np.ix_(alive, alive)]
    pairs = product[np.triu_indices(len(product), 1)]
    if not len(pairs):
        return float("nan")
    return float(np.clip(pairs[abs(pairs).argmax()], -1.0, 1.0))


def _same_dims(f: xr.Dataset, g: xr.Dataset, skip: Hashable | None = None) -> list[Hashable]:
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
    if skip is not None:
        if skip not in mine:
            raise ArgumentError(
                f"skip is {skip!r}; the models have factors of {', '.join(map(str, mine))}."
            )
        mine.remove(skip)
    for dim in mine:
        if unlike := difference(f, g, dim, ("one", "the other")):
            kind, how = unlike
            raise DataError(
                f"the models differ in the {kind} of {dim} ({how}): select or reindex to the same "
                "ones."
            )
    return mine


def _cosines(f: xr.Dataset, g: xr.Dataset, dims: list[Hashable]) -> tuple[Array, list[Array]]:
    """Cosines of all pairs of columns, ``(mode, of f, of g)``, and which components are alive."""
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
    return np.array(cosines), alive


def _match(f: xr.Dataset, g: xr.Dataset, dims: list[Hashable]) -> tuple[Array, Array, Array]:
    """Matched components of two models, and all cosines ``(mode, of f, of g)``."""
    from scipy.optimize import linear_sum_assignment

    cosines, alive = _cosines(f, g, dims)
    own, other = (np.flatnonzero(living) for living in alive)
    score = abs(cosines).mean(axis=0)[np.ix_(own, other)]
    rows, columns = linear_sum_assignment(score, maximize=True)
    return own[rows], other[columns], cosines
