r"""Factors of a tensor that no process holds: a Dask cluster extracts, keeps and factorizes it.

    python examples/larger_than_memory.py                                 # bundled digits and model
    python examples/larger_than_memory.py --images photos/ --model google/vit-base-patch16-224 \
        --step 11 --workers 8 --rank 25

Here the cluster is two processes of this machine; dask_jobqueue.SLURMCluster or another takes its
place without a change elsewhere, if all its workers see --output. Each worker keeps its share of
the neurons in memory; this process reads blocks of them, at the start (are all values finite and
nonnegative?) and at the end (the exact objective).
"""

import argparse
from pathlib import Path

from dask.distributed import Client, LocalCluster

import vitxr


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder with one subfolder for each class")
    parser.add_argument("--per-class", type=int, default=10, help="images of each class")
    parser.add_argument("--model", default="digits", help="name or folder of a model")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--step", type=int, default=4, help="pixels between shifts")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("larger_than_memory"))
    args = parser.parse_args()

    if args.images:
        stim = vitxr.open_images(args.images, per_class=args.per_class)
    else:
        stim = vitxr.datasets.digits(per_class=args.per_class)
    with (
        LocalCluster(
            n_workers=args.workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        # Each worker loads the model once, and writes shards of its own.
        ds = vitxr.extract(
            stim, vitxr.load_model(args.model), layers=args.layer,
            shifts=vitxr.ShiftGrid(args.step), store=args.output / "activations.zarr",
            client=client,
        )  # fmt: skip
        # All feature maps; each worker reads its neurons, keeps them, and exchanges small sums.
        t = ds.vit.neuron_tensor(layer=args.layer, feature_maps=None, normalize=False)
        f = t.vit.factorize(rank=args.rank, client=client)
    vitxr.save(f, args.output / "factors.nc")
    sizes = " x ".join(f"{n} {dim}s" for dim, n in t.sizes.items())
    print(f"tensor: {sizes}, {t.nbytes / 1e6:.0f} MB, kept by {args.workers} workers")
    print(f"{args.rank} components leave {float(f.objective):.1%} of the tensor's norm")


if __name__ == "__main__":
    main()
