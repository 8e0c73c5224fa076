"""Pictures of embeddings: the manifold the neurons form, coloured by what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._select import variable
from vitxr.plot._style import (
    MARKERS,
    SMALL,
    TEXT,
    VALUES,
    beside,
    categorical,
    curve_axes,
    holoviews,
    styled,
)

__all__ = ["embedding", "embedding_3d", "explained_variance", "patch_colors"]

_COLORS = ("feature_map", "patch_row", "patch_col", "both")
_NAMES = {"patch_row": "Patch row (0 at the top)", "patch_col": "Patch column (0 at the left)"}
# Corners of the map of places: top left, top right, bottom left, bottom right. Of
# like lightness on the diagonals, and apart with red-green blindness as well.
_CORNERS = np.array(
    [[0x2B, 0x4B, 0x9B], [0x58, 0xC4, 0xDD], [0xB5, 0x3A, 0x2A], [0xF5, 0xC2, 0x42]]
)


def patch_colors(rows: Any, cols: Any) -> np.ndarray:
    """Colour of places on the patch grid, by row and column at once, as RGB bytes.

    The four corners have colours of their own and the places between are their
    bilinear mixture.

    Parameters
    ----------
    rows, cols
        Places, scaled to 0..1 (top to bottom, left to right), of one shape.

    Examples
    --------
    >>> patch_colors(0.0, 0.0)
    array([ 43,  75, 155], dtype=uint8)
    """
    v, u = np.asarray(rows, dtype=float)[..., None], np.asarray(cols, dtype=float)[..., None]
    a, b, c, d = _CORNERS
    mixed = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
    return np.rint(mixed).astype(np.uint8)


def _place(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return (values - values.min()) / span if span else np.zeros(len(values))


def _axes(e: xr.Dataset, pcs: tuple[int, ...]) -> tuple[list[np.ndarray], list[Any]]:
    """Scores along the axes wanted, and their dimensions with the share of the variance."""
    hv = holoviews()
    score = variable(e, "score")
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


def _check(e: xr.Dataset, color: str, feature_map: int | None) -> None:
    if color not in _COLORS:
        raise ArgumentError(f"color={color!r}: expected one of {', '.join(map(repr, _COLORS))}.")
    for name in ("feature_map", "patch_row", "patch_col"):
        if name not in e.coords:
            raise DataError(
                f"the embedding has no coordinate `{name}`: embed the factors of a tensor made "
                "with ds.vit.neuron_tensor, which labels the neurons."
            )
    if feature_map is not None and feature_map not in e["feature_map"].values:
        have = ", ".join(str(int(v)) for v in pd.unique(e["feature_map"].values))
        raise ArgumentError(f"feature_map={feature_map!r} is not embedded; there are {have}.")


def _colorbar(label: str) -> Any:
    """Matplotlib hook: a slim colour bar beside the scatter."""

    def hook(plot: Any, element: Any) -> None:
        axis, artist = plot.handles["axis"], plot.handles["artist"]
        if any(child.get_label() == label for child in axis.child_axes):
            return
        inset = axis.inset_axes((1.04, 0.0, 0.035, 0.6), label=label)
        colorbar = axis.figure.colorbar(artist, cax=inset)
        colorbar.outline.set_visible(False)
        inset.yaxis.get_major_locator().set_params(integer=True)
        inset.tick_params(labelsize=SMALL, length=2, width=0.5, pad=1.5)
        colorbar.set_label(label, fontsize=TEXT, labelpad=3)
        if label.startswith("Patch row"):
            inset.invert_yaxis()

    return hook


def _color_key(rows: int, cols: int) -> Any:
    """Matplotlib hook: the patch grid in its colours, beside the scatter."""

    def hook(plot: Any, element: Any) -> None:
        axis = plot.handles["axis"]
        if any(child.get_label() == "key" for child in axis.child_axes):
            return
        inset = axis.inset_axes((1.06, 0.0, 0.22, 0.22), label="key")
        v, u = np.meshgrid(_place(np.arange(rows)), _place(np.arange(cols)), indexing="ij")
        inset.imshow(patch_colors(v, u), interpolation="nearest")
        inset.set(xticks=[], yticks=[])
        inset.set_xlabel("patch column", fontsize=SMALL, labelpad=2)
        inset.set_ylabel("patch row", fontsize=SMALL, labelpad=2)
        for spine in inset.spines.values():
            spine.set_visible(False)

    return hook


def _hexes(e: xr.Dataset) -> np.ndarray:
    rgb = patch_colors(_place(e["patch_row"].values), _place(e["patch_col"].values))
    return np.array([f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb.reshape(-1, 3)], dtype=object)


def _groups(e: xr.Dataset) -> list[tuple[int, np.ndarray, str, tuple[str, str]]]:
    """Feature map, its neurons, its colour and marker, in the order of the tensor."""
    numbers = pd.unique(e["feature_map"].values)
    colors = categorical(len(numbers))
    return [
        (
            int(n),
            np.flatnonzero(e["feature_map"].values == n),
            colors[k],
            MARKERS[k // 8 % len(MARKERS)],
        )
        for k, n in enumerate(numbers)
    ]


def embedding(
    e: xr.Dataset,
    color: str = "feature_map",
    *,
    pcs: tuple[int, int] = (1, 2),
    feature_map: int | None = None,
    title: str | None = None,
) -> Any:
    """Scatter the neurons over two axes of their embedding.

    Parameters
    ----------
    e
        Embedding: ``score`` (neuron, pc) with the neurons' labels.
    color
        ``"feature_map"``: a hue and marker a map; ``"patch_row"``, ``"patch_col"``:
        the place on the patch grid; ``"both"``: row and column at once, the corners
        of the grid having a colour each (see :func:`patch_colors`).
    pcs
        The two axes, 1-based.
    feature_map
        Show one map in colour, the others in grey behind it.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay or holoviews.NdOverlay
        ``Points``; keyed by ``feature_map`` for that colouring.

    References
    ----------
    The original notebook, section 7 (``get_embeddings``, ``get_spatial_order_plot``).
    """
    hv = holoviews()
    _check(e, color, feature_map)
    (x, y), kdims = _axes(e, tuple(pcs))
    labels = [np.asarray(e[n].values) for n in ("feature_map", "patch_row", "patch_col")]
    vdims = ["feature_map", "patch_row", "patch_col"]
    count = len(x)
    area = float(np.clip(9000 / count, 3.0, 22.0))
    looks = {
        "mpl": {"s": area, "linewidth": 0},
        "bokeh": {"size": area**0.5 + 1, "tools": ["hover"]},
    }
    rows, cols = len(np.unique(labels[1])), len(np.unique(labels[2]))

    def points(at: np.ndarray, **both: Any) -> Any:
        columns = (x[at], y[at], *(v[at] for v in labels))
        return styled(hv.Points(columns, kdims, vdims), both=both, **looks)

    everyone = np.arange(count)
    chosen = everyone if feature_map is None else np.flatnonzero(labels[0] == feature_map)
    frame: dict[str, Any] = {"size": (2.9, 2.9), "padding": 0.05}
    if color == "feature_map":
        layers = {}
        for number, at, hue, (marker, name) in _groups(e):
            dim = feature_map is not None and number != feature_map
            one = points(at, color="#d9d9d9" if dim else hue, alpha=0.85)
            layers[number] = styled(one, mpl={"marker": marker}, bokeh={"marker": name})
        picture = hv.NdOverlay(layers, kdims=["feature_map"], sort=False)
        frame |= {
            "legend_position": "right",
            "legend_cols": 1 + (len(layers) - 1) // 14,
            "show_legend": len(layers) <= 42,
        }
        return curve_axes(picture, title=title or "By feature map", **frame)
    if color == "both":
        hexes = _hexes(e)
        columns = (x[chosen], y[chosen], *(v[chosen] for v in labels), hexes[chosen])
        front = hv.Points(columns, kdims, [*vdims, "color"])
        front = styled(front, both={"color": "color", "alpha": 0.9}, **looks)
        front = styled(front, mpl={"hooks": [_color_key(rows, cols)]})
        heading = "By row and column"
    else:
        front = points(chosen, color=color, cmap=VALUES, alpha=0.9)
        front = styled(
            front,
            mpl={"hooks": [_colorbar(_NAMES[color])]},
            bokeh={"colorbar": True, "colorbar_opts": {"title": _NAMES[color]}},
        )
        heading = "By patch row" if color == "patch_row" else "By patch column"
    behind = []
    if feature_map is not None:
        behind = [points(np.setdiff1d(everyone, chosen), color="#d9d9d9", alpha=0.6)]
    picture = hv.Overlay([*behind, front])
    return curve_axes(picture, title=title or heading, show_legend=False, **frame)


def embedding_3d(
    e: xr.Dataset,
    color: str = "feature_map",
    *,
    pcs: tuple[int, int, int] = (1, 2, 3),
    feature_map: int | None = None,
    azimuth: int = 40,
    elevation: int = 25,
    title: str | None = None,
) -> Any:
    """Scatter the neurons over three axes of their embedding; Matplotlib only.

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
        With the neurons' labels, and the number of their colour as ``code``.

    References
    ----------
    The original notebook, section 7 (the three-dimensional scatters).
    """
    hv = holoviews()
    _check(e, color, feature_map)
    (x, y, z), kdims = _axes(e, tuple(pcs))
    kdims = [hv.Dimension(d.name, label=f"PC {pc}") for d, pc in zip(kdims, pcs, strict=True)]
    # 3-D scatters colour by number only: number the colours
    if color == "both":
        hexes, code = np.unique(_hexes(e).astype(str), return_inverse=True)
        palette = [str(h) for h in hexes]
    elif color == "feature_map":
        palette = []
        code = np.zeros(len(x), dtype=np.int64)
        for k, (_, at, hue, _) in enumerate(_groups(e)):
            palette.append(hue)
            code[at] = k
    else:
        import matplotlib as mpl

        places, code = np.unique(e[color].values, return_inverse=True)
        palette = [mpl.colors.to_hex(c) for c in mpl.colormaps[VALUES](_place(places))]
    chosen = slice(None) if feature_map is None else e["feature_map"].values == feature_map
    columns = [x, y, z, *(e[n].values for n in ("feature_map", "patch_row", "patch_col")), code]
    element = hv.Scatter3D(
        tuple(c[chosen] for c in columns),
        kdims,
        ["feature_map", "patch_row", "patch_col", "code"],
    )
    names = {"both": "by row and column", "feature_map": "by feature map"}
    return element.opts(
        backend="matplotlib",
        clone=True,
        color="code",
        cmap=palette,
        clim=(-0.5, len(palette) - 0.5),
        s=float(np.clip(9000 / len(x), 3.0, 22.0)),
        linewidth=0,
        azimuth=azimuth,
        elevation=elevation,
        fig_inches=(3.6, 3.4),
        title=title or f"Three axes, {names.get(color, color.replace('_', ' '))}",
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
    ratio = np.asarray(variable(e, "explained_variance_ratio").values, dtype=np.float64) * 100
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
