"""The sides of benchmarks/ncp.py: the tensor and the starts, our fits, those of the peers."""

import functools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np

import vitxr
from vitxr.factor import blocks, compress, hals
from vitxr.factor.kernels import khatri_rao

TOL, MAX_ITER = 1e-5, 500
#: An objective is reached within this factor of it.
SLACK = 1 + 1e-4
#: Rank of each fit of the ensemble; its number is its seed.
RANKS, REPLICATES = (20, 25, 30), 3
ALL = [rank for rank in RANKS for _ in range(REPLICATES)]

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
            x, starts, norm=math.sqrt(blocks.squared_norm(x, pool)), tol=TOL, max_iter=MAX_ITER,
            pool=pool, compressed=compressed,
            callback=lambda *call: calls.append((time.perf_counter() - began, *call)),
        )  # fmt: skip
    spent = time.perf_counter() - began
    seen = [
        [
            (s, value)
            for s, n, i, value, _ in calls
            if n == m and not 0 <= i - compress.FIRST < fit.compressed_iterations
        ]
        for m, fit in enumerate(fits)
    ]
    return Run(spent, fits, seen)


def compresses(numbers: Sequence[int]) -> bool:
    """Whether these fits are made by way of a compressed tensor unless told otherwise."""
    return compress.pays(tensor().shape, max(ALL[n] for n in numbers))


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


def tensorlys(backend: str) -> None:
    """Print, for each rank, tensorly's seconds an iteration and its objective after the third."""
    import tensorly as tl
    from tensorly.decomposition import non_negative_parafac_hals

    tl.set_backend(backend)
    x = tl.tensor(tensor())
    for rank in RANKS:
        seconds = []
        for iterations in (1, 3):
            factors = [tl.tensor(f.astype(np.float32)) for f in start(ALL.index(rank))]
            began = time.perf_counter()
            _, factors = non_negative_parafac_hals(
                x, rank, init=(tl.ones(rank), factors), tol=1e-30, n_iter_max=iterations
            )  # fmt: skip
            seconds.append(time.perf_counter() - began)
        found = residual([tl.to_numpy(f) for f in factors])
        print(rank, (seconds[1] - seconds[0]) / 2, found, flush=True)
