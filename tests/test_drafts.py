"""What vitxr.save leaves when it is killed: a folder with a name that says so, and not for long."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import vitxr
from vitxr.store import drafts

pytest.importorskip("fcntl")

SAVE = """
import sys, numpy as np, xarray as xr, vitxr
from vitxr.store import drafts
with drafts.replacing(__import__("pathlib").Path(sys.argv[1])) as draft:
    (draft.parent / "half").write_text("half")
    print(draft.parent, flush=True)
    sys.stdin.read()
"""


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def writer(tmp_path):
    """Another process that is saving to t.nc."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(tmp_path / "t.nc")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.draft = process.stdout.readline().strip()
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def tensor():
    return xr.DataArray(np.arange(6.0).reshape(2, 3), dims=("a", "b"), name="x")


def test_a_live_process_keeps_its_draft_and_a_dead_ones_is_deleted(tensor, tmp_path, writer):
    (draft,) = left(tmp_path)
    assert draft.startswith(".t.nc.unfinished-")
    vitxr.save(tensor, tmp_path / "t.nc")
    assert left(tmp_path) == [draft, "t.nc"]
    (tmp_path / "t.nc").unlink()
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    vitxr.save(tensor, tmp_path / "other.nc")  # another place: not its business
    assert left(tmp_path) == [draft, "other.nc"]
    vitxr.save(tensor, tmp_path / "t.nc")
    assert left(tmp_path) == ["other.nc", "t.nc"]
    xr.testing.assert_identical(vitxr.open(tmp_path / "t.nc").load(), tensor)


def test_names_with_characters_of_a_pattern(tensor, tmp_path):
    for name in (".t1.nc.unfinished-1", ".t[1].nc.unfinished-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    vitxr.save(tensor, tmp_path / "t[1].nc")
    assert left(tmp_path) == [".t1.nc.unfinished-1", "t[1].nc"]


def test_where_there_are_no_locks_nothing_is_deleted(tensor, tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError("no locks")

    (tmp_path / ".t.zarr.unfinished-1").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    vitxr.save(tensor, tmp_path / "t.zarr")
    assert left(tmp_path) == [".t.zarr.unfinished-1", "t.zarr"]


def test_a_draft_swept_before_it_is_locked_is_made_again(tensor, tmp_path, monkeypatch):
    real, seen = drafts._locked, []

    def swept(folder):
        seen.append(folder)
        if len(seen) == 1:
            folder.rmdir()
        if len(seen) == 2:
            raise BlockingIOError("held")
        return real(folder)

    monkeypatch.setattr(drafts, "_locked", swept)
    vitxr.save(tensor, tmp_path / "t.nc")
    assert len(seen) == 3
    xr.testing.assert_identical(vitxr.open(tmp_path / "t.nc").load(), tensor)
    seen[1].rmdir()  # held by the other
    assert left(tmp_path) == ["t.nc"]
