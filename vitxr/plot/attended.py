"""Where on the image: attention of a token, rollout, relevance, masks of mass."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.plot._facets import draw, taken

__all__ = ["attention_map", "attention_rollout", "mass_mask", "relevance"]

_ATTENTION = 'Extract variables=["attention"] and give '


def _token(array: xr.DataArray) -> tuple[str, tuple[int, int] | None]:
    """Name of the token that attends, and its place if it is a patch."""
    query = array.attrs.get("query")
    if query is None or isinstance(query, str):
        return f"the {query or 'class'} token", None
    row, col = (int(v) for v in np.atleast_1d(query))
    return f"patch ({row}, {col})", (row, col)


def attention_map(m: xr.DataArray, *, pixels: Any = None, title: str | None = None) -> Any:
    """Draw the attention of one token on the patch grid: heads, layers, images or shifts as facets.

    Of the dims besides the grid, one makes a row of facets, two are rows and columns, in
    the order (image, shift_y, shift_x, layer, head). All facets share one scale, from 0; a
    patch that attends is outlined.

    Parameters
    ----------
    m
        ``attention_map`` ([image, shift_y, shift_x, layer, head,] patch_row, patch_col), from
        ``ds.vit.attention_map((2, 4))``. At most two dims may be longer than one. Of lazy
        data only what is selected is computed.
    pixels
        Stimuli, by which the maps lie over their images, greyed and shifted as the map was;
        the images stand in a column of their own as well. They are resized and cropped as
        for the model if the maps say how (``preprocess_settings``).
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the maps, a patch a pixel.

    Raises
    ------
    ArgumentError
        If more than two dims are longer than one.
    DataError
        If there is no patch grid.

    Examples
    --------
    >>> m = xr.DataArray(np.ones((2, 3, 4)) / 12, dims=("head", "patch_row", "patch_col"))
    >>> attention_map(m).Image.I.dimension_values(2, flat=False).shape  # a gap between them
    (3, 9)
    """
    m = taken(m, "attention_map", _ATTENTION + "ds.vit.attention_map().")
    who, place = _token(m)
    return draw(
        m, "Attention weight", title=title or f"Attention of {who}", pixels=pixels, boxes=place
    )


def attention_rollout(r: xr.DataArray, *, pixels: Any = None, title: str | None = None) -> Any:
    """Draw the attention rollout of one token on the patch grid.

    Parameters
    ----------
    r
        ``rollout`` ([image, shift_y, shift_x,] patch_row, patch_col), from
        ``ds.vit.attention_rollout()``. Several rollouts, such as of each fusion of the heads,
        are facets if they are concatenated along a dimension.
    pixels, title
        As for :func:`attention_map`.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the maps, a patch a pixel; one scale, from 0.
    """
    r = taken(r, "rollout", _ATTENTION + "ds.vit.attention_rollout().")
    who, place = _token(r)
    return draw(
        r, "Rollout", title=title or f"Attention rollout of {who}", pixels=pixels, boxes=place
    )


def relevance(r: xr.DataArray | xr.Dataset, *, pixels: Any = None, title: str | None = None) -> Any:
    """Draw which patches speak for a class: images as rows, classes as columns.

    Values for different images and classes are on no common scale, so that each panel
    is divided by its own largest value.

    Parameters
    ----------
    r
        Dataset of :func:`vitxr.analysis.relevance`, or its ``relevance`` ([image, shift_y,
        shift_x,] patch_row, patch_col[, class]).
    pixels, title
        As for :func:`attention_map`.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` has the drawn value and, beside it as ``value``, the relevance itself.
    """
    array = taken(r, "relevance", "Give what vitxr.analysis.relevance(stim, model) returns.")
    return draw(
        array, "Relevance / panel's largest", title=title or "Relevance", pixels=pixels,
        relative=True, clim=(0.0, 1.0),
    )  # fmt: skip


def mass_mask(mask: xr.DataArray, *, pixels: Any = None, title: str | None = None) -> Any:
    """Draw the fewest patches that hold a share of a map's sum.

    Parameters
    ----------
    mask
        ``mass_mask`` (..., patch_row, patch_col), bool, from ``m.vit.mass_mask(0.6)``.
    pixels, title
        As for :func:`attention_map`; the patches that are kept are orange.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` has 1 where the patch is kept and 0 elsewhere.
    """
    mask = taken(mask, "mass_mask", "Give m.vit.mass_mask() of a map on the patch grid.")
    share = f" with {float(mask.attrs['mass']):.0%} of the sum" if "mass" in mask.attrs else ""
    paper = "#00000000" if pixels is not None else "#dcdcdc"
    return draw(
        mask, "Kept", title=title or f"Fewest patches{share}", pixels=pixels,
        cmap=[paper, "#e69f00"], clim=(0.0, 1.0), colorbar=False, pale=False,
    )  # fmt: skip
