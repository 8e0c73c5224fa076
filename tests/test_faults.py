"""What may go wrong while a store is written, or after: nothing is lost or passes for whole."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import make_vit

torch = pytest.importorskip("torch")

import zarr  # noqa: E402
from forked import GEOMETRIES, Forks, arguments, contents, guarded, records  # noqa: E402

import vitxr  # noqa: E402
from vitxr.errors import ImageError, StoreError  # noqa: E402
from vitxr.store.ledger import Ledger  # noqa: E402
from vitxr.store.location import Location  # noqa: E402
from vitxr.store.plans import read_plan  # noqa: E402


@pytest.fixture(scope="module")
def forks():
    if not hasattr(os, "fork"):
        pytest.skip("not on Windows: it cannot fork")
    process = Forks()
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    """For each geometry, the files that an uninterrupted run writes, and what it reported."""
    out = {}
    for geometry in GEOMETRIES:
        path = tmp_path_factory.mktemp(geometry) / "run.zarr"
        result = forks.run(path, geometry)
        assert result.get("error") is None
        out[geometry] = contents(path), result
    return out


def same(store, expected):
    """Whether a store holds the same files, byte for byte, and nothing else."""
    found = contents(store)
    assert sorted(found) == sorted(expected)
    assert [key for key in found if found[key] != expected[key]] == []


# Killed


def test_killed_at_fifty_random_moments(forks, whole, tmp_path):
    rng = random.Random(0)
    kills = midway = 0
    for number in range(1000):
        geometry = list(GEOMETRIES)[number % 2]
        expected, alone = whole[geometry]
        store = tmp_path / f"{number}.zarr"
        result = {"how": "killed"}
        while result["how"] == "killed":
            moment = {"after": rng.uniform(0, alone["seconds"])} if kills < 50 else {}
            result = forks.run(store, geometry, **moment)
            assert "error" not in result
            kills += result["how"] == "killed"
            midway += 0 < len(records(store)) < 6
        same(store, expected)
        if kills == 50:
            break
    assert kills == 50
    assert midway > 0


def moments(operations):
    """The first steps, the last, and some between: of the layout, of shards, of records."""
    count = len(operations)
    return sorted({*range(9), *range(9, count, 17), *range(count - 4, count)})


def test_killed_before_a_step(forks, whole, tmp_path):
    """Not left to chance: the plan, the layout, the root, and the steps between."""
    expected, alone = whole["unaligned"]
    lost = {}
    for step in moments(alone["operations"]):
        store, where = tmp_path / f"{step}.zarr", alone["operations"][step]
        assert forks.run(store, "unaligned", at=step)["how"] == "killed", where
        error = forks.run(store, "unaligned").get("error")
        found = contents(store)
        if error or found != expected:
            lost[where] = error or sorted(dict(found.items() ^ expected.items()))
    assert lost == {}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_killed_in_the_middle_of_a_file(forks, whole, tmp_path, geometry):
    expected, _ = whole[geometry]
    store = tmp_path / "run.zarr"
    # One after the other in one store: its plan, a coordinate, the end of its layout, a shard, ...
    for half in (
        "_vitxr/zarr.json", "offset_y/c/0", "_vitxr/record/zarr.json", "activation/c.1.1.0.1.0.0.0",
        "_vitxr/record/c.4.0.0", "run.zarr/zarr.json",
    ):  # fmt: skip
        assert forks.run(store, geometry, half=half)["how"] == "killed", half
    assert "error" not in forks.run(store, geometry)
    same(store, expected)


def test_killed_between_shard_and_record(forks, whole, tmp_path):
    store = tmp_path / "run.zarr"
    assert forks.run(store, at="open /_vitxr/record/c.8.0.0")["how"] == "killed"
    for name in ("activation/c.2.2.0.0.0.0.0", "activation/c.2.2.0.1.0.0.0", "logits/c.2.2.0.0"):
        assert (store / name).exists()
    assert records(store) == list(range(8))
    with pytest.raises(StoreError, match="not finished: 8 of 9 units"):
        vitxr.open(store)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(store, consolidated=False)
    assert forks.run(store)["frames"] == 5
    same(store, whole["aligned"][0])


def test_a_unit_that_is_written_anew_is_recorded_after_its_shards(forks, whole, tmp_path):
    # Were it recorded first, the old shard, of the same size, would pass for the new one.
    store = tmp_path / "run.zarr"
    forks.run(store)
    flip(store / "activation" / "c.1.0.0.1.0.0.0", 100)
    vitxr.verify(store, reset=True, progress=False)
    assert forks.run(store, at="rename /activation/c.1.0.0.1")["how"] == "killed"
    assert forks.run(store)["frames"] == 5
    same(store, whole["aligned"][0])


# Damaged


@pytest.fixture
def counted(monkeypatch):
    """Counts the frames of every forward pass."""
    from vitxr.extract import units

    sizes, true = [], units.capture

    def capture(model, batch, *rest):
        sizes.append(len(batch))
        return true(model, batch, *rest)

    monkeypatch.setattr(units, "capture", capture)
    return sizes


@pytest.fixture
def extract(stim, model, monkeypatch):
    """Extract as the forked runs do."""
    from vitxr.extract import plan

    def run(store, geometry="aligned", **changes):
        monkeypatch.setattr(plan, "_SHARD_BYTES", GEOMETRIES[geometry][2])
        options = {"stim": stim, "model": model, **arguments(geometry), **changes}
        return vitxr.extract(store=store, **options)

    return run


def flip(file, at):
    """Flip one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 8
    file.write_bytes(data)


