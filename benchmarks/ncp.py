"""Speed and memory of nonnegative CP by HALS, as ratios measured side by side in one run.

The tensor is 3920 x 20 x 462, float32: 20 feature maps of the first block of a ViT-B/16 with random
weights, on 20 photographs and parts of them, under the original notebook's 462 shifts. It is made
once (some minutes) and kept in the temporary folder.

    python benchmarks/ncp.py [ROW ...]

Rows: one-fit, ensemble, tensorly, out-of-core, out-of-core-zstd, memory, workers; all if none is
named. Each by itself takes a few minutes, tensorly longer.

The peer of the first two is tensortools' ``ncp_hals`` where it can be imported, else its literal
transcription, whose products are the same BLAS calls. All sides have the same float32 data, starts,
tolerance and cores, BLAS threads included. Two ratios are given:

- "same stop": seconds until each side's own stop by the same tolerance;
- "same objective": seconds until every fit has an objective, exact and on the whole tensor, of at
  most ``SLACK`` times the one its peer ended with. A fit that went into a worse local minimum by
  way of the compressed tensor is fitted again without, and both times count.
"""

import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import xarray as xr
from ncp_sides import (
    ALL,
    RANKS,
    REPLICATES,
    SLACK,
    Peer,
    Run,
    compresses,
    notebooks,
    ours,
    peer,
    tensor,
    tensorlys,
    until,
)  # fmt: skip

import vitxr
from vitxr.factor import blocks, checks, compress, hals, kernels

ROUNDS = 3


# --- what limits -----------------------------------------------------------------------


@functools.cache
def products_seconds(columns: int, threads: int | None = None) -> float:
    """Seconds of a pass's two products with so many columns: a bare loop, the best block."""
    x = tensor().reshape(len(tensor()), -1)
    rng = np.random.default_rng(0)
    lead = rng.random((columns, x.shape[1]), np.float32)
    factor = rng.random((columns, len(x)), np.float32)
    times = []
    with blocks.own_threads(threads) as pool:
        edges = np.linspace(0, len(x), pool.threads + 1).astype(int)
        for rows in (128, 256, 512, 907):

            def loop(i: int, rows: int = rows) -> None:
                out = np.empty_like(lead)
                for low in range(edges[i], edges[i + 1], rows):
                    part = slice(low, min(low + rows, edges[i + 1]))
                    np.matmul(lead, x[part].T)
                    np.matmul(factor[:, part], x[part], out=out)

            for _ in range(3):
                began = time.perf_counter()
                pool.map(loop, range(pool.threads))
                times.append(time.perf_counter() - began)
    return min(times)


def work(run: Run) -> str:
    """Bytes and operations of a run, in words."""
    x = tensor()
    inside = [fit.compressed_iterations for fit in run.fits]
    passes = max(len(f.history) - n for f, n in zip(run.fits, inside, strict=True))
    ranks = [f.factors[0].shape[1] for f in run.fits]
    whole = sum(r * (len(f.history) - n) for r, f, n in zip(ranks, run.fits, inside, strict=True))
    parts = [f"{passes} passes with {whole} columns {4e-9 * x.size * whole:.0f} GFlop"]
    if any(inside):
        kept = compress.directions(x.shape, max(ranks))
        d0, others = kept[0], math.prod(d or n for d, n in zip(kept[1:], x.shape[1:], strict=True))
        products = sum(
            4 * r * n * d0 * (x.shape[0] + others) for r, n in zip(ranks, inside, strict=True)
        )
        parts.append(f"compression, 3 passes, {4e-9 * x.size * (d0 + compress.EXTRA):.0f} GFlop")
        parts.append(f"{max(inside)} iterations inside {1e-9 * products:.0f} GFlop")
        passes += 3
    sweeps = sum(
        2 * kernels.SWEEPS * r * r * len(f.history) * sum(x.shape)
        for r, f in zip(ranks, run.fits, strict=True)
    )
    parts.append(f"HALS {1e-9 * sweeps:.0f} GFlop")
    widest = sum(ranks)
    rate = 4e-9 * x.size * widest / products_seconds(widest)
    return (
        f"{passes * x.nbytes / 1e9:.1f} GB read; {', '.join(parts)}; a bare loop of products with "
        f"{widest} columns makes {rate:.0f} GFlop/s"
    )


