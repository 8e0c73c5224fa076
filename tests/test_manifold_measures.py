"""Local dimension, activity-weighted sampling, spatial order and clusters."""

from types import SimpleNamespace

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import chisquare, spearmanr

from vitxr.analysis import (
    cluster,
    embed,
    local_dimension,
    project,
    sample_neurons,
    spatial_order,
)
from vitxr.analysis.sampling import draw
from vitxr.errors import ArgumentError, DataError
from vitxr.names import NEURON, validate


def factors(rows):
    rows = np.asarray(rows, float)
    f = xr.Dataset({"neuron_factor": (("neuron", "component"), rows)})
    return f.assign_coords(tag=("neuron", np.arange(len(rows))))


def embedding(score, maps, rows, cols, order=None):
    """Points of neurons on a grid, the neurons in any order."""
    index = pd.MultiIndex.from_product([maps, range(rows), range(cols)], names=NEURON)
    e = xr.Dataset(
        {"score": (("neuron", "pc"), score)},
        coords=xr.Coordinates.from_pandas_multiindex(index, "neuron"),
    ).assign_coords(pc=np.arange(1, score.shape[1] + 1))
    return e if order is None else e.isel(neuron=order)


def tensor(values):
    """(feature_map, row, col, image, shift) -> (neuron, image, shift)."""
    t = xr.DataArray(values, dims=(*NEURON, "image", "shift"))
    t = t.assign_coords({d: np.arange(t.sizes[d]) for d in NEURON})
    return t.stack(neuron=NEURON).transpose("neuron", "image", "shift")


# Local dimension.


@pytest.mark.parametrize("d", [1, 2, 4])
def test_planted_dimension(d):
    """A flat torus of dimension d in 10 dimensions: no edges, constant density."""
    rng = np.random.default_rng(d)
    angle = rng.random((3000, d)) * 2 * np.pi
    rows = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    rows = rows @ np.linalg.qr(rng.normal(size=(10, 2 * d)))[0].T
    k = 12
    found = validate(local_dimension(factors(rows), k))
    assert found.dimension_mle == pytest.approx(d, rel=0.05)
    assert found.dimension_twonn == pytest.approx(d, rel=0.06)
    assert found.local_dimension.mean() == pytest.approx(d, rel=0.05)
    assert found.local_dimension.std() == pytest.approx(d / np.sqrt(k - 3), rel=0.15)


@pytest.mark.parametrize("block", [4_000_000, 100])
def test_dimension_is_the_literal_one(block, monkeypatch):
    monkeypatch.setattr("vitxr.analysis.rows._BLOCK", block)
    rows = np.random.default_rng(0).random((60, 3))
    k = 7
    found = local_dimension(factors(rows), k)
    assert found.attrs["n_neighbors"] == k
    sums, ratios = [], []
    for x in rows:
        t = sorted(np.linalg.norm(rows - x, axis=1))[1 : k + 1]
        sums.append(sum(np.log(t[-1] / t[j]) for j in range(k - 1)))
        ratios.append(t[1] / t[0])
    np.testing.assert_allclose(found.local_dimension, (k - 2) / np.array(sums))
    np.testing.assert_allclose(found.dimension_mle, 60 * (k - 1) / sum(sums))
    x = np.log(sorted(ratios))[:54]
    y = -np.log(1 - np.arange(1, 55) / 60)
    slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    np.testing.assert_allclose(found.dimension_twonn, slope)


def test_dimension_of_dead_and_repeated_rows():
    rows = np.random.default_rng(0).random((60, 3)) + 1
    rows[8, 1] = 0  # which does not make it a dead row
    plain = local_dimension(factors(rows), 7)
    assert np.isfinite(plain.local_dimension).all()
    more = local_dimension(factors(np.concatenate([rows, rows[:5], np.zeros((4, 3))])), 7)
    np.testing.assert_allclose(more.local_dimension[:60], plain.local_dimension)
    np.testing.assert_allclose(more.local_dimension[60:65], plain.local_dimension[:5])
    assert np.isnan(more.local_dimension[65:]).all()
    assert float(more.dimension_mle) == pytest.approx(float(plain.dimension_mle))
    assert float(more.dimension_twonn) == pytest.approx(float(plain.dimension_twonn))
    assert more.tag.values.tolist() == list(range(69))
    e = embed(factors(rows), 3)
    np.testing.assert_allclose(local_dimension(e, 7).local_dimension, plain.local_dimension)
    e.score[4, 1] = np.nan
    some = local_dimension(factors(np.delete(rows, 4, 0)), 7).local_dimension
    np.testing.assert_allclose(local_dimension(e, 7).local_dimension, np.insert(some, 4, np.nan))
    with pytest.raises(ArgumentError, match="n_neighbors is 2"):
        local_dimension(factors(rows), 2)
    with pytest.raises(DataError, match="60 rows of 'neuron' are points; 60 neighbours need more"):
        local_dimension(factors(rows), 60)
    with pytest.raises(DataError, match="expected a Dataset of factors or an embedding"):
        local_dimension(rows)


