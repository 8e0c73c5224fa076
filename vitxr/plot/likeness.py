"""Pictures of similarity: between layers, over shifts, and dissimilarities between images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._facets import draw, taken
from vitxr.plot._mosaic import Words, canvas, image, small
from vitxr.plot._select import described, image_titles, labels_of, unshifted
from vitxr.plot._style import MARKERS, VALUES, bar, beside, curve_axes, holoviews, shorten, styled
from vitxr.plot.layers import layers_of

__all__ = ["rdm", "similarity_by_layer", "similarity_by_shift"]

#: Names of what is drawn.
_NAMES = {"cka": "CKA", "rsa": "RSA (Spearman)"}


def _measure(c: Any, across: str, dims: tuple[str, ...]) -> str:
    """Which similarity a Dataset holds; refuse what has other dims."""
    for name in _NAMES:
        if isinstance(c, xr.Dataset) and name in c and set(c[name].dims) == set(dims):
            return name
    raise DataError(
        f"the picture needs `cka` or `rsa` with dims ({', '.join(dims)}); given: {described(c)}. "
        f"Give ds.vit.cka(across={across!r}) or ds.vit.rsa(across={across!r})."
    )


def similarity_by_layer(c: xr.Dataset, *, title: str | None = None) -> Any:
    """Draw the similarity of every layer with every layer as a matrix, and its noise floor.

    A number in brackets is not above its floor, the quantile of shuffled images. Below
    stands the largest of the floors, which the colour bar marks as well.

    Parameters
    ----------
    c
        Dataset of ``ds.vit.cka()`` or ``ds.vit.rsa()``, of one model or of two.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the similarities, first layer at the top, and the ``floor`` of each.

    Raises
    ------
    DataError
        If it is neither CKA nor RSA across layers.
    """
    name = _measure(c, "layer", ("layer", "other_layer"))
    array = c[name].transpose("layer", "other_layer")
    values = np.asarray(array.values, dtype=np.float64)
    floor = np.asarray(
        c[f"{name}_floor_quantile"].transpose("layer", "other_layer").values, dtype=np.float64
    )
    rows, cols = values.shape
    scale = min(0.34, 4.6 / max(rows, cols))
    low = min(0.0, float(np.nanmin(values)))
    box = (cols - 0.5 + 0.12 / scale, -0.5, 0.09 / scale, min(rows, 1.4 / scale))
    high = float(np.nanmax(floor))
    ticks = sorted({round(low, 2), 0.0, 0.5, 1.0})
    marked = [t for t in ticks if abs(t - high) > 0.09] + [high]
    picture = image(
        values,
        _NAMES[name],
        cmap=VALUES,
        clim=(low, 1.0),
        hook=bar(
            _NAMES[name], box, ticks=marked, ticklabels=[*(f"{t:g}" for t in marked[:-1]), "floor"]
        ),
        extra={"floor": floor},
    )
    numbers = [_numbers(array, "layer"), _numbers(array, "other_layer")]
    edge = 0.04 / scale
    words: list[Words] = []
    if max(rows, cols) * 0.22 <= 4.6:  # else a number is wider than its cell
        dark = (values - low) / (1.0 - low) < 0.6
        for shade, which in (("#ffffff", dark), ("#111111", ~dark)):
            items = [
                (
                    j,
                    i,
                    f"{values[i, j]:.2f}"
                    if values[i, j] > floor[i, j]
                    else f"({values[i, j]:.2f})",
                )
                for i, j in np.argwhere(which & np.isfinite(values))
            ]
            words.append(small(items, color=shade)) if items else None
    every = max(1, round(0.12 / scale))
    words += [
        small(
            [(-0.5 - edge, i, n) for i, n in enumerate(numbers[0]) if i % every == 0], ha="right"
        ),
        small(
            [(j, rows - 0.5 + edge, n) for j, n in enumerate(numbers[1]) if j % every == 0],
            va="top",
        ),
    ]
    ours, theirs = (str(c.attrs.get(k, "")) for k in ("model", "other_model"))
    both = ours != theirs and bool(theirs)
    names = ["Block", "Block"]
    if both:
        names = [f"Block of {shorten(theirs, 28)}", f"Block of {shorten(ours, 28)}"]
    share = float(c.attrs.get("quantile", 0.95))
    said = f"floor: {share:.0%} of shuffled images are below {high:.2f}"
    middle = (cols - 1) / 2
    words += [
        Words([(middle, rows - 0.5 + 0.16 / scale, names[0])], va="top"),
        small([(middle, rows - 0.5 + 0.3 / scale, said)], va="top", color="#555555"),
        Words([(-0.5 - 0.24 / scale, (rows - 1) / 2, names[1])], angle=90),
    ]
    return canvas(
        [picture, *words],
        span=(cols, rows),
        scale=scale,
        margins=(max(0.34, 0.7 - cols * scale / 2), 0.05, max(0.85, 1.6 - cols * scale), 0.46),
        title=title or f"{_NAMES[name]} between layers",
    )


def _numbers(array: xr.DataArray, dim: str) -> list[int]:
    known = array[dim].values if dim in array.coords else range(array.sizes[dim])
    return [int(v) for v in known]


def similarity_by_shift(c: xr.Dataset, *, along: str = "shift_y", title: str | None = None) -> Any:
    """Draw how like the unshifted representation that of a shifted image is, a curve a layer.

    Shifts are circular: the axis has the unshifted frame in the middle, and a shift of half
    the image stands at one end.

    Parameters
    ----------
    c
        Dataset of ``ds.vit.cka(across="shift")`` or ``ds.vit.rsa(across="shift")``.
    along
        ``"shift_y"`` or ``"shift_x"``: the direction of the shifts, the other being none.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        A ``Curve`` for each layer, in colours that go from the first to the last, and the
        noise floor as an ``Area``: the largest of the layers' quantiles of shuffled images.

    Raises
    ------
    DataError
        If it is neither CKA nor RSA across shifts, or the lattice is no grid.
    """
    if along not in ("shift_y", "shift_x"):
        raise ArgumentError(f"along={along!r}: expected 'shift_y' or 'shift_x'.")
    hv = holoviews()
    dims = ("shift_y", "shift_x", "layer", "other_shift_y", "other_shift_x")
    name = _measure(c, "shift", dims)
    direction = along[-1]
    offset = c.coords.get(f"offset_{direction}")
    if offset is None or offset.dims != (along,):
        raise DataError(
            f"the shifts have no `offset_{direction}` along {along}: curves need a true lattice, "
            "the scheme 'grid'."
        )
    row, col = unshifted(c[name])
    other = "shift_x" if along == "shift_y" else "shift_y"
    still = {other: col if along == "shift_y" else row, "other_shift_y": row, "other_shift_x": col}
    part = c.isel(still)
    pixels = np.asarray(offset.values, dtype=np.float64)
    period = offset.attrs.get("period")
    if period:
        pixels = (pixels + period / 2) % period - period / 2
    order = np.argsort(pixels, kind="stable")
    pixels = pixels[order]
    if period and pixels[0] == -period / 2:  # the same shift stands at the other end
        order, pixels = np.append(order, order[0]), np.append(pixels, period / 2)
    values = part[name].transpose("layer", along).values[:, order]
    floor = part[f"{name}_floor_quantile"].transpose("layer", along).values[:, order].max(axis=0)
    words = "down" if along == "shift_y" else "to the right"
    x = hv.Dimension("offset", label=f"Shift {words} (px, circular)")
    y = hv.Dimension("value", label=f"{_NAMES[name]} with no shift")
    low = min(0.0, float(np.nanmin(values)), float(np.nanmin(floor)))
    band = styled(
        hv.Area((pixels, np.full(len(pixels), low - 0.05), floor), x, [y, hv.Dimension("upper")]),
        both={"alpha": 0.35},
        mpl={"facecolor": "#9a9a9a", "linewidth": 0},
        bokeh={"color": "#9a9a9a", "line_color": None},
    )
    edge = styled(
        hv.Curve((pixels, floor), x, y, label=f"shuffled, {c.attrs.get('quantile', 0.95):.0%}"),
        both={"color": "#7a7a7a"},
        mpl={"linewidth": 1.0, "linestyle": "--"},
        bokeh={"line_width": 1.5, "line_dash": "dashed"},
    )
    parts = [band]
    numbers = layers_of(c[name])
    for k, (n, hue) in enumerate(zip(numbers, _ordered(len(numbers)), strict=True)):
        marker, bokeh_marker = MARKERS[k % len(MARKERS)]
        parts += [
            styled(
                hv.Curve((pixels, values[k]), x, y, label=f"block {n}"),
                both={"color": hue},
                mpl={"linewidth": 1.1},
                bokeh={"line_width": 2},
            ),
            styled(
                hv.Scatter((pixels, values[k]), x, y, label=f"block {n}"),
                both={"color": hue},
                mpl={"s": 12, "linewidth": 0, "marker": marker, "show_legend": False},
                bokeh={"size": 5, "marker": bokeh_marker},
            ),
        ]
    return curve_axes(
        hv.Overlay([*parts, edge]).collate(),
        title=title or f"{_NAMES[name]} with the unshifted images",
        ylim=(low - 0.05, 1.05),
        xlim=beside(pixels),
        legend_position="right",
        legend_cols=1 + len(numbers) // 14,
    )


def _ordered(n: int) -> list[str]:
    """Colours of things in an order: dark to light, none too light for paper."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(matplotlib.colormaps[VALUES](v)) for v in np.linspace(0, 0.85, n)]


