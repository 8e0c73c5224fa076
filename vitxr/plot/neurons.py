"""Neurons on the manifold and the patch grid: order, dimension, clusters, new ones, samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.names import NEURON
from vitxr.plot._facets import draw
from vitxr.plot._mosaic import Words, canvas, image, scale_for, tile
from vitxr.plot._select import described, neuron_maps
from vitxr.plot._style import MARKERS, beside, categorical, curve_axes, holoviews, styled
from vitxr.plot.manifold import axes_of, embedded

__all__ = [
    "cluster",
    "local_dimension",
    "manifold_distance",
    "project",
    "sample_neurons",
    "spatial_order",
]

_ORDER = "Give the Dataset of e.vit.spatial_order()."
#: Feature maps that are curves of their own.
_CURVES = 8


def _asked(data: Any, *names: str, remedy: str) -> xr.Dataset:
    if not isinstance(data, xr.Dataset) or any(n not in data for n in names):
        raise DataError(
            f"the picture needs {', '.join(f'`{n}`' for n in names)}; given: {described(data)}. "
            f"{remedy}"
        )
    return data


def spatial_order(s: xr.Dataset, *, title: str = "Spatial order on the manifold") -> Any:
    """Draw how well each feature map is laid out on the manifold, and what shuffles give.

    A point is a map's rank correlation of distances on the patch grid and on the manifold, the
    bar behind it the middle 95 % of the neurons shuffled over the patches. Points with
    ``p <= 0.05`` are filled; p is of each map by itself, not corrected for their number.

    Parameters
    ----------
    s
        Dataset of ``e.vit.spatial_order()``.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Segments`` of the shuffles and ``Scatter`` of the maps, with their p-values.

    Raises
    ------
    DataError
        If it is no such Dataset.
    """
    hv = holoviews()
    needed = ("spatial_order", "shuffled_spatial_order", "spatial_order_p")
    s = _asked(s, *needed, remedy=_ORDER)
    value, p = (np.asarray(s[n].values, dtype=np.float64) for n in (needed[0], needed[2]))
    shuffled = s["shuffled_spatial_order"].transpose("feature_map", "permutation").values
    low, high = np.full((2, len(value)), np.nan)
    some = np.isfinite(shuffled).any(axis=1)
    low[some], high[some] = np.nanquantile(shuffled[some], [0.025, 0.975], axis=1)
    at = np.arange(len(value))
    names = [str(n) for n in s["feature_map"].values]
    x, y = hv.Dimension("place", label="Feature map"), hv.Dimension("order", label="Spatial order")
    hue = categorical(1)[0]
    bars = styled(
        hv.Segments((at[some], low[some], at[some], high[some]), [x, y, "x1", "y1"]),
        both={"color": "#b5b5b5"},
        mpl={"linewidth": 5},
        bokeh={"line_width": 9},
    )
    parts = [bars]
    for sure, fill in ((True, hue), (False, "#ffffff")):
        which = (p <= 0.05) == sure
        points = hv.Scatter((at[which], value[which], p[which]), x, [y, "p"])
        parts.append(
            styled(
                points,
                mpl={"color": fill, "edgecolor": hue, "s": 22, "linewidth": 1.0},
                bokeh={"fill_color": fill, "line_color": hue, "size": 8, "tools": ["hover"]},
            )
        )
    step = math.ceil(len(names) / 30)
    reach = np.concatenate([value, low, high])
    return curve_axes(
        hv.Overlay(parts),
        title=title,
        size=(float(np.clip(0.3 * len(names), 2.6, 5.8)), 2.4),
        xticks=[(k, n) for k, n in zip(at, names, strict=True)][::step],
        xlim=(-0.6, len(names) - 0.4),
        ylim=beside(np.append(reach[np.isfinite(reach)], 0.0)),
        show_legend=False,
    )


def manifold_distance(s: xr.Dataset, *, title: str | None = None) -> Any:
    """Draw distance on the manifold against distance on the patch grid, a curve a feature map.

    Parameters
    ----------
    s
        Dataset of ``e.vit.spatial_order()``. Of more than eight maps the four of the best and
        the four of the worst order are drawn, which the title says.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        A ``Curve`` for each map: the mean over the pairs of neurons so far apart.

    Raises
    ------
    DataError
        If it is no such Dataset.
    """
    hv = holoviews()
    s = _asked(s, "manifold_distance", "spatial_order", remedy=_ORDER)
    whole = s.sizes["feature_map"]
    if whole > _CURVES:
        order = s["spatial_order"].fillna(-np.inf).argsort().values
        half = _CURVES // 2
        s = s.isel(feature_map=np.concatenate([order[::-1][:half], order[:half][::-1]]))
    far = s["grid_distance"].values
    x = hv.Dimension("grid_distance", label="Distance on the grid (patches)")
    y = hv.Dimension("manifold_distance", label="Mean distance on the manifold")
    values = s["manifold_distance"].transpose("feature_map", "grid_distance").values
    rho = s["spatial_order"].values
    parts = []
    for k, hue in enumerate(categorical(len(values))):
        marker, bokeh_marker = MARKERS[k % len(MARKERS)]
        label = f"map {s['feature_map'].values[k]}, order {rho[k]:.2f}"
        known = np.isfinite(values[k])
        points = (far[known], values[k][known])
        parts += [
            styled(
                hv.Curve(points, x, y, label=label),
                both={"color": hue},
                mpl={"linewidth": 0.9},
                bokeh={"line_width": 1.5},
            ),
            styled(
                hv.Scatter(points, x, y, label=label),
                both={"color": hue},
                mpl={"s": 9, "linewidth": 0, "marker": marker, "show_legend": False},
                bokeh={"size": 4, "marker": bokeh_marker},
            ),
        ]
    some = f" (best and worst {_CURVES // 2} of {whole} maps)" if whole > _CURVES else ""
    return curve_axes(
        hv.Overlay(parts).collate(),
        title=title or f"Distances on the manifold{some}",
        legend_position="right",
        legend_cols=1,
        ylim=(0.0, float(np.nanmax(values)) * 1.05),
    )


def local_dimension(d: xr.Dataset, *, bins: int = 30, title: str = "Local dimension") -> Any:
    """Draw the histogram of the neurons' local dimension and two estimates of all neurons.

    Where on the manifold it is large shows ``vitxr.plot.embedding(e, d.local_dimension)``.

    Parameters
    ----------
    d
        Dataset of ``f.vit.local_dimension()``.
    bins
        Bars, of equal width up to the 99 % quantile; the last holds what lies beyond as well.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Histogram``, and a ``Curve`` upright at each estimate.

    Raises
    ------
    DataError
        If it is no such Dataset.
    """
    hv = holoviews()
    names = ("local_dimension", "dimension_mle", "dimension_twonn")
    d = _asked(d, *names, remedy="Make it with f.vit.local_dimension().")
    values = np.asarray(d[names[0]].values, dtype=np.float64)
    values = values[np.isfinite(values)]
    top = max(float(np.quantile(values, 0.99)), *(float(d[n]) for n in names[1:]))
    counts, edges = np.histogram(np.minimum(values, top), bins=bins, range=(0.0, top))
    x = hv.Dimension("dimension", label="Local dimension")
    y = hv.Dimension("count", label=f"{str(d[names[0]].dims[0]).capitalize()}s")
    bars = styled(
        hv.Histogram((edges, counts), kdims=[x], vdims=[y]),
        mpl={"facecolor": "#bdbdbd", "edgecolor": "#ffffff", "linewidth": 0.4},
        bokeh={"fill_color": "#bdbdbd", "line_color": "#ffffff"},
    )
    parts = [bars]
    estimates = (("maximum likelihood", names[1], "-"), ("TwoNN", names[2], "--"))
    for (label, name, dash), hue in zip(estimates, categorical(5)[::4], strict=True):
        value = float(d[name])
        line = hv.Curve(
            ([value, value], [0, counts.max() * 1.05]), x, y, label=f"{label}: {value:.1f}"
        )
        parts.append(
            styled(
                line,
                both={"color": hue},
                mpl={"linewidth": 1.3, "linestyle": dash},
                bokeh={"line_width": 2, "line_dash": {"-": "solid", "--": "dashed"}[dash]},
            )
        )
    return curve_axes(
        hv.Overlay(parts), title=title, size=(2.9, 2.2), xlim=(0.0, top),
        ylim=(0, counts.max() * 1.05), legend_position="right", legend_cols=1,
    )  # fmt: skip


def _on_grid(array: xr.DataArray | xr.Dataset, name: str, remedy: str) -> xr.DataArray:
    if not isinstance(array, xr.DataArray | xr.Dataset) or name not in array.coords:
        raise DataError(f"the neurons have no `{name}`; given: {described(array)}. {remedy}")
    values = array[name].reset_coords(drop=True) if array[name].dims == ("neuron",) else None
    if values is None:
        raise DataError(f"`{name}` is not along neuron: there is no patch grid. {remedy}")
    places = [n for n in NEURON if n in array.coords]
    labels = {n: ("neuron", array[n].values) for n in places}
    plain = xr.DataArray(np.asarray(values.values, dtype=np.float64), dims="neuron", coords=labels)
    return neuron_maps(plain)[0]


def cluster(e: xr.Dataset, *, title: str = "Clusters on the patch grid") -> Any:
    """Draw the clusters of neurons on the patch grid, a map a feature map.

    Colours are those of ``vitxr.plot.embedding(e, "cluster")``; clusters beyond the eighth are
    numbered as well, their colours being like those of others.

    Parameters
    ----------
    e
        Embedding with ``cluster`` (neuron), from ``e.vit.cluster(6)``.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``: the number of the cluster, blank where there is no neuron; -1 for none.

    Raises
    ------
    DataError
        If neurons have no clusters or no place.
    """
    maps = _on_grid(e, "cluster", "Make clusters of neurons with e.vit.cluster(6).")
    numbers = np.unique(np.asarray(e["cluster"].values)).tolist()
    values = maps.values
    count, height, width = values.shape
    codes = np.full_like(values, np.nan)
    for k, n in enumerate(numbers):
        codes[values == n] = k
    wide = min(count, 10)
    down = math.ceil(count / wide)
    cells = np.full((down * wide, height, width), np.nan)
    cells[:count] = codes
    scale = scale_for(wide * width * 1.1, largest=0.85, cell=max(height, width), room=6.6)
    mosaic, tiles = tile(cells.reshape(down, wide, height, width), gap=math.ceil(0.17 / scale))
    scale = min(scale, 6.6 / tiles.shape[1])
    hues = categorical(len(numbers))
    number = {"number": _numbered(mosaic, numbers)}
    reach = (-0.5, len(numbers) - 0.5)
    picture = image(mosaic, "Cluster", cmap=hues, clim=reach, colorbar=False, extra=number)
    edge = 0.04 / scale
    heads = [
        (tiles.x(k % wide), tiles.block(*divmod(k, wide))[0].start - 0.5 - edge, f"map {int(n)}")
        for k, n in enumerate(maps["feature_map"].values)
    ]
    marks = [(j, i, numbers[int(mosaic[i, j])]) for i, j in np.argwhere(mosaic >= 8)]
    words = [Words(heads, va="bottom")]
    if marks:
        words.append(Words(marks, size=4.5, color="#ffffff"))
    across, row, keys = 0.0, 0, []
    for n, hue in zip(numbers, hues, strict=True):
        text = f"■ {n if n >= 0 else 'none'}"
        if across > max(1.0, tiles.shape[1] * scale - 0.4):
            across, row = 0.0, row + 1
        at = (-0.5 + across / scale, tiles.shape[0] - 0.5 + (0.06 + 0.14 * row) / scale, text)
        keys.append(Words([at], ha="left", va="top", color=hue))
        across += 0.4
    return canvas(
        [picture, *words, *keys],
        span=(tiles.shape[1], tiles.shape[0]),
        scale=scale,
        margins=(0.04, 0.19, 0.04, 0.24 + 0.14 * row),
        title=title,
    )


def _numbered(codes: np.ndarray, numbers: list[int]) -> np.ndarray:
    out = np.full_like(codes, np.nan)
    known = np.isfinite(codes)
    out[known] = np.asarray(numbers, dtype=np.float64)[codes[known].astype(int)]
    return out


def sample_neurons(s: xr.DataArray, *, title: str | None = None) -> Any:
    """Draw which neurons were drawn by their activity, on the patch grid of their feature maps.

    Parameters
    ----------
    s
        Neuron tensor of ``t.vit.sample_neurons(500)``, with ``response_maximum`` (neuron).
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``: the largest response of each neuron that was drawn; the others are blank.

    Raises
    ------
    DataError
        If the neurons have no ``response_maximum``, or no place.
    """
    maps = _on_grid(s, "response_maximum", "Draw neurons with t.vit.sample_neurons(500).")
    order = maps["feature_map"].argsort().values
    count = int(np.isfinite(maps.values).sum())
    title = title or f"{count} neurons of {len(order)} feature maps, drawn by activity"
    return draw(maps.isel(feature_map=order), "Largest response", title=title)


def project(
    e: xr.Dataset, p: xr.Dataset, *, pcs: tuple[int, int] = (1, 2), title: str | None = None
) -> Any:
    """Draw new points on an embedding of others.

    Parameters
    ----------
    e
        Embedding: ``score`` (neuron, pc), (image, pc) or (shift, pc).
    p
        What ``e.vit.project(new)`` returns.
    pcs
        The two axes, 1-based.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Points`` embedded, grey, and placed on them.

    Raises
    ------
    ArgumentError
        If there is no such axis.
    DataError
        If these are not embeddings of the same dimension.
    """
    hv = holoviews()
    dim = embedded(e)
    if embedded(p) != dim:
        raise DataError(
            f"the embedding is of {dim!r} and the new points are of {embedded(p)!r}: give what "
            "e.vit.project(new) returns."
        )
    parts = []
    looks = (("embedded", e, "#bdbdbd", "o"), ("placed", p, categorical(5)[4], "^"))
    for label, one, hue, marker in looks:
        columns, kdims = axes_of(one, dim, tuple(pcs))
        if one is e:
            dims = kdims
        parts.append(
            styled(
                hv.Points(tuple(columns), dims, label=label),
                both={"color": hue, "alpha": 0.85},
                mpl={"s": 9, "linewidth": 0, "marker": marker},
                bokeh={"size": 5, "marker": {"o": "circle", "^": "triangle"}[marker]},
            )
        )
    return curve_axes(
        hv.Overlay(parts), title=title or "New points on the embedding", size=(2.9, 2.9),
        padding=0.05, xticks=5, yticks=6, legend_position="right", legend_cols=1,
    )  # fmt: skip
