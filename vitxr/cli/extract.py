"""``vitxr extract``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitxr.cli.arguments import (
    add_quiet,
    batch,
    command,
    layers,
    maps,
    modules,
    numbers,
    queries,
    size,
    workers,
)
from vitxr.cli.show import sizes
from vitxr.errors import ArgumentError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["add_extract"]


def add_extract(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "extract",
        _run_extract,
        "Run a model on shifted images and write its activations. Every image is rolled by every "
        "offset of a lattice, every frame is run, and what the blocks give is kept with its labels "
        "in a Zarr store.\n\nAn interrupted run goes on where it stopped when the same command is "
        "given again; --dry-run says beforehand what it costs.",
        "SOURCE STORE [options]",
        [
            "vitxr extract digits run.zarr --model digits --per-class 2 --step 4",
            "vitxr extract photos/ run.zarr --layers 0,11 --dry-run",
            "vitxr extract photos/ run.zarr --model facebook/dinov2-base --feature-maps 20",
            "vitxr extract photos/ run.zarr --variables attention,logits --queries prefix",
        ],
    )
    add = parser.add_argument_group("from, and to").add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of images (one subfolder a class), image, .npy stack; or the name "
        "of a dataset: digits, photos",
    )
    add(
        "store",
        metavar="STORE",
        help="Zarr store to write, ending in .zarr: a folder, or a URL (s3://...)",
    )
    add = parser.add_argument_group("images and shifts").add_argument
    add("--per-class", type=int, metavar="N", help="images of each class; all if not given")
    add(
        "--size",
        type=size,
        help="thumbnail within 224, or resize to 224x224 (height x width); files are taken as they "
        "are if not given",
    )
    add("--step", type=int, default=11, metavar="PX", help="pixels between shifts; 0: no shifts")
    add(
        "--scheme",
        choices=["grid", "raster"],
        default="grid",
        help="a true lattice, or the original notebook's order",
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default="google/vit-base-patch16-224",
        help="digits (bundled), a hub id, timm:NAME, or a folder written by save_pretrained",
    )
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--input-size",
        type=size,
        metavar="SIZE",
        help="448 or 224x448 (height x width), if not the model's own",
    )
    add(
        "--preprocess",
        choices=["model", "raw"],
        default="model",
        help="the model's own, or pixel values 0..255 as they are",
    )
    add("--device", default="auto", help="auto, cpu, or a GPU: cuda, cuda:1")
    add(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="arithmetic of the forward pass",
    )
    add = parser.add_argument_group("what is kept").add_argument
    add("--layers", type=layers, default="all", help="blocks, from 0: 0,11 or all")
    add(
        "--variables",
        default="activation",
        metavar="NAMES",
        help="some of activation, prefix, embedding, attention, attention_query, attention_key, "
        "attention_value, attention_output, mlp_hidden, logits; separated by commas",
    )
    add(
        "--feature-maps",
        type=maps,
        default="all",
        metavar="MAPS",
        help="a count (the most active), a list of channels 3,17,200 (one: 3,) or all",
    )
    add("--heads", type=numbers, help="heads of attention: 0,5; all if not given")
    add(
        "--queries",
        type=queries,
        help="tokens whose attention is kept: prefix, patches, or tokens 0,3:4 (numbers, or "
        "row:column of a patch); all if not given",
    )
    add(
        "--modules",
        type=modules,
        metavar="NAME=PATH",
        help="more variables, outputs of modules: gate=layers.{layer}.mlp.fc1,norm=vit.layernorm",
    )
    add(
        "--storage-dtype",
        default="float32",
        metavar="DTYPE",
        help="float32; float16; or bitroundN, float32 rounded to N mantissa bits and compressed",
    )
    running = parser.add_argument_group("running")
    add = running.add_argument
    add(
        "--batch-size",
        type=batch,
        default="auto",
        metavar="N",
        help="frames a forward pass takes, or auto",
    )
    add(
        "--workers",
        type=workers,
        default=1,
        help="processes: a number, or a device for each, such as cuda:0,cuda:1",
    )
    add("--dry-run", action="store_true", help="say what it would cost, and write nothing")
    add_quiet(running)


def _stimuli(args: argparse.Namespace) -> xr.Dataset:
    import vitxr

    if args.source in ("digits", "photos") and not Path(args.source).exists():
        if args.size is not None or (args.source == "photos" and args.per_class is not None):
            raise ArgumentError(
                f"--size and --per-class do not go with the dataset {args.source!r} "
                "(--per-class goes with digits)."
            )
        if args.source == "photos":
            return vitxr.datasets.photos()
        return vitxr.datasets.digits(per_class=args.per_class)
    return vitxr.open_images(
        args.source, per_class=args.per_class, size=args.size, progress=not args.quiet
    )


def _run_extract(args: argparse.Namespace) -> None:
    import vitxr

    stim = _stimuli(args)
    model = vitxr.load_model(
        args.model, revision=args.revision, device=args.device, input_size=args.input_size
    )
    options: dict[str, Any] = {
        "layers": args.layers,
        "shifts": vitxr.ShiftGrid(args.step, args.scheme) if args.step != 0 else None,
        "variables": args.variables.split(",") if args.variables else [],
        "feature_maps": args.feature_maps,
        "heads": args.heads,
        "queries": args.queries,
        "modules": args.modules,
        "preprocess": args.preprocess,
        "precision": args.precision,
        "storage_dtype": args.storage_dtype,
        "store": args.store,
        "batch_size": args.batch_size,
    }
    if args.dry_run:
        print(vitxr.estimate(stim, model, **options))
        return
    ds = vitxr.extract(stim, model, **options, workers=args.workers, progress=not args.quiet)
    print(sizes(ds))
    print(f"The store is {args.store}")
