"""Attention on the patch grid: maps of one token, distance, entropy, masks of mass.

Everything takes the ``attention`` of an extraction, keeps its other dims (image, shift_y,
shift_x, ...) and is lazy where it is.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr

from vitxr.analysis.tokens import (
    GRID,
    apply,
    attention_of,
    named,
    of_query,
    on_grid,
    patch_queries,
    token_number,
)
from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, provenance

__all__ = [
    "attention_distance",
    "attention_entropy",
    "attention_map",
    "mass_mask",
]


def attention_map(ds: xr.Dataset, query: str | tuple[int, int] = "class") -> xr.DataArray:
    """Show how much attention one token pays to each patch, on the patch grid.

    ``A[query, key]`` of every head and layer, the keys that are patches laid out row by row.
    Weights are as they are: prefix tokens are left out, so that a map sums to the share of the
    attention that goes to patches.

    Parameters
    ----------
    ds
        Extraction with ``attention([image, shift_y, shift_x, layer,] head, query, key)`` and the
        attributes of its patch grid.
    query
        The token that attends: (row, col) of a patch on the patch grid, or the name of a prefix
        token, such as "class".

    Returns
    -------
    xarray.DataArray
        ``attention_map(..., layer, head, patch_row, patch_col)``, dtype of ``attention``, its NaN
        included; lazy if that is.

    Raises
    ------
    ArgumentError
        If there is no such token.
    DataError
        If ``ds`` lacks ``attention``, the attributes of the patch grid, or keys.

    References
    ----------
    The original notebook's section 3; Caron et al. (2021), Emerging properties in self-supervised
    vision transformers, ICCV (maps of the class token).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    shifts=None, variables=["attention"])
    >>> attention_map(ds, (2, 3)).isel(image=0, shift_y=0, shift_x=0).sizes
    Frozen({'layer': 6, 'head': 4, 'patch_row': 8, 'patch_col': 8})
    """
    weights, prefix, grid = attention_of(ds)
    token, label = token_number(ds, query, prefix, grid)
    out = on_grid(of_query(weights, token), prefix, grid)
    return named(out, "attention_map", ds, query=label)


def attention_distance(ds: xr.Dataset, unit: Literal["px", "patch"] = "px") -> xr.DataArray:
    """Compute the mean distance over which each head attends.

    ``mean_q sum_k a[q, k] d(q, k)``, with ``d`` the Euclidean distance between the centres of two
    patches on the image (not around its edges), and ``q``, ``k`` patches only: prefix tokens have
    no place, so they are left out and each row is divided by the weight that goes to patches.

    Parameters
    ----------
    ds
        Extraction with ``attention`` and the attributes of its patch grid.
    unit
        "px": pixels of the model's input; "patch": steps on the patch grid, row and column alike.
        The two differ by a factor where patches are square.

    Returns
    -------
    xarray.DataArray
        ``attention_distance(..., layer, head)``, float64; lazy if ``attention`` is. Queries of
        which no weight at all goes to patches do not count; NaN where there is no other, or where
        weights of a query that counts are NaN.

    Raises
    ------
    ArgumentError, DataError
        If the unit is unknown, or ``ds`` lacks what is needed.

    References
    ----------
    Dosovitskiy et al. (2021), An image is worth 16x16 words, ICLR, figure 7 and appendix D.7.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    shifts=None, variables=["attention"])
    >>> attention_distance(ds).mean("image").sizes
    Frozen({'shift_y': 1, 'shift_x': 1, 'layer': 6, 'head': 4})
    """
    if unit not in ("px", "patch"):
        raise ArgumentError(f"unit={unit!r}: expected 'px' or 'patch'.")
    weights, prefix, grid = attention_of(ds)
    patch = (1, 1) if unit == "patch" else (ds.attrs["patch_height"], ds.attrs["patch_width"])
    weights, queries = patch_queries(weights, prefix)
    apart = patch_distances(grid, patch)[queries - prefix]
    out = apply(
        _mean_distance, [weights], [["query", "key"]], [], {"apart": apart, "prefix": prefix}, float
    )
    out = named(out, "attention_distance", ds)
    return out.assign_attrs(units=unit)


def attention_entropy(ds: xr.Dataset) -> xr.DataArray:
    """Compute the mean entropy of each head's attention, in nats.

    ``mean_q -sum_k a[q, k] ln a[q, k]`` over the queries that are patches and all keys, prefix
    tokens included; rows are divided by their sum first (stored values may be rounded). It lies
    between 0 (one key has it all) and ``ln(tokens)`` (uniform).

    Parameters
    ----------
    ds
        Extraction with ``attention`` and the attributes of its patch grid.

    Returns
    -------
    xarray.DataArray
        ``attention_entropy(..., layer, head)``, float64, nats; lazy if ``attention`` is. NaN where
        weights of a query that is a patch are.

    Raises
    ------
    DataError
        If ``ds`` lacks what is needed.

    References
    ----------
    Shannon (1948), A mathematical theory of communication. Clark et al. (2019), What does BERT
    look at?, BlackboxNLP (entropy of attention heads).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    shifts=None, variables=["attention"])
    >>> bool((attention_entropy(ds) < np.log(65)).all())
    True
    """
    weights, prefix, _ = attention_of(ds)
    weights, _ = patch_queries(weights, prefix)
    return named(
        apply(_mean_entropy, [weights], [["query", "key"]], [], {}, float), "attention_entropy", ds
    )


def mass_mask(values: xr.DataArray, mass: float = 0.6) -> xr.DataArray:
    """Keep the fewest patches that hold a share of a map's mass.

    Patches are taken from the largest value down until they hold at least ``mass`` of the sum
    over the grid (up to rounding, 1e-9 of it). Of equal values the first, row by row, is taken.

    Parameters
    ----------
    values
        Any map ``(..., patch_row, patch_col)`` of values of 0 or more: of :func:`attention_map`,
        :func:`attention_rollout` or :func:`vitxr.analysis.relevance`.
    mass
        The share, above 0 and at most 1. DINO's pictures keep 0.6.

    Returns
    -------
    xarray.DataArray
        ``mass_mask(..., patch_row, patch_col)``, bool; lazy if ``values`` is. A map without any
        mass, or that holds NaN, keeps no patch.

    Raises
    ------
    ArgumentError, DataError
        If the share is out of range, the map has no patch grid or, when it is computed, negative
        values.

    References
    ----------
    Caron et al. (2021), Emerging properties in self-supervised vision transformers, ICCV, figure 3
    ("thresholding the self-attention maps to keep 60% of the mass").

    Examples
    --------
    >>> m = xr.DataArray([[0.5, 0.1], [0.1, 0.3]], dims=("patch_row", "patch_col"))
    >>> mass_mask(m, 0.8).values
    array([[ True, False],
           [False,  True]])
    """
    number = isinstance(mass, numbers.Real) and not isinstance(mass, bool)
    if not number or not 0 < mass <= 1:
        raise ArgumentError(f"mass={mass!r}: expected a share above 0 and at most 1.")
    if not isinstance(values, xr.DataArray) or set(GRID) - set(values.dims):
        given = getattr(values, "dims", type(values).__name__)
        raise DataError(
            f"mass_mask needs a map with the dims patch_row and patch_col; given: {given}. Make "
            "it with attention_map, attention_rollout or relevance."
        )
    out = apply(_mask, [values], [list(GRID)], list(GRID), {"mass": float(mass)}, bool)
    out = out.transpose(*values.dims).rename("mass_mask")
    out.attrs = {**VARIABLES["mass_mask"].attrs, **provenance(values.attrs), "mass": float(mass)}
    return out


def patch_distances(grid: tuple[int, int], patch: Sequence[float] = (1, 1)) -> np.ndarray:
    """Euclidean distances between all patches, row by row, (patches, patches), float64.

    ``patch``: how far rows and columns lie apart.

    >>> patch_distances((1, 2), (3, 4))
    array([[0., 4.],
           [4., 0.]])
    """
    place = np.indices(grid).reshape(2, -1).T * np.asarray(patch, np.float64)
    return np.sqrt(((place[:, None] - place[None]) ** 2).sum(-1))


# Kernels: plain arrays, leading dims are passed through.


def _mean_distance(weights: np.ndarray, apart: np.ndarray, prefix: int) -> np.ndarray:
    patches = weights[..., prefix:].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = patches.sum(-1)
        rows = np.einsum("...qk,qk->...q", patches, apart) / total
        some = total != 0  # NaN, of what a store does not hold, stays
        return np.where(some, rows, 0).sum(-1) / some.sum(-1)


def _mean_entropy(weights: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    weights = weights.astype(np.float64)
    return entr(weights / weights.sum(-1, keepdims=True)).sum(-1).mean(-1)


def _mask(values: np.ndarray, mass: float) -> np.ndarray:
    if (values < 0).any():
        raise DataError(
            "mass_mask: the map has negative values, which hold no share of its sum. Give one of "
            "values of 0 or more, such as map.clip(min=0)."
        )
    flat = values.reshape(*values.shape[:-2], -1).astype(np.float64)
    by_size = np.argsort(-flat, axis=-1, kind="stable")
    held = np.cumsum(np.take_along_axis(flat, by_size, -1), -1)
    # A patch is kept if those before it do not hold enough yet.
    enough = mass * held[..., -1:] * (1 - 1e-9)
    kept = np.concatenate([np.zeros_like(enough), held[..., :-1]], -1) < enough
    out = np.zeros(flat.shape, bool)
    np.put_along_axis(out, by_size, kept, -1)
    return out.reshape(values.shape)
