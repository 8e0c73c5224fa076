"""Executors: threads, a Dask cluster; workers that die, tasks that come twice."""

import os
import pickle
import signal
import threading
import time

import dask
import pytest
import xarray as xr

torch = pytest.importorskip("torch")
distributed = pytest.importorskip("distributed")

from executors import OVERFLOW, check, eight, extract, reported, saved  # noqa: E402
from forked import PATIENCE, records, until  # noqa: E402

import vitxr  # noqa: E402
from vitxr.errors import ArgumentError, StoreError  # noqa: E402
from vitxr.extract import cluster as clusters  # noqa: E402
from vitxr.extract import plan as plans  # noqa: E402
from vitxr.store.ledger import Ledger  # noqa: E402
from vitxr.store.location import Location  # noqa: E402

# Closing a cluster leaves sockets to the garbage collector now and then.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def many():
    return eight()


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(many, named):
    return extract(many, named).compute()


# Threads


def test_one_store_from_several_threads_is_one_run(many, named, expected, tmp_path):
    store, out = tmp_path / "run.zarr", []
    start = threading.Barrier(3)

    def work():
        start.wait()
        try:
            extract(many, named, store=store)
            out.append("done")
        except StoreError as error:
            out.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    others = [o for o in out if o != "done"]
    assert "done" in out
    assert [o for o in others if "another run is writing" not in o] == []
    check(store, expected)


