"""What a model's first weights look like: filters of the patch embedding, position embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError
from vitxr.names import VARIABLES

if TYPE_CHECKING:
    from vitxr.models import Backbone

__all__ = ["patch_filters", "position_similarity"]


def patch_filters(model: Backbone) -> xr.DataArray:
    """Return the filters of the patch embedding as images.

    A token's channel ``f`` before positions is ``b[f] + sum over row, col, channel of
    filter[f, row, col, channel] * x[row, col, channel]``, with ``x`` the preprocessed patch.

    Parameters
    ----------
    model
        Model whose patch embedding is one convolution.

    Returns
    -------
    xarray.DataArray
        ``patch_filter(feature_map, row, col, channel)``, float32, a unit of a preprocessed pixel;
        ``channel`` is R, G, B.

    Raises
    ------
    ModelError
        If the patch embedding is not one convolution that steps by one patch.

    References
    ----------
    Dosovitskiy et al. (2021), An image is worth 16x16 words, ICLR, figure 7, left (which shows
    principal components of these filters).

    Examples
    --------
    >>> import vitxr
    >>> patch_filters(vitxr.load_model("digits")).sizes
    Frozen({'feature_map': 48, 'row': 4, 'col': 4, 'channel': 3})
    """
    _check(model)
    from vitxr.models.embedding import patch_filters as filters

    values = filters(model).transpose(0, 2, 3, 1)
    coords = {
        **{
            d: np.arange(n)
            for d, n in zip(("feature_map", "row", "col"), values.shape, strict=False)
        },
        "channel": list("RGB"),
    }
    return _labelled("patch_filter", values, coords, model)


def position_similarity(model: Backbone) -> xr.DataArray:
    """Compare the position embeddings of all patches by their cosine.

    ``p_i . p_j / (|p_i| |p_j|)``, with ``p`` what the model adds to the patch embedding at its
    input size (interpolated, if the model does so), found from two forward passes.

    Parameters
    ----------
    model
        Model with absolute position embeddings, learned or fixed.

    Returns
    -------
    xarray.DataArray
        ``position_similarity(patch_row, patch_col, other_row, other_col)``, float64, -1 to 1; NaN
        for patches to which zeros are added.

    Raises
    ------
    ModelError
        If nothing is added to patches, as in models with rotary or relative positions.

    References
    ----------
    Dosovitskiy et al. (2021), An image is worth 16x16 words, ICLR, figure 7, centre.

    Examples
    --------
    >>> import vitxr
    >>> s = position_similarity(vitxr.load_model("digits"))
    >>> s.sizes
    Frozen({'patch_row': 8, 'patch_col': 8, 'other_row': 8, 'other_col': 8})
    >>> round(float(s[2, 3, 2, 3]), 6)
    1.0
    """
    _check(model)
    from vitxr.models.embedding import position_embeddings

    values = position_embeddings(model).astype(np.float64)
    grid = values.shape[1:]
    with np.errstate(invalid="ignore"):
        unit = values.reshape(len(values), -1)
        unit = unit / np.linalg.norm(unit, axis=0)
    dims = ("patch_row", "patch_col", "other_row", "other_col")
    coords = {d: np.arange(n) for d, n in zip(dims, (*grid, *grid), strict=True)}
    cosine = (unit.T @ unit).clip(-1, 1).reshape(*grid, *grid)
    return _labelled("position_similarity", cosine, coords, model)


def _check(model: Any) -> None:
    from vitxr.models import Backbone

    if not isinstance(model, Backbone):
        raise ArgumentError(
            f"model is a {type(model).__name__}; expected what vitxr.load_model returns."
        )


def _labelled(name: str, values: np.ndarray, coords: dict[str, Any], model: Backbone) -> Any:
    attrs = {
        **VARIABLES[name].attrs,
        "model": model.name,
        "model_revision": model.revision,
        "model_fingerprint": model.fingerprint,
    }
    return xr.DataArray(values, coords, tuple(coords), name, attrs)
