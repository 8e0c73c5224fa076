"""Clusters of neurons: k-means on an embedding or on factors."""

from __future__ import annotations

import numpy as np
import xarray as xr

from vitxr.analysis.rows import check_count, points
from vitxr.errors import ArgumentError
from vitxr.names import VARIABLES

__all__ = ["cluster"]


def cluster(
    e: xr.Dataset, n_clusters: int, dim: str = "neuron", random_state: int = 0
) -> xr.Dataset:
    """Divide neurons into clusters by k-means.

    scikit-learn's KMeans, the best of 10 starts: the sum of squared distances to the nearest
    centre is made small. Clusters are numbered by size, largest first, and of equal size by the
    first neuron in them, so that a seed gives the same numbers in whatever order they were found.

    Parameters
    ----------
    e
        Embedding, whose ``score`` is divided, or Dataset of factors, whose ``<dim>_factor`` is.
    n_clusters
        Number of clusters.
    dim
        The dimension that is divided.
    random_state
        Seed.

    Returns
    -------
    xarray.Dataset
        ``e`` with the coordinate ``cluster(dim)``, 0 to ``n_clusters - 1``; -1 for rows that are no
        points (dead neurons, or NaN in ``score``).

    Raises
    ------
    ArgumentError, DataError
        If an argument is out of range, or fewer rows differ than there are clusters.

    References
    ----------
    Lloyd (1982), Least squares quantization in PCM. Arthur & Vassilvitskii (2007), k-means++. The
    original notebook imports scikit-learn's KMeans and never calls it.

    Examples
    --------
    >>> rows = np.array([[0.0, 9.0], [1.0, 0.0], [1.1, 0.0], [0.0, 0.0]])
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    >>> cluster(f, 2).cluster.values
    array([ 1,  0,  0, -1])
    """
    from sklearn.cluster import KMeans

    n_clusters = check_count("n_clusters", n_clusters)
    seed = check_count("random_state", random_state, 0)
    rows = points(e, dim).values
    alive = np.isfinite(rows).all(axis=1)
    distinct = len(np.unique(rows[alive], axis=0))
    if distinct < n_clusters:
        raise ArgumentError(
            f"n_clusters is {n_clusters}; {distinct} rows of {dim!r} differ from each other."
        )
    found = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(rows[alive])
    _, first, sizes = np.unique(found, return_index=True, return_counts=True)
    rank = np.empty(n_clusters, np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(n_clusters)
    labels = np.full(len(rows), -1, np.int64)
    labels[alive] = rank[found]
    return e.assign_coords(cluster=(dim, labels, VARIABLES["cluster"].attrs))
