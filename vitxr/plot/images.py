"""Pictures of the stimuli: the images and their shifts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Words, canvas, scale_for, small, tile
from vitxr.plot._select import (
    described,
    image_positions,
    image_titles,
    labels_of,
    part_of,
    variable,
)
from vitxr.plot._style import TEXT, holoviews, shorten, styled
from vitxr.stimuli.framing import framed

__all__ = ["one_image", "rgb_bytes", "rgb_element", "seen", "shifts", "stimuli"]

#: Pixels along the longer side of an image in a mosaic, at most.
_TILE = 256


def rgb_bytes(pixels: np.ndarray) -> np.ndarray:
    """Any image or stack of images as RGBA bytes: grey is repeated, alpha kept."""
    if pixels.dtype != np.uint8:
        raise ArgumentError(
            f"pixels have dtype {pixels.dtype}; expected uint8 (0 to 255). "
            "Scale them and cast before drawing."
        )
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    if pixels.shape[-1] == 4:
        return pixels
    opaque = np.full((*pixels.shape[:-1], 1), 255, np.uint8)
    return np.concatenate([pixels, opaque], axis=-1)


def rgb_element(pixels: np.ndarray, size: tuple[float, float] | None = None) -> Any:
    """Draw RGBA bytes as ``hv.RGB``, stretched over ``size`` (width, height) mosaic pixels."""
    hv = holoviews()
    rows, cols = pixels.shape[:2]
    width, height = size or (cols, rows)
    bounds = (-0.5, -0.5, width - 0.5, height - 0.5)
    element = hv.RGB(
        pixels[::-1],
        bounds=bounds,
        kdims=["x", "y"],
        vdims=[*hv.RGB.vdims, hv.RGB.alpha_dimension],
    )
    many = max(pixels.shape) > 1200
    return styled(element, mpl={"interpolation": "antialiased" if many else "nearest"})


def one_image(stim: Any, at: int, name: str | None = None, limit: int | None = None) -> np.ndarray:
    """Pixels of one image as RGBA bytes, from wherever the stimuli keep them.

    Parameters
    ----------
    stim
        Stimuli, with ``pixels`` or with files or ``encoded`` images of any size; or
        ``pixels`` alone.
    at, name
        Position of the image, and its name if it is known: that goes first.
    limit
        Reduce the image to this many pixels along its longer side if it has more.
    """
    if "image" in stim.dims:
        names = [str(v) for v in stim["image"].values] if "image" in stim.coords else []
        if name is not None and names and name not in names:
            raise ArgumentError(
                f"the stimuli have no image {name!r}; they have {', '.join(names[:6])}"
                f"{', ...' if len(names) > 6 else ''}. Give the stimuli that were extracted."
            )
        at = names.index(name) if name in names else at
    if isinstance(stim, xr.Dataset) and "pixels" not in stim:
        from vitxr.stimuli import read_image

        pixels = read_image(stim, at)
    else:
        array = variable(stim, "pixels")
        if {"row", "col", "channel"} - set(array.dims):
            raise DataError(
                "pixels must have dims ([image,] row, col, channel); given: "
                f"{described(stim)}. Give stimuli from open_images."
            )
        array = array.isel(image=at) if "image" in array.dims else array
        pixels = np.asarray(array.transpose("row", "col", "channel").values)
    rgba = rgb_bytes(pixels)
    return rgba if limit is None or max(rgba.shape) <= limit else _resized(rgba, limit)


def seen(pixels: Any, of: Any, at: int) -> np.ndarray:
    """One image as the model took it, RGBA bytes.

    Parameters
    ----------
    pixels
        Stimuli, of which the image is read, then resized and cropped as the attribute
        ``preprocess_settings`` of `of` says, if it has one; or the image itself, (row, col,
        channel), as the model took it.
    of
        What was computed from it: an array or Dataset.
    at
        Position of the image in `of`.
    """
    if not isinstance(pixels, xr.DataArray | xr.Dataset):
        return rgb_bytes(np.asarray(pixels))
    name = str(np.atleast_1d(of["image"].values)[at]) if "image" in of.coords else None
    rgba = one_image(pixels, at, name)
    if "preprocess_settings" in of.attrs:
        rgba = framed(rgba, of.attrs["preprocess_settings"])
    return rgba if max(rgba.shape) <= 512 else _resized(rgba, 512)


def _resized(rgba: np.ndarray, side: int) -> np.ndarray:
    """Scale so that the longer side is ``side``, the aspect kept."""
    from PIL import Image

    height, width = rgba.shape[:2]
    share = side / max(height, width)
    size = max(1, round(width * share)), max(1, round(height * share))
    how = Image.Resampling.LANCZOS if share < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(rgba).resize(size, how))


def _choice(stim: xr.Dataset, images: Any, most: int) -> list[int]:
    """Positions of the images to draw: those asked for, else the first of each class."""
    if images is not None:
        return image_positions(stim, images)
    labels = np.asarray(labels_of(stim), dtype=object)
    if len(labels) <= most:
        return list(range(len(labels)))
    # the place of each image within its class: the first of all classes go first
    turn = np.empty(len(labels), dtype=int)
    for one in pd.unique(labels):
        members = np.flatnonzero(labels == one)
        turn[members] = np.arange(len(members))
    return sorted(np.argsort(turn, kind="stable")[:most].tolist())


def stimuli(
    stim: xr.Dataset,
    *,
    images: Any = None,
    most: int = 96,
    columns: int | None = None,
    title: str = "Stimuli",
) -> Any:
    """Mosaic of the images with their labels, row by row.

    Images are read one by one, and none is drawn with more than 256 pixels along
    its longer side. Images that differ in size are fitted into equal tiles, each
    with its own aspect.

    Parameters
    ----------
    stim
        Stimuli from :func:`vitxr.open_images`: with ``pixels`` (image, row, col,
        channel) uint8, or files of any size.
    images
        Names or positions; by default as many as `most`, evenly over the classes.
    most
        Images drawn at most, unless `images` says which. The title says how many
        of how many are shown.
    columns
        Images a row; by default the images of a class where classes have one
        size and stand together, else about as many columns as rows.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        One ``RGB`` with every image, and the labels below them.

    Raises
    ------
    DataError
        If there are no images.
    ImageError
        If the file of an image cannot be read, or has changed.

    Examples
    --------
    >>> stim = xr.Dataset({"pixels": (("image", "row", "col", "channel"),
    ...     np.zeros((2, 4, 4, 3), np.uint8))}, coords={"image": ["a", "b"]})
    >>> stimuli(stim).Labels.I.dimension_values("text").tolist()
    ['a', 'b']
    """
    if not isinstance(stim, xr.Dataset) or "image" not in stim.dims:
        raise DataError(
            f"expected stimuli, a Dataset with the dimension `image`; given: {described(stim)}. "
            "Make one with open_images."
        )
    whole = stim.sizes["image"]
    if whole == 0:
        raise DataError("there are no images to draw: the dimension `image` is empty.")
    at = _choice(stim, images, most)
    shown = stim.isel(image=at)
    if "pixels" in stim:
        rgba = [one_image(shown, i, limit=_TILE) for i in range(len(at))]
    else:
        sizes = np.maximum(shown["height"].values, shown["width"].values)
        side = int(min(_TILE, sizes.max()))
        rgba = [_resized(one_image(shown, i, limit=_TILE), side) for i in range(len(at))]
    count = len(at)
    labels = labels_of(shown)
    if columns is None:
        runs = 1 + sum(a != b for a, b in pairwise(labels))
        even = count % runs == 0 and len(set(labels)) == runs and 1 < runs < count
        columns = count // runs if even else math.ceil(math.sqrt(count * 1.6))
        columns = columns if columns <= 12 else math.ceil(math.sqrt(count * 1.6))
    rows = math.ceil(count / columns)
    height, width = (max(one.shape[k] for one in rgba) for k in (0, 1))
    cells = np.zeros((rows * columns, height, width, 4), np.uint8)
    for cell, one in zip(cells, rgba, strict=False):
        top, left = (height - one.shape[0]) // 2, (width - one.shape[1]) // 2
        cell[top : top + one.shape[0], left : left + one.shape[1]] = one
    scale = scale_for(columns * width * 1.12, largest=0.75, cell=max(width, height))
    gap = max(1, math.ceil(0.25 / scale))  # room for the label
    mosaic, tiles = tile(cells.reshape(rows, columns, height, width, 4), gap=gap, fill=0)
    scale = min(scale, 7.2 / tiles.shape[1])
    edge = 0.03 / scale
    fits = int(width * scale / (TEXT / 72 * 0.6))
    words = labels if any(labels) else image_titles(shown, list(range(count)))
    text = [
        (tiles.x(i % columns), tiles.y(i // columns) + height / 2 + edge, shorten(word, fits))
        for i, word in enumerate(words)
    ]
    return canvas(
        [rgb_element(mosaic), Words(text, va="top")],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.03, 0.03, 0.03, 0.2),
        title=part_of(title, (count, whole, "images")),
    )


def shifts(
    pixels: xr.DataArray | np.ndarray,
    offset_y: Any,
    offset_x: Any,
    *,
    title: str = "Circular shifts",
) -> Any:
    """Draw one image shifted circularly over a lattice, the offsets written.

    Frame (i, j) is ``numpy.roll(pixels, (dy, dx), axis=(0, 1))``: down and to the
    right, what leaves on one side enters on the other.

    Parameters
    ----------
    pixels
        One image (row, col, channel) or (row, col), uint8, at the size at which
        it is shifted.
    offset_y, offset_x
        Pixels. One-dimensional: a row of the picture a vertical offset, a column
        a horizontal one. Two-dimensional (scheme ``"raster"``): one pair a frame.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        One ``RGB`` with every frame, and the offsets.

    Examples
    --------
    >>> picture = shifts(np.eye(4, dtype=np.uint8), [0, 2], [0])
    >>> list(picture.Labels.I.dimension_values("text"))
    ['dx 0 px']
    """
    values = np.asarray(pixels)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3:
        raise ArgumentError(
            f"pixels have shape {values.shape}; expected one image, (row, col, channel)."
        )
    dy, dx = np.asarray(offset_y, dtype=int), np.asarray(offset_x, dtype=int)
    lattice = dy.ndim == dx.ndim == 1
    if lattice:
        dy, dx = np.meshgrid(dy, dx, indexing="ij")
    if dy.ndim != 2 or dy.shape != dx.shape:
        raise ArgumentError(
            f"offset_y has shape {dy.shape} and offset_x {dx.shape}; expected two 1-D arrays (a "
            "lattice) or two 2-D arrays of one shape."
        )
    rgba = rgb_bytes(values)
    rows, cols = dy.shape
    height, width = rgba.shape[:2]
    frames = np.empty((rows, cols, height, width, 4), np.uint8)
    for i in range(rows):
        for j in range(cols):
            frames[i, j] = np.roll(rgba, (dy[i, j], dx[i, j]), axis=(0, 1))
    scale = scale_for(cols * width * 1.06 + width * 0.5, largest=0.9, cell=max(width, height))
    gap = max(1, math.ceil((0.06 if lattice else 0.2) / scale))
    mosaic, tiles = tile(frames, gap=gap, fill=0)
    edge = 0.04 / scale
    if lattice:
        words = [
            Words(
                [(tiles.x(j), -0.5 - edge, f"dx {dx[0, j]} px") for j in range(cols)], va="bottom"
            ),
            Words(
                [(-0.5 - edge, tiles.y(i), f"dy {dy[i, 0]} px") for i in range(rows)], ha="right"
            ),
        ]
        margins = (0.62, 0.2, 0.03, 0.03)
    else:
        text = [
            (tiles.x(j), tiles.y(i) + height / 2 + edge, f"{dy[i, j]}, {dx[i, j]}")
            for i in range(rows)
            for j in range(cols)
        ]
        words = [
            small(text, va="top"),
            Words([(-0.5, -0.5 - edge, "dy, dx (px)")], ha="left", va="bottom"),
        ]
        margins = (0.03, 0.2, 0.03, 0.2)
    return canvas(
        [rgb_element(mosaic), *words],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=margins,
        title=title,
    )
