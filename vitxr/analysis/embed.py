"""Embeddings: few coordinates for each row of a factor, by several methods."""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.analysis.manifold import diffusion_maps
from vitxr.analysis.rows import check_count, factor_rows, labels_of
from vitxr.errors import ArgumentError, DataError, DependencyError
from vitxr.names import VARIABLES, provenance

__all__ = ["embed"]

#: What a method makes besides ``score``: name to dims and values; dims are (row, pc, component).
_More = dict[str, tuple[tuple[str, ...], np.ndarray]]

#: Arguments of every method.
_ARGUMENTS = ("n_components", "method", "dim", "random_state")
#: Options of a diffusion map and their defaults.
_DIFFUSION = {"n_neighbors": 64, "scale_neighbor": 7, "alpha": 1.0, "time": 1.0}


def embed(
    f: xr.Dataset,
    n_components: int = 10,
    method: str = "pca",
    dim: str = "neuron",
    random_state: int = 0,
    **options: Any,
) -> xr.Dataset:
    """Embed the rows of a factor: PCA, diffusion maps, and scikit-learn's manifold methods.

    ``"pca"``: with ``F`` the factor ``(n, rank)`` and ``m`` its mean row, ``F - m = U S V^T``;
    ``score`` is the first columns of ``U S``, ``component_loading`` the first rows of ``V^T``,
    ``explained_variance`` is ``S**2 / (n - 1)`` and its ratio the share of the sum over all axes.
    The sign of an axis is such that its largest loading is positive.

    ``"diffusion"``: with ``s_i`` the distance from row ``i`` to its ``scale_neighbor``-th nearest
    row that differs (the local scaling of Zelnik-Manor and Perona), the kernel
    ``K_ij = exp(-|f_i - f_j|^2 / (s_i s_j))`` over pairs of which one is among the other's
    ``n_neighbors`` nearest, and ``K_ii = 1``; ``q = K 1``; ``K~_ij = K_ij / (q_i q_j)^alpha``;
    ``P = K~`` divided by its row sums ``d``. With ``P psi = lambda psi``, ``lambda`` descending,
    the first (``lambda = 1``, constant) left out, and ``sum_i d_i psi_i^2 / sum_i d_i = 1``,
    ``score = lambda^time psi`` and ``eigenvalue = lambda``. The largest entry of an axis is
    positive. Local scaling evens out much of the density by itself, so that ``alpha`` matters
    less than with one bandwidth for all.

    ``"isomap"``, ``"spectral"``, ``"tsne"``: scikit-learn's Isomap, SpectralEmbedding (on nearest
    neighbours) and TSNE; ``"umap"``: umap-learn's UMAP, of the extra ``umap``.

    Rows that are all zero (dead neurons) have no place relative to others: every method but
    "pca" leaves them out, and their ``score`` is NaN. "pca" takes them as rows like any other.

    Parameters
    ----------
    f
        Factor Dataset of one model, of which ``<dim>_factor`` is used as it is: columns of unit
        norm, weights left out. (The original notebook's columns had the lengths at which the
        fit had left them.)
    n_components
        Axes. PCA never has more than the rank, nor than rows: the smallest of the three is taken.
        t-SNE takes 2 or 3.
    method
        "pca" (by a full singular value decomposition), "diffusion", "isomap", "spectral", "tsne"
        or "umap".
    dim
        The dimension whose rows are embedded.
    random_state
        Seed of "spectral", "tsne" and "umap"; the others have no chance in them.
    **options
        Of "diffusion": ``n_neighbors`` (64), ``scale_neighbor`` (7), ``alpha`` (1: 0 to 1),
        ``time`` (1). Of the others but "pca": arguments of the library's class, such as
        ``n_neighbors`` or ``perplexity``; numbers and strings.

    Returns
    -------
    xarray.Dataset
        ``score(dim, pc)``, float64; ``pc`` counts from 1, the labels of ``dim`` are kept. Of
        "pca" also ``explained_variance(pc)``, ``explained_variance_ratio(pc)``,
        ``component_loading(pc, component)``, ``component_mean(component)``; of "diffusion"
        ``eigenvalue(pc)``, ``bandwidth(dim)``, ``kernel_density(dim)``; of "diffusion" and
        "isomap" the ``<dim>_factor`` that was embedded, which :func:`vitxr.analysis.project`
        needs.

    Raises
    ------
    ArgumentError
        If an argument is unknown or out of range, or ``f`` holds several replicates.
    DataError
        If ``f`` has no such factor, or it has too few rows, values that are not finite, or
        rows that are all the same.
    DependencyError
        If the package of a method is missing.

    Warns
    -----
    RuntimeWarning
        If the neighbour graph of a diffusion map falls into pieces.

    References
    ----------
    The original notebook's section 7 (PCA of the neuron factor, 10 axes); Jolliffe (2002),
    Principal Component Analysis, Springer. Coifman & Lafon (2006), Diffusion maps, Applied and
    Computational Harmonic Analysis 21. Zelnik-Manor & Perona (2004), Self-tuning spectral
    clustering, NIPS.

    Examples
    --------
    >>> rows = np.array([[2.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [0.0, -0.1]])
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    >>> e = embed(f)
    >>> e.score.sel(pc=1).values.round(6).tolist()
    [2.0, 0.0, -2.0, 0.0]
    >>> angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    >>> ring = xr.Dataset({"neuron_factor": (("neuron", "component"),
    ...                                      np.stack([np.cos(angle), np.sin(angle)], 1))})
    >>> embed(ring, 2, "diffusion").eigenvalue.values.round(3)  # two alike: sine and cosine
    array([0.984, 0.984])
    """
    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}; there are: {', '.join(METHODS)}.")
    n_components = check_count("n_components", n_components)
    factor = factor_rows(f, dim)
    component = str(factor.dims[1])
    rows = factor.values
    name = f"{dim}_factor"
    alive = np.ones(len(rows), bool) if method == "pca" else (rows != 0).any(axis=1)
    if alive.sum() < 2:
        zero = "" if alive.all() else f", of which {int((~alive).sum())} are all zero"
        raise DataError(f"{name} has {len(rows)} rows{zero}; an embedding needs two or more.")
    if (rows[alive] == rows[alive][0]).all():
        raise DataError(f"the rows of {name} are all the same, so that no axis has any variance.")
    if method != "pca" and n_components >= alive.sum():
        raise ArgumentError(
            f"n_components is {n_components}; {int(alive.sum())} rows have at most "
            f"{int(alive.sum()) - 1} axes by {method!r}."
        )
    try:
        json.dumps(options)
    except TypeError as error:
        raise ArgumentError(f"options={options!r}: expected numbers and strings.") from error

    found, more, used, libraries = METHODS[method](
        rows[alive], n_components, check_count("random_state", random_state, 0), options
    )
    score = np.full((len(rows), found.shape[1]), np.nan)
    score[alive] = found
    out = xr.Dataset({"score": ((dim, "pc"), score)}, coords=labels_of(factor, dim))
    real: dict[str, str] = {"row": dim, "pc": "pc", "component": component}
    for variable, (dims, values) in more.items():
        if "row" in dims:
            full = np.full((len(rows), *values.shape[1:]), np.nan)
            full[alive] = values
            values = full
        out[variable] = (tuple(real[d] for d in dims), values)
    if method in _KEEPS_ROWS:
        out[name] = (factor.dims, rows)
    out = out.assign_coords(pc=np.arange(1, found.shape[1] + 1))
    if component in factor.coords and component in out.dims:
        out = out.assign_coords({component: factor[component]})
    for made in out.data_vars:
        out[made].attrs.update(VARIABLES[str(made)].attrs)
    packages = {"vitxr": __version__, "numpy": np.__version__}
    packages |= {library: version(library) for library in libraries}
    out.attrs = {
        **provenance(f.attrs),
        "method": method,
        "dim": dim,
        **({} if method == "pca" else {"options": json.dumps(used)}),
        "versions": json.dumps(packages),
    }
    return out