def rdm(d: xr.DataArray, *, title: str | None = None) -> Any:
    """Draw dissimilarities between images, sorted and labelled by class.

    Parameters
    ----------
    d
        ``dissimilarity`` (image, [shift_y, shift_x, layer,] other_image), from
        ``ds.vit.rdm()``. At most two dims besides the images may be longer than one: facets.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``: the matrices, the images in the order of their labels, with a line
        between classes; without labels in their own order, by name.

    Raises
    ------
    DataError
        If it is no such array.

    Examples
    --------
    >>> d = xr.DataArray([[0.0, 1.0], [1.0, 0.0]], dims=("image", "other_image"),
    ...     coords={"image": ["b", "a"], "label": ("image", ["y", "x"])})
    >>> rdm(d).Labels.I.dimension_values("text").tolist()
    ['x', 'y']
    """
    over = ("image", "other_image")
    d = taken(d, "dissimilarity", "Give ds.vit.rdm().", over)
    labels = np.asarray(labels_of(d), dtype=object)
    n = len(labels)
    lines: list[float] = []
    if any(labels):
        order = np.argsort(labels.astype(str), kind="stable")
        d, labels = d.isel(image=order, other_image=order), labels[order]
        codes, classes = pd.factorize(labels)
        ticks = [
            (float(np.flatnonzero(codes == k).mean()), shorten(str(one), 12))
            for k, one in enumerate(classes)
        ]
        lines = [float(k) - 0.5 for k in np.flatnonzero(np.diff(codes)) + 1]
        axes = ("image, by class", "image, by class")
    else:
        names = image_titles(d, list(range(n)))
        every = max(1, n // 12)
        ticks = [(float(i), names[i]) for i in range(0, n, every)]
        axes = ("image", "image")
    metric = str(d.attrs.get("metric", ""))
    quantity = {"correlation": "1 - correlation", "euclidean": "Euclidean distance"}.get(
        metric, "Dissimilarity"
    )
    across = ticks if max(len(t) for _, t in ticks) <= 3 else []
    return draw(
        d.drop_vars([c for c in ("image",) if c in d.coords]), quantity,
        title=title or "Dissimilarity of images", over=over, ticks=(across, ticks), axes=axes,
        lines=lines,
    )  # fmt: skip
