"""Pictures of many factorizations: how well, how alike and how consistent, at each rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._by_rank import (
    POINTS,
    around,
    by_rank,
    by_rank_axes,
    floor,
    joined,
    points_and_line,
    scattered,
)
from vitxr.plot._select import with_dims
from vitxr.plot._style import TEXT, beside, categorical, holoviews, styled

__all__ = [
    "core_consistency_by_rank",
    "held_out_by_rank",
    "objective_by_rank",
    "rank_choice",
    "similarity_by_rank",
    "split_half_by_rank",
]

_CHOICE = "Give what t.vit.choose_rank(ranks=[5, 10, 20]) returns."
#: Core consistency below which points stand at the lower edge, in percent.
_LOWEST = -100.0


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
    ranks, values = by_rank(ensemble, "objective")
    shuffled = floor(ensemble, "shuffled_objective")
    high = float(np.nanmax(values if shuffled is None else np.append(values, shuffled)))
    return points_and_line(
        ranks,
        scattered(ranks, values),
        np.ma.masked_invalid(values).min(axis=1).filled(np.nan),
        ("Relative residual  |X - M| / |X|", "One replicate", "Least of each rank"),
        title,
        (0.0, high * 1.12 or 1.0),
        shuffled,
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
        If there is only one replicate, or no rank of which two have a model.

    References
    ----------
    The original notebook, section 7 (``plot_similarity``).
    """
    ranks, values = by_rank(ensemble, "similarity")
    _, objective = by_rank(ensemble, "objective")
    if values.shape[1] < 2:
        raise DataError(
            "the ensemble has one replicate, and similarity compares replicates: "
            "fit it with replicates=2 or more."
        )
    others = values.copy()
    best = np.where(np.isfinite(objective), objective, np.inf).argmin(axis=1)
    others[np.arange(len(ranks)), best] = np.nan
    if not np.isfinite(others).any():
        raise DataError(
            "of no rank two replicates have a model, and similarity compares replicates: give the "
            "ensemble as resume=... to fit those that have failed again."
        )
    return points_and_line(
        ranks,
        scattered(ranks, others),
        np.ma.masked_invalid(others).mean(axis=1).filled(np.nan),
        ("Similarity to the best replicate", "One replicate", "Mean of each rank"),
        title,
        (0.0, 1.05),
        floor(ensemble, "shuffled_similarity"),
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
        ``Scatter`` has a point a division, ``Path`` joins those of the same division, ``Curve``
        is the mean of each rank.

    Raises
    ------
    DataError
        If there are no scores, as where one half of every division is silent.

    Examples
    --------
    >>> found = xr.Dataset({"split_half_score": (("rank", "split"), [[0.5, 0.25], [0.75, 1.0]])},
    ...     coords={"rank": [1, 2]})
    >>> split_half_by_rank(found).Curve.Mean_of_each_rank.dimension_values("value")
    array([0.375, 0.875])
    """
    ranks, values = by_rank(found, "split_half_score", "split", _CHOICE)
    if not np.isfinite(values).any():
        why = found["split_half_score"].attrs.get("undefined", "all fits have failed")
        raise DataError(f"there are no scores of halves to draw: {why}. Leave this picture out.")
    quantity = "Factor match score of the halves"
    picture = points_and_line(
        ranks,
        scattered(ranks, values),
        np.ma.masked_invalid(values).mean(axis=1).filled(np.nan),
        (quantity, "One division", "Mean of each rank"),
        title,
        (0.0, 1.05),
        floor(found, "shuffled_split_half_score", "split"),
    )
    lines = joined(ranks, values, quantity)
    return by_rank_axes(lines * picture, ranks, title, (0.0, 1.05))


def core_consistency_by_rank(found: xr.Dataset, *, title: str = "Core consistency") -> Any:
    """Core consistency of every replicate against the rank, a line through the best fits.

    It has no lower bound: what is below -100 % stands at the lower edge, as triangles. Ranks at
    which it is not defined are named in the picture.

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
    ranks, values = by_rank(found, "core_consistency", remedy=_CHOICE)
    _, objective = by_rank(found, "objective", remedy=_CHOICE)
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
    picture = points_and_line(
        ranks,
        scattered(ranks, inside),
        np.maximum(line, _LOWEST),
        ("Core consistency (%)", "One replicate", "Least objective"),
        title,
        (_LOWEST - 8, 108.0),
    )
    if (values < _LOWEST).any():
        below = scattered(ranks, np.where(values < _LOWEST, _LOWEST, np.nan))
        picture *= styled(
            holoviews().Scatter(below, "rank", "value", label="Below minus 100"),
            both={"color": POINTS},
            mpl={"s": 18, "linewidth": 0, "marker": "v"},
            bokeh={"size": 7, "marker": "inverted_triangle"},
        )
    if not known.all():
        said = f"not defined at rank {', '.join(str(int(r)) for r in ranks[~known])}"
        place = (beside(ranks)[1], 104.0)
        note = holoviews().Text(*place, said, TEXT, "right", "top", kdims=["rank", "value"])
        picture *= styled(note, both={"color": "#5f5f5f"})
    return by_rank_axes(picture, ranks, title, (_LOWEST - 8, 108.0))


def held_out_by_rank(found: xr.Dataset, *, title: str = "Entries held out") -> Any:
    """Relative residual of entries held out and of those kept, against the rank.

    The axis does not begin at 0: what matters is where the residual is least, and by how little.

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
        ``Scatter`` has a point of each replicate and split, held out; ``Path`` joins, split by
        split, the replicates of least residual on the entries kept, of which the curves are the
        means over splits.

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
    if not np.isfinite(test).any():
        why = found["test_error"].attrs.get("undefined", "all fits have failed")
        raise DataError(
            f"there are no errors of entries held out to draw: {why}. Leave this picture out."
        )
    best = np.where(np.isfinite(train), train, np.inf).argmin(axis=1)[:, None]
    chosen = [np.take_along_axis(values, best, axis=1)[:, 0] for values in (train, test)]
    kept, held = (np.ma.masked_invalid(one).mean(axis=1).filled(np.nan) for one in chosen)
    ylim, quantity = around(test, kept), "Relative residual"
    picture = points_and_line(
        ranks,
        scattered(ranks, test.reshape(len(ranks), -1)),
        held,
        (quantity, "Held out, one fit", "Held out"),
        title,
        ylim,
    )
    line = styled(
        holoviews().Curve((ranks, kept), "rank", "value", label="Kept"),
        both={"color": categorical(3)[2]},
        mpl={"linewidth": 1.2, "linestyle": ":"},
        bokeh={"line_width": 2, "line_dash": "dotted"},
    )
    lines = joined(ranks, chosen[1], quantity)
    # It falls, and then hardly rises: there is room above it.
    return by_rank_axes(lines * picture * line, ranks, title, ylim, "top_right")


def rank_choice(found: xr.Dataset) -> Any:
    """All criteria for choosing the rank: fit, held-out entries, agreement, halves, consistency.

    Every replicate and every division is a point; what shuffled data gave is grey, its mean
    dashed and its range a band.
    Agreement is left out where there is one replicate; core consistency, halves and held-out
    entries where they are not defined for any of the ranks.

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
    if np.isfinite(by_rank(found, "similarity")[1]).sum(axis=1).max() > 1:
        pictures.append(similarity_by_rank(found))
    if np.isfinite(with_dims(found, "split_half_score", ("rank", "split"), _CHOICE)).any():
        pictures.append(split_half_by_rank(found))
    if np.isfinite(found["core_consistency"]).any():
        pictures.append(core_consistency_by_rank(found))
    layout = holoviews().Layout(pictures).cols(2)
    return styled(
        layout,
        mpl={"sublabel_format": "", "hspace": 0.25, "vspace": 0.25, "tight": False},
        bokeh={"shared_axes": False},
    )
