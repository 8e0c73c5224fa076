"""Attention on the patch grid: maps of one token, rollout, distance, entropy, masks of mass.

Everything takes the ``attention`` of an extraction, keeps its other dims (image, shift_y,
shift_x, ...) and is lazy where it is.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, order, provenance

__all__ = [
    "attention_distance",
    "attention_entropy",
    "attention_map",
    "attention_rollout",
    "mass_mask",
]

_GRID = ("patch_row", "patch_col")
_FUSIONS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "max": np.max, "min": np.min}
_REMEDY = 'Extract it with variables=("activation", "attention").'


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
        ``attention_map(..., layer, head, patch_row, patch_col)``, dtype of ``attention``; lazy if
        that is.

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
    weights, prefix, grid = _weights(ds)
    token, label = _token(ds, query, prefix, grid)
    out = _on_grid(_of_query(weights, token), prefix, grid)
    return _named(out, "attention_map", ds, query=label)


def attention_rollout(
    ds: xr.Dataset,
    query: str | tuple[int, int] | None = "class",
    fusion: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
) -> xr.DataArray:
    """Trace attention through the layers, the residual stream included.

    With ``W_l`` the weights of layer ``l`` fused over heads, ``r`` the share of the residual
    stream and ``N`` the division of each row by its sum, ``A_l = N((1 - r) W_l + r I)`` and the
    rollout is ``A_L ... A_1 A_0``: its rows sum to one.

    Parameters
    ----------
    ds
        Extraction with ``attention`` of every head and token, and of layers that follow upon each
        other. From a first layer other than 0, the rollout is to what enters that layer.
    query
        The token whose row is wanted, on the patch grid, as in :func:`attention_map` (prefix
        tokens left out, so that it sums to less than one); None for the whole matrix.
    fusion
        How heads are fused: their "mean" (Abnar & Zuidema), "max" or "min".
    residual
        Share of the identity, 0 to 1 (1 excluded); one half is Abnar and Zuidema's.

    Returns
    -------
    xarray.DataArray
        ``rollout(image, shift_y, shift_x, patch_row, patch_col)``, or with ``query=None``
        ``rollout(image, shift_y, shift_x, query, key)``; float32 (float64 of float64 weights);
        lazy if ``attention`` is.

    Raises
    ------
    ArgumentError
        If an argument is unknown or out of range.
    DataError
        If ``ds`` lacks what is needed, or layers between its first and last.

    References
    ----------
    Abnar & Zuidema (2020), Quantifying attention flow in transformers, ACL.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    shifts=None, variables=["attention"])
    >>> attention_rollout(ds, query=None).sum("key").round(5).values.min()
    np.float32(1.0)
    """
    if fusion not in _FUSIONS:
        raise ArgumentError(f"fusion={fusion!r}: expected {', '.join(map(repr, _FUSIONS))}.")
    number = isinstance(residual, numbers.Real) and not isinstance(residual, bool)
    if not number or not 0 <= residual < 1:
        raise ArgumentError(f"residual={residual!r}: expected a number from 0 to below 1.")
    weights, prefix, grid = _weights(ds)
    tokens = weights.sizes["key"]
    if weights.sizes["query"] != tokens:
        raise DataError(
            f"`attention` holds {weights.sizes['query']} of {tokens} queries; the rollout goes "
            "through all of them. Extract attention without a selection of queries."
        )
    if "layer" not in weights.dims:
        weights = weights.expand_dims("layer")
    layers = np.asarray(weights["layer"].values if "layer" in weights.coords else [])
    if (np.diff(layers) != 1).any():
        raise DataError(
            f"`attention` has the layers {layers.tolist()}; a rollout needs all layers between the "
            "first and the last, ascending. Extract them, or select some that follow upon each "
            "other."
        )
    token, label = (None, "all") if query is None else _token(ds, query, prefix, grid)
    steps = [weights.isel(layer=i, drop=True) for i in range(weights.sizes["layer"])]
    options = {"fusion": fusion, "residual": float(residual)}
    if token is None:
        out = _apply(_mixed, [steps[0]], [["head", "query", "key"]], ["query", "key"], options)
        for step in steps[1:]:
            inner = out.rename(query="between", key="to")
            out = _apply(
                _through, [step, inner], [["head", "query", "key"], ["between", "to"]],
                ["query", "to"], options,
            ).rename(to="key")  # fmt: skip
    else:
        start = np.zeros(tokens)
        start[token] = 1
        out = xr.DataArray(start, dims="to")
        for step in reversed(steps):
            out = _apply(
                _back, [step, out], [["head", "query", "key"], ["to"]], ["key"], options
            ).rename(key="to")
        out = out.rename(to="key")
        out = _on_grid(out, prefix, grid)
    spans = {} if not len(layers) else {"layers": f"{layers[0]} to {layers[-1]}"}
    return _named(out, "rollout", ds, query=label, **options, **spans)


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
        which no weight at all goes to patches do not count; NaN where there is no other.

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
    weights, prefix, grid = _weights(ds)
    patch = (1, 1) if unit == "patch" else (ds.attrs["patch_height"], ds.attrs["patch_width"])
    weights, queries = _patch_queries(weights, prefix)
    apart = patch_distances(grid, patch)[queries - prefix]
    out = _apply(
        _mean_distance, [weights], [["query", "key"]], [], {"apart": apart, "prefix": prefix}, float
    )
    out = _named(out, "attention_distance", ds)
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
        ``attention_entropy(..., layer, head)``, float64, nats; lazy if ``attention`` is.

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
    weights, prefix, _ = _weights(ds)
    weights, _ = _patch_queries(weights, prefix)
    return _named(
        _apply(_mean_entropy, [weights], [["query", "key"]], [], {}, float), "attention_entropy", ds
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
        mass keeps no patch.

    Raises
    ------
    ArgumentError, DataError
        If the share is out of range, or the map has no patch grid.

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
    if not isinstance(values, xr.DataArray) or set(_GRID) - set(values.dims):
        given = getattr(values, "dims", type(values).__name__)
        raise DataError(
            f"mass_mask needs a map with the dims patch_row and patch_col; given: {given}. Make "
            "it with attention_map, attention_rollout or relevance."
        )
    out = _apply(_mask, [values], [list(_GRID)], list(_GRID), {"mass": float(mass)}, bool)
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


def _fused(weights: np.ndarray, fusion: str) -> np.ndarray:
    dtype = np.result_type(weights.dtype, np.float32)
    return _FUSIONS[fusion](weights.astype(dtype, copy=False), axis=-3)


def _mixed(weights: np.ndarray, fusion: str, residual: float) -> np.ndarray:
    """Fuse (..., head, query, key) over heads, mix the identity in, divide rows by their sums."""
    out = _fused(weights, fusion) * (1 - residual)
    at = np.arange(out.shape[-1])
    out[..., at, at] += residual
    out /= out.sum(-1, keepdims=True)
    return out


def _through(weights: np.ndarray, before: np.ndarray, fusion: str, residual: float) -> np.ndarray:
    """Go on from the rollout up to the layer before."""
    return _mixed(weights, fusion, residual) @ before


def _back(weights: np.ndarray, row: np.ndarray, fusion: str, residual: float) -> np.ndarray:
    """Go one layer down: ``row @ N((1 - r) W + r I)``, without making that matrix."""
    fused = _fused(weights, fusion)
    row = row / ((1 - residual) * fused.sum(-1) + residual)
    out = (1 - residual) * (row[..., None, :].astype(fused.dtype) @ fused)[..., 0, :]
    return (out + residual * row).astype(fused.dtype)


def _mean_distance(weights: np.ndarray, apart: np.ndarray, prefix: int) -> np.ndarray:
    patches = weights[..., prefix:].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = np.einsum("...qk,qk->...q", patches, apart) / patches.sum(-1)
        known = np.isfinite(rows)
        return np.where(known, rows, 0).sum(-1) / known.sum(-1)


def _mean_entropy(weights: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    weights = weights.astype(np.float64)
    return entr(weights / weights.sum(-1, keepdims=True)).sum(-1).mean(-1)


def _mask(values: np.ndarray, mass: float) -> np.ndarray:
    flat = values.reshape(*values.shape[:-2], -1).astype(np.float64)
    by_size = np.argsort(-flat, axis=-1, kind="stable")
    held = np.cumsum(np.take_along_axis(flat, by_size, -1), -1)
    # A patch is kept if those before it do not hold enough yet.
    enough = mass * held[..., -1:] * (1 - 1e-9)
    kept = np.concatenate([np.zeros_like(enough), held[..., :-1]], -1) < enough
    out = np.zeros(flat.shape, bool)
    np.put_along_axis(out, by_size, kept, -1)
    return out.reshape(values.shape)


# Labels.


def _apply(
    kernel: Callable[..., np.ndarray],
    arrays: Sequence[xr.DataArray],
    inputs: Sequence[list[str]],
    output: list[str],
    options: dict[str, Any],
    dtype: Any = None,
) -> xr.DataArray:
    """Apply a kernel along core dims, lazily to what is lazy."""
    whole = [
        array.chunk({d: -1 for d in dims if d in array.dims}) if array.chunks else array
        for array, dims in zip(arrays, inputs, strict=True)
    ]
    given = arrays[0].dtype
    return xr.apply_ufunc(
        kernel,
        *whole,
        input_core_dims=inputs,
        output_core_dims=[output],
        kwargs=options,
        dask="parallelized",
        output_dtypes=[np.result_type(given, np.float32) if dtype is None else np.dtype(dtype)],
    )


def _weights(ds: xr.Dataset) -> tuple[xr.DataArray, int, tuple[int, int]]:
    """Attention, the number of prefix tokens, and the patch grid; checked."""
    if not isinstance(ds, xr.Dataset) or "attention" not in ds:
        have = (
            ", ".join(map(str, ds.data_vars)) if isinstance(ds, xr.Dataset) else type(ds).__name__
        )
        raise DataError(f"expected a Dataset with `attention`; given: {have or 'none'}. {_REMEDY}")
    weights = ds["attention"]
    if {"head", "query", "key"} - set(weights.dims):
        raise DataError(
            f"`attention` has dims ({', '.join(map(str, weights.dims))}); expected ([image, "
            "shift_y, shift_x, layer,] head, query, key)."
        )
    needed = ("input_height", "input_width", "patch_height", "patch_width", "prefix_tokens")
    missing = [name for name in needed if name not in ds.attrs]
    if missing:
        raise DataError(
            f"the Dataset lacks the attributes {', '.join(missing)}, which tell the patch grid. "
            "Give the Dataset of vitxr.extract or vitxr.open as it is; arithmetic drops attributes "
            "unless xr.set_options(keep_attrs=True)."
        )
    grid = (
        int(ds.attrs["input_height"]) // int(ds.attrs["patch_height"]),
        int(ds.attrs["input_width"]) // int(ds.attrs["patch_width"]),
    )
    prefix = int(ds.attrs["prefix_tokens"])
    if weights.sizes["key"] != prefix + grid[0] * grid[1]:
        raise DataError(
            f"`attention` has {weights.sizes['key']} keys; expected {prefix} prefix tokens and "
            f"{grid[0]} x {grid[1]} patches. Do not select among keys beforehand."
        )
    return weights, prefix, grid


def _queries(weights: xr.DataArray) -> np.ndarray:
    """Token numbers of the queries that there are."""
    if "query" in weights.coords:
        return np.asarray(weights["query"].values)
    return np.arange(weights.sizes["query"])


def _patch_queries(weights: xr.DataArray, prefix: int) -> tuple[xr.DataArray, np.ndarray]:
    queries = _queries(weights)
    at = np.flatnonzero(queries >= prefix)
    if not len(at):
        raise DataError(
            "`attention` holds the queries of prefix tokens only; expected queries of patches. "
            "Extract attention of patches."
        )
    return weights.isel(query=at), queries[at]


def _of_query(weights: xr.DataArray, token: int) -> xr.DataArray:
    at = np.flatnonzero(_queries(weights) == token)
    if not len(at):
        raise DataError(
            f"`attention` does not hold the query token {token}. Extract attention of it."
        )
    return weights.isel(query=int(at[0]), drop=True)


def _token(
    ds: xr.Dataset, query: Any, prefix: int, grid: tuple[int, int]
) -> tuple[int, str | list[int]]:
    """Number of a token, and its name."""
    names = _prefix_names(ds, prefix)
    if isinstance(query, str):
        if query not in names:
            raise ArgumentError(
                f"query={query!r}: the prefix tokens are {', '.join(names) or 'none'}. Give one "
                "of these, or (row, col) of a patch."
            )
        return names.index(query), query
    place = tuple(query) if isinstance(query, tuple | list) else ()
    whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in place)
    if (
        len(place) != 2
        or not whole
        or any(not 0 <= n < most for n, most in zip(place, grid, strict=True))
    ):
        raise ArgumentError(
            f"query={query!r}: expected (row, col) with 0 <= row < {grid[0]} and 0 <= col < "
            f"{grid[1]}, or a prefix token ({', '.join(names) or 'there is none'})."
        )
    row, col = map(int, place)
    return prefix + row * grid[1] + col, [row, col]


def _prefix_names(ds: xr.Dataset, prefix: int) -> list[str]:
    if "token" in ds.coords:
        return [str(name) for name in ds["token"].values]
    if "prefix_names" in ds.attrs:
        return [name for name in str(ds.attrs["prefix_names"]).split(", ") if name]
    return [f"prefix token {i}, whose name is not recorded" for i in range(prefix)]


def _on_grid(array: xr.DataArray, prefix: int, grid: tuple[int, int]) -> xr.DataArray:
    """(..., key) -> (..., patch_row, patch_col)."""
    patches = array.isel(key=slice(prefix, None)).transpose(..., "key")
    if "key" in patches.coords:
        patches = patches.drop_vars("key")
    shape = (*patches.shape[:-1], *grid)
    out = xr.DataArray(
        patches.data.reshape(shape), dims=(*patches.dims[:-1], *_GRID), coords=patches.coords
    )
    return out.assign_coords(patch_row=np.arange(grid[0]), patch_col=np.arange(grid[1]))


def _named(array: xr.DataArray, name: str, ds: xr.Dataset, **attrs: Any) -> xr.DataArray:
    array = array.transpose(*order(array.dims)).rename(name)
    array.attrs = {**VARIABLES[name].attrs, **provenance(ds.attrs), **attrs}
    return array
