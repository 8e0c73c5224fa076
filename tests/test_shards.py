"""The shards vitxr encodes itself: the bytes zarr would write, and what zarr reads from them."""

import math
import struct
import tempfile
from dataclasses import replace

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from vitxr.errors import StoreError
from vitxr.store.location import Location
from vitxr.store.reader import ShardedArray, lazy
from vitxr.store.shards import Shards, crc32c

SPECIAL = [0.0, -0.0, 1.5, np.nan, np.inf, -np.inf, 6e-8, -65504.0]


def make(shape, shard, chunk, dtype="float32", compress=False):
    """An array in memory, and its files by key."""
    files = {}
    blosc = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=np.dtype(dtype).itemsize)
    array = zarr.create_array(
        zarr.storage.MemoryStore(files),
        name="a",
        shape=shape,
        dtype=dtype,
        shards=shard,
        chunks=chunk,
        compressors=((blosc,) if compress else ()) + (Crc32cCodec(),),
        fill_value=np.nan,
        dimension_names=[f"d{i}" for i in range(len(shape))],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    return array, files


def put(files, found):
    """Put encoded shards where zarr reads them."""
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    files |= {key: buffer.from_bytes(data) for key, data in found.items()}


def encoded(files, data):
    """Every shard as vitxr encodes it, by key."""
    shards = Shards.of("a", files["a/zarr.json"].to_bytes())
    out = np.full(shards.most_bytes, 0xAA, np.uint8)  # used again for each, as in a run
    return {key: shards.encode(data[place], out).tobytes() for key, place in shards.within({})}


@st.composite
def geometries(draw, cut_dims):
    """Shape, shard and chunk of an array; shards hold several chunks along some dims only."""
    dims = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    chunk = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    several = draw(st.sets(st.integers(0, dims - 1), max_size=cut_dims))
    shard = tuple(c * (draw(st.integers(1, 4)) if i in several else 1) for i, c in enumerate(chunk))
    return shape, shard, chunk


def arrays(shape, dtype):
    values = st.one_of(
        st.sampled_from(SPECIAL),
        st.floats(width=8 * np.dtype(dtype).itemsize),
    )
    return npst.arrays(dtype, shape, elements=values, fill=st.just(0.0))


@given(st.data(), geometries(1), st.sampled_from(["float32", "float16"]), st.booleans())
def test_the_bytes_are_those_of_zarr(data, geometry, dtype, compress):
    array, files = make(*geometry, dtype, compress)
    values = data.draw(arrays(geometry[0], dtype))
    ours = encoded(files, values)
    array[...] = values
    assert set(ours) == {key for key in files if not key.endswith("zarr.json")}
    for key, found in ours.items():
        assert found == files[key].to_bytes(), key


@given(st.data(), geometries(4), st.sampled_from(["float32", "float16"]), st.booleans())
def test_zarr_reads_what_is_encoded(data, geometry, dtype, compress):
    # Chunks along several dims lie in another order than zarr's, which is of no consequence.
    array, files = make(*geometry, dtype, compress)
    values = data.draw(arrays(geometry[0], dtype))
    put(files, encoded(files, values))
    back = array[...]
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, values)
    # Bit for bit, which tells zeros and NaNs apart.
    whole = np.uint32 if dtype == "float32" else np.uint16
    np.testing.assert_array_equal(back.view(whole), values.view(whole))


@pytest.mark.parametrize("compress", [False, True])
def test_the_geometry_of_an_extraction(compress):
    # 20 feature maps in chunks of 16, two of three rows; a piece of a larger array, not contiguous.
    shape, shard, chunk = (2, 3, 5, 2, 20, 4, 6), (1, 2, 5, 1, 32, 4, 6), (1, 2, 5, 1, 16, 4, 6)
    array, files = make(shape, shard, chunk, compress=compress)
    values = np.random.default_rng(0).normal(size=(2, 3, 5, 40, 2, 4, 6)).astype("float32")
    values = np.moveaxis(values[:, :, :, ::2], 3, 4)
    array[...] = values
    assert not values.flags.c_contiguous
    for key, found in encoded(files, values).items():
        assert found == files[key].to_bytes(), key


def test_values_of_another_dtype_are_cast():
    _, files = make((4,), (4,), (4,), "float16")
    values = np.array([1.0, 1 + 2**-12, 65504, np.nan])
    (found,) = encoded(files, values).values()
    np.testing.assert_array_equal(np.frombuffer(found[:8], "<f2"), values.astype("float16"))


