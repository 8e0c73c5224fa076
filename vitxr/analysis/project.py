"""New rows on an embedding that is there."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

from vitxr.analysis.manifold import Diffusion, extend
from vitxr.analysis.rows import factor_rows, labels_of
from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, provenance

__all__ = ["project"]


def project(embedding: xr.Dataset, new: xr.Dataset) -> xr.Dataset:
    """Place new rows on an embedding that is there.

    "pca": ``(F - component_mean) component_loading^T``. "diffusion": the Nyström extension
    ``psi(x) = sum_j p(x, j) psi_j / lambda``, ``score = lambda^time psi``, with ``p`` the
    transition probabilities of the same kernel from the new row to its ``n_neighbors + 1``
    nearest embedded rows (an embedded row is the nearest of its own, and has ``n_neighbors``
    others). With all pairs in the kernel the embedded rows come back exactly. "isomap":
    scikit-learn's ``Isomap.transform``; the fit is done again and has to give the same
    coordinates. t-SNE, spectral embedding and UMAP place no new rows: embed them with the rest.

    Parameters
    ----------
    embedding
        What :func:`embed` gave.
    new
        Dataset with ``<dim>_factor`` of the same components, such as ``f.vit.transform(new)``
        gives for new neurons.

    Returns
    -------
    xarray.Dataset
        ``score(dim, pc)``, float64, with the labels of ``new``. Zero rows are NaN except of "pca".

    Raises
    ------
    ArgumentError
        If the method places no new rows.
    DataError
        If ``embedding`` is none, or the components are not the same.

    References
    ----------
    Bengio et al. (2004), Out-of-sample extensions for LLE, Isomap, MDS, eigenmaps, and spectral
    clustering, NIPS.

    Examples
    --------
    >>> from vitxr.analysis import embed
    >>> rows = np.array([[2.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [0.0, -0.1]])
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    >>> project(embed(f), f).score.equals(embed(f).score)
    True
    """
    method, dim = embedding.attrs.get("method"), embedding.attrs.get("dim")
    if "score" not in embedding or dim is None:
        raise DataError(
            "project needs an embedding, with `score` and the attributes `method` and `dim`. Make "
            "it with f.vit.embed()."
        )
    if method not in _PROJECT:
        raise ArgumentError(
            f"{method!r} places no new rows; {', '.join(map(repr, _PROJECT))} do. Embed all rows "
            "together."
        )
    factor = factor_rows(new, dim)
    component = factor.dims[1]
    mine = embedding["component_mean" if method == "pca" else f"{dim}_factor"]
    same = component in mine.dims and mine.sizes[component] == factor.sizes[component]
    if same and component in mine.coords and component in factor.coords:
        same = mine.indexes[component].equals(factor.indexes[component])
    if not same:
        raise DataError(
            f"the embedding is of ({', '.join(f'{d}: {n}' for d, n in mine.sizes.items())}), the "
            f"new rows of ({', '.join(f'{d}: {n}' for d, n in factor.sizes.items())}); expected "
            "the same components. Take the new rows from f.vit.transform(new)."
        )
    rows = factor.values
    alive = np.ones(len(rows), bool) if method == "pca" else (rows != 0).any(axis=1)
    score = np.full((len(rows), embedding.sizes["pc"]), np.nan)
    if alive.any():
        score[alive] = _PROJECT[method](embedding, rows[alive], dim)
    out = xr.Dataset({"score": ((dim, "pc"), score)}, coords=labels_of(factor, dim))
    out = out.assign_coords(pc=embedding["pc"])
    out["score"].attrs.update(VARIABLES["score"].attrs)
    out.attrs = dict(embedding.attrs) | provenance(new.attrs)
    return out


def _project_pca(e: xr.Dataset, rows: np.ndarray, dim: str) -> np.ndarray:
    loading = e["component_loading"].transpose("pc", ...).values
    return (rows - e["component_mean"].values) @ loading.T


def _embedded(e: xr.Dataset, dim: str) -> tuple[np.ndarray, np.ndarray]:
    rows = e[f"{dim}_factor"].transpose(dim, ...).values
    alive = (rows != 0).any(axis=1)
    return rows[alive], alive


def _project_diffusion(e: xr.Dataset, rows: np.ndarray, dim: str) -> np.ndarray:
    known, alive = _embedded(e, dim)
    options = json.loads(e.attrs["options"])
    eigenvalue, time = e["eigenvalue"].values, options.pop("time")
    score = e["score"].transpose(dim, "pc").values[alive]
    map_ = Diffusion(
        eigenvalue,
        score / eigenvalue**time,
        e["bandwidth"].values[alive],
        e["kernel_density"].values[alive],
    )
    return extend(map_, known, rows, **options) * eigenvalue**time


def _project_isomap(e: xr.Dataset, rows: np.ndarray, dim: str) -> np.ndarray:
    from sklearn.manifold import Isomap

    known, alive = _embedded(e, dim)
    made = Isomap(n_components=e.sizes["pc"], **json.loads(e.attrs["options"])).fit(known)
    score = e["score"].transpose(dim, "pc").values[alive]
    if not np.allclose(made.embedding_, score, rtol=1e-6, atol=1e-6 * np.abs(score).max()):
        raise DataError(
            "Isomap, fitted again, gives other coordinates than the embedding holds "
            f"(it was made with {e.attrs.get('versions')}). Embed again with this version."
        )
    return made.transform(rows)


_PROJECT = {"pca": _project_pca, "diffusion": _project_diffusion, "isomap": _project_isomap}
