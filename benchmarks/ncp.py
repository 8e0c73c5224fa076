"""Speed and memory of nonnegative CP by HALS, as ratios measured side by side in one run.

The tensor is 3920 x 20 x 462, float32: 20 feature maps of the first block of a ViT-B/16 with random
weights, on 20 photographs and parts of them, under the original notebook's 462 shifts. It is made
once (some minutes) and kept in the temporary folder.

    python benchmarks/ncp.py [ROW ...]

Rows: one-fit, ensemble, tensorly, out-of-core, memory; all if none is named.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import xarray as xr

import vitxr
from vitxr.factor import blocks, checks, hals
from vitxr.factor.compress import directions, pays
from vitxr.factor.kernels import khatri_rao

ROUNDS = 3
TOL, MAX_ITER = 1e-5, 500
#: An objective is reached within this factor of it.
SLACK = 1 + 1e-4
#: Rank of each fit of the ensemble; its number is its seed.
RANKS, REPLICATES = (20, 25, 30), 3
ALL = [rank for rank in RANKS for _ in range(REPLICATES)]
#: Directions that are drawn by the compression beyond those kept, and its sweeps of HALS.
EXTRA, SWEEPS = 20, 3

#: Factors, and the objective after each iteration.
Found = tuple[list[np.ndarray], Sequence[float]]


def photographs() -> np.ndarray:
    """Twenty squares of the photographs: each whole, then parts of random size and place."""
    from PIL import Image

    files = vitxr.datasets.photos()["source"].values
    rng = np.random.default_rng(0)
    out = []
    for i in range(20):
        with Image.open(files[i % len(files)]) as image:
            image = image.convert("RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if i >= len(files):
            side = int(side * rng.uniform(0.4, 0.8))
            left = int(rng.integers(0, width - side + 1))
            top = int(rng.integers(0, height - side + 1))
        part = image.crop((left, top, left + side, top + side))
        out.append(np.asarray(part.resize((224, 224))))
    return np.stack(out)


def neurons(images: np.ndarray) -> np.ndarray:
    """Neuron tensor of images: block 0 of a ViT-B with random weights, the notebook's shifts."""
    import torch
    import transformers

    torch.manual_seed(0)
    module = transformers.ViTForImageClassification(transformers.ViTConfig()).eval()
    with tempfile.TemporaryDirectory() as folder:
        ds = vitxr.extract(
            vitxr.open_images(images), vitxr.load_model(module), layers=0,
            shifts=vitxr.ShiftGrid(11, "raster"), feature_maps=20, preprocess="raw",
            store=Path(folder) / "run.zarr", progress=False,
        )  # fmt: skip
        return np.ascontiguousarray(ds.vit.neuron_tensor(layer=0).values)


@functools.cache
def tensor() -> np.ndarray:
    """Make the tensor, or read the one that was made before."""
    path = Path(tempfile.gettempdir()) / "vitxr-ncp-3920-20-462.npy"
    if not path.exists():
        unfinished = path.with_suffix(".part.npy")
        np.save(unfinished, neurons(photographs()))
        unfinished.rename(path)
    return np.load(path)


@functools.cache
def start(number: int) -> list[np.ndarray]:
    """Start of a fit of the ensemble."""
    x = tensor()
    return hals.random_start(x.shape, ALL[number], math.sqrt(blocks.squared_norm(x)), number)


# --- ours ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One call: its seconds, its fits, and for each of those ``(seconds, objective)`` as it went.

    Only objectives on the tensor itself are listed.
    """

    seconds: float
    fits: list[hals.Fit]
    seen: list[list[tuple[float, float]]]

    def reached(self, targets: Sequence[float]) -> list[float]:
        """Seconds after which each fit was at its target; infinite where it never was."""
        return [
            next((s for s, objective in seen if objective <= target), math.inf)
            for seen, target in zip(self.seen, targets, strict=True)
        ]


def ours(numbers: Sequence[int], compressed: bool) -> Run:
    """Fit side by side, the norm of the tensor included."""
    x, starts = tensor(), [start(n) for n in numbers]
    calls = []
    began = time.perf_counter()
    with blocks.own_threads() as pool:
        fits = hals.fit_models(
            x, starts, norm=math.sqrt(blocks.squared_norm(x)), tol=TOL, max_iter=MAX_ITER,
            pool=pool, compressed=compressed,
            callback=lambda *call: calls.append((time.perf_counter() - began, *call)),
        )  # fmt: skip
    spent = time.perf_counter() - began
    seen = [
        [(s, value) for s, n, i, value, _ in calls if n == m and i >= fit.compressed_iterations]
        for m, fit in enumerate(fits)
    ]
    return Run(spent, fits, seen)


def compresses(numbers: Sequence[int]) -> bool:
    """Whether these fits are made by way of a compressed tensor unless told otherwise."""
    return pays(tensor().shape, max(ALL[n] for n in numbers))


def until(numbers: Sequence[int], run: Run, targets: Sequence[float]) -> tuple[float, int]:
    """Seconds until all fits of a run are at their targets, and how many were fitted again."""
    times = run.reached(targets)
    missed = [i for i, s in enumerate(times) if s == math.inf]
    if not missed:
        return max(times), 0
    again = ours([numbers[i] for i in missed], compressed=False)
    return run.seconds + max(again.reached([targets[i] for i in missed])), len(missed)


# --- peers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One fit of a peer.

    The objective is computed from its factors: in float32, that which a peer reports is too small
    by several times what we compare.
    """

    seconds: float
    objective: float
    iterations: int