# Sampling.


def test_first_draws_have_the_stated_chances():
    high = np.array([1.0, 3.0, 0.0, 2.0, 6.0, 0.5])
    of = np.array([0, 0, 0, 1, 1, 2])
    activity = np.array([4 / 3, 4.0, 0.5])
    expected = activity[of] / activity.sum() * high / np.array([4.0, 4, 4, 8, 8, 0.5])
    rng = np.random.default_rng(0)
    times = 20000
    drawn = [draw(rng, high, of, activity, 2) for _ in range(times)]
    counts = np.bincount([d[0] for d in drawn], minlength=6)
    assert counts[2] == 0
    alive = high > 0
    assert chisquare(counts[alive], expected[alive] * times).pvalue > 1e-3
    # The second draw, of those after neuron 4: maps as before, in map 1 only neuron 3 is left.
    second = np.bincount([d[1] for d in drawn if d[0] == 4], minlength=6)
    chance = activity[of] / activity.sum() * np.array([1 / 4, 3 / 4, 0, 1, 0, 1])
    kept = chance > 0
    assert second[~kept].sum() == 0
    assert chisquare(second[kept], chance[kept] * second.sum()).pvalue > 1e-3


@pytest.mark.parametrize("feature_maps", [None, 2, 4])
def test_maps_are_drawn_by_the_mean_of_their_neurons(feature_maps):
    """Maps of unlike sizes, silent neurons in them, one silent map."""
    high = np.array([4.0, 3, 1, 0, 0, 2, 2, 0, 9, 0, 0])
    of = np.array([3, 1, 1, 1, 1, 0, 0, 2, 4, 4, 4])
    activity = np.array([2.0, 1, 0, 4, 3])
    name = np.array([2, 3, 5, 7, 11])[of]
    values = np.stack([high / 2, high, 0 * high], 1)
    t = xr.DataArray(values, dims=("neuron", "image"))
    t = t.assign_coords(feature_map=("neuron", name), number=("neuron", np.arange(11)))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        chosen = activity
        if feature_maps:  # exponential clocks with these rates (Efraimidis and Spirakis 2006)
            with np.errstate(divide="ignore"):
                first = np.argsort(rng.exponential(size=5) / activity)[:feature_maps]
            chosen = np.where(np.isin(np.arange(5), first), activity, 0)
        expected = sorted(draw(rng, high, of, chosen, 2))
        s = sample_neurons(t, 2, feature_maps, seed)
        assert s.number.values.tolist() == expected
        assert s.attrs["sampling"].endswith(f"by activity, seed {seed}")


def test_a_map_of_no_weight_is_not_drawn_by_a_chance_of_zero():
    rng = SimpleNamespace(random=lambda: 0.0, exponential=np.random.default_rng(0).exponential)
    drawn = draw(rng, np.array([0.0, 1.0]), np.array([0, 1]), np.array([0.0, 1.0]), 1)
    assert drawn.tolist() == [1]


@settings(max_examples=25)
@given(
    maps=st.integers(1, 4),
    rows=st.integers(1, 4),
    seed=st.integers(0, 999),
    dead=st.floats(0, 0.8),
    share=st.floats(0.01, 1),
)
def test_sampling_draws_each_once_whatever_the_chunks(maps, rows, seed, dead, share):
    rng = np.random.default_rng(seed)
    values = rng.random((maps, rows, 3, 2, 4)) * (rng.random((maps, rows, 3, 1, 1)) >= dead)
    t = tensor(values.astype("float32"))
    able = int((t.max(("image", "shift")) > 0).sum())
    if not able:
        return
    n = max(1, int(share * able))
    s = sample_neurons(t, n, random_state=seed)
    assert s.sizes["neuron"] == n
    assert s.indexes["neuron"].is_unique
    assert (s.response_maximum > 0).all()
    np.testing.assert_array_equal(s.response_maximum, s.max(("image", "shift")))
    xr.testing.assert_equal(s.drop_vars("response_maximum"), t.sel(neuron=s.indexes["neuron"]))
    lazy = sample_neurons(t.chunk(neuron=5, image=1), n, random_state=seed)
    assert lazy.chunks is not None
    xr.testing.assert_identical(lazy.compute(), s)
    if n == able:
        assert set(s.indexes["neuron"]) == set(t.indexes["neuron"][t.max(("image", "shift")) > 0])


