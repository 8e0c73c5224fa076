"""Saving and opening results; the ledger of a store being written."""

import numpy as np
import pytest
import xarray as xr

import vitxr
from vitxr.errors import ArgumentError, StoreError
from vitxr.store import ledger


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
    back = vitxr.open(path)["activation"]
    xr.testing.assert_identical(back.compute(), tensor)
    assert back.indexes["neuron"].equals(tensor.indexes["neuron"])
    back.unstack("neuron").sel(feature_map=4, patch_row=1)


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


def test_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="there is no store at"):
        vitxr.open(tmp_path / "nothing.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a Zarr v3 store"):
        vitxr.open(tmp_path / "folder")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(StoreError, match="cannot be read"):
        vitxr.open(tmp_path / "text.nc")


def make(path, units=2):
    import dask.array as da

    template = xr.Dataset(
        {"logits": (("image", "class"), da.zeros((units, 6), chunks=(1, 6), dtype="float32"))},
        coords={"label": ("image", np.array(["a"] * units, dtype=object))},
        attrs={"model": "none"},
    )
    layout = {"logits": {"chunks": (1, 3), "shards": (1, 6)}}
    return ledger.create(path, template, layout, units, {"model": "none", "layers": (0, 1)})


def test_the_root_is_written_last(tmp_path):
    path = tmp_path / "a.zarr"
    book = make(path)
    assert not (path / "zarr.json").exists()
    book.write(0, {"image": slice(0, 1)}, {"logits": np.zeros((1, 6), "float32")})
    assert list(book.done()) == [True, False]
    with pytest.raises(StoreError, match="misses 1 of 2 units"):
        book.finish()
    assert not (path / "zarr.json").exists()
    again = ledger.Ledger(path)
    again.write(1, {"image": slice(1, 2)}, {"logits": np.ones((1, 6), "float32")})
    again.finish()
    ds = xr.open_zarr(path, consolidated=False)
    np.testing.assert_array_equal(ds["logits"], np.repeat([[0.0], [1.0]], 6, axis=1))
    assert ds.attrs == {"model": "none"}
    assert list(ds["label"].values) == ["a", "a"]
    # All-zero data count as written: their shard is there.
    assert (path / "logits" / "c" / "0" / "0").exists()


def test_a_flipped_bit_is_seen(tmp_path):
    import dask.array as da

    path = tmp_path / "a.zarr"
    template = xr.Dataset({"logits": (("image", "class"), da.zeros((1, 6), dtype="float32"))})
    layout = {"logits": {"chunks": (1, 3), "shards": (1, 6)}}
    book = ledger.create(path, template, layout, 1, {})
    book.write(0, {"image": slice(0, 1)}, {"logits": np.arange(6, dtype="float32")[None]})
    book.finish()
    shard = path / "logits" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        vitxr.open(path)["logits"].compute()


def test_differences_are_readable():
    assert ledger.differences({"a": 1, "b": (0, 1)}, {"a": 2, "b": [0, 1], "c": None}) == [
        "a: 1 -> 2",
        'c: "absent" -> null',
    ]
    (line,) = ledger.differences({"images": ["x" * 64] * 9}, {"images": []})
    assert line.endswith("(612 characters) -> []")


def test_a_failed_layout_leaves_nothing(tmp_path, monkeypatch):
    import zarr

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr, "create_group", full)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())
