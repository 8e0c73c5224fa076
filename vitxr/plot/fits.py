"""Pictures of many factorizations: how well, how alike and how consistent, at each rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._select import with_dims
from vitxr.plot._style import beside, categorical, curve_axes, holoviews, styled

__all__ = [
    "core_consistency_by_rank",
    "held_out_by_rank",
    "objective_by_rank",
    "rank_choice",
    "similarity_by_rank",
    "split_half_by_rank",
]

_REMEDY = "Give the ensemble, t.vit.fit_ensemble(ranks=[20, 25, 30]); of one fit see f.objective."
_CHOICE = "Give what t.vit.choose_rank(ranks=[5, 10, 20]) returns."
_POINTS, _LINE, _FLOOR = categorical(5)[4], categorical(1)[0], "#9a9a9a"
#: Core consistency below which points stand at the lower edge, in percent.
_LOWEST = -100.0


def _by_rank(
    ensemble: Any, name: str, each: str = "replicate", remedy: str = _REMEDY
) -> tuple[np.ndarray, np.ndarray]:
    array = with_dims(ensemble, name, ("rank", each), remedy)
    order = np.argsort(array["rank"].values, kind="stable")
    return array["rank"].values[order], np.asarray(array.values, dtype=np.float64)[order]


def _points_and_line(
    ranks: np.ndarray,
    points: list[tuple[int, float]],
    line: np.ndarray,
    names: tuple[str, str, str],
    title: str,
    ylim: tuple[float, float],
    floor: np.ndarray | None = None,
) -> Any:
    """Points, a line, and below them what shuffled data gave: its mean and range."""
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
    drawn = curve * dots
    if floor is not None:
        known = np.isfinite(floor).any(axis=1)
        low, high = np.nanmin(floor[known], axis=1), np.nanmax(floor[known], axis=1)
        band = styled(
            hv.Area((ranks[known], low, high), x, [y, hv.Dimension("high")]),
            both={"alpha": 0.3},
            mpl={"facecolor": _FLOOR, "edgecolor": _FLOOR, "linewidth": 0.6},
            bokeh={"color": _FLOOR, "line_color": _FLOOR, "line_width": 1},
        )
        middle = styled(
            hv.Curve((ranks[known], np.nanmean(floor[known], axis=1)), x, y, label="Shuffled data"),
            both={"color": _FLOOR},
            mpl={"linewidth": 1.2, "linestyle": "--"},
            bokeh={"line_width": 2, "line_dash": "dashed"},
        )
        drawn = band * middle * drawn
    return _by_rank_axes(drawn, ranks, title, ylim)


def _by_rank_axes(drawn: Any, ranks: np.ndarray, title: str, ylim: tuple[float, float]) -> Any:
    return curve_axes(
        drawn,
        title=title,
        legend_position="bottom_left",
        xlim=beside(ranks),
        xticks=[int(r) for r in ranks] if len(ranks) <= 12 else 10,
        ylim=ylim,
    )


def _floor(ensemble: Any, name: str, each: str = "replicate") -> np.ndarray | None:
    """What shuffled data gave, where that was computed."""
    if isinstance(ensemble, xr.DataArray) or name not in ensemble:
        return None
    values = _by_rank(ensemble, name, each)[1]
    return values if np.isfinite(values).any() else None


def _scattered(ranks: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    return [(r, v) for r, row in zip(ranks, values, strict=True) for v in row if np.isfinite(v)]


def objective_by_rank(ensemble: xr.DataTree | xr.Dataset, *, title: str = "Fit") -> Any:
    """Relative residual of every replicate against the rank, a line through the least.

    Parameters
    ----------
    ensemble
        ``objective`` (rank, replicate), as at the root of an ensemble; ``shuffled_objective``
        is drawn as a band where it is there.
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
    floor = _floor(ensemble, "shuffled_objective")
    high = float(np.nanmax(values if floor is None else np.append(values, floor)))
    return _points_and_line(
        ranks,
        _scattered(ranks, values),
        np.nanmin(values, axis=1),
        ("Relative residual  |X - M| / |X|", "One replicate", "Least of each rank"),
        title,
        (0.0, high * 1.12 or 1.0),
        floor,
    )


