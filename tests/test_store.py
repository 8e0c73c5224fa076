"""Saving and opening results; the ledger of a store being written."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import vitxr
from vitxr.errors import ArgumentError, StoreError
from vitxr.store import ledger, plans
from vitxr.store.layout import Array, create
from vitxr.store.location import Location
from vitxr.store.plans import Cut


@pytest.fixture(scope="module")
def tensor():
    rng = np.random.default_rng(0)
    dims = ("image", "shift_y", "shift_x", "layer", "feature_map", "patch_row", "patch_col")
    ds = xr.Dataset(
        {"activation": (dims, rng.normal(size=(4, 2, 3, 1, 5, 2, 3)).astype("float32"))},
        coords={
            **{d: np.arange(n) for d, n in zip(dims[1:], (2, 3, 1, 5, 2, 3), strict=True)},
            "image": np.array([f"é/{i}.png" for i in range(4)], dtype=object),
            "label": ("image", np.array(list("aabb"), dtype=object)),
            "offset_y": ("shift_y", [0, 4]),
            "offset_x": ("shift_x", [0, 4, 8]),
        },
        attrs={"model": "none"},
    )
    return ds.vit.neuron_tensor(layer=0, feature_maps=[4, 1])


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_multi_indexes_survive(tensor, tmp_path, ending):
    path = vitxr.save(tensor, tmp_path / f"t.{ending}")
    back = vitxr.open(path)
    xr.testing.assert_identical(back.compute(), tensor)
    assert back.indexes["neuron"].equals(tensor.indexes["neuron"])
    back.unstack("neuron").sel(feature_map=4, patch_row=1)
    again = vitxr.read_mat(back.vit.to_mat(tmp_path / "t.mat"))
    assert again.attrs == tensor.attrs


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_factors_ensembles_and_embeddings_survive(tensor, tmp_path, ending):
    ensemble = tensor.vit.fit_ensemble([1, 2], replicates=2, max_iter=5, progress=False)
    factors = tensor.vit.factorize(2, max_iter=5)
    for name, result in {"f": factors, "e": factors.vit.embed()}.items():
        back = vitxr.open(vitxr.save(result, tmp_path / f"{name}.{ending}"))
        xr.testing.assert_identical(back.compute(), result)
    tree = vitxr.open(vitxr.save(ensemble, tmp_path / f"tree.{ending}"))
    assert isinstance(tree, xr.DataTree)
    xr.testing.assert_identical(tree.compute(), ensemble)


def test_lazy_results_are_chunked_by_shards(tmp_path):
    template = xr.Dataset(
        {"logits": (("image", "class"), np.zeros((4, 6), "float32"))},
    )
    template["logits"].encoding = {}
    template.to_zarr(
        tmp_path / "a.zarr", consolidated=False, zarr_format=3,
        encoding={"logits": {"chunks": (1, 3), "shards": (2, 6)}},
    )  # fmt: skip
    assert vitxr.open(tmp_path / "a.zarr")["logits"].chunks == ((2, 2), (6,))


def test_nothing_is_replaced(tensor, tmp_path):
    vitxr.save(tensor, tmp_path / "t.nc")
    with pytest.raises(StoreError, match="exists: choose another path"):
        vitxr.save(tensor, tmp_path / "t.nc")
    with pytest.raises(ArgumentError, match=r"ending in \.nc or \.zarr"):
        vitxr.save(tensor, tmp_path / "t.pkl")


@pytest.mark.parametrize(
    "path", ["S3:/x/run.zarr", "s3:/bucket/run.zarr", Path("gs://bucket/run.zarr"), "memory:/a.nc"]
)
def test_a_url_that_lost_a_slash_is_no_folder(tensor, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for use in (vitxr.open, vitxr.verify, Location, lambda p: vitxr.save(tensor, p)):
        with pytest.raises(StoreError, match=r"one slash of two.*'s3://bucket/run\.zarr'.*'\./"):
            use(path)
    assert not list(tmp_path.iterdir())


def test_paths_with_colons_that_are_no_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./s3:/run.zarr", "10:30.zarr", "a b:/run.zarr", "C:/run.zarr", "/x/s3:/a.zarr"):
        assert Location(path).folder == Path(path).absolute()
    with pytest.raises(StoreError, match="knows and whose package is installed"):
        Location("S3X://bucket/run.zarr")


def test_results_are_saved_on_this_machine(tensor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"'memory://t\.nc' is a URL: expected a local path"):
        vitxr.save(tensor, "memory://t.nc")
    assert not list(tmp_path.iterdir())
    assert vitxr.save(tensor, "t.nc") == tmp_path / "t.nc"


def test_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="there is no store at"):
        vitxr.open(tmp_path / "nothing.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="there is no store at"):
        vitxr.open(tmp_path / "folder")
    (tmp_path / "folder" / "text").write_text("mine")
    with pytest.raises(StoreError, match="not a Zarr v3 store"):
        vitxr.open(tmp_path / "folder")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(StoreError, match="cannot be read"):
        vitxr.open(tmp_path / "text.nc")


def make(path, units=2, **options):
    """A store of one variable, (image, class), laid out and empty."""
    array = Array(("image", "class"), (units, 6), "float32", (1, 6), (1, 3), **options)
    coords = xr.Dataset(
        coords={"label": ("image", np.array(["a"] * units, dtype=object))},
        attrs={"model": "none"},
    )
    cut = Cut(units, 1, 1, 1)
    fingerprint = {"model": "none", "image_names": [f"{i}.png" for i in range(units)]}
    return create(Location(path), coords, {"logits": array}, cut, fingerprint)


def values(value=0.0):
    return {"logits": np.full((1, 6), value, "float32")}


def test_the_root_is_written_last(tmp_path):
    path = tmp_path / "a.zarr"
    book = make(path)
    assert not (path / "zarr.json").exists()
    book.write(0, values(0))
    assert list(book.done()) == [True, False]
    with pytest.raises(StoreError, match=r"misses 1 of 2 units \(the first: image '1.png'\)"):
        book.finish()
    assert not (path / "zarr.json").exists()
    again = ledger.Ledger(Location(path))
    again.write(1, values(1))
    again.finish()
    ds = xr.open_zarr(path, consolidated=False)
    np.testing.assert_array_equal(ds["logits"], np.repeat([[0.0], [1.0]], 6, axis=1))
    assert ds.attrs == {"model": "none"}
    assert list(ds["label"].values) == ["a", "a"]


@pytest.mark.parametrize("value", [0, np.nan])
def test_data_of_one_value_count_as_written(tmp_path, value):
    book = make(tmp_path / "a.zarr", units=1)
    book.write(0, values(value))
    assert (tmp_path / "a.zarr" / "logits" / "c.0.0").stat().st_size == 6 * 4 + 2 * 4 + 2 * 16 + 4
    assert book.done().all()
    book.finish()
    assert vitxr.verify(tmp_path / "a.zarr", progress=False).sizes["shard"] == 0


def test_a_unit_is_recorded_after_its_shards(tmp_path):
    book = make(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"shape \(1, 5\), expected \(1, 6\)"):
        book.write(0, {"logits": np.zeros((1, 5), "float32")})
    assert not book.done().any()


def test_a_layout_that_was_cut_short_is_laid_out_again(tmp_path, monkeypatch):
    path, true = tmp_path / "a.zarr", Location.write

    def killed(self, objects):
        if "label/zarr.json" in objects:
            raise SystemExit
        true(self, objects)

    monkeypatch.setattr(Location, "write", killed)
    monkeypatch.setattr(Location, "remove", lambda self: None)
    with pytest.raises(SystemExit):
        make(path)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="not finished: nothing is written"):
        vitxr.open(path)
    with pytest.raises(StoreError, match="not laid out yet"):
        vitxr.open(path, partial=True)
    book = make(path)
    for unit in range(2):
        book.write(unit, values())
    book.finish()
    assert (vitxr.open(path)["logits"] == 0).all()


def test_a_save_that_fails_leaves_nothing(tensor, tmp_path):
    import dask

    def broken():
        raise OSError("the image is gone")

    import dask.array as da

    lazy = tensor.copy(data=da.from_delayed(dask.delayed(broken)(), tensor.shape, tensor.dtype))
    for ending in ("nc", "zarr"):
        with pytest.raises(OSError, match="the image is gone"):
            vitxr.save(lazy, tmp_path / f"t.{ending}")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArgumentError, match="the result is a ndarray"):
        vitxr.save(np.zeros(3), tmp_path / "t.nc")


def test_float16_survives_in_both_formats(tensor, tmp_path):
    half = tensor.astype("float16")
    for ending in ("nc", "zarr"):
        back = vitxr.open(vitxr.save(half, tmp_path / f"t.{ending}"))
        np.testing.assert_array_equal(back.values, half.values)


def test_a_few_feature_maps_are_read_without_the_others(tmp_path):
    dims = ("image", "shift_y", "shift_x", "layer", "feature_map", "patch_row", "patch_col")
    shape = (1, 1, 1, 1, 64, 2, 2)
    array = Array(dims, shape, "float32", shape, (1, 1, 1, 1, 16, 2, 2))
    coords = xr.Dataset(coords={d: np.arange(n) for d, n in zip(dims, shape, strict=True)})
    location = Location(tmp_path / "a.zarr")
    book = create(location, coords, {"activation": array}, Cut(1, 1, 1, 1), {})
    book.write(0, {"activation": np.ones(shape, "float32")})
    book.finish()
    ds = vitxr.open(tmp_path / "a.zarr")
    # The other chunks are damaged, and nobody notices.
    shard = tmp_path / "a.zarr" / "activation" / "c.0.0.0.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[16 * 16 + 4 + 8] ^= 1  # in the second chunk
    shard.write_bytes(content)
    t = ds.vit.neuron_tensor(layer=0, feature_maps=[3, 40], normalize=False)
    assert (t.compute() == 1).all()
    with pytest.raises(StoreError, match=r"c\.0\.0\.0\.0\.0\.0\.0 is altered.*names all that is"):
        ds.vit.neuron_tensor(layer=0, feature_maps=[20]).compute()


def test_differences_are_readable():
    assert plans.differences({"a": 1, "b": (0, 1)}, {"a": 2, "b": [0, 1], "c": None}) == [
        "a: 1 -> 2",
        'c: "absent" -> null',
    ]
    (line,) = plans.differences({"images": ["x" * 64] * 9}, {"images": []})
    assert line.endswith("(612 characters) -> []")
    # What is long and begins alike differs visibly.
    hashes = [f"{i:064}" for i in range(9)]
    other = [*hashes[:7], "f" * 64, hashes[8]]
    assert plans.differences({"images": hashes}, {"images": other}) == [
        f'images[7]: "{hashes[7]}" -> "{"f" * 64}"'
    ]
    assert plans.differences({"images": hashes}, {"images": hashes[:5]}) == [
        "images: 9 values -> 5 values, which begin alike"
    ]
    (line,) = plans.differences({"images": hashes}, {"images": hashes[1:]})
    assert line.startswith("images: 9 values -> 8 values, the first that differ: images[0]: ")
    (line,) = plans.differences({"a": "x" * 100 + "1" + "y" * 100}, {"a": "x" * 100 + "2"})
    assert line == (
        f'a: ...{"x" * 20}1{"y" * 39}... (203 characters) -> ...{"x" * 20}2" (103 characters)'
    )


def test_differences_show_only_what_changed():
    stored = {"coordinates": {"label": "a", "layer": "b"}, "rows_per_unit": 3, "x": 1}
    asked = {"coordinates": {"label": "c", "layer": "b"}, "rows_per_unit": 4, "x": 1}
    assert plans.differences(stored, asked) == ["coordinates: other values of label"]
    # What follows from nothing that is listed is not kept secret.
    asked["coordinates"] = stored["coordinates"]
    assert plans.differences(stored, asked) == ["rows_per_unit: 3 -> 4"]
    settings = [json.dumps({"size": s, "mean": [0.5] * 3}) for s in (224, 384)]
    assert plans.differences({"settings": settings[0]}, {"settings": settings[1]}) == [
        "settings.size: 224 -> 384"
    ]
    assert plans.differences({"settings": settings[0]}, {"settings": "{}"}) == [
        'settings.mean: [0.5, 0.5, 0.5] -> "absent"',
        'settings.size: 224 -> "absent"',
    ]


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    ),
    st.data(),
)
def test_what_differs_has_a_line(value, data):
    other = data.draw(st.one_of(st.just(value), st.lists(st.integers()), st.text()))
    lines = plans.differences({"key": value}, {"key": other})
    assert bool(lines) == (value != other)
    assert all(line.startswith("key") and len(line) < 400 for line in lines)


def test_a_failed_layout_leaves_nothing(tmp_path, monkeypatch):
    true = Location.write

    def full(self, objects):
        true(self, dict(list(objects.items())[:1]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Location, "write", full)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())
