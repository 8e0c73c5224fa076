"""Pictures of the stimuli: the images, their shifts, what the model says they are."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Words, canvas, image, scale_for, small, tile
from vitxr.plot._select import frame, image_positions, labels_of, variable
from vitxr.plot._style import SMALL, TEXT, VALUES, bar, holoviews, styled

__all__ = ["predictions", "shifts", "stimuli"]


def _rgb(pixels: np.ndarray) -> np.ndarray:
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


def _pixels(stim: xr.Dataset | xr.DataArray) -> xr.DataArray:
    if isinstance(stim, xr.Dataset) and "pixels" not in stim:
        raise DataError(
            "the stimuli have no `pixels`: the files differ in size. "
            "Open them at one size, open_images(source, size=224), to draw them."
        )
    return variable(stim, "pixels").transpose(..., "row", "col", "channel")


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(1, limit - 1)] + "…"


def stimuli(stim: xr.Dataset, *, columns: int | None = None, title: str = "Stimuli") -> Any:
    """Mosaic of the images with their labels, row by row.

    Parameters
    ----------
    stim
        Stimuli with ``pixels`` (image, row, col, channel) uint8.
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
        If the images differ in size, so that there are no ``pixels``.

    Examples
    --------
    >>> stim = xr.Dataset({"pixels": (("image", "row", "col", "channel"),
    ...     np.zeros((2, 4, 4, 3), np.uint8))}, coords={"image": ["a", "b"]})
    >>> stimuli(stim).Labels.I.dimension_values("text").tolist()
    ['a', 'b']
    """
    pixels = _pixels(stim)
    count = pixels.sizes["image"]
    if count == 0:
        raise DataError("there are no images to draw: the dimension `image` is empty.")
    labels = labels_of(stim)
    if columns is None:
        runs = 1 + sum(a != b for a, b in pairwise(labels))
        even = count % runs == 0 and len(set(labels)) == runs and 1 < runs < count
        columns = count // runs if even else math.ceil(math.sqrt(count * 1.6))
        columns = columns if columns <= 12 else math.ceil(math.sqrt(count * 1.6))
    rows = math.ceil(count / columns)
    rgba = _rgb(np.asarray(pixels.values))
    height, width = rgba.shape[1:3]
    cells = np.zeros((rows * columns, height, width, 4), np.uint8)
    cells[:count] = rgba
    scale = scale_for(columns * width * 1.12, largest=0.75, cell=max(width, height))
    gap = max(1, math.ceil(0.25 / scale))  # room for the label
    mosaic, tiles = tile(cells.reshape(rows, columns, height, width, 4), gap=gap, fill=0)
    scale = min(scale, 7.2 / tiles.shape[1])
    edge = 0.03 / scale
    fits = int(width * scale / (TEXT / 72 * 0.6))
    words = labels if any(labels) else [str(v) for v in stim["image"].values]
    text = [
        (tiles.x(i % columns), tiles.y(i // columns) + height / 2 + edge, _shorten(word, fits))
        for i, word in enumerate(words)
    ]
    return canvas(
        [rgb_element(mosaic), Words(text, va="top")],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.03, 0.03, 0.03, 0.2),
        title=title,
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
    rgba = _rgb(values)
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


def probabilities(logits: xr.DataArray) -> xr.DataArray:
    """Softmax over the classes, computed in float64."""
    z = logits.astype(np.float64)
    e = xr.apply_ufunc(np.exp, z - z.max("class"), dask="allowed")
    return e / e.sum("class")


def predictions(
    logits: xr.DataArray | xr.Dataset,
    *,
    images: Any = None,
    most: int = 24,
    title: str = "Class probabilities, no shift",
) -> Any:
    """Heatmap of the class probabilities of every image, at the frame nearest to no shift.

    The probability is the softmax of the logits. A dot marks the class predicted;
    the picture names the image's own label at the left, and a square marks the
    class of that name where the model has one.

    Parameters
    ----------
    logits
        ``logits`` (image, [shift_y, shift_x,] class) with the class names as
        coordinate, or the Dataset that holds it.
    images
        Names or positions of the images to show; all by default.
    most
        Classes shown at most. Of more than twelve classes only those predicted for
        some image and those of the labels are shown, made up to twelve by the most
        probable.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the probabilities, image x class shown.

    Examples
    --------
    >>> logits = xr.DataArray([[0.0, 2.0]], dims=("image", "class"),
    ...     coords={"image": ["a"], "class": ["cat", "dog"]})
    >>> predictions(logits).Image.I.dimension_values("Probability").round(2)
    array([0.12, 0.88])
    """
    hv = holoviews()
    array = frame(variable(logits, "logits"))
    array = array.isel(image=image_positions(array, images)).transpose("image", "class")
    p = probabilities(array)
    values = np.asarray(p.values)
    if "class" in p.coords:
        names = [str(c) for c in p["class"].values]
    else:
        names = [str(i) for i in range(p.sizes["class"])]
    labels = labels_of(array)
    best = values.argmax(1)
    shown = np.arange(len(names))
    if len(names) > min(most, 12):
        wanted = set(best.tolist()) | {names.index(v) for v in labels if v in names}
        by_mass = [int(c) for c in np.argsort(-values.max(0), kind="stable")]
        chosen = [c for c in by_mass if c in wanted] + [c for c in by_mass if c not in wanted]
        shown = np.sort(chosen[: min(most, max(12, len(wanted)))])
    values = values[:, shown]
    rows, cols = values.shape
    scale = min(0.28, 7.0 / max(rows, 1))
    wide = min(0.62, 4.6 / cols) / scale  # a column in units of a row
    heat = image(
        values.astype(np.float64),
        "Probability",
        cmap=VALUES,
        clim=(0.0, 1.0),
        pixel=(wide, 1.0),
        origin=((wide - 1) / 2, 0.0),
        hook=bar(
            "Probability",
            (cols * wide - 0.5 + 0.12 / scale, -0.5, 0.09 / scale, min(rows, 1.3 / scale)),
            ticks=[0, 0.5, 1],
        ),
    )
    at = {int(c): j for j, c in enumerate(shown)}
    x = [(j + 0.5) * wide - 0.5 for j in range(cols)]
    dots = [(x[at[int(c)]], i) for i, c in enumerate(best) if int(c) in at]
    own = [
        (x[at[names.index(v)]], i)
        for i, v in enumerate(labels)
        if v in names and names.index(v) in at
    ]
    marks = [
        styled(
            hv.Points(own, ["x", "y"]),
            both={"marker": "s", "color": "none"},
            mpl={"edgecolor": "#e34a33", "s": 46, "linewidth": 1.1},
            bokeh={"line_color": "#e34a33", "size": 11},
        ),
        styled(
            hv.Points(dots, ["x", "y"]),
            both={"marker": "o", "color": "#e34a33"},
            mpl={"edgecolor": "#ffffff", "s": 14, "linewidth": 0.5},
            bokeh={"line_color": "#ffffff", "size": 6},
        ),
    ]
    edge = 0.05 / scale
    longest = int(wide * scale / (TEXT / 72 * 0.56))
    slanted = max(len(names[c]) for c in shown) > longest
    top = [(x[j], -0.5 - edge, _shorten(names[c], 24)) for j, c in enumerate(shown)]
    left = [
        (
            -0.5 - edge,
            i,
            f"{_shorten(str(n), 18)}  ({_shorten(v, 16)})" if v else _shorten(str(n), 34),
        )
        for i, (n, v) in enumerate(zip(array["image"].values, labels, strict=True))
    ]
    key = "dot: class predicted" + ("     square: the image's label" if own else "")
    words = [
        small([(-0.5, rows - 0.5 + edge, key)], ha="left", va="top"),
        Words(top, ha="left" if slanted else "center", va="bottom", angle=40 if slanted else 0),
        Words(left, ha="right"),
    ]
    right = max(0.65, len(key) * SMALL / 72 * 0.6 - cols * wide * scale)
    room = max(len(t[2]) for t in left) * TEXT / 72 * 0.58 + 0.1
    return canvas(
        [heat, *marks, *words],
        span=(cols * wide, rows),
        scale=scale,
        margins=(room, 1.1 if slanted else 0.22, right, 0.2),
        title=title,
    )
