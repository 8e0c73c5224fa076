"""Processes: workers that die, runs that are stopped, children of a process that has run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

torch = pytest.importorskip("torch")

from executors import OVERFLOW, check, eight, extract, reported, saved  # noqa: E402
from forked import PATIENCE, records, until  # noqa: E402

import vitxr  # noqa: E402
from vitxr.cli import main  # noqa: E402
from vitxr.errors import ModelError, StoreError  # noqa: E402


@pytest.fixture(scope="module")
def many():
    return eight()


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(many, named):
    return extract(many, named).compute()


def test_processes_go_on_and_report_what_is_not_finite(many, tmp_path):
    store, overflowing = tmp_path / "run.zarr", saved(tmp_path / "model", overflowing=True)
    options = {"storage_dtype": "float16", "store": store}
    with pytest.warns(RuntimeWarning, match=OVERFLOW) as caught:
        extract(many, overflowing, **options)
    assert reported(caught) == list(many["image"].values)
    before = vitxr.open(store).compute()
    (store / "zarr.json").unlink()
    for unit in (2, 5, 7):
        (store / "_vitxr" / "record" / f"c.{unit}.0.0").unlink()
    with pytest.warns(RuntimeWarning, match=OVERFLOW) as caught:
        extract(many, overflowing, **options, workers=["cpu"])
    assert reported(caught) == list(many["image"].values[[2, 5, 7]])
    xr.testing.assert_allclose(vitxr.open(store).compute(), before, rtol=1e-3)


#: Runs an extraction by two processes, whose passes take their time.
SLOWLY = """
import os, sys, time
import vitxr
from vitxr.extract import units

true = units.capture

def capture(*args):
    time.sleep(float(os.environ["PAUSE"]))
    return true(*args)

units.capture = capture

