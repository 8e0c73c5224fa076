"""Rows that stay on the workers of a cluster: the same fits as in one process."""

import os
import signal
import time

import dask.array as da
import numpy as np
import pytest
from test_factor import neuron_tensor
from test_fused import fit
from test_hals import planted

from vitxr.errors import ArgumentError, DataError
from vitxr.factor import choose_rank, factorize, fit_ensemble, workers
from vitxr.factor.rules import Rules

distributed = pytest.importorskip("distributed")

# Closing a cluster leaves sockets to the garbage collector now and then.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def held(client, patience=10.0):
    """Actors left on each worker; they go when the scheduler hears that nobody refers to them."""
    until = time.monotonic() + patience
    while True:
        left = client.run(lambda dask_worker: len(dask_worker.state.actors))
        if not any(left.values()) or time.monotonic() > until:
            return left
        time.sleep(0.05)


@pytest.mark.parametrize("chunks", [(17, 9, 8), (80, 3, 8)])
def test_fits_are_those_of_one_process(client, chunks):
    _, x = planted((80, 9, 8), 4, noise=0.3)
    lazy = da.from_array(x, chunks=chunks)
    given = {"ranks": (3, 1, 4), "tol": 4e-3}
    found, _ = fit(lazy, client=client, **given)
    here, _ = fit(lazy, **given)
    assert len({len(f.history) for f in here}) > 1  # models leave at different times
    for a, b in zip(found, here, strict=True):
        assert a.converged == b.converged
        np.testing.assert_allclose(a.history, b.history, rtol=1e-9)
        for ours, theirs in zip(a.factors, b.factors, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    assert set(held(client).values()) == {0}  # nothing stays behind


def test_rules_and_ensembles(client):
    _, x = planted((60, 5, 6), 4, noise=0.3)
    lazy = da.from_array(x - 0.1, chunks=(13, 5, 6))
    for rules in (
        Rules((True, False, False), (False,) * 3, (0.01, 0, 0)),
        Rules((False,) * 3, (True, False, False), (0.0,) * 3),
    ):
        found, _ = fit(lazy, rules=rules, client=client, max_iter=5)
        here, _ = fit(lazy, rules=rules, max_iter=5)
        for a, b in zip(found, here, strict=True):
            np.testing.assert_allclose(a.history, b.history, rtol=1e-9)
            np.testing.assert_allclose(a.factors[0], b.factors[0], rtol=1e-6, atol=1e-9)
    t = neuron_tensor(noise=0.3)
    tree = fit_ensemble(t.chunk(neuron=3), [1, 2], 2, client=client, progress=False, max_iter=8)
    here = fit_ensemble(t, [1, 2], 2, progress=False, max_iter=8)
    np.testing.assert_allclose(tree.objective, here.objective, rtol=1e-5)
    again = fit_ensemble(t, [1, 2, 3], 2, progress=False, max_iter=8, resume=tree)
    np.testing.assert_array_equal(again.objective.sel(rank=[1, 2]), tree.objective)


def test_workers_share_chunks_by_their_threads():
    chunks = (10,) * 12
    assert workers._ranges(chunks, [1, 1]) == [slice(0, 60), slice(60, 120)]
    assert workers._ranges(chunks, [1, 3]) == [slice(0, 30), slice(30, 120)]
    assert workers._ranges((120,), [1, 1, 1]) == [slice(0, 0), slice(0, 120), slice(120, 120)]
    for threads in ([1], [2, 5, 1], [1] * 20):
        ranges = workers._ranges(chunks, threads)
        assert [r for one in ranges for r in range(one.start, one.stop)] == list(range(120))


def test_refused(client):
    t = neuron_tensor()
    with pytest.raises(ArgumentError, match=r"client is 'tcp.* \(str\); expected a dask.dis"):
        factorize(t.chunk(neuron=3), 2, client="tcp://10.0.0.1:8786")
    with pytest.raises(ArgumentError, match="the tensor is in this process: chunk it"):
        factorize(t, 2, client=client)
    with pytest.raises(ArgumentError, match="a mask, which workers do not take"):
        factorize(t.chunk(neuron=3), 2, client=client, mask=t.notnull())
    with pytest.raises(ArgumentError, match="choose_rank takes no client"):
        choose_rank(t.chunk(neuron=3), [2], client=client)
    with pytest.raises(ArgumentError, match=r"compress is True.*client"):
        factorize(t.chunk(neuron=3), 2, client=client, compress=True)


def test_a_worker_that_dies_is_an_error_that_says_so(client):
    _, x = planted((80, 9, 8), 4, noise=0.3)
    lazy = da.from_array(x, chunks=(10, 9, 8))
    pids = list(client.run(os.getpid).values())

    def kill(number, iteration, objective, done):
        if iteration == 3 and number == 0:
            os.kill(pids[0], signal.SIGKILL)

    # The last test: its cluster lacks a worker from here on, or has a new one.
    with pytest.raises(DataError, match=r"the worker tcp://.* died, and with it its rows"):
        fit(lazy, client=client, callback=kill, tol=0, max_iter=50)