def residual(factors: Sequence[np.ndarray]) -> float:
    """Relative residual of a model, from the residual itself."""
    x = tensor()
    first, *others = (np.asarray(f, np.float64).T for f in factors)
    with blocks.own_threads() as pool:
        model = first.T, khatri_rao(others)
        norm = math.sqrt(blocks.squared_norm(x))
        return blocks.relative_residuals(x, [model], norm, pool)[0]


@functools.cache
def notebooks() -> tuple[str, Callable[[np.ndarray, list[np.ndarray]], Found]]:
    """Name of the notebook's method as it is here; a function to its factors and objectives."""
    try:
        import tensortools
    except ImportError:
        import literal

        return "the literal transcription", lambda x, at: literal.ncp_hals(x, at, TOL, MAX_ITER)

    def fit(x: np.ndarray, at: list[np.ndarray]) -> Found:
        init = tensortools.KTensor([f.astype(x.dtype) for f in at])
        found = tensortools.ncp_hals(
            x, at[0].shape[1], init=init, tol=TOL, max_iter=MAX_ITER - 1, verbose=False
        )
        return list(found.factors), found.obj_hist

    few = np.random.default_rng(0).random((5, 4, 3), dtype=np.float32)
    fit(few, hals.random_start(few.shape, 2, 1.0, 0))  # compiles, for these dtypes
    return "tensortools", fit


@functools.cache
def peer(number: int) -> Peer:
    """Fit by the notebook's method."""
    fit = notebooks()[1]
    x, at = tensor(), start(number)
    began = time.perf_counter()
    factors, history = fit(x, at)
    return Peer(time.perf_counter() - began, residual(factors), len(history))


def tensorlys(number: int, backend: str, iterations: int | None = None) -> Peer:
    """Fit by tensorly's HALS as shipped; for a number of iterations where one is given."""
    import tensorly
    from tensorly.decomposition import non_negative_parafac_hals

    with tensorly.backend_context(backend, local_threadsafe=True):
        x = tensorly.tensor(tensor())
        factors = [tensorly.tensor(f.astype(np.float32)) for f in start(number)]
        tol, limit = (TOL, MAX_ITER) if iterations is None else (1e-30, iterations)
        began = time.perf_counter()
        (_, factors), errors = non_negative_parafac_hals(
            x, ALL[number], init=(tensorly.ones(ALL[number]), factors), tol=tol,
            n_iter_max=limit, return_errors=True,
        )  # fmt: skip
        spent = time.perf_counter() - began
        return Peer(spent, residual([tensorly.to_numpy(f) for f in factors]), len(errors))


# --- what limits -----------------------------------------------------------------------


@functools.cache
def products_seconds(columns: int) -> float:
    """Seconds of a pass's two products with so many columns: a bare loop, the best block."""
    x = tensor().reshape(len(tensor()), -1)
    rng = np.random.default_rng(0)
    lead = rng.random((columns, x.shape[1]), np.float32)
    factor = rng.random((columns, len(x)), np.float32)
    times = []
    with blocks.own_threads() as pool:
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
        kept = directions(x.shape, max(ranks))
        d0, others = kept[0], math.prod(d or n for d, n in zip(kept[1:], x.shape[1:], strict=True))
        products = sum(
            4 * r * n * d0 * (x.shape[0] + others) for r, n in zip(ranks, inside, strict=True)
        )
        parts.append(f"compression, 3 passes, {4e-9 * x.size * (d0 + EXTRA):.0f} GFlop")
        parts.append(f"{max(inside)} iterations inside {1e-9 * products:.0f} GFlop")
        passes += 3
    sweeps = sum(
        2 * SWEEPS * r * r * len(f.history) * sum(x.shape)
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
        f"{sum(again for *_, again, _ in rounds)} of {sum(len(r[0].fits) for r in rounds)}",
        flush=True,
    )
    print(f"    limits: {work(rounds[-1][0])}", flush=True)


def objectives(what: str, runs: Sequence[Run], peers: Sequence[Peer]) -> None:
    """Print how final objectives compare, fit by fit."""
    found = [float(fit.history[-1]) for run in runs for fit in run.fits]
    change = [f"{a / b.objective - 1:+.3%}" for a, b in zip(found, peers, strict=True)]
    mean = np.mean(found) / np.mean([p.objective for p in peers]) - 1
    print(f"    {what}, objectives against the peer's: {', '.join(change)}; mean {mean:+.3%}")


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


