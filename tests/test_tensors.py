"""Neuron tensors: selection, reduction, labels, laziness, MATLAB."""

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

import vitxr
from vitxr.errors import ArgumentError, DataError, StoreError
from vitxr.tensors import neuron_matrix, neuron_tensor


@st.composite
def activations(draw):
    """Datasets of any small shape, with values of both signs and maps that are all zero."""
    shape = [draw(st.integers(1, 3)) for _ in range(3)] + [draw(st.integers(1, 2))]
    shape += [draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    x = rng.normal(size=shape)
    x[..., rng.random(shape[4]) < 0.3, :, :] = draw(st.sampled_from([0.0, -1.0]))
    dims = ("image", "shift_y", "shift_x", "layer", "feature_map", "patch_row", "patch_col")
    coords = {d: np.arange(n) * 3 for d, n in zip(dims, shape, strict=True)}
    return xr.Dataset({"activation": (dims, x.astype(dtype))}, coords=coords)


def raise_if_computed(dsk, keys, **kwargs):
    raise AssertionError("a lazy step computed")


@given(activations(), st.data())
def test_chunked_equals_eager_and_stays_lazy(ds, data):
    chunks = {d: data.draw(st.integers(1, n), label=d) for d, n in ds.sizes.items()}
    options = {
        "feature_maps": None,
        "rectify": data.draw(st.booleans()),
        "normalize": data.draw(st.booleans()),
        "stack": data.draw(st.booleans()),
    }
    for make in (neuron_tensor, neuron_matrix):
        eager = make(ds, 0, **options)
        with dask.config.set(scheduler=raise_if_computed):
            lazy = make(ds.chunk(chunks), 0, **options)
            ds.chunk(chunks).vit.activity()
        assert dask.is_dask_collection(lazy)
        assert lazy.dtype == ds["activation"].dtype == eager.dtype
        xr.testing.assert_allclose(lazy.compute(), eager)
        assert lazy.attrs == eager.attrs


@given(activations(), st.data())
def test_every_number_by_hand(ds, data):
    count = data.draw(st.integers(1, ds.sizes["feature_map"]))
    t = neuron_tensor(ds, 0, feature_maps=count, ranking="mean")
    a = np.maximum(ds["activation"].sel(layer=0).values, 0)  # image, y, x, map, row, col
    top = np.argsort(-a.mean((0, 1, 2, 4, 5)).astype("float32"))[:count]
    rows, columns = a.shape[-2:]
    for n, (fm, r, c) in enumerate(t.indexes["neuron"]):
        k = top[n // (rows * columns)]
        assert (fm, r, c) == (3 * k, 3 * (n // columns % rows), 3 * (n % columns))
        for s, (y, x) in enumerate(t.indexes["shift"]):
            frame = a[:, y // 3, x // 3, k]
            highest = frame.max((1, 2))
            expected = frame[:, r // 3, c // 3] / np.where(highest == 0, 1, highest)
            np.testing.assert_allclose(t.values[n, :, s], expected, rtol=1e-6)
    m = neuron_matrix(ds, 0, feature_maps=count, ranking="mean")
    np.testing.assert_allclose(m.values, t.values.mean(2), rtol=1e-5)


def test_unstacking_restores_the_lattice(ds):
    flat = ds.vit.neuron_tensor(layer=1, feature_maps=6)
    lattice = ds.vit.neuron_tensor(layer=1, feature_maps=6, stack=False)
    back = flat.unstack("neuron").unstack("shift")
    xr.testing.assert_equal(
        back.sel(feature_map=lattice.feature_map)
        .transpose(*lattice.dims)
        .drop_vars([c for c in back.coords if c not in lattice.dims]),
        lattice.drop_vars([c for c in lattice.coords if c not in lattice.dims]),
    )
    assert flat.sel(neuron=(flat.feature_map.values[0], 0, 5)).dims == ("image", "shift")
    assert list(flat["label"].values) == ["noise", "noise", "other"]
    assert flat["offset_x"].dims == ("shift",)


def test_channels_by_number_keep_their_order(ds):
    t = ds.vit.neuron_tensor(layer=0, feature_maps=[40, 3, 17], normalize=False)
    assert list(dict.fromkeys(t["feature_map"].values)) == [40, 3, 17]
    expected = ds["activation"].sel(layer=0, feature_map=40).clip(min=0).isel(image=2)
    got = t.sel(feature_map=40).isel(image=2).unstack("neuron").unstack("shift")
    np.testing.assert_array_equal(
        got.transpose("shift_y", "shift_x", "patch_row", "patch_col"), expected
    )


def test_signed_maps_are_scaled_to_one(ds):
    t = ds.vit.neuron_tensor(layer=0, feature_maps=None, rectify=False, stack=False)
    assert (t < 0).any()
    np.testing.assert_allclose(abs(t).max(("patch_row", "patch_col")), 1, rtol=1e-6)


def test_edges_are_marked_and_dropped_before_ranking(ds):
    t = ds.vit.neuron_tensor(layer=0, feature_maps=None, stack=False)
    np.testing.assert_array_equal(
        t["edge_distance"],
        [[0] * 6, [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0] * 6],
    )
    inner = ds.vit.neuron_tensor(layer=0, feature_maps=5, drop_edge=1, ranking="mean")
    cut = ds.isel(patch_row=slice(1, 3), patch_col=slice(1, 5))
    xr.testing.assert_equal(
        inner.drop_vars("edge_distance"),
        cut.vit.neuron_tensor(layer=0, feature_maps=5, ranking="mean").drop_vars("edge_distance"),
    )
    assert (inner["edge_distance"] == 1).all()


def test_rankings_differ_as_they_say(ds):
    ds = ds.copy(deep=True)
    ds["activation"][0, 0, 0, 0, 7] = 1e6  # most active, in the first frame only
    ds["activation"][1, 2, 2, 0, 9] = 1e8  # and over all frames
    first = ds.vit.neuron_tensor(layer=0, feature_maps=1)
    mean = ds.vit.neuron_tensor(layer=0, feature_maps=1, ranking="mean")
    assert set(first["feature_map"].values) == {7}
    assert set(mean["feature_map"].values) == {9}


def test_what_is_not_a_number_is_not_hidden(ds):
    broken = ds.copy(deep=True)
    broken["activation"][0, 1, 2, 0, 5, 2, 2] = np.nan
    assert np.isnan(broken.vit.activity()[0, 1, 2, 0, 5])
    assert int(np.isnan(broken.vit.activity()).sum()) == 1
    matrix = broken.vit.neuron_matrix(layer=0, feature_maps=[5])
    assert np.isnan(matrix.isel(image=0)).all()
    assert np.isfinite(matrix.isel(image=1)).all()


def test_means_are_accumulated_in_float64():
    x = np.full((1, 400, 500, 1, 1, 1, 1), 0.1, "float32")
    x[0, 0, 0] = 1.0
    dims = ("image", "shift_y", "shift_x", "layer", "feature_map", "patch_row", "patch_col")
    ds = xr.Dataset({"activation": (dims, x)}, coords={"layer": [0], "feature_map": [0]})
    ds = ds.assign_coords({d: np.arange(n) for d, n in zip(dims, x.shape, strict=True)})
    mean = ds.vit.neuron_matrix(layer=0, feature_maps=None, normalize=False).item()
    assert mean == np.float32(x.astype(np.float64).mean())


@pytest.mark.parametrize("rectify", [True, False])
def test_activity_is_the_mean_over_patches(ds, rectify):
    x = ds["activation"].values
    a = ds.vit.activity(rectify)
    mean = (np.maximum(x, 0) if rectify else x).mean((-2, -1), dtype=float)
    np.testing.assert_array_equal(a, mean.astype(x.dtype))
    assert a.dtype == x.dtype
    assert a.attrs["long_name"].startswith("mean over patches of the rectified ") == rectify


def test_scalars_come_back_as_dims(ds):
    whole = ds.vit.neuron_tensor(layer=1, feature_maps=[3, 5]).isel(shift=[0])
    part = ds.sel(layer=1).isel(shift_y=0, shift_x=0).vit.neuron_tensor(1, feature_maps=[3, 5])
    np.testing.assert_array_equal(part, whole)
    assert ds.sel(layer=1).vit.activity().sizes["layer"] == 1
    with pytest.raises(ArgumentError, match="which holds 1"):
        ds.sel(layer=1).vit.neuron_tensor(layer=0)


def test_a_method_asked_of_the_wrong_object_says_where_it_is(ds):
    with pytest.raises(AttributeError, match=r"'factorize': it is a method of a neuron tensor"):
        ds.vit.factorize(3)
    with pytest.raises(AttributeError, match="'embed': it is a method of a Dataset of factors"):
        ds["activation"].vit.embed()
    with pytest.raises(AttributeError, match=r"has no method 'nothing'\."):
        _ = ds.vit.nothing


def test_only_what_the_ranking_needs_is_computed(ds):
    """A count reads the first frame of the first image, and no other block."""
    import dask.array as da

    read = []

    def block(block_info=None):
        where = block_info[None]["array-location"]
        read.append((where[0][0], where[1][0]))
        return np.ones([b - a for a, b in where], "float32")

    chunks = [(1,) * ds.sizes["image"], (1,) * ds.sizes["shift_y"]]
    chunks += [(n,) for n in ds["activation"].shape[2:]]
    lazy = ds.assign(
        activation=(ds["activation"].dims, da.map_blocks(block, chunks=chunks, dtype="float32"))
    )
    read.clear()
    lazy.vit.neuron_tensor(layer=0, feature_maps=3)
    assert set(read) == {(0, 0)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"layer": 3}, ArgumentError, r"layer=3 is not in the Dataset, which holds 0, 1, 2"),
        ({"layer": [0]}, ArgumentError, "expected one block number"),
        ({"feature_maps": 49}, ArgumentError, "feature_maps=49: the Dataset holds 48"),
        ({"feature_maps": 0}, ArgumentError, "expected 1 to 48"),
        ({"feature_maps": []}, ArgumentError, "expected a count"),
        ({"feature_maps": "all"}, ArgumentError, "expected a count"),
        ({"feature_maps": [1, 1]}, ArgumentError, "names a channel twice"),
        ({"feature_maps": [1, 99]}, ArgumentError, r"channels \[99\] are not in the Dataset"),
        ({"ranking": "max"}, ArgumentError, "expected 'first_frame' or 'mean'"),
        ({"drop_edge": 2}, ArgumentError, "4 x 6 patch grid can lose 0 to 1"),
    ],
)
def test_refusals(ds, call, error, message):
    with pytest.raises(error, match=message):
        ds.vit.neuron_tensor(**{"layer": 0, **call})


def test_a_dataset_without_activations(stim):
    with pytest.raises(DataError, match=r"has no `activation`.*it has: pixels"):
        stim.vit.neuron_tensor(layer=0)
    with pytest.raises(DataError, match="has no `activation`"):
        stim.vit.activity()


@pytest.mark.parametrize("form", ["neuron_tensor", "neuron_matrix"])
def test_matlab_round_trip(ds, tmp_path, form):
    t = getattr(ds.vit, form)(layer=2, feature_maps=4)
    path = t.vit.to_mat(tmp_path / "t.mat")
    content = loadmat(path)
    key = "neuron_output_3D" if form == "neuron_tensor" else "neuron_output_2D"
    np.testing.assert_array_equal(content[key], t.values)
    back = vitxr.read_mat(path)
    assert back.dims == t.dims
    np.testing.assert_array_equal(back.values, t.values)
    for dim in t.dims:
        assert back.indexes[dim].equals(t.indexes[dim])
    assert list(back["label"].values) == ["noise", "noise", "other"]
    assert back.attrs == t.attrs
    assert list(back["sha256"].values) == list(t["sha256"].values)
    np.testing.assert_array_equal(back["edge_distance"], t["edge_distance"])
    with pytest.raises(StoreError, match="exists: choose another path"):
        t.vit.to_mat(path)
    if "shift" in t.dims:
        np.testing.assert_array_equal(back["offset_y"], t["offset_y"])
        np.testing.assert_array_equal(back["offset_x"], t["offset_x"])
        assert "period" in t["offset_y"].attrs
        for name in ("offset_y", "offset_x"):
            assert back[name].attrs == t[name].attrs
            assert back[name].attrs["period"] == t[name].attrs["period"]


def test_the_notebooks_own_files_are_read(tmp_path):
    data = np.random.default_rng(0).random((12, 3, 1))
    savemat(tmp_path / "n.mat", {"neuron_output_3D": data})
    t = vitxr.read_mat(tmp_path / "n.mat")
    assert t.dims == ("neuron", "image", "shift")
    np.testing.assert_array_equal(t.values, data)


def test_matlab_refusals(ds, tmp_path):
    with pytest.raises(DataError, match=r"dims \(image, .*expected \(neuron, image, shift\)"):
        ds["activation"].vit.to_mat(tmp_path / "x.mat")
    with pytest.raises(ArgumentError, match=r"ending in \.mat"):
        ds.vit.neuron_matrix(layer=0).vit.to_mat(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="cannot be read as a MATLAB 5 file"):
        vitxr.read_mat(tmp_path / "x.mat")
    (tmp_path / "text.mat").write_text("this is not MATLAB" * 20)
    with pytest.raises(StoreError, match="cannot be read as a MATLAB 5 file"):
        vitxr.read_mat(tmp_path / "text.mat")
    savemat(tmp_path / "other.mat", {"a": 1})
    with pytest.raises(DataError, match="holds a; expected one of neuron_output_3D"):
        vitxr.read_mat(tmp_path / "other.mat")


def partial(ds, **missing):
    """As a store that is not whole: rows that are not written are NaN."""
    written = xr.DataArray(np.ones((3, ds.sizes["shift_y"]), bool), dims=("image", "shift_y"))
    written[missing] = False
    ds = ds.assign(activation=ds["activation"].where(written)).assign_coords(written=written)
    return ds.chunk(image=1)


@pytest.mark.parametrize("make", [neuron_tensor, neuron_matrix])
@pytest.mark.parametrize(
    ("ranking", "missing"),
    [
        ("first_frame", {"image": 0}),
        ("first_frame", {"image": 0, "shift_y": 0}),
        ("mean", {"image": 1, "shift_y": 2}),
    ],
)
def test_maps_are_not_ranked_by_what_is_not_written(ds, make, ranking, missing):
    part = partial(ds, **missing)
    name = str(ds.image.values[missing["image"]])
    with pytest.raises(DataError) as raised:
        make(part, 1, feature_maps=4, ranking=ranking)
    said = str(raised.value)
    assert f"ranked by {ranking!r}: image {name}, shift_y {missing.get('shift_y', 0)}" in said
    assert "layer 1 is not written yet; the store is not whole: " in said
    assert 'ds.isel(image=ds.written.all("shift_y").values) has the images that are' in said
    # The remedy is one.
    rest = part.isel(image=part.written.all("shift_y").values)
    whole = ds.isel(image=[i for i in range(3) if i != missing["image"]])
    xr.testing.assert_allclose(
        make(rest, 1, feature_maps=4, ranking=ranking).drop_vars("written", errors="ignore"),
        make(whole, 1, feature_maps=4, ranking=ranking),
    )


def test_what_is_not_written_elsewhere_is_no_matter_for_the_first_frame(ds):
    part = partial(ds, image=2)
    t = neuron_tensor(part, 0, feature_maps=4)
    assert t.indexes["neuron"].equals(neuron_tensor(ds, 0, feature_maps=4).indexes["neuron"])
    remedy = r'the store is not whole: t.isel\(image=t.written.all\("shift"\).values\)'
    with pytest.raises(DataError, match="non-finite value, nan, .*" + remedy):
        t.vit.factorize(2)
    f = t.isel(image=t.written.all("shift").values).vit.factorize(2, max_iter=3)
    assert f.sizes["image"] == 2
    vitxr.names.validate(f)


def test_maps_are_not_ranked_by_values_that_are_not_numbers(ds):
    broken = ds.copy(deep=True)
    broken["activation"][1, 2, 3, 0, 5, 1, 1] = np.nan
    frame = f"image {ds.image.values[1]}, shift_y 2, shift_x 3, layer 0 holds NaN or infinite"
    for one in (broken, broken.chunk(image=1)):
        with pytest.raises(DataError, match=f"by 'mean': {frame} values; leave such images out"):
            neuron_tensor(one, 0, feature_maps=4, ranking="mean")
        neuron_tensor(one, 0, feature_maps=4)  # by the first frame
        neuron_tensor(one, 0, feature_maps=[3, 4], ranking="mean")
    broken["activation"][0, 0, 0, 2, 7] = np.inf
    with pytest.raises(DataError, match=r"by 'first_frame': image .*, layer 2 holds NaN"):
        neuron_tensor(broken, 2, feature_maps=4)