# --- rows ------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: str = ".3g") -> str:
    """Median and range."""
    return (
        f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
    )


def against(what: str, ask: float, rounds: Sequence[tuple[Run, Run, float, int, float]]) -> None:
    """Print ratios: ours, ours without compression, seconds to the objective, again, peer's."""
    stop = [peer / run.seconds for run, _, _, _, peer in rounds]
    same = [peer / seconds for _, _, seconds, _, peer in rounds]
    plain = [peer / run.seconds for _, run, _, _, peer in rounds]
    middle = [statistics.median(column) for column in zip(*(
        (run.seconds, seconds, slow.seconds, peer) for run, slow, seconds, _, peer in rounds
    ), strict=True)]  # fmt: skip
    print(
        f"{what}: same stop {spread(stop)} x, same objective {spread(same)} x, without compression "
        f"{spread(plain)} x; to reach {ask:g} x; {middle[0]:.2f} s, {middle[1]:.2f} s and "
        f"{middle[2]:.2f} s against {middle[3]:.1f} s; fitted again without compression: "
        f"{', '.join(f'{r[3]} of {len(r[0].fits)}' for r in rounds)}",
        flush=True,
    )
    print(f"    limits: {work(rounds[-1][0])}", flush=True)


def objectives(what: str, runs: Sequence[Run], peers: Sequence[Peer]) -> None:
    """Print how final objectives compare, fit by fit."""
    found = [float(fit.history[-1]) for run in runs for fit in run.fits]
    change = [f"{a / b.objective - 1:+.3%}" for a, b in zip(found, peers, strict=True)]
    mean = np.mean(found) / np.mean([p.objective for p in peers]) - 1
    print(f"    {what}, objectives against the peer's: {', '.join(change)}; mean {mean:+.3%}")


def best_of_each_rank(run: Run, peers: Sequence[Peer]) -> None:
    """Print how the replicate of least objective compares, which is the one that is used."""
    change = []
    for rank in RANKS:
        own = [n for n, r in enumerate(ALL) if r == rank]
        ratio = min(run.fits[n].history[-1] for n in own) / min(peers[n].objective for n in own)
        change.append(f"{ratio - 1:+.3%}")
    print(f"    the best of each rank against the peer's best: {', '.join(change)}")


def one_fit() -> None:
    """One fit of rank 25, another start in each round."""
    rounds, peers = [], []
    numbers = [n for n, rank in enumerate(ALL) if rank == 25]
    notebooks()
    for n in numbers:
        run = ours([n], compresses([n]))
        peers.append(peer(n))
        seconds, again = until([n], run, [peers[-1].objective * SLACK])
        rounds.append((run, ours([n], False), seconds, again, peers[-1].seconds))
    against(f"one fit, rank 25, against {notebooks()[0]}", 10, rounds)
    objectives("as by default", [run for run, *_ in rounds], peers)
    objectives("without compression", [run for _, run, *_ in rounds], peers)


def rounds_of(
    runs: Sequence[Run], plain: Run, targets: Sequence[float], total: float
) -> list[tuple[Run, Run, float, int, float]]:
    """What :func:`against` takes. Fits are made again after the last run only: all are alike."""
    seconds, again = until(range(len(ALL)), runs[-1], targets)
    return [(run, plain, run.seconds + seconds - runs[-1].seconds, again, total) for run in runs]


def ensemble() -> None:
    """Nine fits; the peer makes each once, one replicate of every rank in a round."""
    numbers = range(len(ALL))
    notebooks()
    runs, plain = [], ours(numbers, False)
    for i in range(ROUNDS):
        runs.append(ours(numbers, compresses(numbers)))
        for n in numbers[i::REPLICATES]:
            peer(n)
    peers = [peer(n) for n in numbers]
    targets = [p.objective * SLACK for p in peers]
    rounds = rounds_of(runs, plain, targets, sum(p.seconds for p in peers))
    against(f"ranks 20, 25, 30 x 3, against {notebooks()[0]}", 35, rounds)
    objectives("as by default", [runs[-1]], peers)
    best_of_each_rank(runs[-1], peers)
    objectives("without compression", [plain], peers)


