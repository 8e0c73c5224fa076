"""The main job on images and a model of your own.

    python examples/main_job.py                                    # bundled digits and model
    python examples/main_job.py photos/ google/vit-base-patch16-224 --layer 11 --rank 25

Writes a store, factors and pictures into --output.
"""

import argparse
from pathlib import Path

import vitxr


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", help="folder with one subfolder for each class")
    parser.add_argument("model", nargs="?", default="digits", help="name or folder of a model")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--step", type=int, help="pixels between shifts; an eighth of the input")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("main_job"))
    args = parser.parse_args()

    stim = vitxr.open_images(args.images) if args.images else vitxr.datasets.digits(per_class=1)
    model = vitxr.load_model(args.model)
    shifts = vitxr.ShiftGrid(args.step or max(1, min(model.input_size) // 8))
    ds = vitxr.extract(
        stim, model, layers=args.layer, shifts=shifts, store=args.output / "activations.zarr"
    )
    t = ds.vit.neuron_tensor(layer=args.layer, feature_maps=20)
    f = t.vit.factorize(rank=args.rank, progress=True)
    vitxr.save(f, args.output / "factors.nc")
    vitxr.plot.save(vitxr.plot.factors(f), args.output / "factors.png")
    vitxr.plot.save(vitxr.plot.embedding(f.vit.embed()), args.output / "embedding.png")
    print(f"{args.rank} components leave {float(f.objective):.1%} of the tensor's norm")


if __name__ == "__main__":
    main()
