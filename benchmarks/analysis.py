"""Equivariance and CKA over a store four times the memory allowed: memory, rate against reading.

A store of 48 images x 7 x 7 shifts x 2 blocks x 768 maps, 2.8 GB, is made first. Each side runs in
a process of its own, which says its peak memory (VmHWM); sides alternate. Reading is what
`vitxr.open(...).activation.data` gives, one Dask chunk after the other, and for comparison all of
them by Dask's threads; nothing is kept. The store is in the page cache.

    python benchmarks/analysis.py [FOLDER]

With FOLDER the store is kept there, and used again.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import vitxr

ROUNDS = 3
IMAGES, STEP = 48, 32


def make(path: Path) -> None:
    """Write the store: blocks of ViT-B/16's shapes, few heads and a small MLP to be quick."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=2, intermediate_size=64)
    module = transformers.ViTForImageClassification(config).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 224, 224, 3), dtype=np.uint8)
    vitxr.extract(
        vitxr.open_images(pixels, progress=False), vitxr.load_model(module),
        shifts=vitxr.ShiftGrid(STEP), preprocess="raw", store=path,
    )  # fmt: skip


def one_by_one(path: str) -> None:
    for block in vitxr.open(path).activation.data.to_delayed().ravel():
        block.compute()


def all_threads(path: str) -> None:
    data = vitxr.open(path).activation.data
    data.map_blocks(lambda a: a[:1, :1, :1, :1, :1, :1, :1].copy(), chunks=(1,) * 7).compute()


def equivariance(path: str) -> None:
    vitxr.open(path).vit.equivariance().compute()


def cka(path: str) -> None:
    vitxr.open(path).vit.cka()


SIDES = {
    "reading, chunk by chunk": one_by_one,
    "reading, by Dask's threads": all_threads,
    "equivariance": equivariance,
    "CKA": cka,
}


def side(name: str, path: str) -> None:
    """Run one side; print its seconds and this process's peak memory in bytes."""
    start = time.perf_counter()
    SIDES[name](path)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text("utf-8")
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    print(seconds, peak * 1024)


def measure(path: Path) -> None:
    size = vitxr.open(path).activation.nbytes
    print(f"store {size / 1e9:.2f} GB, allowance {size / 4e9:.2f} GB")
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    peaks = dict.fromkeys(SIDES, 0)
    for turn in range(ROUNDS + 1):
        for name in SIDES:
            done = subprocess.run(
                [sys.executable, __file__, "side", name, str(path)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            spent, peak = map(float, done.stdout.split())
            if turn:  # the first fills the page cache
                seconds[name].append(spent)
                peaks[name] = max(peaks[name], int(peak))
    for name, times in seconds.items():
        rates = []
        for reading in list(SIDES)[:2]:
            ratios = [r / t for r, t in zip(seconds[reading], times, strict=True)]
            rates.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        speeds = sorted(size / t / 1e6 for t in times)
        print(
            f"{name}: {statistics.median(speeds):.0f} MB/s ({speeds[0]:.0f} to {speeds[-1]:.0f}); "
            f"of the two rates of reading {', '.join(rates)} (to reach 0.5); "
            f"peak memory {peaks[name] / 1e9:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        side(*sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as scratch:
            store = Path(sys.argv[1] if sys.argv[1:] else scratch) / "run.zarr"
            if not store.exists():
                make(store)
            measure(store)