def problems(store, **options):
    """What verify finds, (problem, unit, image, shift_y, layer, key) each."""
    found = vitxr.verify(store, progress=False, **options)
    names = ("problem", "unit", "image", "shift_y", "layer", "key")
    return [tuple(found[n].values[i] for n in names) for i in range(found.sizes["shard"])]


def unreadable(store, problem, image, shift_y, layer):
    """Reading raises, by vitxr and by zarr alone; but for a missing shard, which zarr takes as NaN.

    What else there is can be read.
    """
    for ds in (vitxr.open(store), xr.open_zarr(store, consolidated=False)):
        at = ds["activation"].isel(image=image, shift_y=shift_y).sel(layer=layer)
        ours = StoreError, rf"is damaged: activation/c\.{image}.*(cut short|{problem}).*verify"
        theirs = Exception, r"(?i)checksum|range|bytes|index|size"
        error, match = ours if ds["activation"].encoding == {} else theirs
        with pytest.raises(error, match=match):
            at.compute()
        assert np.isfinite(ds["activation"].isel(image=0)).all().compute()


#: A shard in the middle, and one at the array's end: unit, image, shift_y, layer.
VICTIMS = {
    "aligned": ("activation/c.1.1.0.1.0.0.0", 4, 1, 1, 2, 5),
    "unaligned": ("activation/c.2.1.0.0.0.0.0", 5, 2, 3, 0, 14),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("left", [0.0, 0.4, "index", -1])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_shard_cut_short(extract, counted, stim, tmp_path, geometry, left, finished):
    key, unit, image, row, layer, frames = VICTIMS[geometry]
    store = tmp_path / "run.zarr"
    extract(store, geometry)
    expected = contents(store)
    size = (store / key).stat().st_size
    # "index": the shard without its index, which has 16 bytes a chunk and a checksum.
    chunks = 3 if geometry == "aligned" else 2
    keep = {0.0: 0, 0.4: int(0.4 * size), "index": size - 16 * chunks - 4, -1: size - 1}[left]
    os.truncate(store / key, keep)
    unreadable(store, "cut short", image=image, shift_y=row, layer=layer)
    name = stim["image"].values[image]
    assert problems(store) == [("cut short", unit, name, row, layer, key)]
    if not finished:
        (store / "zarr.json").unlink()
    counted.clear()
    ranking = geometry == "unaligned"
    extract(store, geometry)
    assert sum(counted) - ranking == frames
    same(store, expected)


@pytest.mark.parametrize("at", ["first", "chunk's checksum", "index", "index's checksum"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_flipped_bit(extract, counted, stim, tmp_path, geometry, at):
    key, unit, image, row, layer, frames = VICTIMS[geometry]
    store = tmp_path / "run.zarr"
    extract(store, geometry)
    expected = contents(store)
    size = (store / key).stat().st_size
    chunks = 3 if geometry == "aligned" else 2
    index = 16 * chunks + 4
    flip(
        store / key,
        {"first": 0, "chunk's checksum": size - index - 1, "index": -index, "index's checksum": -1}[
            at
        ],
    )
    unreadable(store, "altered", image=image, shift_y=row, layer=layer)
    found = [("altered", unit, stim["image"].values[image], row, layer, key)]
    assert problems(store) == found
    assert problems(store, reset=True) == found
    with pytest.raises(StoreError, match=f"not finished: {unit + (geometry == 'aligned') * 4} of"):
        vitxr.open(store)
    counted.clear()
    extract(store, geometry)
    assert sum(counted) - (geometry == "unaligned") == frames
    same(store, expected)
    assert problems(store) == []


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_recorded_shard_deleted(extract, counted, stim, tmp_path, geometry):
    key, unit, image, row, layer, frames = VICTIMS[geometry]
    store = tmp_path / "run.zarr"
    extract(store, geometry)
    expected = contents(store)
    (store / key).unlink()
    at = vitxr.open(store)["activation"].isel(image=image, shift_y=row).sel(layer=layer)
    with pytest.raises(StoreError, match=rf"is damaged: {key} is missing.*verify"):
        at.compute()
    assert problems(store) == [("missing", unit, stim["image"].values[image], row, layer, key)]
    counted.clear()
    extract(store, geometry)  # finished as it is
    assert sum(counted) - (geometry == "unaligned") == frames
    same(store, expected)

    (store / key).unlink()
    (store / "zarr.json").unlink()
    name = re.escape(repr(str(stim["image"].values[image])))
    with pytest.raises(StoreError, match=rf"misses 1 of \d units \(the first: image {name}"):
        Ledger(Location(store)).finish()
    assert not (store / "zarr.json").exists()
    extract(store, geometry)
    same(store, expected)


def test_a_record_deleted_or_cut_short(extract, counted, tmp_path):
    store = tmp_path / "run.zarr"
    extract(store)
    expected = contents(store)
    for damage in (Path.unlink, lambda p: os.truncate(p, 20)):
        damage(store / "_vitxr" / "record" / "c.7.0.0")
        assert {p[:2] for p in problems(store)} == {("not recorded", 7)}
        counted.clear()
        extract(store)
        assert sum(counted) == 5
        same(store, expected)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_coordinates_and_metadata_are_mended(extract, counted, tmp_path, geometry, finished):
    store = tmp_path / "run.zarr"
    extract(store, geometry)
    expected = contents(store)
    ranking = geometry == "unaligned"
    layout = read_plan(Location(store))["layout"]
    assert {"offset_y/c/0", "sha256/c/0", "label/zarr.json", "activation/zarr.json"} <= set(layout)
    for number, key in enumerate(layout):
        # One after the other, each in another way.
        (lambda f: flip(f, -1), Path.unlink, lambda f: os.truncate(f, 3))[number % 3](store / key)
        if not finished:
            (store / "zarr.json").unlink(missing_ok=True)
        if finished and key != "_vitxr/record/zarr.json":
            with pytest.raises(StoreError, match=rf"{key}: (altered|missing)\. The same extract"):
                vitxr.open(store)
        counted.clear()
        extract(store, geometry)
        assert sum(counted) == ranking  # the ranking's frame, and no other
        same(store, expected)


def test_metadata_that_another_version_wrote_are_left_alone(extract, tmp_path, monkeypatch):
    from vitxr.store import layout

    store = tmp_path / "run.zarr"
    extract(store)
    flip(store / "label" / "c" / "0", -1)
    damaged = contents(store)
    true = layout._objects
    monkeypatch.setattr(layout, "_objects", lambda *a: true(*a) | {"label/c/0": b"in another way"})
    with pytest.raises(StoreError, match=r"\(label/c/0\), and this version of zarr .* a copy"):
        extract(store)
    same(store, damaged)


def test_attributes_of_the_root_are_mended(extract, counted, tmp_path):
    store = tmp_path / "run.zarr"
    extract(store)
    expected = contents(store)
    zarr.open_group(store, mode="r+").attrs.put({"mine": 1})
    with pytest.raises(StoreError, match=r'(?s)all units .*\n  model: .* -> "absent"\n.* anew'):
        vitxr.open(store)
    counted.clear()
    extract(store)
    assert counted == []
    same(store, expected)


# Not whole


@pytest.fixture
def unfinished(extract, tmp_path):
    """Killed after five units of nine, and one shard of the sixth."""
    store = tmp_path / "run.zarr"
    full = extract(store).compute()
    for name in ["zarr.json", *(f"_vitxr/record/c.{i}.0.0" for i in range(5, 9))]:
        (store / name).unlink()
    for name in ("activation/c.1.2.0.1.0.0.0", "logits/c.1.2.0.0"):
        (store / name).unlink()
    shutil.rmtree(store / "logits" / "c.2.0.0.0", ignore_errors=True)
    for file in [*store.glob("activation/c.2.*"), *store.glob("logits/c.2.*")]:
        file.unlink()
    return store, full


def test_an_unfinished_store_does_not_open_as_whole(unfinished):
    store, _ = unfinished
    with pytest.raises(StoreError, match=r"not finished: 5 of 9 units are written\. Run extract"):
        vitxr.open(store)
    for consolidated in (None, False):
        with pytest.raises(FileNotFoundError):
            xr.open_zarr(store, consolidated=consolidated)
    with pytest.raises(FileNotFoundError):
        xr.open_datatree(store, engine="zarr", consolidated=False)
    for opened in (zarr.open_group, zarr.open):
        with pytest.raises(FileNotFoundError):
            opened(store, mode="r")
    assert not (store / "zarr.json").exists()


def test_a_root_that_somebody_else_wrote_makes_nothing_whole(unfinished, extract, counted):
    # zarr.open_group's default mode makes a group of a folder that is none.
    store, full = unfinished
    zarr.open_group(store)
    assert (store / "zarr.json").exists()
    with pytest.raises(StoreError, match="not finished: 5 of 9 units"):
        vitxr.open(store)
    counted.clear()
    xr.testing.assert_identical(extract(store).compute(), full)
    assert sum(counted) == 20


def test_partial_masks_what_is_missing_and_says_so(unfinished, extract):
    store, full = unfinished
    assert (store / "activation" / "c.1.2.0.0.0.0.0").exists()  # and is not recorded
    ds = vitxr.open(store, partial=True)
    expected = np.array([[True] * 3, [True, True, False], [False] * 3])
    np.testing.assert_array_equal(ds["written"], expected)
    assert ds["written"].dims == ("image", "shift_y")
    mask = xr.DataArray(expected, dims=("image", "shift_y"))
    for name in ("activation", "logits"):
        assert ds[name].dtype == full[name].dtype
        assert ds[name].dims == full[name].dims
        xr.testing.assert_identical(ds[name].compute().drop_vars("written"), full[name].where(mask))
    assert ds.attrs == full.attrs
    # It stays unfinished, and what a shard has lost since it was recorded is masked as well.
    assert not (store / "zarr.json").exists()
    os.truncate(store / "logits" / "c.0.1.0.0", 3)
    assert not vitxr.open(store, partial=True)["written"].values[0, 1]
    extract(store)
    ds = vitxr.open(store, partial=True)
    assert ds["written"].all()
    xr.testing.assert_identical(ds.drop_vars("written").compute(), full)


@pytest.mark.parametrize("storage_dtype", ["float32", "float16", "bitround7"])
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_data_of_one_value_count_as_written(stim, tmp_path, counted, value, storage_dtype):
    model = vitxr.load_model(make_vit())
    model.blocks[0].register_forward_hook(lambda _m, _a, out: torch.full_like(out, value))
    options = {**arguments("aligned"), "layers": [0], "variables": ["activation"]}
    options |= {"store": tmp_path / "run.zarr", "storage_dtype": storage_dtype}
    if np.isnan(value):
        with pytest.warns(RuntimeWarning, match="not finite, first at image .* layer 0"):
            ds = vitxr.extract(stim, model, **options)
    else:
        ds = vitxr.extract(stim, model, **options)
    np.testing.assert_array_equal(ds["activation"], np.full(ds["activation"].shape, value))
    assert all(f.stat().st_size for f in (tmp_path / "run.zarr" / "activation").glob("c.*"))
    assert problems(tmp_path / "run.zarr") == []
    (tmp_path / "run.zarr" / "zarr.json").unlink()
    counted.clear()
    vitxr.extract(stim, model, **options)
    assert counted == []


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"batch_size": 5}, "batch_size: 4 -> 5"),
        ({"variables": ["activation"]}, r'variables: \["activation", "logits"\] -> '),
        ({"shifts": vitxr.ShiftGrid(11, "raster")}, 'shift_scheme: "grid" -> "raster"'),
        ({"shifts": None}, "shift_step: "),
        ({"storage_dtype": "bitround9"}, 'storage_dtype: "float32" -> "bitround9"'),
        ({"images": [1, 0, 2]}, r"image_names.*\n  images[:[]"),
        ({"images": [0, 1]}, r"image_names.*\n  images[:[]"),
        ({"geometry": "unaligned"}, "channels: null -> "),
    ],
)
def test_another_run_is_refused_with_the_difference(
    extract, stim, tmp_path, counted, change, line, finished
):
    store = tmp_path / "run.zarr"
    extract(store)
    if not finished:
        (store / "zarr.json").unlink()
    expected = contents(store)
    change = dict(change)
    if "images" in change:
        change["stim"] = stim.isel(image=change.pop("images"))
    counted.clear()
    with pytest.raises(StoreError, match=f"(?s)nothing was written.*{line}"):
        extract(store, **change)
    assert sum(counted) <= 1  # the ranking's, of one frame
    same(store, expected)


