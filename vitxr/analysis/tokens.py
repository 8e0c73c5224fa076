"""Tokens of an extraction's attention: which are prefix, where patches lie, labels of rows."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, order, provenance

__all__ = [
    "GRID",
    "apply",
    "attention_of",
    "named",
    "of_query",
    "on_grid",
    "patch_queries",
    "token_number",
]

#: Labels beside the numbers of tokens.
_NAMES = ("query_token", "key_token")
GRID = ("patch_row", "patch_col")
_REMEDY = 'Extract it with variables=("activation", "attention").'


def apply(
    kernel: Callable[..., np.ndarray],
    arrays: Sequence[xr.DataArray],
    inputs: Sequence[list[str]],
    output: list[str],
    options: dict[str, Any],
    dtype: Any = None,
) -> xr.DataArray:
    """Apply a kernel along core dims, lazily to what is lazy."""
    whole = [
        # Of the variable alone: coordinates stay in memory.
        array.copy(data=array.variable.chunk({d: -1 for d in dims if d in array.dims}).data)
        if array.chunks
        else array
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


def attention_of(ds: xr.Dataset) -> tuple[xr.DataArray, int, tuple[int, int]]:
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
    # Names of tokens come back where the dims are kept: those of two layers would clash.
    return weights.drop_vars(_NAMES, errors="ignore"), prefix, grid


def query_numbers(weights: xr.DataArray) -> np.ndarray:
    """Token numbers of the queries that there are."""
    if "query" in weights.coords:
        return np.asarray(weights["query"].values)
    return np.arange(weights.sizes["query"])


def patch_queries(weights: xr.DataArray, prefix: int) -> tuple[xr.DataArray, np.ndarray]:
    """Attention of the queries that are patches, and their token numbers."""
    queries = query_numbers(weights)
    at = np.flatnonzero(queries >= prefix)
    if not len(at):
        raise DataError(
            "`attention` holds the queries of prefix tokens only; expected queries of patches. "
            "Extract attention of patches."
        )
    return weights.isel(query=at), queries[at]


def of_query(weights: xr.DataArray, token: int) -> xr.DataArray:
    """Attention of one query, by its token number."""
    at = np.flatnonzero(query_numbers(weights) == token)
    if not len(at):
        raise DataError(
            f"`attention` does not hold the query token {token}. Extract attention of it."
        )
    return weights.isel(query=int(at[0]), drop=True)


def token_number(
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


def on_grid(array: xr.DataArray, prefix: int, grid: tuple[int, int]) -> xr.DataArray:
    """(..., key) -> (..., patch_row, patch_col)."""
    patches = array.isel(key=slice(prefix, None)).transpose(..., "key")
    if "key" in patches.coords:
        patches = patches.drop_vars("key")
    shape = (*patches.shape[:-1], *grid)
    out = xr.DataArray(
        patches.data.reshape(shape), dims=(*patches.dims[:-1], *GRID), coords=patches.coords
    )
    return out.assign_coords(patch_row=np.arange(grid[0]), patch_col=np.arange(grid[1]))


def named(array: xr.DataArray, name: str, ds: xr.Dataset, **attrs: Any) -> xr.DataArray:
    """Give a result its name, the order of its dims, and its attributes."""
    array = array.transpose(*order(array.dims)).rename(name)
    kept = {n: ds[n] for n in _NAMES if n in ds.coords and set(ds[n].dims) & set(array.dims)}
    array = array.assign_coords(kept)
    array.attrs = {**VARIABLES[name].attrs, **provenance(ds.attrs), **attrs}
    return array