def tensorly() -> None:
    """Nine fits against tensorly: its seconds an iteration, times the iterations it takes.

    All its fits would take an hour. Its iterates are those of our plain method with five inner
    sweeps in place of three, by which its iterations are counted; that this is so is shown by the
    objective after three. Each backend runs in a process of its own.
    """
    numbers = range(len(ALL))
    before, kernels.SWEEPS = kernels.SWEEPS, 5
    counted = ours(numbers, False)
    kernels.SWEEPS = before
    targets = [float(fit.history[-1]) * SLACK for fit in counted.fits]
    runs = [ours(numbers, compresses(numbers)) for _ in range(ROUNDS)]
    rounds = rounds_of(runs, ours(numbers, False), targets, math.nan)
    for backend in ("numpy", "pytorch"):
        lines = subprocess.run(
            [sys.executable, __file__, "tensorlys", backend],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        each, apart = {}, 0.0
        for rank, seconds, objective in (map(float, line.split()) for line in lines[-3:]):
            each[rank] = seconds
            apart = max(apart, abs(counted.fits[ALL.index(rank)].history[2] / objective - 1))
        total = sum(
            each[rank] * len(fit.history) for rank, fit in zip(ALL, counted.fits, strict=True)
        )
        against(
            f"ranks 20, 25, 30 x 3, against tensorly, {backend}",
            25,
            [(*one[:4], total) for one in rounds],
        )
        print(
            f"    tensorly: {', '.join(f'{each[r]:.2f}' for r in RANKS)} s an iteration for ranks "
            f"20, 25, 30, {sum(len(f.history) for f in counted.fits)} iterations; objectives after "
            f"three differ by at most {apart:.1e} of their size from those counted by",
            flush=True,
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for a store, on the disk this is started on."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        yield Path(folder)


def store(path: Path, times: int, chunk: int, packed: bool) -> xr.DataArray:
    """Write the tensor several times over along neurons, each part a little larger; open it."""
    import dask.array as da

    x = tensor()
    parts = [da.from_array(x * np.float32(1 + i / 8), (chunk, -1, -1)) for i in range(times)]
    t = xr.DataArray(
        da.concatenate(parts).rechunk((chunk, -1, -1)),
        dims=("neuron", "image", "shift"), name="activation",
    )  # fmt: skip
    plain = {"activation": {"compressors": None}}
    t.to_zarr(path, consolidated=False, encoding={} if packed else plain)
    return xr.open_dataarray(path, engine="zarr", chunks={}, consolidated=False)


def forget(folder: Path) -> None:
    """Drop the files of a store from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


@contextmanager
def allowed(size: int) -> Iterator[None]:
    """Lower the memory that a tensor may take, in or out of core."""
    before = blocks.MEMORY_BYTES, checks.IN_MEMORY_BYTES
    blocks.MEMORY_BYTES = checks.IN_MEMORY_BYTES = size
    try:
        yield
    finally:
        blocks.MEMORY_BYTES, checks.IN_MEMORY_BYTES = before


def bare_read(path: Path) -> float:
    """Seconds of one read of a store's array, chunk by chunk, in as many threads as there are."""
    import zarr

    array = zarr.open_array(path / "activation", mode="r")
    step = array.chunks[0]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        began = time.perf_counter()
        list(pool.map(lambda low: array[low : low + step].shape, range(0, array.shape[0], step)))
        return time.perf_counter() - began


def passes(
    t: xr.DataArray, count: int, path: Path | None = None, client: Any = None
) -> list[float]:
    """Seconds of each iteration, all nine models, on a tensor that stays where it is.

    With a path the page cache forgets what is there before each of them.
    """
    stamps, last = [], len(ALL) - 1
    starts = [hals.random_start(t.shape, rank, 1e4, n) for n, rank in enumerate(ALL)]

    def stamp(number: int, *_: object) -> None:
        if number == last:
            now = time.perf_counter()
            if path is not None:
                forget(path)
            stamps.append((now, time.perf_counter()))

    with blocks.own_threads() as pool:
        hals.fit_models(
            t.data, starts, norm=1e4, tol=-math.inf, max_iter=count + 1, pool=pool, callback=stamp,
            client=client,
        )  # fmt: skip
    return [b[0] - a[1] for a, b in itertools.pairwise(stamps)]


def out_of_core(packed: bool = False) -> None:
    """An iteration of nine models on a store that is larger than what is read into memory."""
    columns = sum(ALL)
    times = checks.IN_MEMORY_BYTES // tensor().nbytes + 2
    with scratch() as folder:
        t = store(folder / "t.zarr", times, 784, packed)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        for state in ("in the page cache", "from disk"):
            ratios, own, reads, products = [], [], [], []
            for _ in range(ROUNDS):
                cold = folder if state == "from disk" else None
                if cold:
                    forget(cold)
                reads.append(bare_read(folder / "t.zarr"))
                products_seconds.cache_clear()
                products.append(times * products_seconds(columns))
                if cold:
                    forget(cold)
                found = passes(t, 2, cold)
                own += found
                ratios += [seconds / max(reads[-1], products[-1]) for seconds in found]
            print(
                f"an iteration out of core, 9 models, {'zstd' if packed else 'uncompressed'}, "
                f"{state} / the larger of one read and the products: {spread(ratios)}; to reach at "
                f"most 1.3; {spread(own)} s; read {spread(reads)} s, products {spread(products)} s"
                f"\n    limits: {size / 1e9:.2f} GB read of a tensor of {t.nbytes / 1e9:.2f} GB, "
                f"{4e-9 * t.size * columns:.0f} GFlop at "
                f"{4e-9 * t.size * columns / statistics.median(products):.0f} GFlop/s",
                flush=True,
            )


def workers() -> None:
    """An iteration of nine models on two Dask workers against one, with one thread each."""
    from distributed import Client, LocalCluster

    for times in (1, 4):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        bare: list[float] = []
        with scratch() as folder:
            t = store(folder / "t.zarr", times, 392, packed=False)
            for _ in range(ROUNDS):
                products_seconds.cache_clear()
                bare.append(products_seconds(sum(ALL), 1) / products_seconds(sum(ALL), 2))
                for n, found in seconds.items():
                    with (
                        LocalCluster(
                            n_workers=n, threads_per_worker=1, processes=True, memory_limit=None,
                            dashboard_address=":0",
                        ) as cluster,
                        Client(cluster) as client,
                    ):  # fmt: skip
                        found.append(statistics.median(passes(t, 5, client=client)))
        rates = [one / two for one, two in zip(*seconds.values(), strict=True)]
        print(
            f"two Dask workers against one, 9 models, {len(t)} neurons: {spread(rates)} x the "
            f"rate; to reach 1.7 x; bare products in two threads against one {spread(bare)} x; "
            f"an iteration takes {spread(seconds[1])} and {spread(seconds[2])} s\n"
            f"    limits: {4e-9 * t.size * sum(ALL):.0f} GFlop; "
            f"{16e-6 * sum(ALL) * sum(t.shape[1:]):.1f} MB to each worker and about as much back",
            flush=True,
        )


def memory() -> None:
    """Peak memory of an ensemble on a store of four times the memory allowed."""
    allowance = 1 << 30
    times = -(-4 * allowance // tensor().nbytes)
    with scratch() as folder:
        size = store(folder / "t.zarr", times, 392, packed=True).nbytes
        lines = subprocess.run(
            [sys.executable, __file__, "peak", str(folder / "t.zarr"), str(allowance)],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        before, peak = (int(word) * 1024 for word in lines[-2:])
    print(
        f"peak memory on {size / 1e9:.2f} GB with {allowance / 1e9:.3f} GB allowed: "
        f"{peak / allowance:.3g} of it, {peak / 1e9:.3f} GB; to reach at most 1; "
        f"the imports alone take {before / 1e9:.3f} GB",
        flush=True,
    )


def peak(path: str, allowance: int) -> None:
    """Print this process's peak memory, kB, before and after an ensemble on a store."""
    import dask.array  # noqa: F401  (what the imports take is not the tensor's)
    import zarr  # noqa: F401

    def high() -> str:
        status = Path("/proc/self/status").read_text("utf-8")
        return next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))

    t = xr.open_dataarray(path, engine="zarr", chunks={}, consolidated=False)
    before = high()
    with allowed(allowance):
        vitxr.factor.fit_ensemble(t, RANKS, REPLICATES, max_iter=4, progress=False)
    print(before, high())


ROWS = {
    "one-fit": one_fit,
    "ensemble": ensemble,
    "tensorly": tensorly,
    "out-of-core": out_of_core,
    "out-of-core-zstd": functools.partial(out_of_core, packed=True),
    "memory": memory,
    "workers": workers,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["tensorlys"]:
        tensorlys(sys.argv[2])
    else:
        for row in sys.argv[1:] or ROWS:
            ROWS[row]()
