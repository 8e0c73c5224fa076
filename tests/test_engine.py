"""The engine's promises about numbers: memory that runs out, rounding, selections, many images."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from conftest import make_vit
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.bitround import BitRound

torch = pytest.importorskip("torch")

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, ModelError  # noqa: E402
from vitxr.extract import units  # noqa: E402
from vitxr.models import capture as captures  # noqa: E402
from vitxr.store.plans import Cut  # noqa: E402

ALL = ("activation", "prefix", "embedding", "attention", "logits")


def extract(stim, model, **options):
    return vitxr.extract(
        stim,
        model,
        **{"shifts": vitxr.ShiftGrid(11), "preprocess": "raw", "progress": False, **options},
    )


@pytest.fixture
def sizes(monkeypatch):
    """Frames of every forward pass."""
    out, true = [], units.capture

    def capture(model, batch, *rest):
        out.append(len(batch))
        return true(model, batch, *rest)

    monkeypatch.setattr(units, "capture", capture)
    return out


@pytest.fixture
def memory(monkeypatch):
    """Lets a pass run out of memory if it has more frames than allowed; lists all that were tried.

    Half of its results are written by then, as on a device that fails in a later block.
    """
    tried, true = [], units.capture

    class Memory:
        frames = 10**9
        message = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on it."
        error = torch.cuda.OutOfMemoryError

    def capture(model, batch, layers, variables, channels, dtype, keepbits, out, *rest):
        tried.append(len(batch))
        if len(batch) > Memory.frames:
            for array in out.values():
                array[: len(batch) // 2] = np.nan
            raise Memory.error(Memory.message)
        return true(model, batch, layers, variables, channels, dtype, keepbits, out, *rest)

    monkeypatch.setattr(units, "capture", capture)
    Memory.tried = tried
    return Memory


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 14])
def test_out_of_memory_halves_the_batch(stim, model, memory, tmp_path, frames, stored):
    whole = extract(stim, model, variables=ALL, batch_size=15).compute()
    memory.tried.clear()
    memory.frames = frames
    store = {"store": tmp_path / "run.zarr"} if stored else {}
    halved = extract(stim, model, variables=ALL, batch_size=15, **store)
    # One thread, so that the order of the passes is known.
    halved = halved.compute(scheduler="synchronous")
    # Other batches, other rounding: the same numbers but for the last bits.
    xr.testing.assert_allclose(halved, whole, rtol=1e-4, atol=1e-5)
    ran = [n for n in memory.tried if n <= frames]
    assert sum(ran) == 45
    # It is tried once: what does not fit is known for the rest of the run.
    failed = [n for n in memory.tried if n > frames]
    assert failed == [n for n in (15, 8, 4, 2) if n > frames]


def test_other_ways_to_say_that_memory_is_full(stim, model, memory):
    memory.frames = 4
    memory.error = RuntimeError
    memory.message = (
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
    )
    extract(stim, model, layers=[0]).compute()
    memory.error, memory.message = torch.cuda.OutOfMemoryError, "XPU: no memory is left"
    extract(stim, model, layers=[0]).compute()
    memory.error, memory.message = RuntimeError, "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        extract(stim, model, layers=[0]).compute()


def test_one_frame_that_does_not_fit_is_refused(stim, model, memory, tmp_path):
    memory.frames = 0
    with pytest.raises(
        ModelError, match=r"one frame does not fit.*cpu \(CUDA out of memory.*GiB\.\)\. Use precis"
    ):
        extract(stim, model, layers=[0], store=tmp_path / "run.zarr", batch_size=15)
    assert memory.tried == [15, 8, 4, 2, 1]
    memory.frames = 10**9
    ds = extract(stim, model, layers=[0], store=tmp_path / "run.zarr", batch_size=15)
    xr.testing.assert_identical(ds.compute(), extract(stim, model, layers=[0]).compute())


BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.floats(width=32).map(lambda x: int(np.float32(x).view(np.uint32))),
    # Ties, and their neighbours.
    st.builds(
        lambda high, keep, off: (high << 23 | 1 << (22 - keep)) + off & 0xFFFFFFFF,
        st.integers(0, 511), st.integers(1, 22), st.integers(-1, 1),
    ),
)  # fmt: skip


@given(st.lists(BITS, min_size=1, max_size=40), st.integers(1, 22))
def test_bit_rounding_is_that_of_numcodecs(bits, keep):
    values = np.array(bits, np.uint32).view(np.float32)
    ours = captures._rounded(torch.from_numpy(values.copy()), keep).numpy()
    theirs = BitRound(keep).decode(BitRound(keep).encode(values.copy())).view(np.float32)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])
    # Not a number stays none, and infinity stays: numcodecs makes numbers of some NaNs.
    assert np.isnan(ours[~number]).all()
    infinite = np.isinf(values)
    np.testing.assert_array_equal(ours[infinite], values[infinite])
    normal = number & ~infinite & (abs(values) >= 2.0**-126) & np.isfinite(ours)
    error = abs(ours[normal].astype(float) - values[normal])
    assert (error <= 2.0 ** -(keep + 1) * abs(values[normal].astype(float))).all()


@pytest.mark.parametrize("keep", [1, 7, 22])
def test_a_rounded_store_is_the_rounded_result(stim, model, tmp_path, keep):
    full = extract(stim, model, variables=ALL, batch_size=15).compute()
    name = f"bitround{keep}"
    stored = extract(
        stim, model, variables=ALL, storage_dtype=name, store=tmp_path / "run.zarr", batch_size=15
    )
    lazy = extract(stim, model, variables=ALL, storage_dtype=name, batch_size=15)
    xr.testing.assert_identical(stored.compute(), lazy.compute())
    for variable in ALL:
        values = full[variable].values
        expected = BitRound(keep).decode(BitRound(keep).encode(values.copy())).view(np.float32)
        np.testing.assert_array_equal(stored[variable], expected.reshape(values.shape))
        attrs = stored[variable].attrs
        assert attrs["quantization_keepbits"] == keep
        limit = attrs["quantization_maximum_relative_error"]
        assert limit == 2.0 ** -(keep + 1)
        assert (abs(stored[variable] - values) <= limit * abs(values)).all()


def test_rounded_values_that_are_not_finite_are_kept(stim, tmp_path):
    model = vitxr.load_model(make_vit())

    def hook(_module, _args, out):
        out = out.clone()
        out[:, 3, 0], out[:, 4, 1], out[:, 5, 2] = np.nan, np.inf, -np.inf
        return out

    model.blocks[0].register_forward_hook(hook)
    with pytest.warns(RuntimeWarning, match="`activation` has 18 values that are not finite"):
        ds = extract(
            stim.isel(image=[0]), model, layers=[0], storage_dtype="bitround3",
            shifts=vitxr.ShiftGrid(16), store=tmp_path / "run.zarr",
        )  # fmt: skip
    found = ds["activation"].isel(image=0, layer=0).compute()
    # After the class token, in rows of six.
    for token, channel, value in [(2, 0, np.nan), (3, 1, np.inf), (4, 2, -np.inf)]:
        at = found.isel(patch_row=0, patch_col=token, feature_map=channel)
        np.testing.assert_array_equal(at, np.full(at.shape, value))
    assert int((~np.isfinite(found)).sum()) == 18


@pytest.mark.parametrize("variables", [("activation",), ("activation", "attention", "logits")])
def test_maps_that_are_selected_beforehand_give_the_same_tensor(stim, model, tmp_path, variables):
    full = extract(stim, model, variables=variables, store=tmp_path / "full.zarr")
    few = extract(stim, model, variables=variables, feature_maps=20, store=tmp_path / "few.zarr")
    assert few.sizes["feature_map"] == 20
    assert few["channel"].dims == ("layer", "feature_map")
    for layer in range(3):
        for options in ({}, {"normalize": False}, {"rectify": False, "normalize": False}):
            chosen = {"layer": layer, "feature_maps": 20, **options}
            xr.testing.assert_identical(
                few.vit.neuron_tensor(**chosen).compute(),
                full.vit.neuron_tensor(**chosen).compute(),
            )
        chosen = {"layer": layer, "feature_maps": 7}
        xr.testing.assert_identical(
            few.vit.neuron_matrix(**chosen).compute(), full.vit.neuron_matrix(**chosen).compute()
        )
    for name in variables[1:]:
        xr.testing.assert_identical(few[name].compute(), full[name].compute())


def small(stim, model, **options):
    """The plan of an extraction."""
    from vitxr.extract.plan import make_plan

    return make_plan(
        stim, model, layers=[0, 2], shifts=vitxr.ShiftGrid(11), feature_maps=None,
        variables=ALL, preprocess="raw", precision="float32", batch_size=15,
        **{"storage_dtype": "float32", **options},
    )  # fmt: skip


@pytest.mark.parametrize("storage_dtype", ["float32", "bitround7"])
@pytest.mark.parametrize(
    # Of 15 frames, one, one and head: 4 heads, 25 tokens.
    ("most", "chunk"),
    [(150_000, (3, 5, 4)), (149_999, (1, 5, 4)), (49_999, (1, 1, 4)), (9_999, (1, 1, 1))],
)  # fmt: skip
def test_large_chunks_are_cut_by_frame_and_head(
    stim, model, tmp_path, monkeypatch, most, chunk, storage_dtype
):
    from vitxr.extract import plan as plans

    options = {"layers": [0, 2], "variables": ALL, "batch_size": 15}
    options |= {"storage_dtype": storage_dtype}
    monkeypatch.setattr(plans, "_CHUNK_BYTES", most)
    ds = extract(stim, model, store=tmp_path / "run.zarr", **options)
    xr.testing.assert_identical(ds.compute(), extract(stim, model, **options).compute())
    plain = xr.open_zarr(tmp_path / "run.zarr", consolidated=False, chunks=None)
    xr.testing.assert_equal(plain["attention"].compute(), ds["attention"].compute())
    rows, columns, heads = chunk
    encoding = plain["attention"].encoding
    assert encoding["chunks"] == (1, rows, columns, 1, heads, 25, 25)
    assert encoding["shards"] == (1, 3, 5, 1, 4, 25, 25)
    for frame in ({"image": 2, "shift_y": 1, "shift_x": 3}, {"head": 2, "query": 0}):
        np.testing.assert_array_equal(ds["attention"].isel(frame), plain["attention"].isel(frame))
    assert vitxr.verify(tmp_path / "run.zarr", progress=False).sizes["shard"] == 0


def test_attention_of_a_large_model_fits_into_chunks(stim, model):
    from vitxr.store.shards import MOST_CHUNK_BYTES

    plan = small(stim, model)
    for tokens, columns, heads in ((197, 5, 12), (400, 1, 12), (1370, 1, 1), (12_000, 1, 1)):
        large = replace(plan, frame={"attention": (2, 12, tokens, tokens)}, cut=Cut(3, 3, 1, 1))
        array = large.array("attention")
        assert array.chunk == (1, 1, columns, 1, heads, tokens, tokens)
        assert 4 * np.prod(array.chunk) <= MOST_CHUNK_BYTES
    large = replace(plan, frame={"attention": (2, 12, 24_000, 24_000)})
    with pytest.raises(
        ArgumentError,
        match=r"`attention` of a frame and head has 2\.3 GB; .* 2\.1 GB at most\.",
    ):
        large.array("attention")
    large = replace(plan, frame={"attention": (2, 12, 20_000, 20_000)}, cut=Cut(3, 3, 1, 1))
    with pytest.raises(ArgumentError, match=r"`attention` of a row of shifts has 96\.0 GB; "):
        large.array("attention")


def test_what_no_store_can_hold_is_refused_before_work(stim, model, tmp_path, monkeypatch, sizes):
    from vitxr.extract import plan as plans

    monkeypatch.setattr(plans, "MOST_CHUNK_BYTES", 1000)
    with pytest.raises(ArgumentError, match="a store takes"):
        extract(stim, model, store=tmp_path / "run.zarr", variables=ALL)
    assert not list(tmp_path.iterdir())
    assert sizes == []
    extract(stim, model, layers=[0], variables=ALL)  # lazily there are no chunks on a disk


@pytest.fixture(scope="module")
def seven():
    pixels = np.random.default_rng(1).integers(0, 256, (7, 32, 48, 3), dtype=np.uint8)
    return vitxr.open_images(pixels)


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("shifts", [None, vitxr.ShiftGrid(32)])
def test_several_images_a_unit(seven, model, tmp_path, sizes, batch_size, shifts):
    options = {"layers": [0, 2], "variables": ALL, "shifts": shifts}
    ds = extract(
        seven, model, store=tmp_path / "run.zarr", batch_size=batch_size, **options
    ).compute()
    frames = 1 if shifts is None else 2
    each = max(1, batch_size // frames)
    assert sum(sizes) == 7 * frames
    assert max(sizes) == min(each, 7) * frames
    assert len(list((tmp_path / "run.zarr" / "logits").glob("c.*"))) == -(-7 // each)
    for i in range(7):
        one = extract(seven.isel(image=[i]), model, batch_size=1, **options).compute()
        xr.testing.assert_allclose(ds.isel(image=[i]), one, rtol=1e-4, atol=1e-5)
    assert vitxr.verify(tmp_path / "run.zarr", progress=False).sizes["shard"] == 0


def test_several_images_a_unit_are_resumed(seven, model, tmp_path, sizes):
    store = tmp_path / "run.zarr"
    options = {"layers": [0], "shifts": None, "batch_size": 3, "store": store}
    whole = extract(seven, model, **options).compute()
    assert sizes == [3, 3, 1]
    (store / "zarr.json").unlink()
    (store / "_vitxr" / "record" / "c.2.0.0").unlink()
    written = vitxr.open(store, partial=True)["written"]
    np.testing.assert_array_equal(written[:, 0], [True] * 6 + [False])
    sizes.clear()
    xr.testing.assert_identical(extract(seven, model, **options).compute(), whole)
    assert sizes == [1]
