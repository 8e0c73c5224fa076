"""Statistics of feature maps, against their formulas, analysis of variance and planted truths."""

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import vitxr
from vitxr.analysis.activity import selectivity, sparseness
from vitxr.errors import ArgumentError, DataError
from vitxr.names import LATTICE, VARIABLES, validate
from vitxr.stimuli.shifts import ShiftGrid

LABELS = ["b", "a", "b", "c", "a", "c", "b"]


def make(values, labels=LABELS, scheme="grid", step=8):
    lattice = ShiftGrid(step, scheme).lattice(16, 24)
    ds = lattice.assign_coords(
        image=[f"i{k}" for k in range(len(values))],
        label=("image", list(labels)),
        layer=np.arange(values.shape[3]) + 1,
        feature_map=np.arange(values.shape[4]) * 2,
    )
    ds["activation"] = (LATTICE, values)
    ds.attrs = {"model": "planted"}
    return ds


def random(seed=0, n=7, dtype="float64", scheme="grid", layers=2, maps=3):
    shape = (2, 3 + (scheme == "raster"))
    values = np.random.default_rng(seed).normal(0.2, 1, (n, *shape, layers, maps, 2, 3))
    return make(values.astype(dtype), LABELS[:n], scheme)


def responses(ds):
    """Mean over patches of the rectified activation, (image, shift_y, shift_x, layer, map)."""
    return np.maximum(ds.activation.values.astype(np.float64), 0).mean((-2, -1))


