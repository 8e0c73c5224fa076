"""Pictures of ensembles of factorizations: how well, and how alike, at each rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._select import with_dims
from vitxr.plot._style import beside, categorical, curve_axes, holoviews, styled

__all__ = ["objective_by_rank", "similarity_by_rank"]

_REMEDY = "Give the ensemble, t.vit.fit_ensemble(ranks=[20, 25, 30]); of one fit see f.objective."
_POINTS, _LINE = categorical(5)[4], categorical(1)[0]


def _by_rank(ensemble: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    array = with_dims(ensemble, name, ("rank", "replicate"), _REMEDY)
    order = np.argsort(array["rank"].values, kind="stable")
    return array["rank"].values[order], np.asarray(array.values, dtype=np.float64)[order]


def _points_and_line(
    ranks: np.ndarray,
    points: list[tuple[int, float]],
    line: np.ndarray,
    names: tuple[str, str, str],
    title: str,
    ylim: tuple[float, float],
) -> Any:
    hv = holoviews()
    quantity, each, summary = names
    x, y = hv.Dimension("rank", label="Rank (components)"), hv.Dimension("value", label=quantity)
    curve = styled(
        hv.Curve((ranks, line), x, y, label=summary),
        both={"color": _LINE},
        mpl={"linewidth": 1.2},
        bokeh={"line_width": 2},
    )
    dots = styled(
        hv.Scatter(points, x, y, label=each),
        both={"color": _POINTS, "alpha": 0.75},
        mpl={"s": 16, "linewidth": 0, "marker": "o"},
        bokeh={"size": 6},
    )
    return curve_axes(
        curve * dots,
        title=title,
        legend_position="bottom_left",
        xlim=beside(ranks),
        xticks=[int(r) for r in ranks] if len(ranks) <= 12 else 10,
        ylim=ylim,
    )


def objective_by_rank(ensemble: xr.DataTree | xr.Dataset, *, title: str = "Fit") -> Any:
    """Relative residual of every replicate against the rank, a line through the least.

    Parameters
    ----------
    ensemble
        ``objective`` (rank, replicate), as at the root of an ensemble.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Scatter`` has a point a fit, ``Curve`` the least of each rank.

    References
    ----------
    The original notebook, section 7 (``plot_objective``).

    Examples
    --------
    >>> e = xr.Dataset({"objective": (("rank", "replicate"), [[0.5, 0.4], [0.3, 0.2]])},
    ...     coords={"rank": [1, 2]})
    >>> objective_by_rank(e).Curve.Least_of_each_rank.dimension_values("value")
    array([0.4, 0.2])
    """
    ranks, values = _by_rank(ensemble, "objective")
    points = [(r, v) for r, row in zip(ranks, values, strict=True) for v in row if np.isfinite(v)]
    high = float(np.nanmax(values))
    return _points_and_line(
        ranks,
        points,
        np.nanmin(values, axis=1),
        ("Relative residual  |X - M| / |X|", "One replicate", "Least of each rank"),
        title,
        (0.0, high * 1.12 or 1.0),
    )


def similarity_by_rank(ensemble: xr.DataTree | xr.Dataset, *, title: str = "Agreement") -> Any:
    """Similarity of the replicates to the best one, against the rank, with the mean.

    The best replicate of a rank, of least objective, is left out: it is alike to
    itself by definition.

    Parameters
    ----------
    ensemble
        ``similarity`` and ``objective`` (rank, replicate), as at the root of an
        ensemble.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Scatter`` has a point a replicate, ``Curve`` the mean of each rank.

    Raises
    ------
    DataError
        If there is only one replicate.

    References
    ----------
    The original notebook, section 7 (``plot_similarity``).
    """
    ranks, values = _by_rank(ensemble, "similarity")
    _, objective = _by_rank(ensemble, "objective")
    if values.shape[1] < 2:
        raise DataError(
            "the ensemble has one replicate, and similarity compares replicates: "
            "fit it with replicates=2 or more."
        )
    others = values.copy()
    others[np.arange(len(ranks)), np.nanargmin(objective, axis=1)] = np.nan
    points = [(r, v) for r, row in zip(ranks, others, strict=True) for v in row if np.isfinite(v)]
    return _points_and_line(
        ranks,
        points,
        np.nanmean(others, axis=1),
        ("Similarity to the best replicate", "One replicate", "Mean of each rank"),
        title,
        (0.0, 1.05),
    )
