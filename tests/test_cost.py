"""What an extraction will cost is what it then costs; what it would refuse is refused."""

import os

import pytest

pytest.importorskip("torch")

import vitxr
from vitxr.errors import ArgumentError, StoreError
from vitxr.extract.cost import Cost

GRID = vitxr.ShiftGrid(11)
OPTIONS = {"layers": [0, 2], "shifts": GRID, "preprocess": "raw", "batch_size": 4}


def files(store):
    return sum(len(names) for _, _, names in os.walk(store))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"variables": ["activation", "prefix", "attention", "embedding", "logits"]},
        {"feature_maps": 5},
        {"shifts": None, "batch_size": 2},
        {"storage_dtype": "bitround7"},
    ],
)
def test_files_and_frames_are_those_of_the_run(stim, model, tmp_path, more):
    options = {**OPTIONS, **more}
    store = tmp_path / "run.zarr"
    cost = vitxr.estimate(stim, model, store=store, **options)
    assert not list(tmp_path.iterdir())
    vitxr.extract(stim, model, store=store, progress=False, **options)
    assert cost.files == files(store)
    assert cost.frames == (3 if options["shifts"] is None else 45)
    assert cost.written == 0
    assert cost.free > 0
    # All is there: nothing is left to do.
    again = vitxr.estimate(stim, model, store=store, **options)
    assert (again.frames, again.batches, again.bytes, again.files) == (0, 0, 0, 0)
    assert (again.seconds, again.written) == (0, cost.frames)
    # What the root lacks is one file.
    (store / "zarr.json").unlink()
    assert vitxr.estimate(stim, model, store=store, **options).files == 1


def test_what_is_written_is_not_counted(stim, model, tmp_path, monkeypatch):
    from vitxr.extract import plan

    monkeypatch.setattr(plan, "_SHARD_BYTES", 1)
    store = tmp_path / "run.zarr"
    vitxr.extract(stim, model, store=store, progress=False, **OPTIONS)
    whole = vitxr.estimate(stim, model, store=tmp_path / "other.zarr", **OPTIONS)
    (store / "_vitxr" / "record" / "c.4.0.0").unlink()
    os.truncate(store / "activation" / "c.2.1.0.1.0.0.0", 9)
    before = files(store)
    cost = vitxr.estimate(stim, model, store=store, **OPTIONS)
    assert (cost.frames, cost.batches, cost.written) == (10, 4, 35)
    assert cost.bytes * 9 == whole.bytes * 2
    assert cost.files == 2 * 3 + 1
    assert str(cost).endswith("; 35 are written already")
    assert files(store) == before  # looking changes nothing


def test_a_run_that_would_be_refused_is_refused(stim, model, tmp_path, monkeypatch):
    store = tmp_path / "run.zarr"
    vitxr.extract(stim, model, store=store, progress=False, **OPTIONS)
    before = files(tmp_path)
    with pytest.raises(StoreError, match=r"other settings.*\n  batch_size: 4 -> 5\n"):
        vitxr.estimate(stim, model, store=store, **{**OPTIONS, "batch_size": 5})
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("in the way")
    for run in (vitxr.estimate, vitxr.extract):
        for path, error, message in (
            (tmp_path / "mine.zarr", StoreError, "is not a store of vitxr.extract: nothing was"),
            (tmp_path / "file" / "run.zarr", StoreError, r"cannot be written: '.*file' is a file"),
            (tmp_path, ArgumentError, r"ending in \.zarr"),
        ):
            with pytest.raises(error, match=message):
                run(stim, model, store=path, **OPTIONS)
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, how: False)
            for path in (tmp_path / "new.zarr", tmp_path / "new" / "run.zarr"):
                with pytest.raises(StoreError, match=r"no permission to write to '.*'\. Choose"):
                    run(stim, model, store=path, **OPTIONS)
            run(stim, model, store=store, **OPTIONS)  # there is nothing to write
    (store / "activation" / "c.0.0.0.0.0.0.0").unlink()
    for run in (vitxr.estimate, vitxr.extract):
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, how: False)
            with pytest.raises(StoreError, match="no permission"):
                run(stim, model, store=store, **OPTIONS)
    assert files(tmp_path) == before - 1 + 2


def test_a_cost_is_a_sentence():
    assert str(Cost(1, 1, 1, 1, None)) == "1 forward pass in 1 batch, 1 B in 1 file"
    cost = Cost(2000, 500, 3_210_000, 40, 10**9, 100.0, compressed=True, written=1000)
    assert str(cost) == (
        "2,000 forward passes in 500 batches, 3.21 MB before compression in 40 files "
        "(1 GB free), about 2 min; 1,000 are written already"
    )