def ensemble() -> None:
    """Nine fits; the peer makes each once, one replicate of every rank in a round."""
    numbers = range(len(ALL))
    runs = []
    notebooks()
    for i in range(ROUNDS):
        runs.append((ours(numbers, compresses(numbers)), ours(numbers, False)))
        for n in numbers[i::REPLICATES]:
            peer(n)
    peers = [peer(n) for n in numbers]
    total = sum(p.seconds for p in peers)
    targets = [p.objective * SLACK for p in peers]
    rounds = [(run, plain, *until(numbers, run, targets), total) for run, plain in runs]
    against(f"ranks 20, 25, 30 x 3, against {notebooks()[0]}", 35, rounds)
    objectives("as by default", [runs[-1][0]], peers)
    objectives("without compression", [runs[-1][1]], peers)


def tensorly() -> None:
    """Nine fits against tensorly; of its NumPy backend, which takes long, iterations are timed."""
    numbers = range(len(ALL))
    runs, peers = [], []
    for i in range(ROUNDS):
        runs.append((ours(numbers, compresses(numbers)), ours(numbers, False)))
        peers += [(n, tensorlys(n, "pytorch")) for n in numbers[i::REPLICATES]]
    fits = dict(peers)
    targets = [fits[n].objective * SLACK for n in numbers]
    each = {rank: tensorlys(ALL.index(rank), "numpy", 2).seconds / 2 for rank in RANKS}
    totals = {
        "pytorch": sum(p.seconds for p in fits.values()),
        "numpy, seconds an iteration times pytorch's iterations": sum(
            each[ALL[n]] * p.iterations for n, p in fits.items()
        ),
    }
    timed = [(run, plain, *until(numbers, run, targets)) for run, plain in runs]
    for name, total in totals.items():
        rounds = [(*one, total) for one in timed]
        against(f"ranks 20, 25, 30 x 3, against tensorly, {name}", 25, rounds)
    objectives("as by default", [runs[-1][0]], [fits[n] for n in numbers])
    objectives("without compression", [runs[-1][1]], [fits[n] for n in numbers])


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for a store, on the disk this is started on."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        yield Path(folder)


def store(path: Path, times: int, chunk: int) -> xr.DataArray:
    """Write the tensor several times over along neurons, each part a little larger; open it."""
    import dask.array as da

    x = tensor()
    parts = [da.from_array(x * np.float32(1 + i / 8), (chunk, -1, -1)) for i in range(times)]
    t = xr.DataArray(
        da.concatenate(parts).rechunk((chunk, -1, -1)),
        dims=("neuron", "image", "shift"), name="activation",
    )  # fmt: skip
    t.to_zarr(path, consolidated=False)
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
        for _ in pool.map(lambda low: array[low : low + step].shape, range(0, array.shape[0], step)):
            pass
        return time.perf_counter() - began


def passes(t: xr.DataArray, path: Path, count: int, cold: bool) -> list[float]:
    """Seconds of each iteration, all nine models, on a tensor that stays in its store."""
    stamps, last = [], len(ALL) - 1
    starts = [hals.random_start(t.shape, rank, 1e4, n) for n, rank in enumerate(ALL)]

    def stamp(number: int, *_: object) -> None:
        if number == last:
            now = time.perf_counter()
            if cold:
                forget(path)
            stamps.append((now, time.perf_counter()))

    with blocks.own_threads() as pool:
        hals.fit_models(
            t.data, starts, norm=1e4, tol=-math.inf, max_iter=count + 1, pool=pool, callback=stamp
        )
    return [b[0] - a[1] for a, b in itertools.pairwise(stamps)]


def out_of_core() -> None:
    """An iteration of nine models on a store of four times the memory allowed."""
    times, columns = 4, sum(ALL)
    with scratch() as folder:
        t = store(folder / "t.zarr", times, chunk=392)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        products = times * products_seconds(columns)
        with allowed(t.nbytes // times):
            for state in ("in the page cache", "from disk"):
                cold = state == "from disk"
                ratios, own, reads = [], [], []
                for _ in range(ROUNDS):
                    if cold:
                        forget(folder)
                    reads.append(bare_read(folder / "t.zarr"))
                    own += passes(t, folder, 2, cold)
                bound = max(statistics.median(reads), products)
                ratios = [seconds / bound for seconds in own]
                print(
                    f"an iteration out of core, 9 models, {state} / the larger of one read and the "
                    f"products: {spread(ratios)}; to reach at most 1.3; {spread(own)} s; read "
                    f"{spread(reads)} s, products {products:.2f} s, both one after the other "
                    f"{statistics.median(reads) + products:.2f} s\n"
                    f"    limits: {size / 1e9:.2f} GB read of a tensor of {t.nbytes / 1e9:.2f} GB, "
                    f"{4e-9 * t.size * columns:.0f} GFlop at "
                    f"{4e-9 * t.size * columns / products:.0f} GFlop/s",
                    flush=True,
                )


def memory() -> None:
    """Peak memory of an ensemble on a store of four times the memory allowed."""
    allowance = 512 << 20
    times = -(-4 * allowance // tensor().nbytes)
    with scratch() as folder:
        size = store(folder / "t.zarr", times, chunk=392).nbytes
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
    "memory": memory,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    else:
        for row in sys.argv[1:] or ROWS:
            ROWS[row]()
