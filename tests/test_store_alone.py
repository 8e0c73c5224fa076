"""A store read by the words of docs/store.md: JSON, NumPy and two decompressors, no Zarr."""

import itertools
import json
import struct

import numpy as np
import pytest
from google_crc32c import value as crc
from numcodecs import blosc, zstd

pytest.importorskip("torch")

import vitxr

MODEL = vitxr.load_model("digits")


def strings(data):
    """A count, then of each string its length and its bytes."""
    (count,), at, out = struct.unpack_from("<I", data), 4, []
    for _ in range(count):
        (size,) = struct.unpack_from("<I", data, at)
        out.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return np.array(out, dtype=object)


def chunk(data, codecs, shape, kind):
    """One chunk's values."""
    names = [codec["name"] for codec in codecs]
    if "crc32c" in names:
        assert crc(data[:-4]) == struct.unpack("<I", data[-4:])[0]
        data = data[:-4]
    if "zstd" in names:
        data = zstd.decompress(data)
    if "blosc" in names:
        data = blosc.decompress(data)
    values = strings(data) if kind is object else np.frombuffer(data, kind)
    return values.reshape(shape)


def shard(data, meta, shape, kind):
    """One shard's values, its size and the checksum that the record should have."""
    inner, codecs = meta["configuration"]["chunk_shape"], meta["configuration"]["codecs"]
    places = [range(whole // part) for whole, part in zip(shape, inner, strict=True)]
    assert all(whole % part == 0 for whole, part in zip(shape, inner, strict=True))
    count = np.prod([len(along) for along in places])
    index = data[-(16 * count + 4) : -4]
    assert crc(index) == struct.unpack("<I", data[-4:])[0]
    out, sums, at = np.full(shape, np.nan, kind), b"", 0
    for place, (start, size) in zip(
        itertools.product(*places), struct.iter_unpack("<QQ", index), strict=True
    ):
        if start == 2**64 - 1:
            continue
        assert start == at  # one after the other, in C order
        at += size
        cut = tuple(slice(p * n, p * n + n) for p, n in zip(place, inner, strict=True))
        out[cut] = chunk(data[start:at], codecs, inner, kind)
        sums += data[at - 4 : at]
    assert at + len(index) + 4 == len(data)
    return out, (len(data), crc(sums + index))


def read(folder):
    """An array's values, its dims, and size and checksum of each shard."""
    meta = json.loads((folder / "zarr.json").read_text())
    shape, part = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    between = meta["chunk_key_encoding"]["configuration"]["separator"]
    kind = object if meta["data_type"] == "string" else np.dtype(meta["data_type"])
    out, found = np.empty(shape, kind), {}
    for place in itertools.product(
        *(range(-(-whole // n)) for whole, n in zip(shape, part, strict=True))
    ):
        data = folder.joinpath(between.join(["c", *map(str, place)])).read_bytes()
        if meta["codecs"][0]["name"] == "sharding_indexed":
            values, found[place] = shard(data, meta["codecs"][0], part, kind)
        else:
            values = chunk(data, meta["codecs"], part, kind)
        cut = tuple(
            slice(p * n, min(p * n + n, whole))
            for p, n, whole in zip(place, part, shape, strict=True)
        )
        out[cut] = values[tuple(slice(c.stop - c.start) for c in cut)]
    return out, meta["dimension_names"], found


@pytest.mark.parametrize(
    "options",
    [
        {"variables": ["activation", "prefix", "attention", "attention_query", "logits"],
         "modules": {"gate": "layers.{layer}.mlp.fc1", "normed": "vit.layernorm"}},
        {"feature_maps": 20, "storage_dtype": "bitround7", "shifts": vitxr.ShiftGrid(5, "raster")},
        {"storage_dtype": "float16", "batch_size": 2},
    ],
)  # fmt: skip
def test_a_store_is_read_without_zarr(tmp_path, options):
    stim = vitxr.datasets.digits(per_class=1).isel(image=slice(5))
    options = {"shifts": vitxr.ShiftGrid(8), "layers": [0, 5], **options}
    path = tmp_path / "run.zarr"
    ds = vitxr.extract(stim, MODEL, store=path, progress=False, **options).compute()
    arrays = {
        p.parent.name: read(p.parent) for p in path.glob("*/zarr.json") if p.parent.name[0] != "_"
    }
    assert set(arrays) == set(ds.variables)
    for name, (values, dims, _) in arrays.items():
        assert list(ds[name].dims) == dims
        np.testing.assert_array_equal(values, ds[name])
    attrs = json.loads((path / "zarr.json").read_text())["attributes"]
    assert set(attrs["coordinates"].split()) == set(ds.coords) - set(ds.dims)

    plan = json.loads((path / "_vitxr" / "zarr.json").read_text())["attributes"]
    record, _, _ = read(path / "_vitxr" / "record")
    cut = plan["cut"]
    bands = -(-cut["rows"] // cut["rows_per_unit"])
    for unit, row in enumerate(record.tolist()):
        first = {"image": unit // bands, "shift_y": unit % bands}
        wanted = [
            list(sums)
            for name in plan["variables"]
            for place, sums in arrays[name][2].items()  # layers ascending
            if first.items() <= dict(zip(arrays[name][1], place, strict=True)).items()
        ]
        assert row == wanted