# The methods: rows, axes, seed, options -> coordinates, what else, options used, libraries.

_Made = tuple[np.ndarray, _More, dict[str, Any], tuple[str, ...]]


def _pca(rows: np.ndarray, axes: int, seed: int, options: Mapping[str, Any]) -> _Made:
    from sklearn.decomposition import PCA

    _known("pca", options, ())
    pca = PCA(min(axes, *rows.shape), svd_solver="full").fit(rows)
    more: _More = {
        "explained_variance": (("pc",), pca.explained_variance_),
        "explained_variance_ratio": (("pc",), pca.explained_variance_ratio_),
        "component_loading": (("pc", "component"), pca.components_),
        "component_mean": (("component",), pca.mean_),
    }
    return (rows - pca.mean_) @ pca.components_.T, more, {}, ("scikit-learn",)


def _diffusion(rows: np.ndarray, axes: int, seed: int, options: Mapping[str, Any]) -> _Made:
    _known("diffusion", options, tuple(_DIFFUSION))
    used = {**_DIFFUSION, **options}
    for name in ("n_neighbors", "scale_neighbor"):
        used[name] = check_count(name, used[name])
    for name, most in (("alpha", 1.0), ("time", np.inf)):
        value = used[name]
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= value <= most or not np.isfinite(value):
            raise ArgumentError(
                f"{name}={value!r}: expected a number of 0 or more"
                + (f", at most {most:g}." if np.isfinite(most) else ".")
            )
    if used["scale_neighbor"] > used["n_neighbors"]:
        raise ArgumentError(
            f"scale_neighbor={used['scale_neighbor']} lies beyond n_neighbors="
            f"{used['n_neighbors']}: give a smaller one."
        )
    found = diffusion_maps(
        rows, axes, used["n_neighbors"], used["scale_neighbor"], float(used["alpha"])
    )
    more: _More = {
        "eigenvalue": (("pc",), found.eigenvalue),
        "bandwidth": (("row",), found.bandwidth),
        "kernel_density": (("row",), found.density),
    }
    score = found.eigenvector * found.eigenvalue ** used["time"]
    return score, more, used, ("scipy", "scikit-learn")