@pytest.mark.parametrize("scheme", ["grid", "raster"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_equals_the_formulas(scheme, dtype):
    ds = random(scheme=scheme, dtype=dtype)
    t = validate(ds.vit.map_table())
    r = responses(ds)
    labels = np.array(LABELS)
    for layer, m in np.ndindex(2, 3):
        row = t.isel(layer=layer, feature_map=m)
        x = r[..., layer, m]
        flat = x.ravel()
        n = flat.size
        np.testing.assert_allclose(row.mean_activity, flat.mean())
        above = ds.activation.values[:, :, :, layer, m] > 0
        np.testing.assert_allclose(row.responsiveness, above.mean())
        # Vinje and Gallant (2000), note 22.
        sparse = (1 - (flat.sum() / n) ** 2 / (flat**2 / n).sum()) / (1 - 1 / n)
        np.testing.assert_allclose(row.lifetime_sparseness, sparse)
        mean = x.mean((1, 2))
        of = {c: mean[labels == c] for c in "abc"}
        best = max(of, key=lambda c: of[c].mean())
        others = np.mean([of[c].mean() for c in of if c != best])
        top = of[best].mean()
        assert row.preferred_label == best
        np.testing.assert_allclose(row.class_selectivity, (top - others) / (top + others))
        a, b = mean[labels == best], mean[labels != best]
        d = (a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
        np.testing.assert_allclose(row.d_prime, d)
        # A two-way table of images and shifts.
        total = x.var()
        across = x.mean(0)
        residual = x - mean[:, None, None] - across + x.mean()
        np.testing.assert_allclose(row.image_share, mean.var() / total)
        np.testing.assert_allclose(row.shift_share, across.var() / total)
        np.testing.assert_allclose(row.interaction_share, residual.var() / total)
        between = sum(len(v) * (v.mean() - mean.mean()) ** 2 for v in of.values()) / 7
        np.testing.assert_allclose(row.label_share, between / total)
    shares = t.image_share + t.shift_share + t.interaction_share
    np.testing.assert_allclose(shares, 1)
    assert (t.label_share <= t.image_share + 1e-12).all()


def test_label_share_is_that_of_an_analysis_of_variance():
    from scipy.stats import f_oneway

    ds = random()
    t = ds.vit.map_table()
    mean = responses(ds).mean((1, 2))
    groups = [mean[np.array(LABELS) == c] for c in "abc"]
    eta = t.label_share / t.image_share
    np.testing.assert_allclose(f_oneway(*groups)[0], eta / 2 / ((1 - eta) / 4))


def test_planted_maps_are_found():
    """One map tells a class, one an image, one the shift, one is silent, one is constant."""
    rng = np.random.default_rng(0)
    values = np.zeros((7, 2, 3, 1, 5, 2, 3))
    values[np.array(LABELS) == "c", :, :, 0, 0] = 2
    values[:, :, :, 0, 0] += rng.random((7, 1, 1, 1, 1)) * 0.1
    values[3, :, :, 0, 1] = 1
    values[:, 1, 2, 0, 2] = 1
    values[:, :, :, 0, 3] = -1
    values[:, :, :, 0, 4] = 0.7
    t = make(values).vit.map_table().isel(layer=0)
    tells_class, tells_image, tells_shift, silent, constant = (
        t.isel(feature_map=k) for k in range(5)
    )
    assert tells_class.preferred_label == "c"
    assert tells_class.class_selectivity > 0.9
    assert tells_class.d_prime > 10
    assert tells_class.d_prime > tells_class.d_prime_floor
    assert tells_class.label_share > 0.99
    np.testing.assert_allclose(tells_image.image_share, 1)
    np.testing.assert_allclose(tells_image.lifetime_sparseness, (1 - 6 / 42) / (1 - 1 / 42))
    assert tells_image.label_share < 0.5
    np.testing.assert_allclose(tells_shift.shift_share, 1)
    np.testing.assert_allclose(tells_shift.responsiveness, 1 / 6)
    np.testing.assert_allclose(tells_shift.class_selectivity, 0, atol=1e-12)
    assert silent.mean_activity == silent.responsiveness == 0
    assert silent.preferred_label == ""
    for name in ("lifetime_sparseness", "class_selectivity", "d_prime", "image_share"):
        assert np.isnan(silent[name])
    for name in ("image_share", "shift_share", "interaction_share", "label_share"):
        assert np.isnan(constant[name])
    np.testing.assert_allclose(constant.lifetime_sparseness, 0, atol=1e-12)


def test_floors_are_of_shuffled_labels():
    ds = random()
    t = ds.vit.map_table(shuffles=30, random_state=4)
    mean = responses(ds).mean((1, 2))
    rng = np.random.default_rng(4)
    which = np.array([ord(c) - ord("a") for c in LABELS])
    shuffled = [selectivity(mean, rng.permutation(which), 3) for _ in range(30)]
    for name in ("class_selectivity", "d_prime"):
        floor = np.quantile([s[name] for s in shuffled], 0.95, axis=0, method="weibull")
        np.testing.assert_allclose(t[f"{name}_floor"], floor)
    xr.testing.assert_identical(t, ds.vit.map_table(shuffles=30, random_state=4))
    assert [t.attrs[k] for k in ("images", "shuffles", "random_state")] == [7, 30, 4]
    assert {k: v.attrs for k, v in t.items()} == {k: VARIABLES[k].attrs for k in t}


def test_noise_stays_below_its_floor():
    ds = make(np.random.default_rng(0).random((20, 2, 3, 1, 200, 2, 3)), ["a", "b"] * 10)
    t = ds.vit.map_table()
    for name in ("class_selectivity", "d_prime"):
        above = float((t[name] > t[f"{name}_floor"]).mean())
        assert above < 0.12, name


def test_a_table_sorts_and_filters():
    ds = random().assign_coords(channel=(("layer", "feature_map"), np.arange(6).reshape(2, 3)))
    frame = ds.vit.map_table().to_dataframe()
    assert frame.index.names == ["layer", "feature_map"]
    assert len(frame) == 6
    assert "channel" in frame.columns
    best = frame.query("mean_activity > 0").sort_values("d_prime", ascending=False)
    assert best.d_prime.is_monotonic_decreasing
    assert "offset_y" not in frame.columns


def test_one_class_and_single_images():
    ds = random()
    one = ds.assign_coords(label=("image", ["x"] * 7)).vit.map_table()
    assert np.isnan(one.class_selectivity).all()
    assert np.isnan(one.d_prime).all()
    assert (one.preferred_label == "").all()
    assert np.isfinite(one.image_share).all()
    each = ds.assign_coords(label=("image", list("abcdefg"))).vit.map_table()
    assert np.isnan(each.d_prime).all()
    assert np.isfinite(each.class_selectivity).all()
    np.testing.assert_allclose(each.label_share, each.image_share)


def test_a_class_of_one_image_leaves_the_floors():
    """Permutations that prefer it have no d'; the floor is of the others."""
    rng = np.random.default_rng(0)
    labels = ["a"] * 6 + ["b"] * 6 + ["c"]
    values = rng.random((13, 2, 3, 1, 60, 2, 3))
    values[:6, ..., :10, :, :] += 1
    t = make(values, labels).vit.map_table(shuffles=200).isel(layer=0)
    assert np.isfinite(t.d_prime_floor).all()
    assert (t.d_prime > t.d_prime_floor)[:10].all()
    assert np.isnan(t.d_prime).any()  # those that prefer c
    assert (t.preferred_label.values[np.isnan(t.d_prime)] == "c").all()


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 1e-6, 3e4])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_maps_that_are_the_same_for_all_images_prefer_no_class(value, dtype):
    """Constant ones, and ones that answer to the shift alone; their means are not exact."""
    values = np.random.default_rng(0).random((7, 2, 3, 1, 3, 7, 7))
    values[..., 1, :, :] = value
    values[:, :, :, :, 2] = values[:1, :, :, :, 2]
    ds = make(values.astype(dtype))
    t = ds.vit.map_table().isel(layer=0)
    assert t.preferred_label.values[1:].tolist() == ["", ""]
    assert t.class_selectivity.values[1:].tolist() == [0, 0]
    assert t.class_selectivity_floor.values[1:].tolist() == [0, 0]
    assert np.isnan(t.d_prime[1:]).all()
    assert np.isnan(t.d_prime_floor[1:]).all()
    assert np.isnan(t.image_share[1])
    np.testing.assert_allclose(t.shift_share[2], 1)
    assert t.preferred_label[0].item() in LABELS
    assert np.isfinite(t.d_prime[0])


@pytest.mark.parametrize("high", [0.7, 1 / 3, 1e4])
def test_a_class_told_without_any_variance_has_an_infinite_index(high):
    """And a floor as high only where permutations tell it as well."""
    values = np.full((12, 2, 3, 1, 2, 7, 7), 0.1)
    values[:6, ..., 0, :, :] = high
    values[:, ..., 1, :, :] = np.random.default_rng(0).random((12, 2, 3, 1, 7, 7))
    t = make(values, ["a"] * 6 + ["b"] * 6).vit.map_table().isel(layer=0)
    assert t.d_prime[0] == np.inf
    assert t.preferred_label[0] == "a"
    assert np.isfinite(t.d_prime_floor[0])
    assert np.isfinite(t.d_prime[1])
    few = make(values[[0, 1, 6, 7]], list("aabb")).vit.map_table(shuffles=99).isel(layer=0)
    assert few.d_prime[0] == few.d_prime_floor[0] == np.inf  # a third of all permutations


def test_a_rest_of_one_image_has_no_variance():
    rng = np.random.default_rng(0)
    values = rng.random((7, 2, 3, 1, 40, 2, 3))
    values[:6] += 1
    t = make(values, ["a"] * 6 + ["b"]).vit.map_table()
    assert (t.preferred_label == "a").all()
    assert np.isnan(t.d_prime).all()
    assert np.isfinite(t.class_selectivity).all()


def test_of_equal_classes_the_first_is_preferred():
    values = np.zeros((7, 2, 3, 1, 1, 2, 3))
    values[np.isin(LABELS, ["b", "c"])] = 1
    assert make(values).vit.map_table().preferred_label.item() == "b"


def test_not_a_number_goes_not_unseen():
    ds = random()
    ds["activation"][2, 0, 0, 1, 0, 0, 0] = np.nan
    t = ds.vit.map_table(shuffles=2)
    for name in ("mean_activity", "responsiveness", "image_share", "d_prime"):
        assert np.isnan(t[name][1, 0]), name
        assert np.isfinite(t[name][0]).all(), name
    assert t.preferred_label[1, 0] == ""
    assert np.isnan(ds.vit.population_sparseness().sel(layer=2)[2, 0, 0])
    c, whole = ds.vit.class_activity(), random().vit.class_activity()
    lost = (c.layer == 2) & (c.feature_map == 0) & (c.label == LABELS[2])
    assert int(lost.sum()) == 1
    xr.testing.assert_allclose(c, whole.where(~lost))


def test_class_activity_is_a_grouped_mean():
    ds = random()
    c = validate(ds.vit.class_activity().to_dataset()).class_activity
    r = xr.DataArray(responses(ds), dims=LATTICE[:5], coords={"label": ds.label})
    true = r.mean(("shift_y", "shift_x")).groupby("label").mean()
    np.testing.assert_allclose(c, true.transpose("layer", "feature_map", "label"))
    assert c.label.values.tolist() == ["a", "b", "c"]
    t = ds.vit.map_table()
    assert (c.idxmax("label") == t.preferred_label).all()


def test_population_sparseness():
    ds = random(maps=6)
    s = validate(ds.vit.population_sparseness().to_dataset()).population_sparseness
    r = responses(ds)
    a = r.mean(-1) ** 2 / (r**2).mean(-1)  # Treves and Rolls (1991)
    np.testing.assert_allclose(s, (1 - a) / (1 - 1 / 6))
    one = ds.copy(deep=True)
    one["activation"][:, :, :, :, 1:] = -1
    one["activation"][:, :, :, :, 0] = 1
    np.testing.assert_allclose(one.vit.population_sparseness(), 1)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20))