def test_runs_of_several_threads_on_one_model(many, named, expected, tmp_path):
    # Hooks hang on the module they share.
    threads = [
        threading.Thread(
            target=extract, args=(many, named), kwargs={"store": tmp_path / f"{i}.zarr"}
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for i in range(3):
        xr.testing.assert_identical(vitxr.open(tmp_path / f"{i}.zarr").compute(), expected)


# A cluster


@pytest.fixture(scope="module")
def client():
    """Two worker processes, of two threads each."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        yield client


class Trouble(distributed.WorkerPlugin):
    """Makes a worker process slow, or kills it at some units; those that replace it as well."""

    name = "trouble"

    def __init__(self, pause=0.0, deadly=()):
        self.pause, self.deadly = pause, deadly

    def setup(self, worker):
        from vitxr.extract import cluster

        if not hasattr(cluster, "_true"):
            cluster._true = cluster.compute

        def compute(task):
            if str(task.stim["image"].values[0]) in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.pause)
            return cluster._true(task)

        cluster.compute = compute

    def teardown(self, worker):
        from vitxr.extract import cluster

        cluster.compute = cluster._true


@pytest.fixture
def trouble(client):
    def start(**options):
        client.register_plugin(Trouble(**options))

    yield start
    client.unregister_worker_plugin("trouble")
    client.wait_for_workers(2, timeout=PATIENCE)


def test_worker_processes_write_the_same(many, named, expected, tmp_path, client):
    store = tmp_path / "run.zarr"
    extract(many, named, store=store, client=client)
    check(store, expected)


def test_a_relative_path_is_the_same_to_workers(
    many, named, expected, tmp_path, client, monkeypatch
):
    # They are in another folder, where nothing is, which zarr reads as NaN.
    monkeypatch.chdir(tmp_path)
    extract(many, named, store="run.zarr", client=client)
    check("run.zarr", expected)


def test_a_pass_has_all_threads_of_its_worker(many, named, tmp_path, client):
    extract(many.isel(image=slice(4)), named, store=tmp_path / "run.zarr", client=client)

    def threads():
        import torch

        return torch.get_num_threads()

    # Tasks run one pass at a time, with the worker's two threads.
    assert set(client.run(threads).values()) <= {2, torch.get_num_threads()}
    assert 2 in client.run(threads).values()


def test_a_cluster_s_worker_that_is_killed(many, named, expected, tmp_path, client, trouble):
    store, out = tmp_path / "run.zarr", []
    trouble(pause=0.5)
    before = client.run(os.getpid)
    thread = threading.Thread(
        target=lambda: out.append(extract(many, named, store=store, client=client)), daemon=True
    )
    thread.start()
    until(lambda: len(records(store)) >= 2 or not thread.is_alive())
    assert len(records(store)) < 8
    os.kill(next(iter(before.values())), signal.SIGKILL)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(out) == 1
    check(store, expected)


def test_a_unit_that_kills_its_workers(many, named, expected, tmp_path, client, trouble):
    store, deadly = tmp_path / "run.zarr", str(many["image"].values[2])
    trouble(deadly=[deadly])
    # Or another, which the same workers had at the same time.
    with pytest.raises(
        StoreError, match=r"the unit image 'image_000.' was given up after several workers died"
    ):
        extract(many, named, store=store, client=client)
    assert 2 not in records(store)
    assert not (store / "zarr.json").exists()
    extract(many, named, store=store)
    check(store, expected)


def test_a_task_that_comes_twice_is_done_once(many, named, expected, tmp_path, monkeypatch):
    store = tmp_path / "run.zarr"
    extract(many, named, store=store)
    # As the scheduler does when it has lost sight of a worker that goes on.
    plan = plans.make_plan(
        many, named, layers=[0, 1], shifts=vitxr.ShiftGrid(11), feature_maps=None,
        variables=["activation", "logits"], preprocess="raw", precision="float32",
        storage_dtype="float32", batch_size=15,
    )  # fmt: skip
    (store / "_vitxr" / "record" / "c.3.0.0").unlink()
    location, true, ran = Location(store), clusters.compute, []

    def compute(task):
        ran.append(task)
        return true(task)

    monkeypatch.setattr(clusters, "compute", compute)
    monkeypatch.setattr(clusters, "_use_threads", lambda: None)
    task = pickle.loads(pickle.dumps(plan.task(3)))
    assert clusters._unit(task, 3, location) == []
    assert len(ran) == 1
    assert clusters._unit(task, 3, location) == []
    assert len(ran) == 1
    check(store, expected)
    # Both at the same time: the same bytes twice, no shard in pieces.
    (store / "_vitxr" / "record" / "c.3.0.0").unlink()
    arrays = true(task)[0]
    threads = [threading.Thread(target=Ledger(location).write, args=(3, arrays)) for _ in range(8)]
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failures == []
    check(store, expected)


@pytest.mark.parametrize("finished", [True, False])
def test_a_cluster_repairs_recorded_units(many, named, expected, tmp_path, client, finished):
    store = tmp_path / "run.zarr"
    extract(many, named, store=store)
    (store / "activation" / "c.3.0.0.1.0.0.0").unlink()
    os.truncate(store / "logits" / "c.5.0.0.0", 10)
    if not finished:
        (store / "zarr.json").unlink()
    extract(many, named, store=store, client=client)
    check(store, expected)


def test_a_cluster_reports_what_is_not_finite(many, tmp_path, client):
    overflowing = saved(tmp_path / "model", overflowing=True)
    with pytest.warns(RuntimeWarning, match=OVERFLOW) as caught:
        extract(
            many, overflowing, store=tmp_path / "run.zarr", client=client, storage_dtype="float16"
        )
    assert reported(caught) == list(many["image"].values)


def test_a_cluster_s_disk_that_fails(many, named, expected, tmp_path, client):
    store = tmp_path / "run.zarr"
    extract(many, named, store=store)
    (store / "zarr.json").unlink()
    (store / "_vitxr" / "record" / "c.6.0.0").unlink()
    shard = store / "activation" / "c.6.0.0.0.0.0.0"
    shard.unlink()
    (shard / "in the way").mkdir(parents=True)
    name = str(many["image"].values[6])
    with pytest.raises(StoreError, match=rf"write image '{name}': .*run extract again"):
        extract(many, named, store=store, client=client)
    (shard / "in the way").rmdir()
    shard.rmdir()
    extract(many, named, store=store, client=client)
    check(store, expected)


def test_a_store_that_the_workers_do_not_see(many, named, tmp_path, client, monkeypatch):
    with pytest.raises(ArgumentError, match="memory"):
        extract(many, named, store="memory://shared/run.zarr", client=client)
    monkeypatch.setattr(clusters, "_seen", lambda _: None)
    with pytest.raises(ArgumentError, match=r"do not see the store .*that all of them share"):
        extract(many, named, store=tmp_path / "run.zarr", client=client)
