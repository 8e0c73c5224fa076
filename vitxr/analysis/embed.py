"""Embeddings: few coordinates for each row of a factor."""

from __future__ import annotations

import json
import numbers
from importlib.metadata import version

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, provenance

__all__ = ["embed"]


def embed(
    f: xr.Dataset, n_components: int = 10, method: str = "pca", dim: str = "neuron"
) -> xr.Dataset:
    """Embed the rows of a factor by principal component analysis.

    With ``F`` the factor ``(n, rank)`` and ``m`` its mean row, ``F - m = U S V^T``; ``score`` is
    the first columns of ``U S``, ``component_loading`` the first rows of ``V^T``,
    ``explained_variance`` is ``S**2 / (n - 1)`` and its ratio the share of the sum over all axes.
    The sign of an axis is such that its largest loading is positive.

    Parameters
    ----------
    f
        Factor Dataset of one model, of which ``<dim>_factor`` is used as it is: columns of unit
        norm, weights left out. (The original notebook's columns had the lengths at which the
        fit had left them.)
    n_components
        Most axes. There are never more than the rank, nor than rows: of ``n_components``, rank
        and rows the smallest is taken.
    method
        "pca", by a full singular value decomposition.
    dim
        The dimension whose rows are embedded.

    Returns
    -------
    xarray.Dataset
        ``score(dim, pc)``, ``explained_variance(pc)``, ``explained_variance_ratio(pc)``,
        ``component_loading(pc, component)``, ``component_mean(component)``, float64;
        ``pc`` counts from 1, the labels of ``dim`` are kept.

    Raises
    ------
    ArgumentError
        If an argument is unknown or out of range, or ``f`` holds several replicates.
    DataError
        If ``f`` has no such factor, or it has fewer than two rows, values that are not finite, or
        rows that are all the same.

    References
    ----------
    The original notebook's section 7 (PCA of the neuron factor, 10 axes); Jolliffe (2002),
    Principal Component Analysis, Springer.

    Examples
    --------
    >>> rows = np.array([[2.0, 0.0], [0.0, 0.1], [-2.0, 0.0], [0.0, -0.1]])
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    >>> e = embed(f)
    >>> e.score.sel(pc=1).values.round(6).tolist()
    [2.0, 0.0, -2.0, 0.0]
    """
    if method != "pca":
        raise ArgumentError(f"unknown method {method!r}; there is: pca.")
    integer = isinstance(n_components, numbers.Integral) and not isinstance(n_components, bool)
    if not integer or n_components < 1:
        raise ArgumentError(f"n_components is {n_components!r}; expected an integer of 1 or more.")
    name = f"{dim}_factor"
    if name not in f.data_vars:
        have = [str(v) for v in f.data_vars if str(v).endswith("_factor")]
        raise DataError(
            f"the Dataset has no {name}; it has: {', '.join(have) or 'no factors'}. Give a Dataset "
            "from factorize, and for dim one of its dimensions."
        )
    factor = f[name]
    if "replicate" in factor.dims:
        raise ArgumentError(
            f"{name} has a replicate dimension; an embedding is of one model: select one, "
            "f.sel(replicate=0)."
        )
    axes = [d for d in factor.dims if d != dim]
    if factor.ndim != 2 or len(axes) != 1:
        given = ", ".join(map(str, factor.dims))
        raise DataError(f"{name} has dims ({given}); expected ({dim}, component).")
    component = axes[0]
    factor = factor.transpose(dim, component)
    rows = np.asarray(factor.values, np.float64)
    if len(rows) < 2:
        raise DataError(f"{name} has {len(rows)} rows; an embedding needs two or more.")
    if not np.isfinite(rows).all():
        raise DataError(f"{name} holds NaN or infinite values: drop those rows first.")
    if (rows == rows[0]).all():
        raise DataError(f"the rows of {name} are all the same, so that no axis has any variance.")

    from sklearn.decomposition import PCA

    pca = PCA(min(int(n_components), *rows.shape), svd_solver="full").fit(rows)
    score = (rows - pca.mean_) @ pca.components_.T
    labels = factor.drop_vars([c for c in factor.coords if component in factor[c].dims]).coords
    out = xr.Dataset(
        {
            "score": ((dim, "pc"), score),
            "explained_variance": ("pc", pca.explained_variance_),
            "explained_variance_ratio": ("pc", pca.explained_variance_ratio_),
            "component_loading": (("pc", component), pca.components_),
            "component_mean": (component, pca.mean_),
        },
        coords=labels,
    ).assign_coords(pc=np.arange(1, len(pca.components_) + 1))
    if component in factor.coords:
        out = out.assign_coords({component: factor[component]})
    for variable in out.data_vars:
        out[variable].attrs.update(VARIABLES[str(variable)].attrs)
    used = {"vitxr": __version__, "numpy": np.__version__, "scikit-learn": version("scikit-learn")}
    out.attrs = {
        **provenance(f.attrs),
        "method": method,
        "dim": dim,
        "versions": json.dumps(used),
    }
    return out