def test_sparseness_lies_between_nothing_and_one(values):
    r = np.array(values)
    s = sparseness(r.mean(), (r**2).mean(), len(r))
    assert np.isnan(s) or -1e-9 <= s <= 1 + 1e-9


@settings(max_examples=8)
@given(data=st.data())
def test_chunked_equals_eager_and_stays_lazy(data):
    ds = random(dtype="float32")
    sizes = ds.activation.sizes
    chunks = {
        str(d): data.draw(st.integers((k + 1) // 2, k), label=str(d)) for d, k in sizes.items()
    }
    lazy = ds.assign(activation=ds.activation.variable.chunk(chunks))

    def never(*_args, **_kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=never):
        by_class, sparse = lazy.vit.class_activity(), lazy.vit.population_sparseness()
    with dask.config.set(scheduler="sync"):
        xr.testing.assert_allclose(by_class.compute(), ds.vit.class_activity())
        xr.testing.assert_allclose(sparse.compute(), ds.vit.population_sparseness())
        xr.testing.assert_allclose(lazy.vit.map_table(shuffles=3), ds.vit.map_table(shuffles=3))


def test_of_a_store(stim, model, tmp_path):
    ds = vitxr.extract(
        stim, model, [0, 2], ShiftGrid(16), feature_maps=5, preprocess="raw",
        store=tmp_path / "s.zarr", progress=False,
    )  # fmt: skip
    t = ds.vit.map_table()
    assert t.channel.dims == ("layer", "feature_map")
    assert set(np.unique(t.preferred_label)) <= {"noise", "other"}
    assert t.attrs["model_fingerprint"] == ds.attrs["model_fingerprint"]


def test_refusals():
    ds = random()
    with pytest.raises(DataError, match="no coordinate label, the class of each image"):
        ds.drop_vars("label").vit.map_table()
    with pytest.raises(DataError, match="no coordinate label"):
        ds.drop_vars("label").vit.class_activity()
    with pytest.raises(ArgumentError, match="shuffles=0: expected an integer of 1 or more"):
        ds.vit.map_table(shuffles=0)
    with pytest.raises(DataError, match="has no `activation`"):
        ds.drop_vars("activation").vit.population_sparseness()


def test_stores_that_are_not_whole_are_refused():
    ds = random()
    partly = ds.assign_coords(written=(("image", "shift_y"), np.arange(14).reshape(7, 2) != 3))
    partly["activation"] = partly.activation.where(partly.written)
    for run in (partly.vit.map_table, partly.vit.class_activity):
        with pytest.raises(DataError, match=r"not written yet.*has the images that are"):
            run()
    s = partly.vit.population_sparseness().drop_vars("written")
    xr.testing.assert_allclose(
        s, ds.vit.population_sparseness().where(partly.written.drop_vars("written"))
    )


def test_any_variable_on_the_patch_grid():
    ds = random()
    more = ds.assign(mlp_hidden=ds.activation.rename(feature_map="hidden_unit") + 1)
    same = ds.assign(activation=ds.activation + 1)
    table = more.vit.map_table(variable="mlp_hidden")
    assert table.attrs["variable"] == "mlp_hidden"
    for name, values in same.vit.map_table().data_vars.items():
        np.testing.assert_array_equal(table[name].values, values.values)
    for a, b in (
        (more.vit.class_activity("mlp_hidden"), same.vit.class_activity()),
        (more.vit.population_sparseness("mlp_hidden"), same.vit.population_sparseness()),
    ):
        np.testing.assert_allclose(a, b)
        assert (a.attrs["variable"], b.attrs["variable"]) == ("mlp_hidden", "activation")
