"""Pictures of neurons on the manifold and on the patch grid."""

import numpy as np
import pytest
import synthetic
import xarray as xr

from vitxr import analysis, plot
from vitxr.errors import ArgumentError, DataError

pytest.importorskip("holoviews")


@pytest.fixture(scope="module")
def tensor():
    stim = synthetic.stimuli(per_class=2, classes=(0, 1))
    return synthetic.neuron_tensor(synthetic.extraction(stim, step=8, layers=(0,)), 0, maps=3)


@pytest.fixture(scope="module")
def factors(tensor):
    return synthetic.factorize(tensor, 4)


@pytest.fixture(scope="module")
def ordered(factors):
    return analysis.spatial_order(analysis.embed(factors, 3), n_permutations=19)


def parts(picture, kind):
    return [e for e in picture.traverse(lambda x: x) if type(e).__name__ == kind]


def grid(element, vdim=2):
    return element.dimension_values(vdim, flat=False)


def test_spatial_order_stands_before_its_shuffles(ordered):
    picture = plot.spatial_order(ordered)
    sure, unsure = parts(picture, "Scatter")
    assert len(sure) + len(unsure) == 3
    value = np.full(3, np.nan)
    for one in (sure, unsure):
        value[one.dimension_values("place").astype(int)] = one.dimension_values("order")
    np.testing.assert_array_equal(value, ordered.spatial_order)
    (bars,) = parts(picture, "Segments")
    low, high = ordered.shuffled_spatial_order.quantile([0.025, 0.975], "permutation").values
    np.testing.assert_allclose(bars.dimension_values("order"), low)
    np.testing.assert_allclose(bars.dimension_values("y1"), high)
    assert (sure.dimension_values("p") <= 0.05).all()
    with pytest.raises(DataError, match=r"`spatial_order`.*given: a Dataset.*e\.vit\.spatial_ord"):
        plot.spatial_order(ordered.drop_vars("spatial_order"))


def test_distances_of_the_best_and_worst(ordered):
    curves = parts(plot.manifold_distance(ordered), "Curve")
    for k, curve in enumerate(curves):
        expected = ordered.manifold_distance[k].dropna("grid_distance")
        np.testing.assert_array_equal(curve.dimension_values("manifold_distance"), expected)
        np.testing.assert_array_equal(
            curve.dimension_values("grid_distance"), expected.grid_distance
        )
    many = xr.concat([ordered.assign(spatial_order=ordered.spatial_order + k) for k in range(4)],
                     "feature_map").assign_coords(feature_map=range(12))  # fmt: skip
    picture = plot.manifold_distance(many)
    ranked = many.spatial_order.argsort().values
    drawn = [int(c.label.split()[1].rstrip(",")) for c in parts(picture, "Curve")]
    assert drawn == [*ranked[::-1][:4], *ranked[:4][::-1]]
    assert "best and worst 4 of 12 maps" in picture.opts.get().kwargs["title"]


def test_local_dimension_counts_every_neuron(factors):
    d = analysis.local_dimension(factors, 10)
    (bars,) = parts(plot.local_dimension(d, bins=7), "Histogram")
    known = np.isfinite(d.local_dimension).sum()
    assert bars.dimension_values("count").sum() == known
    upright = [c.dimension_values(0)[0] for c in parts(plot.local_dimension(d), "Curve")]
    assert upright == [float(d.dimension_mle), float(d.dimension_twonn)]


def test_clusters_stand_on_the_grid(factors):
    e = analysis.cluster(analysis.embed(factors, 3), 4)
    (drawn,) = parts(plot.cluster(e), "Image")
    values = grid(drawn, "number")
    assert np.isfinite(values).sum() == 3 * 64
    expected = e.cluster.values.reshape(3, 8, 8)
    gap = (values.shape[1] - 24) // 2
    for k in range(3):
        np.testing.assert_array_equal(values[:, k * (8 + gap) :][:, :8], expected[k])
    with pytest.raises(DataError, match=r"no `cluster`.*e\.vit\.cluster\(6\)"):
        plot.cluster(analysis.embed(factors))


def test_new_points_are_drawn_over_the_others(factors):
    e = analysis.embed(factors.isel(neuron=slice(60)), 3)
    p = analysis.project(e, factors.isel(neuron=slice(60, None)))
    first, second = parts(plot.project(e, p, pcs=(3, 1)), "Points")
    np.testing.assert_array_equal(first.dimension_values(0), e.score[:, 2])
    np.testing.assert_array_equal(second.dimension_values(1), p.score[:, 0])
    with pytest.raises(ArgumentError, match="axes 1 to 3"):
        plot.project(e, p, pcs=(1, 9))
    with pytest.raises(DataError, match="of 'neuron' and the new points are of 'image'"):
        plot.project(e, analysis.embed(factors, 2, dim="image"))


def test_only_neurons_drawn_are_shown(tensor):
    drawn = analysis.sample_neurons(tensor, 40)
    (element,) = parts(plot.sample_neurons(drawn), "Image")
    shown = grid(element)[np.isfinite(grid(element))]
    np.testing.assert_allclose(np.sort(shown), np.sort(drawn.response_maximum), rtol=1e-6)
    with pytest.raises(DataError, match=r"t\.vit\.sample_neurons\(500\)"):
        plot.sample_neurons(tensor)
