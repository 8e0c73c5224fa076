"""Speed of the main job, as ratios against peers measured side by side in one run.

Two comparisons, each alternating between the two sides, medians printed:

- extraction of block 0 of a ViT-B/16 (random weights, 224 px, step 11) into a store,
  against the original notebook's loop: one frame at a time through the whole model;
- nonnegative CP by HALS on a digits tensor, against tensorly's
  ``non_negative_parafac_hals`` from the same start: seconds an iteration.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import torch
import transformers

import vitxr

ROUNDS = 3


def seconds(run) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(name, ours, peer, per_ours=1.0, per_peer=1.0):
    """Time both sides in turn and print medians and their ratio."""
    times = [(seconds(ours) / per_ours, seconds(peer) / per_peer) for _ in range(ROUNDS)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(peer / ours for ours, peer in times)
    print(
        f"{name}: ours {a:.4f} s, peer {b:.4f} s, {statistics.median(ratios):.1f} x "
        f"({ratios[0]:.1f} to {ratios[-1]:.1f})",
        flush=True,
    )


def extraction():
    """Seconds a frame, block 0 into a store, against the notebook's loop."""
    torch.manual_seed(0)
    module = transformers.ViTForImageClassification(transformers.ViTConfig()).eval()
    eager = transformers.ViTForImageClassification(
        transformers.ViTConfig(attn_implementation="eager")
    ).eval()
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    stim, model = vitxr.open_images(image), vitxr.load_model(module)
    _ = model.fingerprint  # hashed once a model, not once a frame
    folder = Path(tempfile.mkdtemp())
    runs = iter(range(1000))
    frames, few = 441, 12

    def ours():
        vitxr.extract(
            stim, model, layers=0, preprocess="raw", store=folder / f"{next(runs)}.zarr",
            progress=False,
        )  # fmt: skip

    x = torch.as_tensor(image.transpose(0, 3, 1, 2), dtype=torch.float32)

    def peer():
        with torch.no_grad():
            for i in range(few):
                eager(torch.roll(x, 11 * i, 3), output_hidden_states=True, output_attentions=True)

    alternate("extraction, block 0, seconds a frame", ours, peer, frames, few)


def factorization():
    """Seconds an iteration of HALS, rank 8, on the demo's tensor."""
    import tensorly.decomposition

    from vitxr.factor.hals import ncp_hals, random_start

    stim = vitxr.datasets.digits(per_class=2)
    ds = vitxr.extract(
        stim, vitxr.load_model("digits"), layers=0, shifts=vitxr.ShiftGrid(3), progress=False
    )
    x = ds.vit.neuron_tensor(layer=0).values
    start = random_start(x.shape, 8, float(np.linalg.norm(x)), seed=0)
    iterations = 10

    def ours():
        ncp_hals(x, 8, start=start, tol=-np.inf, max_iter=iterations)

    def peer():
        tensorly.decomposition.non_negative_parafac_hals(
            x, 8, n_iter_max=iterations, tol=0,
            init=(np.ones(8, x.dtype), [f.astype(x.dtype) for f in start]),
        )  # fmt: skip

    alternate(f"HALS on {x.shape}, seconds an iteration", ours, peer, iterations, iterations)


if __name__ == "__main__":
    extraction()
    factorization()