def similarity_by_rank(ensemble: xr.DataTree | xr.Dataset, *, title: str = "Agreement") -> Any:
    """Similarity of the replicates to the best one, against the rank, with the mean.

    The best replicate of a rank, of least objective, is left out: it is alike to
    itself by definition.

    Parameters
    ----------
    ensemble
        ``similarity`` and ``objective`` (rank, replicate), as at the root of an
        ensemble; ``shuffled_similarity`` is drawn as a band where it is there.
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
    return _points_and_line(
        ranks,
        _scattered(ranks, others),
        np.nanmean(others, axis=1),
        ("Similarity to the best replicate", "One replicate", "Mean of each rank"),
        title,
        (0.0, 1.05),
        _floor(ensemble, "shuffled_similarity"),
    )


def split_half_by_rank(found: xr.Dataset, *, title: str = "Two halves of the neurons") -> Any:
    """Factor match score between models of two halves of the neurons, against the rank.

    Parameters
    ----------
    found
        ``split_half_score`` (rank, split), from :func:`vitxr.factor.choose_rank`;
        ``shuffled_split_half_score`` is drawn as a band where it is there.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Scatter`` has a point a division, ``Curve`` the mean of each rank.

    Examples
    --------
    >>> found = xr.Dataset({"split_half_score": (("rank", "split"), [[0.5, 0.25], [0.75, 1.0]])},
    ...     coords={"rank": [1, 2]})
    >>> split_half_by_rank(found).Curve.Mean_of_each_rank.dimension_values("value")
    array([0.375, 0.875])
    """
    ranks, values = _by_rank(found, "split_half_score", "split", _CHOICE)
    return _points_and_line(
        ranks,
        _scattered(ranks, values),
        np.nanmean(values, axis=1),
        ("Factor match score of the halves", "One division", "Mean of each rank"),
        title,
        (0.0, 1.05),
        _floor(found, "shuffled_split_half_score", "split"),
    )


def core_consistency_by_rank(found: xr.Dataset, *, title: str = "Core consistency") -> Any:
    """Core consistency of every replicate against the rank, a line through the best fits.

    It has no lower bound: what is below -100 % stands at the lower edge, as triangles.

    Parameters
    ----------
    found
        ``core_consistency`` and ``objective`` (rank, replicate), from
        :func:`vitxr.factor.choose_rank`.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Scatter`` has a point a replicate, ``Curve`` the replicate of least objective of each
        rank.

    Raises
    ------
    DataError
        If core consistency is not defined for any of the ranks.

    Examples
    --------
    >>> found = xr.Dataset({"core_consistency": (("rank", "replicate"), [[100.0], [-900.0]]),
    ...     "objective": (("rank", "replicate"), [[0.5], [0.4]])}, coords={"rank": [1, 2]})
    >>> core_consistency_by_rank(found).Scatter.Below_minus_100.dimension_values("value")
    array([-100.])
    """
    ranks, values = _by_rank(found, "core_consistency", remedy=_CHOICE)
    _, objective = _by_rank(found, "objective", remedy=_CHOICE)
    if not np.isfinite(values).any():
        why = found["core_consistency"].attrs.get("undefined", "all fits have failed")
        raise DataError(
            f"there is no core consistency to draw: {why}. Ask for ranks up to the smallest "
            "dimension, or leave this picture out."
        )
    known = np.isfinite(values).any(axis=1)
    best = np.nanargmin(np.where(np.isfinite(values), objective, np.inf), axis=1)
    line = np.where(known, values[np.arange(len(ranks)), best], np.nan)
    inside = np.where(values >= _LOWEST, values, np.nan)
    picture = _points_and_line(
        ranks,
        _scattered(ranks, inside),
        np.maximum(line, _LOWEST),
        ("Core consistency (%)", "One replicate", "Least objective"),
        title,
        (_LOWEST - 8, 108.0),
    )
    if not (values < _LOWEST).any():
        return picture
    below = _scattered(ranks, np.where(values < _LOWEST, _LOWEST, np.nan))
    triangles = styled(
        holoviews().Scatter(below, "rank", "value", label="Below minus 100"),
        both={"color": _POINTS},
        mpl={"s": 18, "linewidth": 0, "marker": "v"},
        bokeh={"size": 7, "marker": "inverted_triangle"},
    )
    return _by_rank_axes(picture * triangles, ranks, title, (_LOWEST - 8, 108.0))


def held_out_by_rank(found: xr.Dataset, *, title: str = "Entries held out") -> Any:
    """Relative residual of entries held out and of those kept, against the rank.

    Parameters
    ----------
    found
        ``test_error`` and ``train_error`` (rank, replicate, split), from
        :func:`vitxr.factor.choose_rank`.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Scatter`` has a point of each replicate and split, held out. The curves are means over
        splits of the replicates of least residual on the entries kept.

    Raises
    ------
    DataError
        If nothing was held out.

    Examples
    --------
    >>> dims = ("rank", "replicate", "split")
    >>> found = xr.Dataset({"train_error": (dims, [[[0.5], [0.4]], [[0.2], [0.3]]]),
    ...     "test_error": (dims, [[[0.5], [0.6]], [[0.8], [0.7]]])}, coords={"rank": [1, 2]})
    >>> held_out_by_rank(found).Curve.Held_out.dimension_values("value")
    array([0.6, 0.8])
    """
    arrays = [
        with_dims(found, name, ("rank", "replicate", "split"), _CHOICE).sortby("rank")
        for name in ("train_error", "test_error")
    ]
    train, test = (np.asarray(array.values, np.float64) for array in arrays)
    ranks = arrays[0]["rank"].values
    known = np.isfinite(test).any(axis=1)
    if not known.any():
        why = found["test_error"].attrs.get("undefined", "all fits have failed")
        raise DataError(
            f"there are no errors of entries held out to draw: {why}. Leave this picture out."
        )
    best = np.where(np.isfinite(train), train, np.inf).argmin(axis=1)[:, None]
    kept, held = (
        np.nanmean(np.take_along_axis(values, best, axis=1)[:, 0], axis=1)
        for values in (train, test)
    )
    high = float(np.nanmax(test)) * 1.12
    picture = _points_and_line(
        ranks,
        _scattered(ranks, test.reshape(len(ranks), -1)),
        held,
        ("Relative residual", "Held out, one fit", "Held out"),
        title,
        (0.0, high),
    )
    line = styled(
        holoviews().Curve((ranks, kept), "rank", "value", label="Kept"),
        both={"color": categorical(3)[2]},
        mpl={"linewidth": 1.2, "linestyle": ":"},
        bokeh={"line_width": 2, "line_dash": "dotted"},
    )
    return _by_rank_axes(picture * line, ranks, title, (0.0, high))


def rank_choice(found: xr.Dataset) -> Any:
    """All criteria for choosing the rank: fit, held-out entries, agreement, halves, consistency.

    Every replicate and every division is a point; what shuffled data gave is grey, its mean
    dashed and its range a band.
    Agreement is left out where there is one replicate, core consistency and held-out entries
    where they are not defined for any of the ranks.

    Parameters
    ----------
    found
        From :func:`vitxr.factor.choose_rank`.

    Returns
    -------
    holoviews.Layout
        Two pictures a row.

    Examples
    --------
    >>> from vitxr.factor import choose_rank
    >>> rng = np.random.default_rng(0)
    >>> t = xr.DataArray(rng.random((8, 4, 5)), dims=("neuron", "image", "shift"))
    >>> found = choose_rank(t, [1, 2], 2, splits=1, progress=False)
    >>> len(rank_choice(found))
    5
    """
    errors = with_dims(found, "test_error", ("rank", "replicate", "split"), _CHOICE)
    pictures = [objective_by_rank(found)]
    if np.isfinite(errors).any():
        pictures.append(held_out_by_rank(found))
    if found.sizes["replicate"] > 1:
        pictures.append(similarity_by_rank(found))
    pictures.append(split_half_by_rank(found))
    if np.isfinite(found["core_consistency"]).any():
        pictures.append(core_consistency_by_rank(found))
    layout = holoviews().Layout(pictures).cols(2)
    return styled(
        layout,
        mpl={"sublabel_format": "", "hspace": 0.25, "vspace": 0.25, "tight": False},
        bokeh={"shared_axes": False},
    )
