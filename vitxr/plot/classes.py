"""Picture of what the model says the images are."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._mosaic import Words, canvas, image, small
from vitxr.plot._select import described, frame, image_positions, labels_of, shift_words, variable
from vitxr.plot._style import SMALL, TEXT, VALUES, bar, holoviews, shorten, styled

__all__ = ["predictions"]


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
    title: str | None = None,
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
    remedy = 'Extract it with variables=("activation", "logits"), from a model with classes.'
    array = frame(variable(logits, "logits", remedy))
    if {"image", "class"} - set(array.dims):
        raise DataError(
            "the picture needs `logits` with dims (image, class); given: "
            f"{described(logits)}. {remedy}"
        )
    title = title or f"Class probabilities, {shift_words(array)}"
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
            both={"marker": "s"},
            mpl={"color": "none", "edgecolor": "#e34a33", "s": 46, "linewidth": 1.1},
            bokeh={"fill_color": None, "line_color": "#e34a33", "size": 11},
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
    top = [(x[j], -0.5 - edge, shorten(names[c], 24)) for j, c in enumerate(shown)]
    left = [
        (
            -0.5 - edge,
            i,
            f"{shorten(str(n), 18)}  ({shorten(v, 16)})" if v else shorten(str(n), 34),
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
