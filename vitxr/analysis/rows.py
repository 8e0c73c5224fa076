"""Rows of a factor or points of an embedding as plain arrays, checked, and their neighbours."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError

__all__ = ["check_count", "factor_rows", "labels_of", "neighbours", "points", "scaled_neighbours"]

#: Floats that are held at once when distances are made exact.
_BLOCK = 4_000_000


def factor_rows(f: xr.Dataset, dim: str) -> xr.DataArray:
    """Return ``<dim>_factor`` as (dim, component), float64, checked."""
    name = f"{dim}_factor"
    if not isinstance(f, xr.Dataset):
        raise DataError(
            f"expected a Dataset with {name}, not a {type(f).__name__}: from t.vit.factorize, or "
            "of new neurons, images or shifts from f.vit.transform(t)."
        )
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
    factor = factor.transpose(dim, axes[0]).astype(np.float64)
    if not np.isfinite(factor.values).all():
        raise DataError(f"{name} holds NaN or infinite values: drop those rows first.")
    return factor


def points(e: xr.Dataset, dim: str) -> xr.DataArray:
    """Return ``score`` if the Dataset is an embedding, else ``<dim>_factor``: (dim, axis), float64.

    Rows that are no point are NaN: those that the embedding left out, and zero rows of a factor.
    """
    if not isinstance(e, xr.Dataset):
        raise DataError(
            f"expected a Dataset of factors or an embedding; given: {type(e).__name__}. Make it "
            "with t.vit.factorize(rank) or f.vit.embed()."
        )
    if "score" in e.data_vars:
        score = e["score"]
        if set(score.dims) != {dim, "pc"}:
            given = ", ".join(map(str, score.dims))
            raise DataError(f"`score` has dims ({given}); expected ({dim}, pc).")
        return score.transpose(dim, "pc").astype(np.float64)
    rows = factor_rows(e, dim)
    return rows.where((rows != 0).any(str(rows.dims[1])))


def labels_of(rows: xr.DataArray, dim: str) -> Any:
    """Coordinates along ``dim`` only."""
    other = [d for d in rows.dims if d != dim]
    return rows.drop_vars([c for c in rows.coords if set(rows[c].dims) & set(other)]).coords


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Check an integer argument."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ArgumentError(f"{name} is {value!r}; expected an integer of {least} or more.")
    return int(value)


def neighbours(
    rows: np.ndarray, count: int, of: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest rows of each row but itself, or of each row of ``of``.

    Returns
    -------
    distance, index
        (row, count), nearest first; Euclidean, from differences, so that rows that are the same
        are exactly 0 apart.
    """
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=count).fit(rows).kneighbors(of, return_distance=False)
    from_ = rows if of is None else of
    distance = np.empty(found.shape)
    block = max(1, _BLOCK // (count * rows.shape[1]))
    for start in range(0, len(found), block):
        part = slice(start, start + block)
        apart = from_[part, None] - rows[found[part]]
        distance[part] = np.sqrt((apart**2).sum(-1))
    by_size = np.argsort(distance, axis=1, kind="stable")
    return np.take_along_axis(distance, by_size, 1), np.take_along_axis(found, by_size, 1)


def scaled_neighbours(rows: np.ndarray, count: int, of: np.ndarray | None = None) -> np.ndarray:
    """Distances to the nearest rows that differ, (row, count), ascending and above 0.

    Rows that occur several times count as one.
    """
    distinct, back = np.unique(rows, axis=0, return_inverse=True)
    if len(distinct) <= count:
        raise DataError(
            f"{len(distinct)} of {len(rows)} rows differ from each other; their {count} nearest "
            "neighbours need more. Ask for fewer neighbours."
        )
    if of is None:
        return neighbours(distinct, count)[0][back.reshape(-1)]
    distance, _ = neighbours(distinct, count + 1, of)
    first = np.where(distance[:, :1] == 0, 1, 0)
    return np.take_along_axis(distance, first + np.arange(count), 1)
