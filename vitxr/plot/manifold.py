"""Pictures of embeddings: the manifold that neurons, images or shifts form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._coloring import LABELS, Coloring, class_key, coloring, patch_colors
from vitxr.plot._select import described, variable, with_dims
from vitxr.plot._style import (
    MARKERS,
    SMALL,
    TEXT,
    beside,
    categorical,
    curve_axes,
    holoviews,
    styled,
)

__all__ = ["axes_of", "embedded", "embedding", "embedding_3d", "explained_variance", "patch_colors"]

_REMEDY = "Make the embedding with f.vit.embed()."
#: Classes named in a key at most.
_NAMED = 42


def axes_of(e: xr.Dataset, dim: str, pcs: tuple[int, ...]) -> tuple[list[np.ndarray], list[Any]]:
    """Scores along the axes wanted, and their dimensions with the share of the variance."""
    hv = holoviews()
    score = e["score"].transpose(dim, "pc")
    have = (
        [int(v) for v in score["pc"].values]
        if "pc" in score.coords
        else list(range(1, score.sizes["pc"] + 1))
    )
    columns, dims = [], []
    share = np.full(len(have), np.nan)
    if "explained_variance_ratio" in e:
        share = np.asarray(e["explained_variance_ratio"].values, dtype=np.float64)
    for pc in pcs:
        if pc not in have:
            raise ArgumentError(
                f"pcs={pcs!r}: the embedding has the axes {have[0]} to {have[-1]} (1-based)."
            )
        at = have.index(pc)
        columns.append(np.asarray(score.isel(pc=at).values, dtype=np.float64))
        known = f"PC {pc} ({share[at]:.0%} of variance)"
        label = known if np.isfinite(share[at]) else f"Axis {pc}"
        dims.append(hv.Dimension(f"pc{pc}", label=label))
    return columns, dims


def embedded(e: xr.Dataset) -> str:
    """Check that ``e`` is an embedding, and tell of what dimension."""
    if not isinstance(e, xr.Dataset):
        raise DataError(f"expected an embedding Dataset; given: {described(e)}. {_REMEDY}")
    dims = variable(e, "score", _REMEDY).dims
    for dim in LABELS:
        if set(dims) == {dim, "pc"}:
            return dim
    raise DataError(
        f"`score` has dims ({', '.join(map(str, dims))}); expected (neuron, pc), (image, pc) or "
        f"(shift, pc). {_REMEDY}"
    )


def _prepare(
    e: xr.Dataset, color: str | xr.DataArray | None, feature_map: int | None
) -> tuple[str, Coloring]:
    dim = embedded(e)
    look = coloring(e, dim, color)
    if feature_map is not None:
        if dim != "neuron" or "feature_map" not in e.coords:
            raise ArgumentError(
                f"feature_map={feature_map!r}: the points are not labelled by feature map (this is "
                f"an embedding of dim {dim!r}); leave it out."
            )
        if feature_map not in e["feature_map"].values:
            have = ", ".join(str(int(v)) for v in pd.unique(e["feature_map"].values))
            raise ArgumentError(f"feature_map={feature_map!r} is not embedded; there are {have}.")
    return dim, look


def _labels(e: xr.Dataset, dim: str) -> dict[str, np.ndarray]:
    """What is known of each point."""
    known = {n: np.asarray(e[n].values) for n in LABELS[dim] if n in e.coords}
    return {n: v if v.dtype.kind in "iuf" else v.astype(str) for n, v in known.items()}


def embedding(
    e: xr.Dataset,
    color: str | xr.DataArray | None = None,
    *,
    pcs: tuple[int, int] = (1, 2),
    feature_map: int | None = None,
    title: str | None = None,
) -> Any:
    """Scatter neurons, images or shifts over two axes of their embedding.

    Parameters
    ----------
    e
        Embedding: ``score`` (neuron, pc), (image, pc) or (shift, pc), with the labels
        of the points.
    color
        Of neurons: ``"feature_map"`` (default), a hue and marker a map;
        ``"patch_row"``, ``"patch_col"``, the place on the patch grid; ``"both"``, row
        and column at once, the corners of the grid having a colour each (see
        :func:`patch_colors`); ``"edge_distance"``, patches to the nearest border;
        ``"label"``, if you gave the neurons one; ``"cluster"`` of ``e.vit.cluster(6)``. Or an
        array along the points, such as a loading, ``f.neuron_factor.sel(component=3)``, or
        ``d.local_dimension``: numbers in a colour map, diverging if there are negative ones,
        anything else as classes. Of images: ``"label"`` (default
        where there is one) or ``"image"``. Of shifts: ``"offset_y"`` (default) or
        ``"offset_x"``, in cyclic colours, because shifts are circular: the last is
        next to none.
    pcs
        The two axes, 1-based.
    feature_map
        Show one map in colour, the others in grey behind it.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay or holoviews.NdOverlay
        ``Points``; keyed by the class for the colourings by class.

    References
    ----------
    The original notebook, section 7 (``get_embeddings``, ``get_spatial_order_plot``).
    """
    hv = holoviews()
    dim, look = _prepare(e, color, feature_map)
    (x, y), kdims = axes_of(e, dim, tuple(pcs))
    labels = _labels(e, dim)
    if look.kind == "number":
        labels[look.name] = look.values
    count = len(x)
    area = float(np.clip(9000 / count, 3.0, 22.0))
    looks = {
        "mpl": {"s": area, "linewidth": 0},
        "bokeh": {"size": area**0.5 + 1, "tools": ["hover"]},
    }

    def points(at: np.ndarray, extra: dict[str, np.ndarray] | None = None, **both: Any) -> Any:
        known = {**labels, **(extra or {})}
        columns = (x[at], y[at], *(v[at] for v in known.values()))
        return styled(hv.Points(columns, kdims, list(known)), both=both, **looks)

    everyone = np.arange(count)
    chosen = (
        everyone if feature_map is None else np.flatnonzero(labels["feature_map"] == feature_map)
    )
    # few ticks: scores are small numbers with long names
    frame: dict[str, Any] = {"size": (2.9, 2.9), "padding": 0.05, "xticks": 5, "yticks": 6}
    if look.kind == "class":
        layers, rest = {}, [everyone[:0]]
        hues = categorical(len(look.groups))
        for k, group in enumerate(look.groups):
            at = np.flatnonzero(look.values == k)
            marker, name = MARKERS[k // 8 % len(MARKERS)]
            front = np.intersect1d(at, chosen)
            dim_hue = "#d9d9d9" if len(front) == 0 else hues[k]
            if 0 < len(front) < len(at):
                rest.append(np.setdiff1d(at, front))
                at = front
            one = points(at, color=dim_hue, alpha=0.85)
            layers[group] = styled(one, mpl={"marker": marker}, bokeh={"marker": name})
        picture = hv.NdOverlay(layers, kdims=[look.name], sort=False)
        behind = np.concatenate(rest)
        if behind.size:  # of classes that other maps have as well
            picture = points(behind, color="#d9d9d9", alpha=0.6) * picture
        frame |= {
            "legend_position": "right",
            "legend_cols": 1 + (len(layers) - 1) // 14,
            "show_legend": len(layers) <= _NAMED,
        }
        return curve_axes(picture, title=title or look.heading, **frame)
    if look.kind == "place":
        front = points(chosen, {"color": look.values}, color="color", alpha=0.9)
        front = styled(front, mpl={"hooks": [look.key]}, bokeh={"hooks": [look.panel]})
    else:
        front = points(chosen, color=look.name, cmap=look.cmap, clim=look.clim, alpha=0.9)
        front = styled(
            front,
            mpl={"hooks": [look.key]},
            bokeh={"colorbar": True, "colorbar_opts": {"title": look.label}},
        )
    picture = hv.Overlay([front])
    if feature_map is not None:
        grey = points(np.setdiff1d(everyone, chosen), color="#d9d9d9", alpha=0.6)
        picture = hv.Overlay([grey, front])
    return curve_axes(picture, title=title or look.heading, show_legend=False, **frame)


def _on_paper(plot: Any, element: Any) -> None:
    """Matplotlib hook: white paper.

    HoloViews leaves it out of 3-D pictures, and the smooth edges of letters on
    nothing look like smears wherever a viewer drops the transparency.
    """
    fig = plot.handles["fig"]
    fig.set_frameon(True)
    fig.patch.set(facecolor="white", alpha=1.0)


def embedding_3d(
    e: xr.Dataset,
    color: str | xr.DataArray | None = None,
    *,
    pcs: tuple[int, int, int] = (1, 2, 3),
    feature_map: int | None = None,
    azimuth: int = 40,
    elevation: int = 25,
    title: str | None = None,
) -> Any:
    """Scatter neurons, images or shifts over three axes of their embedding; Matplotlib only.

    Parameters
    ----------
    e, color, feature_map, title
        As for :func:`embedding`; with ``feature_map`` the others are left out.
    pcs
        The three axes, 1-based.
    azimuth, elevation
        Direction of view in degrees.

    Returns
    -------
    holoviews.Scatter3D
        With the labels of the points and, as ``code``, what they are coloured by: the
        number itself, or that of the class or colour.

    References
    ----------
    The original notebook, section 7 (the three-dimensional scatters).
    """
    hv = holoviews()
    dim, look = _prepare(e, color, feature_map)
    columns, kdims = axes_of(e, dim, tuple(pcs))
    # without the share of the variance, for which there is no room
    kdims = [hv.Dimension(d.name, label=d.label.split(" (")[0]) for d in kdims]
    # 3-D scatters colour by number only: number the colours
    code, palette, limits, key = look.values, look.cmap, look.clim, look.key
    if look.kind == "place":
        hexes, code = np.unique(look.values.astype(str), return_inverse=True)
        palette = [str(h) for h in hexes]
    elif look.kind == "class":
        palette = categorical(len(look.groups))
        names = [str(g) for g in look.groups]
        heading = look.name.replace("_", " ").capitalize()
        key = class_key(heading, names, palette) if len(names) <= _NAMED else None
    if look.kind != "number":
        limits = (-0.5, len(palette) - 0.5)
    labels = _labels(e, dim)
    chosen = slice(None) if feature_map is None else labels["feature_map"] == feature_map
    element = hv.Scatter3D(
        tuple(c[chosen] for c in (*columns, *labels.values(), code)), kdims, [*labels, "code"]
    )
    return element.opts(
        backend="matplotlib",
        clone=True,
        color="code",
        cmap=palette,
        clim=limits,
        s=float(np.clip(9000 / len(code), 3.0, 22.0)),
        linewidth=0,
        azimuth=azimuth,
        elevation=elevation,
        fig_inches=(3.6, 3.4),
        xticks=5,
        yticks=5,
        zticks=5,
        hooks=[_on_paper, *([key] if key else [])],
        title=title or f"Three axes, {look.heading[:1].lower()}{look.heading[1:]}",
        fontsize={"title": 8.5, "labels": TEXT, "ticks": SMALL},
    )


def explained_variance(e: xr.Dataset, *, title: str = "Explained variance") -> Any:
    """Share of the variance along each axis of the embedding, and its running sum.

    Parameters
    ----------
    e
        Embedding with ``explained_variance_ratio`` (pc).
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Curve`` and ``Scatter`` of each, in percent.

    References
    ----------
    The original notebook, section 7 (``explained_variance_ratio_``).

    Examples
    --------
    >>> e = xr.Dataset({"explained_variance_ratio": ("pc", [0.6, 0.3])}, coords={"pc": [1, 2]})
    >>> explained_variance(e).Curve.Running_sum.dimension_values("share")
    array([60., 90.])
    """
    hv = holoviews()
    ratio = (
        np.asarray(
            with_dims(e, "explained_variance_ratio", ("pc",), _REMEDY).values, dtype=np.float64
        )
        * 100
    )
    pc = e["pc"].values if "pc" in e.coords else np.arange(1, len(ratio) + 1)
    x, y = (
        hv.Dimension("pc", label="Axis (principal component)"),
        hv.Dimension("share", label="Share of variance (%)"),
    )
    parts = []
    colors = categorical(2)
    for (name, values), hue in zip(
        (("Each axis", ratio), ("Running sum", np.cumsum(ratio))), colors, strict=True
    ):
        curve = hv.Curve((pc, values), x, y, label=name)
        dots = hv.Scatter((pc, values), x, y, label=name)
        parts.append(styled(curve, both={"color": hue}, mpl={"linewidth": 1.2}))
        parts.append(
            styled(
                dots,
                both={"color": hue},
                mpl={"s": 12, "linewidth": 0, "show_legend": False},
                bokeh={"size": 5},
            )
        )
    return curve_axes(
        hv.Overlay(parts).collate(),
        title=title,
        size=(2.9, 2.2),
        ylim=(0, 105),
        xlim=beside(pc),
        legend_position="right",
        legend_cols=1,
        xticks=[int(v) for v in pc] if len(pc) <= 15 else 10,
    )
