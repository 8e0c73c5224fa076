"""What feature maps care about: a scatter of the table of maps, and activity by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES
from vitxr.plot._coloring import number_key
from vitxr.plot._facets import draw
from vitxr.plot._select import described
from vitxr.plot._style import MARKERS, VALUES, beside, categorical, curve_axes, holoviews, styled
from vitxr.plot.layers import layers_of

__all__ = ["class_activity", "map_table"]

_SHORT = {
    "image_share": "Share of variance, image",
    "shift_share": "Share of variance, shift",
    "interaction_share": "Share of variance, image x shift",
    "label_share": "Share of variance, class",
    "d_prime": "d'",
    "d_prime_floor": "d', shuffled labels (95 %)",
    "class_selectivity": "Class selectivity",
    "class_selectivity_floor": "Class selectivity, shuffled labels (95 %)",
    "mean_activity": "Mean activity",
}


def _label(name: str) -> str:
    meaning = VARIABLES[name].meaning if name in VARIABLES else name
    return _SHORT.get(name, meaning[:1].upper() + meaning[1:])


def map_table(
    table: xr.Dataset,
    x: str = "shift_share",
    y: str = "image_share",
    color: str | None = None,
    *,
    title: str | None = None,
) -> Any:
    """Scatter feature maps over two columns of the table of what they care about.

    Parameters
    ----------
    table
        Dataset of ``ds.vit.map_table()``, (layer, feature_map), or a part of it.
    x, y
        Columns. Where `x` is the floor of `y`, as ``"d_prime_floor"`` of ``"d_prime"``, a line
        shows where they are the same: maps above it are selective beyond chance.
    color
        Column for the colour; by default the layer, if there are several.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Points``, one element, or one a layer; each knows its layer and feature map.

    Raises
    ------
    ArgumentError
        If there is no such column.
    DataError
        If it is no such table.
    """
    hv = holoviews()
    if not isinstance(table, xr.Dataset) or "feature_map" not in table.dims:
        raise DataError(
            f"expected a table of feature maps; given: {described(table)}. Make it with "
            "ds.vit.map_table()."
        )
    columns = [str(n) for n, v in table.data_vars.items() if v.dtype.kind in "fiu"]
    for name, value in (("x", x), ("y", y), ("color", color)):
        if value is not None and value not in columns:
            raise ArgumentError(f"{name}={value!r}: the columns are {', '.join(columns)}.")
    if "layer" not in table.dims:
        table = table.expand_dims("layer")
    layers = layers_of(table[x])
    maps = table["feature_map"].values if "feature_map" in table.coords else None
    kdims = [hv.Dimension(n, label=_label(n)) for n in (x, y)]
    values = {
        n: table[n].transpose("layer", "feature_map").values for n in (x, y, color) if n is not None
    }
    several = color is None and len(layers) > 1
    parts = []
    groups = [[k] for k in range(len(layers))] if several else [list(range(len(layers)))]
    look: dict[str, Any]
    for k, (at, hue) in enumerate(zip(groups, categorical(len(groups)), strict=True)):
        shape = values[x][at].shape
        known = {
            "layer": np.repeat(layers[at], shape[1]),
            "feature_map": np.tile(np.arange(shape[1]) if maps is None else maps, len(at)),
        }
        if color is not None:
            known[color] = values[color][at].ravel()
        marker, bokeh_marker = MARKERS[k % len(MARKERS)]
        points = hv.Points(
            (values[x][at].ravel(), values[y][at].ravel(), *known.values()),
            kdims,
            list(known),
            **({"label": f"block {layers[at[0]]}"} if several else {}),
        )
        points = styled(
            points,
            both={"alpha": 0.8},
            mpl={"s": 14, "linewidth": 0, "marker": marker},
            bokeh={"size": 6, "marker": bokeh_marker, "tools": ["hover"]},
        )
        if color is None:
            look = {"color": hue}
        else:
            look = {"color": color, "cmap": VALUES, "clim": _span(known[color])}
            points = styled(
                points,
                mpl={"hooks": [number_key(_label(color))]},
                bokeh={"colorbar": True, "colorbar_opts": {"title": _label(color)}},
            )
        parts.append(styled(points, both=look))
    limits = [beside(v[np.isfinite(v)]) for v in (values[x], values[y])]
    if x == f"{y}_floor":
        ends = [min(limits[0][0], limits[1][0]), max(limits[0][1], limits[1][1])]
        same = hv.Curve((ends, ends), *kdims, label="same")
        parts.insert(
            0,
            styled(
                same,
                both={"color": "#7a7a7a"},
                mpl={"linestyle": "--", "linewidth": 1.0},
                bokeh={"line_dash": "dashed"},
            ),
        )
    if len(layers) == 1 and "layer" in table.coords:
        title = title or f"Feature maps of block {layers[0]}"
    return curve_axes(
        hv.Overlay(parts),
        title=title or "Feature maps",
        size=(2.9, 2.6),
        xlim=limits[0],
        ylim=limits[1],
        legend_position="right",
        legend_cols=1,
        show_legend=several,
    )


def _span(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return (min(0.0, low), high) if high > min(0.0, low) else (low - 0.5, low + 0.5)


def class_activity(a: xr.DataArray, *, title: str | None = None) -> Any:
    """Draw the mean activity of every feature map for every class, maps sorted by class.

    A row is a feature map, divided by its own largest activity; the maps stand in the order of
    the class that they answer to most.

    Parameters
    ----------
    a
        ``class_activity`` ([layer,] feature_map, label), from ``ds.vit.class_activity()``; a
        facet a layer, each with an order of its own.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` holds the relative activities.

    Raises
    ------
    DataError
        If it is no such array.
    """
    if not isinstance(a, xr.DataArray) or {"feature_map", "label"} - set(a.dims):
        raise DataError(
            "the picture needs `class_activity` with dims ([layer,] feature_map, label); given: "
            f"{described(a)}. Give ds.vit.class_activity()."
        )
    a = a.transpose(..., "feature_map", "label").compute()
    values = np.asarray(a.values, dtype=np.float64)
    most = values.max(axis=-1, keepdims=True)
    values = np.divide(values, most, out=np.full_like(values, np.nan), where=most > 0)
    best = np.where(np.isfinite(values).all(-1), np.nan_to_num(values).argmax(-1), a.sizes["label"])
    order = np.argsort(best, axis=-1, kind="stable")
    values = np.take_along_axis(values, order[..., None], axis=-2)
    # stretched, or 768 maps of 4 classes would be a thread: each class so many pixels wide
    wide = max(1, round(0.8 * a.sizes["feature_map"] / a.sizes["label"]))
    stretched = np.repeat(values, wide, axis=-1)
    drawn = xr.DataArray(
        stretched,
        dims=(*a.dims[:-1], "class_column"),
        coords={n: a[n] for n in ("layer",) if n in a.coords},
    )
    names = [str(v) for v in a["label"].values] if "label" in a.coords else []
    places = [(k * wide + (wide - 1) / 2, name) for k, name in enumerate(names)]
    if max((len(n) for n in names), default=0) > 3:
        places = [(x, str(k)) for k, (x, _) in enumerate(places)]
    return draw(
        drawn,
        "Activity / map's largest",
        title=title or "Activity by class",
        over=("feature_map", "class_column"),
        clim=(0.0, 1.0),
        ticks=(places, []),
        axes=("class", "feature map, by its class"),
    )
