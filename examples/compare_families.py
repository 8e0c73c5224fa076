r"""One set of images across three families of Vision Transformers, one store each.

    python examples/compare_families.py          # three small models made here, no network
    python examples/compare_families.py photos/ google/vit-base-patch16-224 \
        facebook/dinov2-with-registers-base google/siglip-base-patch16-224

Each model has its own input size, patch grid and prefix tokens; the shift is the same share of the
image in all of them. Writes a store for each model into --output, and prints how alike the models
find the images: representational similarity, the correlation of the images' distances in one model
with those in another, from the mean of each feature map over patches and shifts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import xarray as xr
from scipy.spatial.distance import pdist

import vitxr


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", help="folder with one subfolder for each class")
    parser.add_argument("models", nargs="*", help="names or folders of models")
    parser.add_argument("--shifts", type=int, default=4, help="shifts along each side")
    parser.add_argument("--output", type=Path, default=Path("families"))
    args = parser.parse_args()

    stim = vitxr.open_images(args.images) if args.images else vitxr.datasets.digits(per_class=1)
    args.output.mkdir(parents=True, exist_ok=True)
    distances = {}
    for name in args.models or small_models(args.output / "models"):
        model = vitxr.load_model(name)
        ds = vitxr.extract(
            stim,
            model,
            layers=len(model.blocks) - 1,
            shifts=vitxr.ShiftGrid(-(-max(model.input_size) // args.shifts)),
            variables=["activation", *(["prefix"] if model.prefix else [])],
            store=args.output / f"{Path(str(name)).name}.zarr",
        )
        rows, columns = model.grid
        print(f"{name}: {rows} x {columns} patches, prefix {', '.join(model.prefix) or 'none'}")
        distances[Path(str(name)).name] = pdist(mean_of_maps(ds), "correlation")
    print(xr.DataArray(
        np.atleast_2d(np.corrcoef(list(distances.values()))),
        dims=("model", "other"),
        coords={"model": list(distances), "other": list(distances)},
        name="similarity",
    ).to_pandas().round(2).to_string())  # fmt: skip


def mean_of_maps(ds: xr.Dataset) -> np.ndarray:
    """Return (image, feature_map), the mean over patches and shifts of the last block kept."""
    dims = ["shift_y", "shift_x", "patch_row", "patch_col"]
    return ds["activation"].isel(layer=-1).mean(dims).transpose("image", "feature_map").values


def small_models(folder: Path) -> list[str]:
    """Save a ViT, a DINOv2 with registers and a SigLIP, small and with random weights."""
    import torch
    import transformers as tf

    small = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    models = {
        "vit": tf.ViTModel(tf.ViTConfig(**small, image_size=32)),
        "dinov2-registers": tf.Dinov2WithRegistersModel(
            tf.Dinov2WithRegistersConfig(**small, image_size=48, num_register_tokens=4)
        ),
        "siglip": tf.SiglipVisionModel(tf.SiglipVisionConfig(**small, image_size=64)),
    }
    for name, module in models.items():
        module.save_pretrained(folder / name)
        side = module.config.image_size
        settings = {"do_resize": True, "size": {"height": side, "width": side}, "do_rescale": True}
        settings |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        settings["image_processor_type"] = "ViTImageProcessor"
        text = json.dumps(settings)
        (folder / name / "preprocessor_config.json").write_text(text, "utf-8")
    return [str(folder / name) for name in models]


if __name__ == "__main__":
    main()
