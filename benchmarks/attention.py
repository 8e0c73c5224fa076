"""Speed of rollout and relevance, as ratios to the forward passes they need, side by side.

ViT-S/16 with random weights, 224 px. The other sides are the bare batched forward pass of the same
frames and, of rollout, the one that gives attention weights. Sides alternate; each line gives the
median ratio of the rounds and their range. Some four minutes on two cores.

    python benchmarks/attention.py [ROW ...]

Rows: rollout, relevance; all if none is named.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import torch
import transformers
import xarray as xr

import vitxr
from vitxr.analysis import attention_rollout, relevance

ROUNDS = 5
#: Frames of a round, at most; the cost of a frame does not depend on their number.
FRAMES = int(os.environ.get("FRAMES", "128"))
BATCH = 8


def vit() -> transformers.ViTForImageClassification:
    """ViT-S/16 with random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    return transformers.ViTForImageClassification(config).eval()


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(what: str, sides: dict[str, Callable[[], object]], target: str) -> None:
    """Time the sides in turn; print the ratios to the first."""
    for run in sides.values():
        run()  # warm
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            times[name].append(seconds(run))
    passes = [name for name in sides if "pass" in name]
    for name in sides:
        each = f"{FRAMES} frames, {1000 * statistics.median(times[name]) / FRAMES:.1f} ms a frame"
        if name in passes:
            print(f"{what}, {name}: {each}", flush=True)
            continue
        for base in passes:
            ratios = [b / a for a, b in zip(times[base], times[name], strict=True)]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(
                f"{what}, {name}: {middle:.3g} ({low:.3g} to {high:.3g}) x {base}; "
                f"to reach {target}; {each}",
                flush=True,
            )


module = vit()
model = vitxr.load_model(module, device="cpu")
images = np.random.default_rng(0).integers(0, 256, (FRAMES, 224, 224, 3), dtype=np.uint8)
stim = vitxr.open_images({"noise": images})


def forward() -> None:
    """Run the bare forward pass, batch by batch."""
    with torch.inference_mode():
        for start in range(0, FRAMES, BATCH):
            batch = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float()
            module(batch)


def weights() -> None:
    """Run the pass that gives attention weights: transformers' own, which fuses nothing."""
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        for start in range(0, FRAMES, BATCH):
            batch = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float()
            module(batch, output_attentions=True)
    module.set_attn_implementation("sdpa")


def extract() -> xr.Dataset:
    """Extract the attention of all layers, lazily."""
    return vitxr.extract(
        stim, model, shifts=None, variables=["attention"], preprocess="raw", batch_size=BATCH
    )


def rollout() -> None:
    """Rollout of the class token, extraction included."""
    report(
        "rollout",
        {
            "forward pass": forward,
            "pass with weights": weights,
            "from images, class token": lambda: attention_rollout(extract()).compute(),
            "from images, whole matrix": lambda: attention_rollout(extract(), None).compute(),
        },
        "1.2",
    )


def chefer() -> None:
    """Relevance of the patches for the predicted class."""
    report(
        "relevance",
        {
            "forward pass": forward,
            "from images, one class": lambda: relevance(
                stim, model, preprocess="raw", batch_size=BATCH
            ),
        },
        "3",
    )


ROWS = {"rollout": rollout, "relevance": chefer}

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(ROWS)
    if unknown:
        sys.exit(f"unknown rows {', '.join(sorted(unknown))}; there are: {', '.join(ROWS)}")
    for row in sys.argv[1:] or ROWS:
        ROWS[row]()