def test_data_that_do_not_compress_have_room():
    shape = (3, 5000)
    array, files = make(shape, shape, (1, 1250), compress=True)
    noise = np.random.default_rng(0).integers(0, 2**31, shape, np.int64).astype(np.uint32)
    values = (noise & 0x7F7FFFFF).view(np.float32)  # finite
    found = encoded(files, values)
    assert len(found["a/c.0.0"]) > values.nbytes * 0.9
    put(files, found)
    np.testing.assert_array_equal(array[...], values)


@given(geometries(4))
def test_shards_tile_the_array(geometry):
    _, files = make(*geometry)
    shape, shard, _ = geometry
    shards = Shards.of("a", files["a/zarr.json"].to_bytes())
    seen = np.zeros(shape, int)
    keys = []
    for key, place in shards.within({}):
        keys.append(key)
        seen[place] += 1
    assert (seen == 1).all()
    assert len(set(keys)) == len(keys)
    assert len(keys) == math.prod(math.ceil(n / s) for n, s in zip(shape, shard, strict=True))


@given(geometries(4), st.data())
def test_within_a_region_are_its_shards(geometry, data):
    _, files = make(*geometry)
    shape, shard, _ = geometry
    shards = Shards.of("a", files["a/zarr.json"].to_bytes())
    region = {}
    for i in data.draw(st.sets(st.integers(0, len(shape) - 1))):
        count = math.ceil(shape[i] / shard[i])
        first = data.draw(st.integers(0, count - 1))
        last = data.draw(st.integers(first + 1, count))
        region[f"d{i}"] = slice(first * shard[i], min(last * shard[i], shape[i]))
    inside = tuple(region.get(f"d{i}", slice(0, n)) for i, n in enumerate(shape))
    expected = np.zeros(shape, int)
    expected[inside] = 1
    seen = np.zeros(shape, int)
    for key, place in shards.within(region):
        seen[place] += 1
        where = [s.start // step for s, step in zip(place, shard, strict=True)]
        assert key == "a/c." + ".".join(map(str, where))
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("cut", [slice(1, 4), slice(0, 3), slice(2, 5), slice(3, 7)])
def test_a_region_that_cuts_a_shard_is_refused(cut):
    _, files = make((7, 2), (2, 2), (1, 2))
    shards = Shards.of("a", files["a/zarr.json"].to_bytes())
    with pytest.raises(ValueError, match=r"a: d0 slice\(.*\) cuts shards of 2"):
        list(shards.within({"d0": cut}))


@st.composite
def selections(draw, shape):
    """Integers, slices and one array at most, of either sign and step, empty ones among them."""
    out = []
    for size in shape:
        kind = draw(st.sampled_from(["integer", "slice", "array"]))
        if kind == "array" and not any(isinstance(part, np.ndarray) for part in out):
            out.append(np.array(draw(st.lists(st.integers(-size, size - 1), max_size=4)), int))
        elif kind == "integer":
            out.append(draw(st.integers(-size, size - 1)))
        else:
            bound = st.none() | st.integers(-size - 2, size + 2)
            step = draw(st.sampled_from([None, 1, 2, 3, -1, -2]))
            out.append(slice(draw(bound), draw(bound), step))
    return tuple(out)


def selected(values, key):
    """Each axis by itself."""
    for axis in range(values.ndim - 1, -1, -1):
        values = values[(slice(None),) * axis + (key[axis],)]
    return values


@given(st.data(), geometries(4), st.sampled_from(["float32", "float16"]), st.booleans())
def test_a_selection_is_read(data, geometry, dtype, compress):
    _, files = make(*geometry, dtype, compress)
    dims = ("image", "shift_y", "d2", "d3")[: len(geometry[0])]
    shards = replace(Shards.of("a", files["a/zarr.json"].to_bytes()), dims=dims)
    values = data.draw(arrays(geometry[0], dtype))
    found = encoded(files, values)
    lost = data.draw(st.sets(st.sampled_from(sorted(found)), max_size=2))
    # A unit is all shards of some images and rows; what is not written is not even looked at.
    written = np.ones((*geometry[0], 1)[:2], bool)
    masked = values.copy()
    for key, place in shards.within({}):
        if key in lost:
            written[(*place, slice(None))[:2]] = False
            masked[place[:2]] = np.nan
    with tempfile.TemporaryDirectory() as folder:
        location = Location(folder)
        location.write({key: b"" if key in lost else shard for key, shard in found.items()})
        partial, whole = (ShardedArray(location, shards, w) for w in (written, None))
        for _ in range(3):
            key = data.draw(selections(geometry[0]))
            part = partial[key]
            np.testing.assert_array_equal(part, selected(masked, key))
            assert part.dtype == dtype
            assert np.ndim(part) == 0 or part.flags.writeable
            if not lost:
                np.testing.assert_array_equal(whole[key], selected(values, key))
        lazily = lazy(location, shards, written)
        np.testing.assert_array_equal(lazily.compute(scheduler="synchronous"), masked)
        for how in ("is cut short", "is missing") if lost else ():
            with pytest.raises(StoreError, match=rf"is damaged: a/c\..* {how}"):
                lazy(location, shards, None).compute(scheduler="synchronous")
            location.erase(lost)


def test_a_selection_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    _, files = make((4, 6, 8), (2, 3, 8), (2, 3, 2))
    shards = replace(
        Shards.of("a", files["a/zarr.json"].to_bytes()), dims=("image", "shift_y", "d")
    )
    values = np.arange(192, dtype="float32").reshape(4, 6, 8)
    location = Location(tmp_path)
    location.write(encoded(files, values))
    pieces, true = [], Shards.decode
    monkeypatch.setattr(Shards, "decode", lambda *a: (pieces.append(len(a[1])), true(*a))[1])
    array = lazy(location, shards, None)
    assert array[1, 4, 3].compute(scheduler="synchronous") == values[1, 4, 3]
    assert len(pieces) == 1
    pieces.clear()
    np.testing.assert_array_equal(
        array[2:, :, 2:4].compute(scheduler="synchronous"), values[2:, :, 2:4]
    )
    assert len(pieces) == 2


def test_a_small_part_does_not_keep_the_whole_alive(tmp_path):
    _, files = make((4, 6, 8), (4, 6, 8), (4, 6, 8))
    shards = replace(
        Shards.of("a", files["a/zarr.json"].to_bytes()), dims=("image", "shift_y", "d")
    )
    location = Location(tmp_path)
    location.write(encoded(files, np.zeros((4, 6, 8), "float32")))
    assert ShardedArray(location, shards, None)[0, 0, 0:2].base is None


@pytest.mark.parametrize("entry", [(2**64 - 1, 2**64 - 1), (0, 2**50), (2**62, 100)])
def test_an_index_that_makes_no_sense(tmp_path, entry):
    _, files = make((4, 6), (4, 6), (4, 6))
    shards = replace(Shards.of("a", files["a/zarr.json"].to_bytes()), dims=("image", "shift_y"))
    ((key, shard),) = encoded(files, np.zeros((4, 6), "float32")).items()
    index = np.array(entry, "<u8").tobytes()
    index += crc32c(np.frombuffer(index, np.uint8)).to_bytes(4, "little")
    Location(tmp_path).write({key: shard[: -len(index)] + index})
    with pytest.raises(StoreError, match="index that makes no sense"):
        ShardedArray(Location(tmp_path), shards, None)[0, 0]


def table():
    """The 256 steps of CRC-32C, made from its polynomial alone."""
    out = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        out.append(value)
    return out


TABLE = table()


def reference(data):
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


@given(st.binary(max_size=300))
def test_crc32c_is_the_polynomial_s(data):
    assert crc32c(np.frombuffer(data, np.uint8)) == reference(data)


@pytest.mark.parametrize(
    ("data", "value"),
    # RFC 3720, B.4
    [
        (bytes(32), 0x8A9136AA),
        (bytes([0xFF] * 32), 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_crc32c_of_the_standard(data, value):
    assert crc32c(np.frombuffer(data, np.uint8)) == value == reference(data)


def test_the_parts_of_a_shard():
    """Read by the specification alone: chunks with checksums, places and sizes, a checksum."""
    _, files = make((2, 5), (2, 8), (2, 2))
    values = np.arange(10, dtype="float32").reshape(2, 5)
    (data,) = encoded(files, values).values()
    index, end = data[-4 * 16 - 4 : -4], data[-4:]
    assert struct.unpack("<I", end)[0] == reference(index)
    places = np.frombuffer(index, "<u8").reshape(4, 2)
    assert (places[3] == 2**64 - 1).all()  # wholly beyond the array
    for number, (start, size) in enumerate(places[:3].tolist()):
        chunk, check = data[start : start + size - 4], data[start + size - 4 : start + size]
        assert struct.unpack("<I", check)[0] == reference(chunk)
        found = np.frombuffer(chunk, "<f4").reshape(2, 2)
        expected = np.full((2, 2), np.nan, "float32")
        part = values[:, 2 * number : 2 * number + 2]
        expected[:, : part.shape[1]] = part
        np.testing.assert_array_equal(found, expected)