def _estimator(name: str) -> tuple[Callable[..., Any], dict[str, Any], bool, str]:
    """Class, our defaults, whether it is seeded, its distribution."""
    if name == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise DependencyError(
                "method='umap' needs umap-learn, which is not installed: pip install 'vitxr[umap]'."
            ) from error
        return UMAP, {"n_jobs": 1}, True, "umap-learn"  # more of them take no seed
    from sklearn import manifold

    return {
        "isomap": (manifold.Isomap, {}, False, "scikit-learn"),
        "spectral": (
            manifold.SpectralEmbedding, {"affinity": "nearest_neighbors"}, True, "scikit-learn",
        ),
        "tsne": (manifold.TSNE, {}, True, "scikit-learn"),
    }[name]  # fmt: skip


def _by_library(name: str) -> Callable[..., _Made]:
    def run(rows: np.ndarray, axes: int, seed: int, options: Mapping[str, Any]) -> _Made:
        if name == "tsne" and axes > 3 and options.get("method") != "exact":
            raise ArgumentError(
                f"n_components is {axes}; t-SNE takes 2 or 3 (with method='exact' of scikit-learn, "
                "more): embed(f, 2, 'tsne')."
            )
        make, used, seeded, library = _estimator(name)
        used = {**used, **options}
        settings = {**used, "n_components": axes, **({"random_state": seed} if seeded else {})}
        try:
            made = make(**settings)
        except TypeError as error:
            raise ArgumentError(
                f"{name!r} does not take options={dict(options)!r}: {error}. Beside "
                f"{', '.join(_ARGUMENTS)}, embed takes arguments of {make.__name__} of {library}."
            ) from error
        try:
            score = np.asarray(made.fit_transform(rows), np.float64)
        except ValueError as error:
            raise ArgumentError(
                f"{name!r} refuses {len(rows)} rows with options={dict(options)!r}: {error}"
            ) from error
        return score, {}, {**used, **({"random_state": seed} if seeded else {})}, (library,)

    return run


def _known(method: str, options: Mapping[str, Any], names: tuple[str, ...]) -> None:
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ArgumentError(
            f"embed has no argument {', '.join(map(repr, unknown))} for method={method!r}; "
            f"expected {', '.join((*_ARGUMENTS, *names))}."
        )


METHODS: dict[str, Callable[..., _Made]] = {
    "pca": _pca,
    "diffusion": _diffusion,
    "isomap": _by_library("isomap"),
    "spectral": _by_library("spectral"),
    "tsne": _by_library("tsne"),
    "umap": _by_library("umap"),
}

#: Methods whose embedding holds the rows that it is of, for new ones to be placed among them.
_KEEPS_ROWS = ("diffusion", "isomap")
