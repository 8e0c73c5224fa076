"""Files that are written past the page cache: whole or not there, whatever the system does."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import vitxr
from vitxr.errors import ArgumentError, StoreError
from vitxr.store import local
from vitxr.store.local import aligned
from vitxr.store.location import Location

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux only")

MIB = 1 << 20


def filled(size):
    data = aligned(size)
    data[:] = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    return data


@pytest.fixture
def direct(monkeypatch):
    """Calls that wrote to a file opened for direct writing: place and size."""
    calls, true = [], os.pwrite

    def pwrite(file, data, at):
        import fcntl

        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            calls.append((at, len(data)))
        return true(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


@given(size=st.sampled_from([MIB, 3 * MIB]), more=st.sampled_from([0, 1, 511, 512, 4095, 4096]))
def test_any_size(tmp_path_factory, size, more):
    folder = tmp_path_factory.mktemp("any")
    data = filled(size + more)
    Location(folder).write({"a/b": data})
    assert (folder / "a" / "b").read_bytes() == data.tobytes()


@given(offset=st.integers(1, 4095))
def test_memory_that_is_not_aligned(tmp_path_factory, offset):
    folder = tmp_path_factory.mktemp("offset")
    data = filled(MIB + 4096)[offset:]
    Location(folder).write({"a": data})
    assert (folder / "a").read_bytes() == data.tobytes()


def test_large_shards_are_written_directly_and_small_ones_are_not(tmp_path, direct):
    Location(tmp_path).write({"small": filled(MIB - 1)})
    assert not direct
    Location(tmp_path).write({"large": filled(MIB + 5)})
    assert direct == [(0, MIB)]  # the last five bytes went through the cache


@pytest.mark.parametrize("given", [4096, 4097, 12345])
def test_a_write_that_is_cut_short_goes_on(tmp_path, monkeypatch, given):
    true = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: _short(true, f, data, at, given))
    data = filled(MIB + 77)
    Location(tmp_path).write({"a": data})
    assert (tmp_path / "a").read_bytes() == data.tobytes()


def _short(true, file, data, at, given):
    """Take less than was given, and from a file open for direct writing whole pages only."""
    import fcntl

    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
        assert at % 4096 == 0
        # The system may stop anywhere: the rest of the page is written as well, and again.
        true(file, data[: max(given // 4096 + 1, 1) * 4096], at)
        return given
    return true(file, data[:given], at)


@pytest.mark.parametrize("where", ["open", "pwrite"])
def test_a_file_system_without_direct_writing(tmp_path, monkeypatch, where):
    true = getattr(os, where)

    def refuse(target, *args, **kwargs):
        if where == "pwrite" or args[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return true(target, *args, **kwargs)

    monkeypatch.setattr(os, where, refuse)
    data = filled(MIB)
    Location(tmp_path).write({"a": data})
    assert (tmp_path / "a").read_bytes() == data.tobytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails(tmp_path, monkeypatch, number):
    def fail(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StoreError, match=f"a cannot be written: .*{os.strerror(number)}"):
        Location(tmp_path).write({"a": filled(MIB)})
    assert not list(tmp_path.iterdir())


def test_every_shard_of_an_extraction_is_written_directly(
    stim, model, tmp_path, monkeypatch, direct
):
    monkeypatch.setattr(local, "_DIRECT", 4096)
    given = {"layers": [0, 2], "preprocess": "raw", "progress": False}
    ds = vitxr.extract(stim, model, store=tmp_path / "run.zarr", **given)
    shards = list((tmp_path / "run.zarr" / "activation").glob("c.*"))
    assert len(shards) == sum(at == 0 for at, _ in direct)
    lazy = vitxr.extract(stim, model, **given)
    xr.testing.assert_identical(ds.activation.compute(), lazy.activation.compute())


def test_a_place_that_cannot_be_made():
    if not Path("/proc/self").is_dir():
        pytest.skip("not on a system without /proc")
    with (
        pytest.raises(StoreError, match=r"'/proc/x\.zarr' cannot be made.*Choose another path"),
        Location("/proc/x.zarr").alone(),
    ):
        pass


@pytest.mark.parametrize("path", [3, None, b"run.zarr"])
def test_a_path_that_is_none(path):
    with pytest.raises(ArgumentError, match=r"the path is .* \((int|NoneType|bytes)\); expected"):
        vitxr.open(path)