def main(folder, store):
    import numpy as np

    pixels = np.random.default_rng(1).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)
    vitxr.extract(
        vitxr.open_images(pixels), vitxr.load_model(folder), layers=[0, 1], store=store,
        variables=["activation", "logits"], shifts=vitxr.ShiftGrid(11), preprocess="raw",
        batch_size=15, workers=2, progress=False,
    )

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def slowly(named, tmp_path):
    """Starts such a run; kills what is left of it at the end."""
    script, store = tmp_path / "script.py", tmp_path / "run.zarr"
    script.write_text(SLOWLY)
    process = subprocess.Popen(
        [sys.executable, script, named.name, store],
        env=os.environ | {"PAUSE": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    yield process, store
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def workers(process):
    """Process numbers of a run's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == process.pid and b"spawn_main" in command and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux: it reads /proc")


@linux
def test_a_worker_process_that_is_killed(slowly, many, named, expected):
    process, store = slowly
    until(lambda: len(records(store)) >= 2 or process.poll() is not None)
    victim, other = workers(process)
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "StoreError: the worker process vitxr-" in err
    assert "died (exit status -9)" in err
    assert "recorded as done is safe: run extract again" in err
    assert not alive(other)
    done = len(records(store))
    assert 2 <= done < 8
    assert f"{done} of 8 units" in vitxr.store.files.unfinished(store)
    extract(many, named, store=store)
    check(store, expected)


@linux
def test_no_worker_outlives_a_run_that_is_killed(slowly, many, named, expected):
    process, store = slowly
    until(lambda: len(records(store)) >= 2 or process.poll() is not None)
    children = workers(process)
    assert len(children) == 2
    process.kill()
    process.communicate(timeout=PATIENCE)
    until(lambda: not any(map(alive, children)))
    assert len(records(store)) < 8
    extract(many, named, store=store)
    check(store, expected)


def test_a_worker_s_error_ends_the_run(many, named, tmp_path):
    # The weights in memory are not those in the folder any more.
    model = vitxr.load_model(named.name)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight += 1
    store = tmp_path / "run.zarr"
    with pytest.raises(ModelError, match="loaded by a worker has other weights"):
        extract(many, model, store=store, workers=["cpu"])
    assert records(store) == []


def test_a_worker_s_disk_that_fails(many, model, expected, tmp_path):
    # And a model that each worker is sent whole.
    store = tmp_path / "run.zarr"
    expected = expected.assign_attrs(extract(many, model, store=store).attrs)
    (store / "zarr.json").unlink()
    for unit in (3, 6):
        (store / "_vitxr" / "record" / f"c.{unit}.0.0").unlink()
    # A folder where the shard is to be: an error of the disk that reaches other processes.
    shard = store / "activation" / "c.6.0.0.0.0.0.0"
    shard.unlink()
    (shard / "in the way").mkdir(parents=True)
    name = str(many["image"].values[6])
    with pytest.raises(StoreError, match=rf"writing image '{name}' to .*run extract again"):
        extract(many, model, store=store, workers=["cpu"])
    (shard / "in the way").rmdir()
    shard.rmdir()
    extract(many, model, store=store)
    check(store, expected)


# Forked, spawned, stopped


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


ENGINE = """
import multiprocessing, sys, threading
import numpy as np
import torch
import transformers
import vitxr
from vitxr.models.capture import exclusive

def run(path, precision="float32"):
    torch.manual_seed(0)
    # Large enough for torch to share it out among threads, the weights' casting included.
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=192, intermediate_size=768, num_hidden_layers=1,
        num_attention_heads=4,
    )
    vitxr.extract(
        vitxr.open_images(np.full((4, 32, 32, 3), 9, np.uint8)),
        vitxr.load_model(transformers.ViTForImageClassification(config)),
        layers=[0], shifts=vitxr.ShiftGrid(8), preprocess="raw", precision=precision, store=path,
        progress=False,
    )

def during_a_pass(start):
    held, go_on = threading.Event(), threading.Event()

    def work():
        with exclusive():
            held.set()
            go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    held.wait()
    start()
    go_on.set()
    thread.join()

if __name__ == "__main__":
    folder, *cases = sys.argv[1:]
    run(f"{folder}/parent.zarr")
    ended = {}
    for case in cases:
        context = multiprocessing.get_context(case.split("-")[0])
        precision = "bfloat16" if case.endswith("half") else "float32"
        child = context.Process(target=run, args=(f"{folder}/{case}.zarr", precision))
        during_a_pass(child.start) if case.endswith("busy") else child.start()
        child.join(40)
        ended[case] = "deadlock" if child.is_alive() else child.exitcode
        child.kill()
        child.join()
    run(f"{folder}/again.zarr")  # and the parent goes on as before
    print(ended)
"""


def test_no_deadlock_in_a_child_of_one_that_has_run(tmp_path):
    cases = ["fork", "fork-busy", "spawn"] if hasattr(os, "fork") else ["spawn"]
    script = tmp_path / "script.py"
    script.write_text(ENGINE)
    # Python 3.12 warns of any fork of a process with threads; torch's must be more than one.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path, *cases],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=2 * PATIENCE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(dict.fromkeys(cases, 0))
    first = vitxr.open(tmp_path / "parent.zarr")["activation"].compute()
    for case in (*cases, "again"):
        other = vitxr.open(tmp_path / f"{case}.zarr")["activation"].compute()
        xr.testing.assert_allclose(first, other, atol=0.1 if case == "fork-half" else 1e-5)


#: The command line, with a pause in each pass if there is a file named "slowly".
COMMAND = """
import sys, time
from pathlib import Path
from vitxr.cli import main
from vitxr.extract import units

true = units.capture

def capture(*args):
    if Path("slowly").exists():
        time.sleep(0.3)
    return true(*args)

units.capture = capture  # in its worker processes, too, which read this again

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.parametrize(
    ("sent", "status", "workers"), [(signal.SIGINT, 130, "cpu"), (signal.SIGTERM, 143, "1")]
)
@pytest.mark.skipif(sys.platform == "win32", reason="not on Windows: it has no such signals")
def test_a_signal_stops_the_command(tmp_path, monkeypatch, capsys, counted, sent, status, workers):
    arguments = ["extract", "digits", "run.zarr", "--model", "digits", "--per-class", "3"]
    arguments += ["--layers", "0", "--step", "16", "--batch-size", "4", "--quiet"]
    store = tmp_path / "run.zarr"
    (tmp_path / "slowly").touch()
    (tmp_path / "command.py").write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, "command.py", *arguments, "--workers", workers], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while len(records(store)) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
        start = time.monotonic()
        # A terminal sends it to all processes, a batch system to the first.
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        out, err = process.communicate(timeout=PATIENCE)  # all have closed their ends
        assert time.monotonic() - start < 20
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    done = len(records(store))
    assert process.returncode == status, err
    assert 2 <= done < 30
    assert f"{done} of 30 units are written. The same command goes on from there." in err
    assert "Traceback" not in err
    assert out == ""
    ds = vitxr.open(store, partial=True)
    assert ds["written"].sum() == done * ds.sizes["shift_y"]
    (tmp_path / "slowly").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert "The store is run.zarr" in capsys.readouterr().out
    assert sum(counted) == 4 * (30 - done)
    direct = vitxr.extract(
        vitxr.datasets.digits(per_class=3), vitxr.load_model("digits"), layers=[0],
        shifts=vitxr.ShiftGrid(16), batch_size=4,
    )  # fmt: skip
    xr.testing.assert_allclose(vitxr.open(store).compute(), direct.compute(), atol=1e-5)
