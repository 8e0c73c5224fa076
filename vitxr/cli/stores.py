"""``vitxr verify``, and ``vitxr info`` of stores and of models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitxr.cli.arguments import add_quiet, command, size
from vitxr.cli.show import amount, sizes
from vitxr.errors import ArgumentError, StoreError

__all__ = ["add_info", "add_verify"]


def add_verify(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "verify",
        _run_verify,
        "Check every byte of a store against the checksums written with it. What is missing, cut "
        "short, altered or not written yet is listed, and the exit status is 1; with --reset it is "
        "0 when all that is damaged was taken back. Do so after copying a store, and after a power "
        "failure.",
        "STORE [--reset] [--quiet]",
        ["vitxr verify run.zarr", "vitxr verify run.zarr --reset    # then vitxr extract again"],
    )
    what = parser.add_argument_group("what is checked")
    what.add_argument(
        "store", metavar="STORE", help="store that vitxr extract wrote, finished or not"
    )
    what.add_argument(
        "--reset",
        action="store_true",
        help="take damaged units back: the same vitxr extract, run again, writes them anew",
    )
    add_quiet(what)


def _run_verify(args: argparse.Namespace) -> None:
    import vitxr

    found = vitxr.verify(args.store, reset=args.reset, progress=not args.quiet)
    checked = f"{found.attrs['units']} units, {amount(found.attrs['bytes'])}"
    if found.sizes["shard"] == 0:
        print(f"All is as it was written: {checked}.")
        return
    rows = found.to_dataframe().sort_values("unit")
    print(rows[["problem", "unit", "image", "shift_y", "layer", "key"]].to_string(index=False))
    damaged, units, again = found.attrs["damaged"], found.attrs["units"], "vitxr extract again"
    if not damaged:
        raise StoreError(f"the store is not finished. Run {again} to write what is missing.")
    said = "1 damaged unit was" if damaged == 1 else f"{damaged} damaged units were"
    if args.reset:
        print(f"{said} taken back. Run {again}, with the same arguments, to write what is missing.")
        return
    raise StoreError(
        f"{damaged} of {units} {'unit is' if units == 1 else 'units are'} damaged. Take back what "
        f"is with --reset, and run {again}, with the same arguments, to write it anew."
    )


def add_info(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "info",
        _run_info,
        "Say what a store, a file of factors or a model holds. Of data: variables, sizes, and how "
        "they were made. Of a model: blocks, tokens, patch grid, preprocessing, licence, and what "
        "one frame costs on this machine; one that is not here yet is downloaded.",
        "TARGET [options]",
        [
            "vitxr info run.zarr",
            "vitxr info factors.nc",
            "vitxr info facebook/dinov2-base --input-size 448",
        ],
    )
    what = parser.add_argument_group("what is looked at")
    what.add_argument(
        "target", metavar="TARGET", help="a store, a file of factors, or a model's name or folder"
    )
    model = parser.add_argument_group("if it is a model")
    model.add_argument(
        "--input-size",
        type=size,
        metavar="SIZE",
        help="448 or 224x448 (height x width), if not the model's own",
    )
    model.add_argument("--revision", help="branch, tag or commit of a hub model")


def _run_info(args: argparse.Namespace) -> None:
    import vitxr
    from vitxr.store.layout import is_laid_out
    from vitxr.store.location import Location

    path = Path(args.target)
    is_file = path.suffix in (".zarr", ".nc", ".mat")
    if is_file or (path.exists() and not (path / "config.json").exists()):
        for option in ("input_size", "revision"):
            if getattr(args, option) is not None:
                raise ArgumentError(
                    f"--{option.replace('_', '-')} goes with a model; {args.target!r} is none."
                )
        if not (is_file or path.joinpath("zarr.json").exists() or is_laid_out(Location(path))):
            raise ArgumentError(
                f"{args.target!r} is neither a store (it holds no zarr.json) nor a model (it holds "
                "no config.json); expected a store that vitxr extract wrote, a file of factors, or "
                "a model's name or folder."
            )
        result = vitxr.open(args.target)
        print(sizes(result))
        for key, value in result.attrs.items():
            print(f"  {key}: {value}")
        return
    from vitxr.models.catalog import known_models
    from vitxr.models.cost import operations, seconds

    model = vitxr.load_model(args.target, revision=args.revision, input_size=args.input_size)
    known: dict[str, Any] = known_models().get(args.target, {})
    lines: dict[str, str] = {
        **model.summary(),
        **{key: str(known[key]) for key in ("family", "licence", "expect") if key in known},
        "one frame": f"{operations(model) / 1e9:.3g} GFLOP, {seconds(model):.3g} s here",
        "weights SHA-256": model.fingerprint,
    }
    for key, text in lines.items():
        print(f"{key:>16}  {text}")
