"""Pictures of what the analyses find: the numbers in the elements, refusals, and one PNG each."""

import numpy as np
import pytest
import synthetic
import xarray as xr

from vitxr import analysis, plot
from vitxr.errors import ArgumentError, DataError
from vitxr.plot._mosaic import Tiles

pytest.importorskip("holoviews")


@pytest.fixture(scope="module")
def stim():
    return synthetic.stimuli(per_class=4, classes=(0, 1, 2))


@pytest.fixture(scope="module")
def run(stim):
    ds = synthetic.extraction(stim, step=4, layers=(0, 1, 2), channels=12, heads=3)
    for name in ("offset_y", "offset_x"):
        ds[name].attrs["period"] = 32
    ds.attrs["prefix_names"] = "class"
    return ds


@pytest.fixture(scope="module")
def fine(stim):
    ds = synthetic.extraction(stim.isel(image=[0, 4]), step=1, layers=(0, 1), channels=5)
    for name in ("offset_y", "offset_x"):
        ds[name].attrs["period"] = 32
    return ds


@pytest.fixture(scope="module")
def moved(fine):
    return analysis.equivariance(fine)


@pytest.fixture(scope="module")
def alike(run):
    few = run.isel(shift_y=[0, 3, 4, 6], shift_x=[0, 2])
    return {
        (name, across): call(few, across=across, shuffles=5)
        for name, call in (("cka", analysis.cka), ("rsa", analysis.rsa))
        for across in ("layer", "shift")
    }


@pytest.fixture(scope="module")
def table(run):
    return analysis.map_table(run, shuffles=10)


def parts(picture, kind):
    return [e for e in picture.traverse(lambda x: x) if type(e).__name__ == kind]


def named(picture, kind):
    return {e.label: e for e in parts(picture, kind)}


def grid(element, vdim=2):
    return element.dimension_values(vdim, flat=False)


def texts(picture):
    return [t for e in parts(picture, "Labels") for t in e.dimension_values("text")]


def test_curves_are_medians_and_bands_quartiles(moved):
    picture = plot.equivariance(moved)
    curves = named(picture, "Curve")
    whole = moved.phase_error.sel(phase_y=0, phase_x=0)
    expected = {
        "rolled back, whole patches": whole,
        "rolled back, all shifts": moved.equivariance_error,
        "not rolled": moved.still_error,
    }
    drawn = [curves[name] for name in expected]
    for curve, array in zip(drawn, expected.values(), strict=True):
        np.testing.assert_allclose(curve.dimension_values("value"), array.median("feature_map"))
    for band, array in zip(parts(picture, "Area"), expected.values(), strict=True):
        low, high = array.quantile([0.25, 0.75], "feature_map").values
        np.testing.assert_allclose(band.dimension_values("value"), low)
        np.testing.assert_allclose(band.dimension_values("upper"), high)
    np.testing.assert_array_equal(curves["chance"].dimension_values("value"), 1.0)
    both = plot.equivariance({"one": moved, "two": moved.isel(layer=[1])}, "invariance")
    assert set(named(both, "Curve")) == {"one", "two"}
    np.testing.assert_array_equal(named(both, "Curve")["two"].dimension_values("layer"), [1])
    with pytest.raises(ArgumentError, match="variable='phase': expected one of equivariance_error"):
        plot.equivariance(moved, "phase")
    with pytest.raises(DataError, match=r"results of equivariance; given.*ds\.vit\.equivariance"):
        plot.equivariance(xr.Dataset())
    with pytest.raises(DataError, match="no shift is one by whole patches"):
        plot.equivariance(moved.sel(phase_y=[1, -1]), "whole_patches")
    with pytest.raises(DataError, match=r"dimension `layer`; given: the DataArray"):
        plot.by_layer(moved.variance.isel(layer=0))


def test_error_map_is_the_median_over_maps(moved):
    (drawn,) = parts(plot.error_map(moved), "Image")
    values, expected = grid(drawn), moved.error_map.median("feature_map")
    tiles = Tiles(1, 2, 8, 8, (values.shape[1] - 16))
    for layer in range(2):
        np.testing.assert_allclose(values[tiles.block(0, layer)], expected[layer])
    (drawn,) = parts(plot.error_map(moved.isel(feature_map=2, layer=0)), "Image")
    np.testing.assert_array_equal(grid(drawn), moved.error_map[0, 2])


def test_phases_close_the_circle(moved):
    picture = plot.phase_tuning(moved.isel(layer=0))
    (drawn,) = parts(picture, "Image")
    expected = moved.phase_error.isel(layer=0).median("feature_map").values
    np.testing.assert_allclose(grid(drawn)[:4, :4], expected)
    np.testing.assert_array_equal(grid(drawn)[4], grid(drawn)[0])
    np.testing.assert_array_equal(grid(drawn)[:, 4], grid(drawn)[:, 0])
    assert texts(picture)[:5] == ["-2", "-1", "0", "1", "2"]
    (drawn,) = parts(plot.phase_tuning(moved.isel(layer=0), "phase_activity"), "Image")
    assert np.nanmax(np.abs(grid(drawn))) == pytest.approx(1)
    with pytest.raises(ArgumentError, match="variable='phase_frames': expected 'phase_error'"):
        plot.phase_tuning(moved, "phase_frames")


