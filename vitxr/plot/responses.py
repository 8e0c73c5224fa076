"""Pictures of responses across shifts: frames side by side, and the mean of each map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Words, canvas, image, left_margin, scale_for, side_bar, small, tile
from vitxr.plot._select import (
    described,
    image_positions,
    image_titles,
    lattice_offsets,
    neuron_maps,
    one_per_label,
    part_of,
    variable,
    with_dims,
)
from vitxr.plot._style import SMALL, VALUES

__all__ = ["activity", "filmstrip"]


def filmstrip(
    tensor: xr.DataArray | xr.Dataset,
    feature_map: int,
    *,
    image_at: int | str = 0,
    every: int = 1,
    title: str | None = None,
) -> Any:
    """Lay the response of one feature map out over the shifts: a patch map a frame.

    The frames stand where their shifts stand on the lattice: one row down is the
    next vertical shift, one column to the right the next horizontal one. A map
    that follows the stimulus moves with it from frame to frame.

    Parameters
    ----------
    tensor
        Neuron tensor (neuron, image, shift), or a Dataset that holds it as ``activation``.
    feature_map
        Channel number, one of those in the tensor.
    image_at
        Name or position of the image.
    every
        Show every so many shifts only, in both directions.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the responses.

    References
    ----------
    The original notebook, section 7 (the loop over 484 frames).
    """
    remedy = "Give a neuron tensor, ds.vit.neuron_tensor(layer=0)."
    tensor = with_dims(tensor, "activation", ("neuron", "image", "shift"), remedy)
    if not isinstance(every, int | np.integer) or every < 1:
        raise ArgumentError(f"every={every!r}: expected a positive integer.")
    if "feature_map" not in tensor.coords:
        raise DataError(f"the neurons have no coordinate `feature_map`. {remedy}")
    numbers = tensor["feature_map"].values
    chosen = np.flatnonzero(numbers == feature_map)
    if not len(chosen):
        have = ", ".join(str(int(v)) for v in pd.unique(numbers))
        raise ArgumentError(f"feature_map={feature_map!r} is not in the tensor; it has {have}.")
    at = image_positions(tensor, image_at)[0]
    maps, _ = neuron_maps(tensor.isel(neuron=chosen, image=at, drop=True).compute())
    flat = maps.isel(feature_map=0).assign_coords(
        shift_y=("shift", tensor["shift_y"].values), shift_x=("shift", tensor["shift_x"].values)
    )
    values, _, _ = _on_lattice(flat)
    values = values[::every, ::every]
    mosaic, tiles = tile(values, gap=1)
    scale = scale_for(tiles.shape[1], largest=0.5, cell=values.shape[3], room=5.9)
    high = float(np.nanmax(values)) or 1.0
    picture = image(
        mosaic,
        "Response",
        cmap=VALUES,
        clim=(min(0.0, float(np.nanmin(values))), high),
        hook=side_bar("Response", tiles, scale),
    )
    return canvas(
        [picture, *_lattice_words(tensor, tiles, scale, every)],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.5, 0.32, 0.7, 0.04),
        title=title
        or f"Feature map {feature_map}, image {image_titles(tensor, [at])[0]}, across shifts",
    )


def _on_lattice(array: xr.DataArray) -> tuple[np.ndarray, int, int]:
    """Values with dims (shift_y, shift_x, ...) of an array whose ``shift`` is stacked and last."""
    at_y, at_x, (ny, nx) = lattice_offsets(array)
    values = np.asarray(array.transpose("shift", ...).values)
    out = np.full((ny, nx, *values.shape[1:]), np.nan, dtype=np.float32)
    out[at_y, at_x] = values
    return out, int(ny), int(nx)


def _lattice_words(tensor: xr.DataArray, tiles: Any, scale: float, every: int) -> list[Words]:
    """Offsets at the left of the rows and above the columns of a mosaic of shifts."""
    at_y, at_x, (ny, nx) = lattice_offsets(tensor)
    edge = 0.05 / scale
    known = "offset_y" in tensor.coords and "offset_x" in tensor.coords
    unit = "px" if known else "lattice step"
    named = ("offset_y", "offset_x") if known else ("shift_y", "shift_x")
    dy, dx = (np.broadcast_to(tensor[n].values, tensor.sizes["shift"]) for n in named)
    rows = [int(dy[at_y == i][0]) for i in range(0, ny, every)]
    # under "raster" a column has no single horizontal offset: number the columns
    straight = all(len(set(dx[at_x == j])) == 1 for j in range(nx))
    cols = [int(dx[at_x == j][0]) if straight else j for j in range(0, nx, every)]
    across = f"dx ({unit})" if straight else "column of the raster"
    middle = ((tiles.shape[1] - 1) / 2, -0.5 - 0.17 / scale, across)
    return [
        small([(-0.5 - edge, tiles.y(i), v) for i, v in enumerate(rows)], ha="right"),
        small([(tiles.x(j), -0.5 - edge, v) for j, v in enumerate(cols)], va="bottom"),
        Words([middle], va="bottom"),
        Words(
            [(-0.5 - 0.3 / scale, (tiles.shape[0] - 1) / 2, f"dy ({unit})")], ha="center", angle=90
        ),
    ]


def activity(
    array: xr.DataArray | xr.Dataset,
    *,
    images: Any = None,
    most: int = 24,
    title: str = "Mean activity of each feature map across shifts",
) -> Any:
    """Show how the mean activity of each feature map changes as the image is shifted.

    A column is a feature map, a row an image; each small map is the shift
    lattice, a vertical shift a row and a horizontal shift a column. A column has
    its own scale, from its least to its largest value over the images shown,
    both written above it, because maps differ in level far more than they vary.

    Parameters
    ----------
    array
        Neuron tensor (neuron, image, shift), or the activity (image, shift_y,
        shift_x, [layer,] feature_map).
    images
        Names or positions; by default the first image of each class, at most 6: the
        title says how many of how many.
    most
        Feature maps shown at most, the first ones.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` has the drawn value and, beside it, the activity itself.

    References
    ----------
    The original notebook, section 5 (``plot_activity``).
    """
    array = _activity_of(array)
    at = image_positions(array, images) if images is not None else one_per_label(array)
    names = image_titles(array, at)
    maps = _activity_on_lattice(array.isel(image=at))
    whole = maps.sizes["feature_map"]
    maps = maps.isel(feature_map=slice(most))
    values = np.asarray(maps.values, dtype=np.float64)
    least = np.nanmin(values, axis=(0, 2, 3), keepdims=True)
    largest = np.nanmax(values, axis=(0, 2, 3), keepdims=True)
    spread = largest - least
    relative = np.divide(values - least, spread, out=np.zeros_like(values), where=spread > 0)
    relative[np.isnan(values)] = np.nan
    gap = max(1, round(0.1 * values.shape[3]))
    mosaic, tiles = tile(relative, gap=gap)
    raw, _ = tile(values, gap=gap)
    scale = scale_for(tiles.shape[1], largest=0.6, cell=values.shape[3], room=5.9)
    picture = image(
        mosaic,
        "Activity, column's range",
        cmap=VALUES,
        clim=(0.0, 1.0),
        hook=side_bar(
            "Activity", tiles, scale, ticks=[0, 1], ticklabels=["least", "largest"], length=1.0
        ),
        extra={"activity": raw},
    )
    edge = 0.05 / scale
    spans = [[f"{v:.2g}" for v in row.ravel()] for row in (least, largest)]
    # numbers wider than their column are written upwards
    inches = max(len(text) for row in spans for text in row) * SMALL / 72 * 0.64 + 0.03
    upright = inches > tiles.width * scale + gap * scale
    line = (inches if upright else 0.095) / scale
    angle = 90.0 if upright else 0.0
    base = -0.5 - edge
    heads = [
        (tiles.x(j), base - 2 * line, int(n)) for j, n in enumerate(maps["feature_map"].values)
    ]
    words = [Words(heads, va="bottom")]
    for k, row in enumerate(spans):
        items = [(tiles.x(j), base - k * line, text) for j, text in enumerate(row)]
        words.append(small(items, va="bottom", color="#555555", angle=angle))
    side = [(base, base - (k + 0.5) * line, t) for k, t in enumerate(("least", "largest"))]
    side.append((base, base - 2 * line - 0.05 / scale, "feature map"))
    words += [
        small(side, ha="right", color="#555555"),
        Words([(base, tiles.y(i), n) for i, n in enumerate(names)], ha="right"),
    ]
    return canvas(
        [picture, *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(max(0.62, left_margin(names)), 0.19 + 2 * line * scale, 0.75, 0.04),
        title=part_of(
            title,
            (len(at), array.sizes["image"] if images is None else 0, "images"),
            (maps.sizes["feature_map"], whole, "feature maps"),
        ),
    )


def _activity_of(array: xr.DataArray | xr.Dataset) -> xr.DataArray:
    """Take the array to show: a neuron tensor, or the activity already averaged."""
    remedy = "Give a neuron tensor, ds.vit.neuron_tensor(layer=0), or ds.vit.activity()."
    if isinstance(array, xr.Dataset):
        array = variable(array, "activity" if "activity" in array else "activation", remedy)
    dims = set(getattr(array, "dims", ()))
    if dims == {"neuron", "image"}:
        raise DataError(
            "the neuron matrix has no shifts to show activity across: give the neuron tensor."
        )
    averaged = {"image", "shift_y", "shift_x", "feature_map"}
    if dims not in ({"neuron", "image", "shift"}, averaged, averaged | {"layer"}):
        raise DataError(
            "the picture needs an array with dims (neuron, image, shift) or (image, shift_y, "
            f"shift_x, [layer,] feature_map); given: {described(array)}. {remedy}"
        )
    return array


def _activity_on_lattice(array: xr.DataArray) -> xr.DataArray:
    """Mean over patches as (image, feature_map, shift_y, shift_x)."""
    if "neuron" not in array.dims:
        if "layer" in array.dims:
            if array.sizes["layer"] > 1:
                raise ArgumentError(
                    f"the activity has {array.sizes['layer']} layers; select one, "
                    "activity.sel(layer=0)."
                )
            array = array.isel(layer=0)
        return array.transpose("image", "feature_map", "shift_y", "shift_x")
    numbers = pd.unique(array["feature_map"].values)
    of = pd.Index(numbers).get_indexer(array["feature_map"].values)
    values = np.asarray(array.transpose("neuron", "image", "shift").values)
    mean = np.stack([values[of == k].mean(axis=0, dtype=np.float64) for k in range(len(numbers))])
    at_y, at_x, (ny, nx) = lattice_offsets(array)
    out = np.full((array.sizes["image"], len(numbers), ny, nx), np.nan)
    out[:, :, at_y, at_x] = mean.swapaxes(0, 1)
    coords = {n: array[n] for n in ("image", "label") if n in array.coords}
    return xr.DataArray(
        out,
        dims=("image", "feature_map", "shift_y", "shift_x"),
        coords={**coords, "feature_map": numbers},
    )
