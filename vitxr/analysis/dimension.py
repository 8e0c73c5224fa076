"""Local dimension of the manifold that rows lie on, from distances to nearest neighbours."""

from __future__ import annotations

import numpy as np
import xarray as xr

from vitxr.analysis.rows import check_count, labels_of, points, scaled_neighbours
from vitxr.errors import DataError
from vitxr.names import VARIABLES, provenance

__all__ = ["local_dimension"]

#: Share of the largest ratios that the fit of TwoNN leaves out, as its authors do.
_DISCARD = 0.1


def local_dimension(e: xr.Dataset, n_neighbors: int = 20, dim: str = "neuron") -> xr.Dataset:
    """Estimate the dimension of the manifold, around each neuron and of all.

    With ``T_j(x)`` the distance from ``x`` to its ``j``-th nearest neighbour that differs and
    ``k = n_neighbors``, ``S(x) = sum over j < k of ln(T_k / T_j)``:

    - ``local_dimension = (k - 2) / S(x)``, Levina and Bickel's estimate of maximum likelihood
      with the divisor that removes its bias (unbiased if points are Poisson and the density does
      not change within the neighbourhood; its standard deviation is then ``m / sqrt(k - 3)``);
    - ``dimension_mle = n (k - 1) / sum over x of S(x)``: inverses averaged over the points, as
      MacKay and Ghahramani correct the estimate;
    - ``dimension_twonn``: the slope through the origin of ``-ln(1 - F(u))`` against ``ln u``,
      with ``u = T_2 / T_1`` and ``F`` its empirical distribution, the largest tenth left out
      (Facco et al.).

    Distances beyond the scale at which a manifold curves, or noise below it, are measured as they
    are: large ``n_neighbors`` underestimate, noise gives the dimension of the space.

    Parameters
    ----------
    e
        Dataset of factors, whose rows are measured; or an embedding, whose ``score`` is.
    n_neighbors
        Neighbours of a point, 3 or more.
    dim
        The dimension whose rows are points.

    Returns
    -------
    xarray.Dataset
        ``local_dimension(dim)``, ``dimension_mle``, ``dimension_twonn``, float64; labels are kept.
        Rows that are all zero, or NaN in ``score``, as those that an embedding left out, are NaN
        and no neighbours; rows that are the same count once.

    Raises
    ------
    ArgumentError, DataError
        If an argument is out of range, or fewer than ``n_neighbors + 1`` rows differ.

    References
    ----------
    Levina & Bickel (2004), Maximum likelihood estimation of intrinsic dimension, NIPS. MacKay &
    Ghahramani (2005), Comments on that paper. Facco et al. (2017), Estimating the intrinsic
    dimension of datasets by a minimal neighborhood information, Scientific Reports 7.

    Examples
    --------
    >>> rows = np.random.default_rng(0).random((2000, 2)) @ [[1, 0, 2, 0, 1], [0, 1, 0, 3, 1]]
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    >>> d = local_dimension(f)
    >>> round(float(d.dimension_mle), 1), round(float(d.dimension_twonn), 1)
    (1.9, 2.0)
    """
    n_neighbors = check_count("n_neighbors", n_neighbors, 3)
    rows = points(e, dim)
    alive = np.isfinite(rows.values).all(axis=1)
    if alive.sum() <= n_neighbors:
        raise DataError(
            f"{int(alive.sum())} rows of {dim!r} are points; {n_neighbors} neighbours need more. "
            "Ask for fewer."
        )
    local, by_mle, by_two = dimensions(rows.values[alive], n_neighbors)
    full = np.full(len(alive), np.nan)
    full[alive] = local
    out = xr.Dataset(
        {
            "local_dimension": (dim, full),
            "dimension_mle": ((), by_mle),
            "dimension_twonn": ((), by_two),
        },
        coords=labels_of(rows, dim),
    )
    for name in out.data_vars:
        out[name].attrs.update(VARIABLES[str(name)].attrs)
    out.attrs = {**provenance(e.attrs), "n_neighbors": n_neighbors}
    return out


def dimensions(rows: np.ndarray, n_neighbors: int) -> tuple[np.ndarray, float, float]:
    """Dimension around each row, and two of all rows; rows that are the same count once."""
    distinct, back = np.unique(rows, axis=0, return_inverse=True)
    distance = scaled_neighbours(distinct, n_neighbors)
    total = np.log(distance[:, -1:] / distance[:, :-1]).sum(axis=1)
    with np.errstate(divide="ignore"):
        local = (n_neighbors - 2) / total
        by_mle = len(distinct) * (n_neighbors - 1) / total.sum()
        ratio = np.sort(np.log(distance[:, 1] / distance[:, 0]))
        kept = ratio[: int(len(ratio) * (1 - _DISCARD))]
        height = -np.log1p(-np.arange(1, len(kept) + 1) / len(ratio))
        by_two = (kept @ height) / (kept @ kept)
    return local[back.reshape(-1)], float(by_mle), float(by_two)