def test_unshift_draws_frames_and_rolls(fine):
    picture = plot.unshift(fine, 3, layer=1, image_at=1, every=8)
    values = grid(parts(picture, "Image")[0])
    tiles = Tiles(2, 4, 8, 8, (values.shape[0] - 16))
    frames = fine.activation.sel(layer=1, feature_map=3).isel(image=1, shift_x=0).values
    for k in range(4):
        np.testing.assert_array_equal(values[tiles.block(0, k)], frames[8 * k])
        np.testing.assert_array_equal(values[tiles.block(1, k)], np.roll(frames[8 * k], -2 * k, 0))
    assert texts(picture)[:4] == ["dy 0 px", "dy 8 px", "dy 16 px", "dy 24 px"]
    for wrong, message in (
        ({"layer": 7}, r"layer=7 is not in the data; they hold 0, 1\."),
        ({"along": "x"}, "along='x': expected 'shift_y'"),
        ({"every": 0}, "every=0: expected a positive integer"),
    ):
        with pytest.raises(ArgumentError, match=message):
            plot.unshift(fine, 3, **{"layer": 1, **wrong})


@pytest.mark.parametrize("name", ["cka", "rsa"])
def test_similarity_by_layer_marks_what_is_not_above_the_floor(alike, name):
    c = alike[name, "layer"].copy(deep=True)
    c[name][0, 2] = c[f"{name}_floor_quantile"][0, 2] - 0.01
    picture = plot.similarity_by_layer(c)
    (drawn,) = parts(picture, "Image")
    np.testing.assert_array_equal(grid(drawn), c[name])
    np.testing.assert_array_equal(grid(drawn, "floor"), c[f"{name}_floor_quantile"])
    bracketed = [t for t in texts(picture) if t.startswith("(")]
    assert bracketed == [f"({float(c[name][0, 2]):.2f})"]
    assert any(t.startswith("floor: 95% of shuffled images") for t in texts(picture))
    with pytest.raises(DataError, match=r"\(layer, other_layer\); given.*across='layer'"):
        plot.similarity_by_layer(alike[name, "shift"])


def test_similarity_by_shift_goes_around(alike):
    c = alike["cka", "shift"]
    picture = plot.similarity_by_shift(c)
    curves = named(picture, "Curve")
    assert [n for n in curves if n.startswith("block")] == ["block 0", "block 1", "block 2"]
    one = c.cka.isel(shift_x=0, other_shift_y=0, other_shift_x=0, layer=1).values
    offsets = [-16, -8, 0, 12, 16]  # of 0, 12, 16, 24 px, the third at both ends
    curve = curves["block 1"]
    np.testing.assert_array_equal(curve.dimension_values("offset"), offsets)
    np.testing.assert_allclose(curve.dimension_values("value"), one[[2, 3, 0, 1, 2]])
    assert curve.dimension_values("value")[2] == pytest.approx(1)
    (band,) = parts(picture, "Area")
    floor = c.cka_floor_quantile.isel(shift_x=0, other_shift_y=0, other_shift_x=0).max("layer")
    np.testing.assert_allclose(band.dimension_values("upper"), floor.values[[2, 3, 0, 1, 2]])
    with pytest.raises(DataError, match="across='shift'"):
        plot.similarity_by_shift(alike["cka", "layer"])


def test_rdm_is_sorted_by_class(run):
    order = np.random.default_rng(0).permutation(12)
    d = analysis.rdm(run.isel(image=order, shift_y=[0], shift_x=[0], layer=[1]))
    picture = plot.rdm(d)
    (drawn,) = parts(picture, "Image")
    first = np.argsort(d.label.values.astype(str), kind="stable")
    np.testing.assert_array_equal(grid(drawn), d.squeeze().values[np.ix_(first, first)])
    assert texts(picture)[:3] == ["0", "1", "2"]
    assert len(parts(picture, "Segments")[0]) == 4
    with pytest.raises(
        DataError, match=r"`dissimilarity` with dims \(\.\.\., image, other_image\)"
    ):
        plot.rdm(run.activation)


def test_heads_are_means_over_images_and_shifts(run):
    few = run.isel(shift_y=[0, 1], shift_x=[0])
    d = analysis.attention_distance(few)
    picture = plot.attention_distance(d, uniform=12.0)
    points = [p.dimension_values("value") for p in parts(picture, "Scatter")]
    expected = d.mean(("image", "shift_y", "shift_x")).transpose("head", "layer")
    np.testing.assert_allclose(points, expected)
    assert {"mean_of_heads", "uniform_attention"} <= {
        k.replace(" ", "_") for k in named(picture, "Curve")
    }
    entropy = plot.attention_entropy(analysis.attention_entropy(few))
    assert entropy.get_dimension("value").label == "Mean attention entropy (nat)"
    with pytest.raises(
        DataError, match=r"with dims \(\.\.\., layer, head\).*attention_distance\(\)"
    ):
        plot.attention_distance(d.isel(layer=0))


