"""Pictures of the choice of rank: what they show is what the Dataset holds."""

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("holoviews")

from vitxr import plot
from vitxr.errors import DataError


@pytest.fixture
def found():
    rng = np.random.default_rng(0)
    both, halves = ("rank", "replicate"), ("rank", "split")
    names = ("objective", "similarity", "shuffled_objective", "shuffled_similarity")
    ds = xr.Dataset({name: (both, rng.random((3, 2))) for name in names})
    ds["shuffled_similarity"][1] = np.nan
    ds["split_half_score"] = (halves, rng.random((3, 2)))
    ds["shuffled_split_half_score"] = (halves, rng.random((3, 2)))
    ds["core_consistency"] = (both, [[100.0, 90.0], [np.nan, np.nan], [-4000.0, 20.0]])
    for name in ("train_error", "test_error"):
        ds[name] = (("rank", "replicate", "split"), rng.random((3, 2, 2)))
    return ds.assign_coords(rank=[4, 16, 2], replicate=[0, 1], split=[0, 1])


def shown(picture, kind, label):
    return getattr(getattr(picture, kind), label)


def test_bands_are_the_range_of_shuffled_data(found):
    for picture, name in (
        (plot.objective_by_rank(found), "shuffled_objective"),
        (plot.split_half_by_rank(found), "shuffled_split_half_score"),
        (plot.similarity_by_rank(found), "shuffled_similarity"),
    ):
        each = found[name].sortby("rank")
        each = each.isel(rank=np.isfinite(each).any(each.dims[1]).values)
        band = picture.Area.I
        np.testing.assert_array_equal(band.dimension_values("rank"), each["rank"])
        np.testing.assert_array_equal(band.dimension_values("value"), each.min(each.dims[1]))
        np.testing.assert_array_equal(band.dimension_values("high"), each.max(each.dims[1]))
        middle = shown(picture, "Curve", "Shuffled_data").dimension_values("value")
        np.testing.assert_allclose(middle, each.mean(each.dims[1]))
    plain = plot.objective_by_rank(found.drop_vars("shuffled_objective"))
    assert "Area" not in plain.keys()  # noqa: SIM118 (an Overlay, not a dict)


def test_every_division_is_a_point(found):
    points = shown(plot.split_half_by_rank(found), "Scatter", "One_division")
    expected = found.split_half_score.sortby("rank").values.ravel()
    np.testing.assert_array_equal(points.dimension_values("value"), expected)


def test_core_consistency_far_below_stands_at_the_edge(found):
    picture = plot.core_consistency_by_rank(found)
    points = shown(picture, "Scatter", "One_replicate")
    assert points.dimension_values("value").tolist() == [20, 100, 90]
    assert points.dimension_values("rank").tolist() == [2, 4, 4]
    below = shown(picture, "Scatter", "Below_minus_100")
    assert below.dimension_values("rank").tolist() == [2]
    line = shown(picture, "Curve", "Least_objective").dimension_values("value")
    best = found.objective.sortby("rank").argmin("replicate").values
    expected = found.core_consistency.sortby("rank").values[[0, 1], best[:2]]
    np.testing.assert_array_equal(line[:2], np.maximum(expected, -100))
    assert np.isnan(line[2])
    undefined = found.assign(core_consistency=found.core_consistency * np.nan)
    undefined.core_consistency.attrs["undefined"] = "rank 2 exceeds the size of image (1)"
    with pytest.raises(DataError, match=r"to draw: rank 2 exceeds the size of image \(1\)"):
        plot.core_consistency_by_rank(undefined)


def test_held_out_entries_of_the_fit_that_was_best_on_those_kept(found):
    picture = plot.held_out_by_rank(found)
    by_rank = found.sortby("rank")
    best = by_rank.train_error.argmin("replicate")
    for label, name in (("Held_out", "test_error"), ("Kept", "train_error")):
        expected = by_rank[name].isel(replicate=best).mean("split")
        values = shown(picture, "Curve", label).dimension_values("value")
        np.testing.assert_allclose(values, expected)
    points = shown(picture, "Scatter", "Held_out_comma_one_fit")
    np.testing.assert_array_equal(
        points.dimension_values("value"), by_rank.test_error.values.ravel()
    )
    nothing = found.assign(test_error=found.test_error * np.nan)
    nothing.test_error.attrs["undefined"] = "parafac takes no masks"
    with pytest.raises(DataError, match="to draw: parafac takes no masks"):
        plot.held_out_by_rank(nothing)


def test_all_in_one_and_what_is_missing_left_out(found):
    assert len(plot.rank_choice(found)) == 5
    single = found.isel(replicate=[0])
    single = single.assign({n: single[n] * np.nan for n in ("core_consistency", "test_error")})
    assert len(plot.rank_choice(single)) == 2
    assert plot.render(plot.rank_choice(found), dpi=40)["png"].startswith(b"\x89PNG")
    import holoviews as hv

    assert hv.Store.renderers["bokeh"].get_plot(plot.rank_choice(found)) is not None
    with pytest.raises(DataError, match=r"`test_error`.*choose_rank"):
        plot.rank_choice(found.drop_vars("test_error"))
    with pytest.raises(DataError, match="choose_rank"):
        plot.split_half_by_rank(found.drop_vars("split_half_score"))