# Two runs


def test_two_runs_on_one_store(forks, whole, tmp_path, extract):
    store = tmp_path / "run.zarr"
    first = forks.run(store, at="open /_vitxr/record/c.3.0.0", signal=signal.SIGSTOP)
    assert first["how"] == "stopped"
    before = contents(store)
    with pytest.raises(StoreError, match=r"another run is writing the store .*Wait for it"):
        extract(store)
    assert "another run is writing" in forks.run(store)["error"]
    same(store, before)
    # Looking is allowed.
    assert vitxr.open(store, partial=True)["written"].sum() == 3
    forks.kill(first["pid"])
    assert forks.run(store)["frames"] == 30
    same(store, whole["aligned"][0])


def test_two_runs_of_one_process(extract, tmp_path):
    store = tmp_path / "run.zarr"
    with (
        Location(store).alone(),
        pytest.raises(StoreError, match="another run is writing the store"),
    ):
        extract(store)
    extract(store)


def test_one_that_is_refused_leaves_the_folder_of_the_other(tmp_path):
    store = tmp_path / "run.zarr"
    with Location(store).alone():
        for _ in range(2):
            with pytest.raises(StoreError, match="another run"), Location(store).alone():
                pass
            assert store.is_dir()
    assert not store.exists()  # nothing was written


