"""Attention rollout: attention traced through the layers, the residual stream included."""

from __future__ import annotations

import numbers
from typing import Literal

import numpy as np
import xarray as xr

from vitxr.analysis._blas import one_thread
from vitxr.analysis.tokens import apply, attention_of, named, on_grid, token_number
from vitxr.errors import ArgumentError, DataError

__all__ = ["attention_rollout"]

_FUSIONS = {"mean": np.add, "max": np.maximum, "min": np.minimum}


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
        lazy if ``attention`` is. NaN where a weight that enters the product is.

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
    weights, prefix, grid = attention_of(ds)
    tokens = weights.sizes["key"]
    if weights.sizes["query"] != tokens:
        raise DataError(
            f"`attention` holds {weights.sizes['query']} of {tokens} queries; the rollout goes "
            "through all of them. Extract attention without a selection of queries."
        )
    heads = int(ds.attrs.get("heads", weights.sizes["head"]))
    if weights.sizes["head"] != heads:
        raise DataError(
            f"`attention` holds {weights.sizes['head']} of {heads} heads; the rollout fuses all of "
            "them. Extract attention without a selection of heads."
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
    token, label = (None, "all") if query is None else token_number(ds, query, prefix, grid)
    steps = [weights.isel(layer=i, drop=True) for i in range(weights.sizes["layer"])]
    options = {"fusion": fusion, "residual": float(residual)}
    if token is None:
        out = apply(_mixed, [steps[0]], [["head", "query", "key"]], ["query", "key"], options)
        for step in steps[1:]:
            inner = out.rename(query="between", key="to")
            out = apply(
                _through, [step, inner], [["head", "query", "key"], ["between", "to"]],
                ["query", "to"], options,
            ).rename(to="key")  # fmt: skip
    else:
        # Of the last layer the token's own row alone, so that no other row's NaN comes in.
        top = steps.pop().isel(query=[token])
        out = apply(
            _row, [top], [["head", "query", "key"]], ["key"], {**options, "token": token}
        ).rename(key="to")
        for step in reversed(steps):
            out = apply(
                _back, [step, out], [["head", "query", "key"], ["to"]], ["key"], options
            ).rename(key="to")
        out = out.rename(to="key")
        out = on_grid(out, prefix, grid)
    spans = {} if not len(layers) else {"layers": f"{layers[0]} to {layers[-1]}"}
    return named(out, "rollout", ds, query=label, **options, **spans)


# Kernels: plain arrays, leading dims are passed through.


def _fused(weights: np.ndarray, fusion: str) -> np.ndarray:
    heads = np.moveaxis(weights, -3, 0)
    out = heads[0].astype(np.result_type(weights.dtype, np.float32))
    # Head by head into the same memory: three times as fast as a reduction over an inner axis.
    for head in heads[1:]:
        _FUSIONS[fusion](out, head, out=out)
    if fusion == "mean":
        out /= len(heads)
    return out


def _mixed(weights: np.ndarray, fusion: str, residual: float) -> np.ndarray:
    """Fuse (..., head, query, key) over heads, mix the identity in, divide rows by their sums."""
    out = _fused(weights, fusion) * (1 - residual)
    at = np.arange(out.shape[-1])
    out[..., at, at] += residual
    out /= out.sum(-1, keepdims=True)
    return out


def _through(weights: np.ndarray, before: np.ndarray, fusion: str, residual: float) -> np.ndarray:
    """Go on from the rollout up to the layer before: ``N((1 - r) W + r I) @ before``."""
    out = np.empty_like(before)
    with one_thread():
        for frame in np.ndindex(*before.shape[:-2]):  # each stays in the cache
            fused = _fused(weights[frame], fusion)
            here = np.matmul(fused, before[frame], out=out[frame])
            here *= 1 - residual
            here += residual * before[frame]
            here /= (1 - residual) * fused.sum(-1, keepdims=True) + residual
    return out


def _row(weights: np.ndarray, fusion: str, residual: float, token: int) -> np.ndarray:
    """Return one token's row of ``N((1 - r) W + r I)``; ``weights`` are (..., head, 1, key)."""
    out = _fused(weights, fusion)[..., 0, :] * (1 - residual)
    out[..., token] += residual
    out /= out.sum(-1, keepdims=True)
    return out


def _back(weights: np.ndarray, row: np.ndarray, fusion: str, residual: float) -> np.ndarray:
    """Go one layer down: ``row @ N((1 - r) W + r I)``, without making that matrix."""
    fused = _fused(weights, fusion)
    row = row / ((1 - residual) * fused.sum(-1) + residual)
    out = (1 - residual) * (row[..., None, :].astype(fused.dtype) @ fused)[..., 0, :]
    return (out + residual * row).astype(fused.dtype)
