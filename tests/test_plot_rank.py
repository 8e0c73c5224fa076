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


def test_every_division_is_a_point_and_a_line(found):
    picture = plot.split_half_by_rank(found)
    points = shown(picture, "Scatter", "One_division")
    scores = found.split_half_score.sortby("rank")
    np.testing.assert_array_equal(points.dimension_values("value"), scores.values.ravel())
    lines = picture.Path.I.split(datatype="array")
    assert len(lines) == found.sizes["split"]
    for line, split in zip(lines, (0, 1), strict=True):
        np.testing.assert_array_equal(line, np.stack([scores["rank"], scores[:, split]], axis=1))
    gone = found.assign(split_half_score=found.split_half_score * np.nan)
    gone.split_half_score.attrs["undefined"] = "split 0: of one half of neuron, it is zero"
    with pytest.raises(DataError, match="scores of halves to draw: split 0: of one half of neur"):
        plot.split_half_by_rank(gone)
    assert len(plot.rank_choice(gone)) == 4


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
    assert picture.Text.I.data[2] == "not defined at rank 16"
    assert picture.Text.I.data[0] >= 16
    assert "Text" not in plot.core_consistency_by_rank(found.sel(rank=[2, 4])).keys()  # noqa: SIM118
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
    chosen = by_rank.test_error.isel(replicate=best)
    for line, split in zip(picture.Path.I.split(datatype="array"), (0, 1), strict=True):
        np.testing.assert_array_equal(line, np.stack([chosen["rank"], chosen[:, split]], axis=1))
    nothing = found.assign(test_error=found.test_error * np.nan)
    nothing.test_error.attrs["undefined"] = "parafac takes no masks"
    with pytest.raises(DataError, match="to draw: parafac takes no masks"):
        plot.held_out_by_rank(nothing)


def test_the_axis_of_held_out_entries_shows_how_they_differ(found):
    close = found.assign(
        test_error=0.194 + 0.01 * found.test_error, train_error=0.192 + 0.001 * found.train_error
    )
    picture = plot.held_out_by_rank(close)
    drawn = plot.figure(picture).axes[0]
    low, high = drawn.get_ylim()
    # of the axis most is data, and all data are on it
    kept = shown(picture, "Curve", "Kept").dimension_values("value")
    least, most = min(kept.min(), float(close.test_error.min())), float(close.test_error.max())
    assert low < least < most < high
    assert (most - least) / (high - low) > 0.7
    assert drawn.get_ylabel() == "Relative residual"
    assert drawn.get_xlabel() == "Rank (components)"
    same = found.assign(test_error=0 * found.test_error, train_error=0 * found.train_error)
    assert plot.figure(plot.held_out_by_rank(same)).axes[0].get_ylim() == (0.0, 0.5)


def legend(picture):
    drawn = plot.figure(picture).axes[0].get_legend()
    return {text.get_text() for text in drawn.get_texts()}


def test_the_legend_names_what_is_drawn(found):
    assert legend(plot.core_consistency_by_rank(found)) == {
        "One replicate",
        "Least objective",
        "Below minus 100",
    }
    low = found.assign(core_consistency=-200 - abs(found.core_consistency.fillna(1)))
    assert legend(plot.core_consistency_by_rank(low)) == {"Least objective", "Below minus 100"}
    high = found.assign(core_consistency=abs(found.core_consistency).clip(max=99).fillna(1))
    assert legend(plot.core_consistency_by_rank(high)) == {"Least objective", "One replicate"}
    assert legend(plot.held_out_by_rank(found)) == {"Held out, one fit", "Held out", "Kept"}
    halves = {"One division", "Mean of each rank"}
    assert legend(plot.split_half_by_rank(found)) == {*halves, "Shuffled data"}
    plain = found.drop_vars("shuffled_split_half_score")
    assert legend(plot.split_half_by_rank(plain)) == halves


def test_fits_that_failed_are_left_out(found):
    one = found.copy(deep=True)
    for name in ("objective", "similarity", "core_consistency", "train_error", "test_error"):
        one[name][2] = np.nan  # rank 2 has no model
        one[name][0, 0] = np.nan
    for picture, label in (
        (plot.objective_by_rank(one), "Least_of_each_rank"),
        (plot.similarity_by_rank(one), "Mean_of_each_rank"),
    ):
        values = shown(picture, "Curve", label).dimension_values("value")
        assert np.isnan(values[0])
        assert np.isfinite(values[2])
    assert len(plot.rank_choice(one)) == 5
    one["similarity"][:, 0] = one["objective"][:, 0] = np.nan
    with pytest.raises(DataError, match="of no rank two replicates have a model"):
        plot.similarity_by_rank(one)
    assert len(plot.rank_choice(one)) == 4


def test_all_in_one_and_what_is_missing_left_out(found):
    assert len(plot.rank_choice(found)) == 5
    single = found.isel(replicate=[0])
    single = single.assign({n: single[n] * np.nan for n in ("core_consistency", "test_error")})
    single["similarity"][:] = 1.0  # as of a replicate alone
    assert len(plot.rank_choice(single)) == 2
    assert plot.render(plot.rank_choice(found), dpi=40)["png"].startswith(b"\x89PNG")
    import holoviews as hv

    assert hv.Store.renderers["bokeh"].get_plot(plot.rank_choice(found)) is not None
    with pytest.raises(DataError, match=r"`test_error`.*choose_rank"):
        plot.rank_choice(found.drop_vars("test_error"))
    with pytest.raises(DataError, match="choose_rank"):
        plot.split_half_by_rank(found.drop_vars("split_half_score"))