def test_table_of_maps(table):
    picture = plot.map_table(table, "d_prime_floor", "d_prime")
    points = parts(picture, "Points")
    assert len(points) == 3
    for k, one in enumerate(points):
        np.testing.assert_array_equal(one.dimension_values("d_prime"), table.d_prime[k])
        np.testing.assert_array_equal(one.dimension_values("feature_map"), table.feature_map)
    (line,) = parts(picture, "Curve")
    np.testing.assert_array_equal(line.dimension_values(0), line.dimension_values(1))
    (points,) = parts(plot.map_table(table.sel(layer=1), color="label_share"), "Points")
    np.testing.assert_array_equal(points.dimension_values("label_share"), table.label_share[1])
    with pytest.raises(ArgumentError, match="y='preferred_label': the columns are mean_activity"):
        plot.map_table(table, y="preferred_label")


def test_class_activity_is_sorted_by_the_class_preferred(run):
    a = analysis.class_activity(run).isel(layer=2)
    (drawn,) = parts(plot.class_activity(a), "Image")
    wide = grid(drawn).shape[1] // 3
    values = grid(drawn)[:, ::wide]
    dead = np.isnan(values).any(1)
    assert (np.diff(dead.astype(int)) >= 0).all()  # they stand last
    values = values[~dead]
    assert (np.diff(values.argmax(1)) >= 0).all()
    np.testing.assert_array_equal(values.max(1), 1.0)
    relative = (a / a.max("label")).dropna("feature_map").values
    np.testing.assert_array_equal(sorted(map(tuple, values)), sorted(map(tuple, relative)))


def test_filters_are_on_one_scale():
    values = np.random.default_rng(0).normal(size=(7, 2, 3, 3))
    f = xr.DataArray(values, dims=("feature_map", "row", "col", "channel"), name="patch_filter")
    picture = plot.patch_filters(f, columns=4)
    (drawn,) = parts(picture, "RGB")
    shown = np.dstack([drawn.dimension_values(k, flat=False) for k in range(2, 6)])
    gap = shown.shape[0] - 4
    for k in range(7):
        block = Tiles(2, 4, 2, 3, gap).block(*divmod(k, 4))
        expected = 255 * (0.5 + values[k] / (2 * np.abs(values).max()))
        np.testing.assert_allclose(shown[block][..., :3], expected, atol=0.51)
    assert (shown[..., 3] > 0).sum() == 7 * 6


def test_positions_stand_at_their_place():
    cosine = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 3))
    dims = ("patch_row", "patch_col", "other_row", "other_col")
    (drawn,) = parts(plot.position_similarity(xr.DataArray(cosine, dims=dims)), "Image")
    tiles = Tiles(2, 3, 2, 3, 1)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(grid(drawn)[tiles.block(i, j)], cosine[i, j])


def test_signed_factors_are_drawn_in_diverging_colours():
    stim = synthetic.stimuli(per_class=1, classes=(0, 1))
    tensor = synthetic.neuron_tensor(
        synthetic.extraction(stim, step=8, layers=(0,), channels=12), 0, maps=3
    )
    f = synthetic.factorize(tensor, 2)
    for name in ("neuron_factor", "image_factor", "shift_factor"):
        f[name].values -= float(f[name].max()) / 2
    picture = plot.factors(f)
    neurons, *lattice = parts(picture, "Image")
    for one in (neurons, *lattice):
        options = one.opts.get("style", backend="matplotlib").kwargs
        low, high = one.opts.get("plot", backend="matplotlib").kwargs["clim"]
        assert options["cmap"] == "RdBu_r"
        assert low == -high
    assert np.nanmax(np.abs(grid(neurons))) == pytest.approx(1)
    for boxes in parts(picture, "Rectangles"):
        corners = boxes.array().astype(float)
        assert (corners[:, 3] >= corners[:, 1]).all()
    plot.figure(picture)


def test_embedding_by_an_array(run):
    tensor = synthetic.neuron_tensor(run.isel(image=[0, 4]), 1, maps=3)
    f = synthetic.factorize(tensor, 3)
    e = synthetic.embed(f)
    loading = f.neuron_factor.sel(component=1)
    (points,) = parts(plot.embedding(e, loading), "Points")
    np.testing.assert_array_equal(points.dimension_values(points.vdims[-1]), loading)
    options = points.opts.get("style", backend="matplotlib").kwargs
    assert options["cmap"] == "viridis"
    (points,) = parts(plot.embedding(e, loading - 0.01), "Points")
    assert points.opts.get("style", backend="matplotlib").kwargs["cmap"] == "RdBu_r"
    clustered = e.assign_coords(cluster=("neuron", np.arange(e.sizes["neuron"]) % 4 - 1))
    assert list(plot.embedding(clustered, "cluster").keys()) == [-1, 0, 1, 2]
    with pytest.raises(ArgumentError, match=r"dims \(neuron: 5\); expected one number or name"):
        plot.embedding(e, loading[:5])
    with pytest.raises(ArgumentError, match="labelled by other neurons"):
        plot.embedding(e, loading[::-1])
