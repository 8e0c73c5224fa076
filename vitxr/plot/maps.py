"""Pictures of responses on the patch grid: across layers and images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Words, canvas, image, left_margin, scale_for, side_bar, small, tile
from vitxr.plot._select import (
    described,
    frame,
    image_positions,
    image_titles,
    neuron_maps,
    one_per_label,
    part_of,
    variable,
    with_dims,
)
from vitxr.plot._style import SIGNED, VALUES

__all__ = ["feature_map_layers", "neuron_matrix"]

_REMEDY = "Give a neuron matrix, ds.vit.neuron_matrix(layer=0), or t.mean('shift') of a tensor t."


def feature_map_layers(
    activation: xr.DataArray | xr.Dataset,
    feature_map: int,
    *,
    images: Any = None,
    embedding: bool = True,
    title: str | None = None,
) -> Any:
    """Follow one channel on the patch grid from layer to layer, for some images.

    A row is an image, a column a block. Values are the raw block outputs, signed;
    they grow with depth, so each column has its own scale, symmetric about zero:
    the colour is the value divided by the column's largest magnitude, which is
    written above it.

    Parameters
    ----------
    activation
        Extraction Dataset or its ``activation``; the frame nearest to no shift is
        taken of a lattice.
    feature_map
        Channel number, as in the coordinate ``feature_map``, or ``channel`` where there is one.
    images
        Names or positions; by default the first image of each class, at most 6.
    embedding
        Begin with the embedding output, where the Dataset has one.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` has the drawn value and, beside it, the activation itself; NaN is blank.

    Raises
    ------
    ArgumentError
        If the channel or an image is not there.
    DataError
        If there are no activations, or each layer keeps other channels.

    References
    ----------
    The original notebook, section 3 (channel 391 of hidden states 0, 1 and 11).
    """
    array = variable(activation, "activation")
    if {"image", "feature_map", "patch_row", "patch_col"} - set(array.dims):
        raise DataError(
            "the picture needs `activation` with dims (image, layer, feature_map, patch_row, "
            f"patch_col); given: {described(activation)}. Give the extraction Dataset."
        )
    if "channel" in array.coords and array.sizes.get("layer", 1) > 1:
        raise DataError(
            "each layer keeps channels of its own, so that a feature map is another channel in "
            "each and cannot be followed across blocks. Extract channels by number, "
            "feature_maps=[5, 391], or select one layer, ds.sel(layer=[0])."
        )
    if "layer" in array.coords and np.ndim(array["layer"].values):
        layers = [int(v) for v in array["layer"].values]
    else:
        layers = list(range(array.sizes.get("layer", 1)))
    named = next((n for n in ("channel", "feature_map") if n in array.coords), None)
    known = np.ravel(array[named].values) if named else np.arange(array.sizes["feature_map"])
    found = np.flatnonzero(np.asarray(known) == feature_map)
    if not len(found):
        raise ArgumentError(
            f"feature_map={feature_map!r} is not in the data; they hold {len(known)} channels, "
            f"{known[0]} to {known[-1]}."
        )
    at = image_positions(array, images) if images is not None else one_per_label(array)
    heads = [f"block {n}" for n in layers]

    def maps(source: xr.DataArray) -> np.ndarray:
        one = frame(source.isel(feature_map=int(found[0])).isel(image=at))
        one = one if "layer" in one.dims else one.expand_dims("layer")
        return np.asarray(one.transpose("image", "layer", "patch_row", "patch_col").values)

    values = maps(array)
    if embedding and isinstance(activation, xr.Dataset) and "embedding" in activation:
        values = np.concatenate([maps(activation["embedding"]), values], axis=1)
        heads = ["embedding", *heads]
    values = values.astype(np.float32)
    largest = np.nanmax(np.abs(values), axis=(0, 2, 3), keepdims=True, initial=0)
    relative = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    relative[np.isnan(values)] = np.nan
    gap = max(1, round(0.09 * values.shape[3]))
    mosaic, tiles = tile(relative, gap=gap)
    raw, _ = tile(values, gap=gap)
    scale = scale_for(tiles.shape[1], largest=0.85, cell=values.shape[3], room=5.6)
    picture = image(
        mosaic,
        "Activation / column's largest",
        cmap=SIGNED,
        clim=(-1.0, 1.0),
        hook=side_bar("Activation / column's largest", tiles, scale, ticks=[-1, 0, 1], length=1.5),
        extra={"activation": raw},
    )
    edge = 0.05 / scale
    names = image_titles(array, at)
    top = [(tiles.x(j), -0.5 - edge - 0.11 / scale, name) for j, name in enumerate(heads)]
    span = [(tiles.x(j), -0.5 - edge, f"±{_number(v)}") for j, v in enumerate(largest.ravel())]
    words = [
        Words(top, va="bottom"),
        small(span, va="bottom", color="#555555"),
        Words([(-0.5 - edge, tiles.y(i), n) for i, n in enumerate(names)], ha="right"),
    ]
    return canvas(
        [picture, *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(left_margin(names), 0.3, 0.75, 0.04),
        title=title
        or part_of(
            f"Channel {feature_map} across blocks",
            (len(at), array.sizes["image"] if images is None else 0, "images"),
        ),
    )


def neuron_matrix(
    matrix: xr.DataArray, *, title: str = "Neuron matrix: mean response over shifts"
) -> Any:
    """Draw a neuron matrix as maps: a row an image, a column a feature map.

    Every number of the matrix is one pixel, at its place on the patch grid.

    Parameters
    ----------
    matrix
        (neuron, image), with the neurons' ``feature_map, patch_row, patch_col``.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the matrix.

    References
    ----------
    The original notebook, section 7.1.
    """
    matrix = with_dims(matrix, "activation", ("neuron", "image"), _REMEDY)
    maps, numbers = neuron_maps(matrix)
    values = maps.transpose("image", "feature_map", "patch_row", "patch_col").values
    mosaic, tiles = tile(values, gap=1)
    scale = scale_for(tiles.shape[1], largest=0.6, cell=values.shape[3], room=5.9)
    high = float(np.nanmax(values)) or 1.0
    low = min(0.0, float(np.nanmin(values)))
    picture = image(
        mosaic,
        "Mean response",
        cmap=VALUES,
        clim=(low, high),
        hook=side_bar("Mean response", tiles, scale),
    )
    edge = 0.05 / scale
    names = image_titles(matrix, list(range(matrix.sizes["image"])))
    # one name a row as long as a row is as high as the letters
    every = max(1, math.ceil(0.085 / ((tiles.height + 1) * scale)))
    words = [
        Words(
            [(-0.5 - edge, tiles.y(i), n) for i, n in enumerate(names) if i % every == 0],
            ha="right",
        ),
        small([(tiles.x(j), -0.5 - edge, n) for j, n in enumerate(numbers)], va="bottom"),
        Words(
            [((tiles.shape[1] - 1) / 2, -0.5 - 0.17 / scale, "feature map (channel)")], va="bottom"
        ),
    ]
    return canvas(
        [picture, *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(left_margin(names), 0.32, 0.75, 0.04),
        title=title,
    )


def _number(value: float) -> str:
    """Three significant digits, no trailing zeros, no exponent where it is short without."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