def test_a_folder_that_is_removed_while_it_is_taken_is_not_held(tmp_path, monkeypatch):
    # By the run before, which has written nothing: whoever holds what is gone holds nothing.
    fcntl = pytest.importorskip("fcntl", reason="not on Windows: it has no such locks")
    store, true = tmp_path / "run.zarr", fcntl.flock

    def flock(held, how):
        monkeypatch.setattr(fcntl, "flock", true)
        store.rmdir()
        true(held, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    alone = False
    with contextlib.suppress(StoreError), Location(store).alone():
        with pytest.raises(StoreError, match="another run"), Location(store).alone():
            pass
        alone = True
    assert alone or not store.exists()


def test_two_writers_of_one_object_that_share_a_process_number(tmp_path, monkeypatch):
    # As containers do, which count from one. The one that is overtaken must not fail.
    location, true = Location(tmp_path / "run.zarr"), Path.replace

    def overtaken(self, target):
        monkeypatch.setattr(Path, "replace", true)
        location.write({"a/b": b"data"})
        return true(self, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    location.write({"a/b": b"data"})
    assert contents(tmp_path / "run.zarr") == {"a/b": b"data"}


# Full, broken, slow


def failing(monkeypatch, where, number):
    """Let writing the files of that name fail in the middle, with half of them written."""
    true = Path.write_bytes

    def write_bytes(self, data):
        if re.search(where, str(self)):
            true(self, bytes(data)[: len(bytes(data)) // 2])
            raise OSError(number, os.strerror(number), str(self))
        return true(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("where", [r"activation/c\.1\.1\.0\.1", r"record/c\.4"])
def test_a_disk_that_fails_in_the_middle(extract, stim, counted, tmp_path, where, number):
    store = tmp_path / "run.zarr"
    extract(tmp_path / "whole.zarr")
    name = re.escape(repr(str(stim["image"].values[1])))
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, where, number)
        with pytest.raises(
            StoreError,
            match=rf"writing image {name}, shift_y 1 to 1 to .*run\.zarr' failed: .*"
            rf"{os.strerror(number)}.*recorded as done is safe.*run extract again",
        ):
            extract(store)
    assert not list(store.rglob("*part"))
    done = len(records(store))
    assert done in (4, 5)  # the next may have been written when it was noticed
    with pytest.raises(StoreError, match=f"not finished: {done} of 9 units"):
        vitxr.open(store)
    counted.clear()
    extract(store)
    assert sum(counted) == 5 * (9 - done)
    same(store, contents(tmp_path / "whole.zarr"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_the_start_or_the_end(extract, counted, tmp_path, number):
    store = tmp_path / "run.zarr"
    for where in (r"_vitxr/zarr\.json", r"label/zarr\.json", r"record/zarr\.json"):
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, where, number)
            with pytest.raises(StoreError, match=rf"run\.zarr.*{os.strerror(number)}"):
                extract(store)
        assert list(tmp_path.iterdir()) == []
    assert counted == []
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, r"run\.zarr/zarr\.json", number)
        with pytest.raises(StoreError, match=rf"run\.zarr.*{os.strerror(number)}"):
            extract(store)
    assert not list(store.rglob("*part"))
    with pytest.raises(StoreError, match="not finished: 9 of 9 units"):
        vitxr.open(store)
    counted.clear()
    extract(store)
    assert counted == []
    vitxr.open(store)


def test_no_room_is_refused_beforehand(extract, counted, tmp_path, monkeypatch):
    store = tmp_path / "run.zarr"
    # Of each frame 2 layers x 48 maps x 24 patches, and 5 classes, in float32.
    needed = 45 * (2 * 48 * 24 + 5) * 4

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, count))

    free(needed)
    with pytest.raises(StoreError, match=r"kB free, and the run would write 45 forward passes"):
        extract(store)
    assert counted == []
    assert not list(tmp_path.iterdir())
    free(2 * needed)
    extract(store)
    (store / "activation" / "c.0.0.0.0.0.0.0").unlink()
    free(needed // 9)
    with pytest.raises(StoreError, match=r"kB free, and the run would write 5 forward passes"):
        extract(store)
    free(needed // 4)  # enough for what is left, not for all
    extract(store)
    # What compresses may turn out small.
    free(needed // 4)
    extract(tmp_path / "rounded.zarr", storage_dtype="bitround7")


@pytest.fixture
def computed(monkeypatch):
    """Counts the units that were computed."""
    from vitxr.extract import pipeline

    units, true = [], pipeline.compute

    def compute(*args):
        out = true(*args)
        units.append(time.monotonic())
        return out

    monkeypatch.setattr(pipeline, "compute", compute)
    return units


def test_a_slow_store_bounds_what_is_computed(extract, computed, tmp_path, monkeypatch):
    bound = 2  # one that is being written, one that waits
    true, written, ahead, arrays = Ledger.write, [], [], []
    extract(tmp_path / "whole.zarr")
    computed.clear()

    def write(self, unit, shaped, *rest):
        if not written:
            # The others would be computed in no time, were it not for the bound.
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline and len(computed) <= bound:
                time.sleep(0.01)
        ahead.append(len(computed) - len(written))
        arrays.append(shaped["activation"].__array_interface__["data"][0])
        true(self, unit, shaped, *rest)
        written.append(unit)

    monkeypatch.setattr(Ledger, "write", write)
    guarded(extract, tmp_path / "run.zarr")
    assert written == list(range(9))
    assert max(ahead) <= bound
    # The same memory all over again, and never while it is being written.
    assert len(set(arrays)) <= bound
    same(tmp_path / "run.zarr", contents(tmp_path / "whole.zarr"))


@pytest.mark.parametrize("error", [OSError(5, "a broken cable"), RuntimeError("a client's own")])
def test_a_writer_that_fails_stops_the_forward_passes(extract, computed, tmp_path, error):
    store, true = tmp_path / "run.zarr", Ledger.write

    def write(self, unit, shaped, *rest):
        if unit == 2:
            raise error
        true(self, unit, shaped, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "write", write)
        with pytest.raises(StoreError, match=f"shift_y 2 to 2 to .* failed: .*{error.args[-1]}"):
            guarded(extract, store)
    assert 3 <= len(computed) <= 5
    names = [t.name for t in threading.enumerate()]
    assert not [n for n in names if n.startswith(("vitxr-decode", "vitxr-write"))]
    done = len(records(store))
    computed.clear()
    extract(store)
    assert len(computed) == 9 - done


def test_an_image_that_is_gone_stops_the_run(model, tmp_path, counted):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    stim = vitxr.open_images(tmp_path / "photos", progress=False)
    options = {"store": tmp_path / "run.zarr", **arguments("aligned"), "batch_size": 15}
    (tmp_path / "photos" / "4.png").rename(tmp_path / "away.png")
    with pytest.raises(ImageError, match=r"4\.png"):
        guarded(vitxr.extract, stim, model, **options)
    assert sum(counted) <= 60
    (tmp_path / "away.png").rename(tmp_path / "photos" / "4.png")
    counted.clear()
    done = len(records(tmp_path / "run.zarr"))
    assert done >= 2
    vitxr.extract(stim, model, **options)
    assert sum(counted) == 15 * (6 - done)