def test_sampling_makes_one_pass_and_some_maps():
    values = np.random.default_rng(0).random((5, 4, 4, 3, 2))
    values[3] *= 100
    seen = []

    def read(block, block_info=None):
        seen.append(block_info[0]["chunk-location"])
        return block

    t = tensor(values).chunk(neuron=16)
    t.data = t.data.map_blocks(read, dtype=t.dtype, meta=np.empty((0, 0, 0)))
    s = sample_neurons(t, 20, feature_maps=2)
    assert sorted(seen) == sorted(set(seen))
    assert len(np.unique(s.feature_map)) == 2
    assert s.attrs["sampling"] == "20 neurons of 2 feature maps by activity, seed 0"
    all_maps = sample_neurons(tensor(values), 16)
    assert (all_maps.feature_map == 3).sum() > 12
    assert not sample_neurons(tensor(values), 16, random_state=1).equals(all_maps)
    with dask.config.set(scheduler="synchronous"):
        xr.testing.assert_identical(sample_neurons(t, 20, 2).compute(), s.compute())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: sample_neurons(t, 0), ArgumentError, "n is 0"),
        (lambda t: sample_neurons(t, 19), ArgumentError, "n is 19; 18 neurons"),
        (
            lambda t: sample_neurons(t, 4, 3),
            ArgumentError,
            "feature_maps is 3; 2 of 3 feature maps",
        ),
        (lambda t: sample_neurons(t, 10, 1), ArgumentError, "n is 10; 9 neurons"),
        (lambda t: sample_neurons(t - 1, 4), DataError, "negative or not finite"),
        (lambda t: sample_neurons(t * np.nan, 4), DataError, "negative or not finite"),
        (
            lambda t: sample_neurons(t.where(t.image != t.image[1]), 4),
            DataError,
            "negative or not finite",
        ),
        (lambda t: sample_neurons(t.unstack("neuron"), 4), DataError, "labelled by feature_map"),
    ],
)
def test_sampling_refuses(call, error, message):
    values = np.random.default_rng(0).random((3, 3, 3, 2, 2)) + 0.1
    values[1] = 0
    with pytest.raises(error, match=message):
        call(tensor(values))


# Spatial order.


def grid_score(rows, cols):
    return np.indices((rows, cols)).reshape(2, -1).T.astype(float)


def test_order_is_scipys_and_has_a_baseline():
    rng = np.random.default_rng(0)
    clean = grid_score(5, 6)
    noisy = clean + rng.normal(size=clean.shape)
    noise = rng.normal(size=clean.shape)
    score = np.concatenate([clean, noisy, noise])
    e = embedding(score, [7, 3, 9], 5, 6)
    s = validate(spatial_order(e, 199), require=["spatial_order", "pairs"])
    assert s.feature_map.values.tolist() == [7, 3, 9]
    for i, points in enumerate((clean, noisy, noise)):
        expected = spearmanr(pdist(clean), pdist(points)).statistic
        assert s.spatial_order[i] == pytest.approx(expected)
        below = (s.shuffled_spatial_order[i] >= s.spatial_order[i] - 1e-12).sum()
        assert s.spatial_order_p[i] == (1 + below) / 200
    assert s.spatial_order[0] == pytest.approx(1)
    assert s.spatial_order_p[:2].values.tolist() == [1 / 200, 1 / 200]
    assert s.spatial_order_p[2] > 0.02
    assert abs(s.shuffled_spatial_order.mean()) < 0.02
    # The curve of the first map is the diagonal.
    curve = s.manifold_distance.sel(feature_map=7)
    np.testing.assert_allclose(curve, s.grid_distance)
    assert s.pairs.sum("grid_distance").values.tolist() == [435] * 3
    assert s.pairs.sel(feature_map=7, grid_distance=1).item() == 5 * 5 + 4 * 6


def test_shuffles_are_shuffles_of_neurons():
    e = embedding(np.random.default_rng(1).normal(size=(12, 2)), [0], 3, 4)
    s = spatial_order(e, 5, random_state=8)
    rng = np.random.default_rng(8)
    for i in range(5):
        p = rng.permutation(12)
        expected = spearmanr(pdist(grid_score(3, 4)), pdist(e.score.values[p])).statistic
        assert s.shuffled_spatial_order[0, i] == pytest.approx(expected)
    assert s.attrs["random_state"] == 8


def test_shuffles_that_are_as_well_ordered_count():
    """The grid turned and mirrored: its distances are the same, their sums not quite."""
    score = grid_score(2, 2) * 0.1 + 0.7
    s = spatial_order(embedding(score, [0], 2, 2), 199, random_state=3)
    rng = np.random.default_rng(3)
    apart = np.abs(grid_score(2, 2)[:, None] - grid_score(2, 2)[None]).sum(-1)
    same = 0
    for _ in range(199):
        p = rng.permutation(4)
        same += bool((apart[p][:, p] == apart).all())
    assert 20 < same < 120  # 8 of 24
    assert s.spatial_order_p.item() == (1 + same) / 200


