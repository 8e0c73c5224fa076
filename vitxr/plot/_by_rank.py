"""What pictures of many fits share: points and a line over ranks, a band of shuffled data."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.plot._select import with_dims
from vitxr.plot._style import beside, categorical, curve_axes, holoviews, styled

__all__ = [
    "POINTS",
    "around",
    "axes",
    "by_rank",
    "by_rank_axes",
    "floor",
    "joined",
    "points_and_line",
    "scattered",
]

_REMEDY = "Give the ensemble, t.vit.fit_ensemble(ranks=[20, 25, 30]); of one fit see f.objective."
_LINE, _FLOOR = categorical(1)[0], "#9a9a9a"
#: Colour of single fits.
POINTS = categorical(5)[4]


def by_rank(
    ensemble: Any, name: str, each: str = "replicate", remedy: str = _REMEDY
) -> tuple[np.ndarray, np.ndarray]:
    array = with_dims(ensemble, name, ("rank", each), remedy)
    order = np.argsort(array["rank"].values, kind="stable")
    return array["rank"].values[order], np.asarray(array.values, dtype=np.float64)[order]


def points_and_line(
    ranks: np.ndarray,
    points: list[tuple[int, float]],
    line: np.ndarray,
    names: tuple[str, str, str],
    title: str,
    ylim: tuple[float, float],
    shuffled: np.ndarray | None = None,
) -> Any:
    """Points, a line, and below them what shuffled data gave: its mean and range."""
    hv = holoviews()
    quantity, each, summary = names
    x, y = axes(quantity)
    curve = styled(
        hv.Curve((ranks, line), x, y, label=summary),
        both={"color": _LINE},
        mpl={"linewidth": 1.2},
        bokeh={"line_width": 2},
    )
    drawn = hv.Overlay([curve])
    if points:  # or the legend would name what is not there
        drawn *= styled(
            hv.Scatter(points, x, y, label=each),
            both={"color": POINTS, "alpha": 0.75},
            mpl={"s": 16, "linewidth": 0, "marker": "o"},
            bokeh={"size": 6},
        )
    if shuffled is not None:
        known = np.isfinite(shuffled).any(axis=1)
        low, high = np.nanmin(shuffled[known], axis=1), np.nanmax(shuffled[known], axis=1)
        band = styled(
            hv.Area((ranks[known], low, high), x, [y, hv.Dimension("high")]),
            both={"alpha": 0.3},
            mpl={"facecolor": _FLOOR, "edgecolor": _FLOOR, "linewidth": 0.6},
            bokeh={"color": _FLOOR, "line_color": _FLOOR, "line_width": 1},
        )
        middle = styled(
            hv.Curve(
                (ranks[known], np.nanmean(shuffled[known], axis=1)), x, y, label="Shuffled data"
            ),
            both={"color": _FLOOR},
            mpl={"linewidth": 1.2, "linestyle": "--"},
            bokeh={"line_width": 2, "line_dash": "dashed"},
        )
        drawn = band * middle * drawn
    return by_rank_axes(drawn, ranks, title, ylim)


def axes(quantity: str) -> list[Any]:
    """Dimensions of the rank and of what is drawn against it."""
    hv = holoviews()
    return [
        hv.Dimension("rank", label="Rank (components)"),
        hv.Dimension("value", label=quantity),
    ]


def joined(ranks: np.ndarray, values: np.ndarray, quantity: str) -> Any:
    """A thin line for each division, (rank, split): it is the same data at each rank."""
    lines = [np.stack([ranks, one], axis=1)[np.isfinite(one)] for one in values.T]
    return styled(
        holoviews().Path(lines, axes(quantity)),
        both={"color": POINTS, "alpha": 0.5},
        mpl={"linewidth": 0.6},
        bokeh={"line_width": 1},
    )


def around(*values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that show how values of a narrow range differ."""
    known = np.concatenate([v[np.isfinite(v)] for v in values])
    low, high = float(known.min()), float(known.max())
    room = 0.12 * (high - low) or 0.05 * high or 0.5
    return max(0.0, low - room), high + room


def by_rank_axes(
    drawn: Any,
    ranks: np.ndarray,
    title: str,
    ylim: tuple[float, float],
    legend: str = "bottom_left",
) -> Any:
    """Give a picture over ranks its axes."""
    return curve_axes(
        drawn,
        title=title,
        legend_position=legend,
        xlim=beside(ranks),
        xticks=[int(r) for r in ranks] if len(ranks) <= 12 else 10,
        ylim=ylim,
    )


def floor(ensemble: Any, name: str, each: str = "replicate") -> np.ndarray | None:
    """What shuffled data gave, where that was computed."""
    if isinstance(ensemble, xr.DataArray) or name not in ensemble:
        return None
    values = by_rank(ensemble, name, each)[1]
    return values if np.isfinite(values).any() else None


def scattered(ranks: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    return [(r, v) for r, row in zip(ranks, values, strict=True) for v in row if np.isfinite(v)]