def test_order_knows_labels_and_leaves_dead_neurons_out():
    rng = np.random.default_rng(0)
    score = np.concatenate([grid_score(4, 4) + rng.normal(size=(16, 2)) / 3] * 2)
    score[[3, 20]] = np.nan
    e = embedding(score, [0, 1], 4, 4)
    s = spatial_order(e, 9)
    alive = np.arange(16) != 3
    expected = spearmanr(pdist(grid_score(4, 4)[alive]), pdist(score[:16][alive])).statistic
    assert s.spatial_order[0] == pytest.approx(expected)
    assert s.pairs.sum("grid_distance").values.tolist() == [105, 105]
    mixed = spatial_order(embedding(score, [0, 1], 4, 4, rng.permutation(32)), 9)
    xr.testing.assert_allclose(
        mixed.spatial_order.sortby("feature_map"), s.spatial_order.sortby("feature_map")
    )
    few = e.isel(neuron=[0, 1, 16, 17, 18])
    assert np.isnan(spatial_order(few, 3).spatial_order).values.tolist() == [True, False]
    flat = embedding(np.ones((16, 2)), [0], 4, 4)
    assert np.isnan(spatial_order(flat, 3).spatial_order_p).all()
    with pytest.raises(DataError, match="no feature_map, patch_col, patch_row"):
        spatial_order(embed(factors(rng.random((9, 3)))))
    with pytest.raises(ArgumentError, match="n_permutations is 0"):
        spatial_order(e, 0)


# Clusters.


def test_planted_clusters_in_order_of_size():
    rng = np.random.default_rng(0)
    planted = rng.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    rows = np.eye(3)[planted] * 9 + rng.normal(size=(60, 3)) / 10
    rows = np.insert(rows, 5, 0, axis=0)
    c = validate(cluster(factors(rows), 3))
    assert c.cluster[5] == -1
    np.testing.assert_array_equal(np.delete(c.cluster.values, 5), planted)
    assert c.tag.values.tolist() == list(range(61))
    for seed in range(4):
        np.testing.assert_array_equal(
            cluster(factors(rows), 3, random_state=seed).cluster, c.cluster
        )
    equal = np.repeat(np.eye(3) * 9, 5, axis=0)[::-1] + rng.normal(size=(15, 3)) / 10
    assert cluster(factors(equal), 3).cluster.values.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    np.testing.assert_array_equal(
        cluster(embed(factors(np.delete(rows, 5, 0))), 3).cluster, planted
    )
    with pytest.raises(ArgumentError, match="n_clusters is 4; 3 rows of 'neuron' differ"):
        cluster(factors(np.repeat(np.eye(3), 4, axis=0)), 4)


@pytest.mark.parametrize("seed", [0, 5])
def test_clusters_are_scikit_learns_best_of_ten(seed):
    from sklearn.cluster import KMeans

    rows = np.random.default_rng(0).random((150, 3))
    c = cluster(factors(rows), 9, random_state=seed).cluster.values
    theirs = KMeans(9, n_init=10, random_state=seed).fit_predict(rows)
    pairs = {*zip(c.tolist(), theirs.tolist(), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 9
    places = [(-(c == k).sum(), np.argmax(c == k)) for k in range(9)]
    assert places == sorted(places)
    once = KMeans(9, n_init=1, random_state=seed).fit(rows).inertia_
    centred = [rows[c == k] - rows[c == k].mean(0) for k in range(9)]
    assert sum((part**2).sum() for part in centred) < once - 1e-9


def test_accessor():
    t = tensor(np.random.default_rng(0).random((2, 4, 4, 5, 3)))
    s = t.vit.sample_neurons(10, 1, 3)
    xr.testing.assert_identical(s, sample_neurons(t, 10, 1, 3))
    f = t.vit.factorize(3, max_iter=3)
    assert s.vit.factorize(2, max_iter=2).attrs["sampling"] == s.attrs["sampling"]
    e = f.vit.embed(2, "diffusion", n_neighbors=9)
    assert e.attrs["method"] == "diffusion"
    xr.testing.assert_identical(e.vit.project(f), project(e, f))
    xr.testing.assert_identical(f.vit.local_dimension(5), local_dimension(f, 5))
    xr.testing.assert_identical(e.vit.spatial_order(9, 2), spatial_order(e, 9, 2))
    assert e.vit.spatial_order(9, 2).attrs["method"] == "diffusion"
    xr.testing.assert_identical(e.vit.cluster(3, random_state=1), cluster(e, 3, random_state=1))
    with pytest.raises(AttributeError, match="method of a neuron tensor"):
        f.vit.sample_neurons(3)
