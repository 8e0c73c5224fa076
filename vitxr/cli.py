"""The command ``vitxr``: arguments to the same public functions."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitxr import __version__
from vitxr.errors import ArgumentError, StoreError, VitxrError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["main"]

#: Feature maps that are factorized by default.
_MAPS = 20

_EPILOG = """\
examples:
  vitxr demo                                     the whole analysis on the bundled model
  vitxr extract photos/ run.zarr --model google/vit-base-patch16-224 --layers 0,11
  vitxr factorize run.zarr factors.nc --layer 0 --rank 25
  vitxr verify run.zarr
  vitxr info run.zarr

exit status: 0 done, 1 refused or failed (one message says why), 2 usage, 130 interrupted,
143 terminated
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = _parser().parse_args(argv)
    terminated: list[bool] = []
    try:
        with _terminable(terminated):
            args.run(args)
    except VitxrError as error:
        print(f"vitxr {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        what = "terminated" if terminated else "interrupted"
        left = f": {stop}" if str(stop) else _left(args)
        print(f"vitxr {args.command}: {what}{left}", file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"vitxr {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _terminable(terminated: list[bool]) -> Iterator[None]:
    """Let a SIGTERM, as batch systems send before they kill, end the command as Ctrl-C does."""

    def stop(*_: Any) -> None:
        terminated.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _left(args: argparse.Namespace) -> str:
    """Say what an interrupted extraction has left, and how to go on."""
    from vitxr.store.files import unfinished

    done = unfinished(args.store) if args.command == "extract" and not args.dry_run else None
    return f": {done}. The same command goes on from there." if done else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitxr",
        description="What a Vision Transformer's neurons do: activations under image shifts, "
        "neuron tensors, nonnegative factors, embeddings, a report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vitxr {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _demo(commands)
    _extract(commands)
    _factorize(commands)
    _verify(commands)
    _info(commands)
    return parser


class _Help(argparse.HelpFormatter):
    """Show a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text[0].lower() + text[1:].split(".")[0],
        description=text,
        formatter_class=_Help,
    )
    parser.set_defaults(run=run)
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers separated by commas, such as 0,11"
        ) from None


def _layers(text: str) -> list[int] | str:
    return text if text == "all" else _numbers(text)


def _maps(text: str) -> int | list[int] | None:
    if text == "all":
        return None
    numbers = _numbers(text.rstrip(","))
    return numbers[0] if len(numbers) == 1 and not text.endswith(",") else numbers


def _queries(text: str) -> str | list[int | tuple[int, ...]]:
    if text in ("prefix", "patches"):
        return text
    try:
        tokens = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected prefix, patches, or tokens separated by commas: numbers, or "
            "row:column of patches, such as 0,3:4"
        ) from None
    return [token[0] if len(token) == 1 else token for token in tokens]


def _modules(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and path for name, _, path in pairs) or len({n for n, *_ in pairs}) < len(
        pairs
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=PATH, several separated by commas, such as "
            "gate=layers.{layer}.mlp.fc1"
        )
    return {name: path for name, _, path in pairs}


def _size(text: str) -> int | tuple[int, int]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 224 or 224x224 (height x width)")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _batch(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _workers(text: str) -> int | list[str]:
    try:
        return int(text)
    except ValueError:
        return text.split(",")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _run_demo,
        "Run the whole analysis on the bundled model and write a report. Works offline; 4 classes "
        "x 5 held-out digits, 121 shifts, first and last block, ensembles over ranks.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="new folder to write")
    _add_quiet(parser)


def _run_demo(args: argparse.Namespace) -> None:
    from vitxr.demo import run_demo

    report = run_demo(args.output, progress=not args.quiet)
    print(f"The report is {report}")


def _extract(commands: Any) -> None:
    parser = _command(
        commands,
        "extract",
        _run_extract,
        "Run a model on shifted images and write its activations. An interrupted run goes on where "
        "it stopped when the same command is given again.",
    )
    add = parser.add_argument
    add(
        "source",
        help="folder of images (one subfolder a class), image, .npy stack; or the name "
        "of a dataset: digits, photos",
    )
    add("store", help="Zarr store to write, ending in .zarr: a folder, or a URL (s3://...)")
    add(
        "--model",
        default="google/vit-base-patch16-224",
        help="'digits' (bundled), a hub id, timm:NAME, or a folder written by save_pretrained",
    )
    add("--revision", help="branch, tag or commit of a hub model")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--input-size", type=_size, help="448 or 224x448 (height x width), if not the model's own")
    add("--layers", type=_layers, default="all", help="blocks, 0-based: 0,11 or all")
    add("--step", type=int, default=11, help="pixels between shifts; 0 for no shifts")
    add(
        "--scheme",
        choices=["grid", "raster"],
        default="grid",
        help="a true lattice, or the original notebook's order",
    )
    add(
        "--variables",
        default="activation",
        help="some of activation,prefix,embedding,attention,attention_query,attention_key,"
        "attention_value,attention_output,mlp_hidden,logits",
    )
    add(
        "--feature-maps",
        type=_maps,
        default="all",
        help="channels kept: a count (the most active), a list 3,17,200 (one: 3,) or all",
    )
    add("--heads", type=_numbers, help="heads kept of attention: 0,5; all if not given")
    add(
        "--queries",
        type=_queries,
        help="tokens whose attention is kept: prefix, patches, or tokens 0,3:4 (numbers, or "
        "row:column of a patch); all if not given",
    )
    add(
        "--modules",
        type=_modules,
        metavar="NAME=PATH",
        help="more variables, outputs of modules: gate=layers.{layer}.mlp.fc1,norm=vit.layernorm",
    )
    add(
        "--preprocess",
        choices=["model", "raw"],
        default="model",
        help="the model's own, or pixel values 0..255 as they are",
    )
    add("--per-class", type=int, help="images of each class; all if not given")
    add("--size", type=_size, help="thumbnail within 224, or resize to 224x224 (height x width)")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the forward")
    add(
        "--storage-dtype",
        default="float32",
        help="float32; float16; or bitroundN, float32 rounded to N mantissa bits and compressed",
    )
    add("--batch-size", type=_batch, default="auto", help="frames a forward pass takes")
    add(
        "--workers",
        type=_workers,
        default=1,
        help="processes: a number, or a device for each, such as cuda:0,cuda:1",
    )
    add("--dry-run", action="store_true", help="say what it would cost, and write nothing")
    _add_quiet(parser)


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
    print(_sizes(ds))
    print(f"The store is {args.store}")


def _factorize(commands: Any) -> None:
    parser = _command(
        commands,
        "factorize",
        _run_factorize,
        "Factorize the neuron tensor of one block. One rank and one replicate give factors, more "
        "give an ensemble. A tensor of more than half of the memory that is available is not "
        "loaded: each iteration of ncp_hals reads it from the store.",
    )
    add = parser.add_argument
    add("store", help="store that vitxr extract wrote")
    add("output", type=Path, help="file to write, ending in .nc or .zarr")
    add("--layer", type=int, required=True, help="block, 0-based")
    add(
        "--rank",
        type=_numbers,
        required=True,
        metavar="RANKS",
        help="number of components; several, as 20,25,30, fit an ensemble",
    )
    add("--replicates", type=int, default=1, help="fits a rank, from distinct seeds")
    add(
        "--feature-maps",
        type=_maps,
        default=argparse.SUPPRESS,
        help="maps kept: a count (the most active), a list of channels (one: 3,) or all; 20 if not "
        "given, or all of a store that keeps fewer",
    )
    add(
        "--ranking",
        choices=["first_frame", "mean"],
        default="first_frame",
        help="what the count ranks by; mean needs a store of all maps",
    )
    add("--matrix", action="store_true", help="factorize the mean over shifts (neuron x image)")
    add("--method", default="ncp_hals", help="ncp_hals, or a tensorly decomposition by its name")
    add("--seed", type=int, default=0, help="seed of the random starts")
    add("--tol", type=float, default=1e-5, help="stop when the objective improves by less")
    add("--max-iter", type=int, default=500, help="iterations at most")
    add(
        "--floors",
        action="store_true",
        help="fit shuffled data as well, for what agreement there is by chance",
    )
    add(
        "--resume",
        metavar="FILE",
        help="ensemble that this command wrote when it was interrupted, or with fewer ranks or "
        "replicates: its fits are kept",
    )
    _add_quiet(parser)


def _run_factorize(args: argparse.Namespace) -> None:
    import xarray as xr

    import vitxr
    from vitxr.factor.interrupts import held

    if args.output.exists():
        raise ArgumentError(f"{str(args.output)!r} exists: name another file, or delete it.")
    if args.output.suffix not in (".nc", ".zarr"):
        raise ArgumentError(f"output {str(args.output)!r}: expected a name ending in .nc or .zarr.")
    if not os.access(args.output.absolute().parent, os.W_OK):
        raise ArgumentError(f"the folder of {str(args.output)!r} is missing or not writable.")
    single = len(args.rank) == 1 and args.replicates == 1
    if single and (args.floors or args.resume):
        raise ArgumentError(
            f"{'--floors' if args.floors else '--resume'} is for ensembles: give several ranks, "
            "or --replicates 2 or more."
        )
    resume = vitxr.open(args.resume) if args.resume else None
    ds = vitxr.open(args.store)
    if not isinstance(ds, xr.Dataset):
        raise ArgumentError(
            f"{str(args.store)!r} holds a {type(ds).__name__}; expected a store of activations "
            "that vitxr extract wrote."
        )
    t = _loaded(_tensor(ds, args))
    options = {
        "method": args.method,
        "random_state": args.seed,
        "tol": args.tol,
        "max_iter": args.max_iter,
        "progress": not args.quiet,
    }
    result: xr.Dataset | xr.DataTree
    if single:
        result = t.vit.factorize(args.rank[0], **options)
        print(f"objective {float(result['objective']):.4f}")
    else:
        options |= {"floors": args.floors, "resume": resume}
        result = t.vit.fit_ensemble(args.rank, replicates=args.replicates, **options)
        print(result.to_dataset()[["objective", "similarity"]].to_dataframe().to_string())
        if args.resume:
            reused, fits = result.attrs["reused"], result["failed"].size
            print(f"{reused} of {fits} fits are those of {args.resume}, {fits - reused} are new")
    with held():  # what took hours to fit is not lost by a Ctrl-C more
        vitxr.save(result, args.output)
    print(f"Written to {args.output}")
    missing = args.floors and "shuffled_objective" not in result
    if result.attrs.get("interrupted") or missing:
        raise KeyboardInterrupt(
            f"{result.attrs['interrupted']} of {result['failed'].size} fits are left"
            f"{' and the floors' if missing else ''}. The same command with another output and "
            f"--resume {args.output} goes on from there."
        )


def _tensor(ds: xr.Dataset, args: argparse.Namespace) -> xr.DataArray:
    """Make the neuron tensor or matrix, lazily; say so if not given how many feature maps."""
    options: dict[str, Any] = {"layer": args.layer, "ranking": args.ranking}
    if "feature_maps" in args:
        options["feature_maps"] = args.feature_maps
    elif (have := ds.sizes.get("feature_map", _MAPS)) < _MAPS:
        print(f"All {have} feature maps, which is what the store keeps")
        options["feature_maps"] = None
    else:
        print(f"{_MAPS} of {have} feature maps; --feature-maps takes others")
        options["feature_maps"] = _MAPS
    return ds.vit.neuron_matrix(**options) if args.matrix else ds.vit.neuron_tensor(**options)


def _loaded(t: xr.DataArray) -> xr.DataArray:
    """Load a tensor into memory where that leaves as much again for the fits."""
    available = _available()
    if available is not None and 2 * t.nbytes <= available:
        return t.compute()
    room = "" if available is None else f", and {_bytes(available)} of memory are available"
    print(f"The tensor has {_bytes(t.nbytes)}{room}: it is not loaded")
    return t


def _available() -> int | None:
    """Bytes of memory that are available to this process; None where nobody can tell."""
    found = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(known["MemAvailable"].split()[0]) * 1024)
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(found, default=None)


def _verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        _run_verify,
        "Check every byte of a store against the checksums written with it. Exit status 1 if "
        "anything is missing, cut short, altered or not written yet; with --reset, 0 when all that "
        "is damaged was taken back.",
    )
    parser.add_argument("store", help="store that vitxr extract wrote, finished or not")
    parser.add_argument(
        "--reset",
        action="store_true",
        help="take damaged units back: the same vitxr extract, run again, writes them anew",
    )
    _add_quiet(parser)


def _run_verify(args: argparse.Namespace) -> None:
    import vitxr

    found = vitxr.verify(args.store, reset=args.reset, progress=not args.quiet)
    checked = f"{found.attrs['units']} units, {_bytes(found.attrs['bytes'])}"
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


def _info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        _run_info,
        "Say what a store, a file of factors or a model holds.",
    )
    parser.add_argument("target", help="a store, a file of factors, or a model's name or folder")
    parser.add_argument(
        "--input-size", type=_size, help="of a model: 448 or 224x448 (height x width), not its own"
    )


def _run_info(args: argparse.Namespace) -> None:
    import vitxr

    path = Path(args.target)
    is_file = path.suffix in (".zarr", ".nc", ".mat")
    if is_file or (path.exists() and not (path / "config.json").exists()):
        if args.input_size is not None:
            raise ArgumentError(f"--input-size goes with a model; {args.target!r} is none.")
        result = vitxr.open(args.target)
        print(_sizes(result))
        for key, value in result.attrs.items():
            print(f"  {key}: {value}")
        return
    from vitxr.models.catalog import known_models
    from vitxr.models.cost import operations, seconds

    model = vitxr.load_model(args.target, input_size=args.input_size)
    known: dict[str, Any] = known_models().get(args.target, {})
    lines: dict[str, str] = {
        **model.summary(),
        **{key: str(known[key]) for key in ("family", "licence", "expect") if key in known},
        "one frame": f"{operations(model) / 1e9:.3g} GFLOP, {seconds(model):.3g} s here",
        "weights SHA-256": model.fingerprint,
    }
    for key, text in lines.items():
        print(f"{key:>16}  {text}")


def _sizes(result: xr.DataArray | xr.Dataset | xr.DataTree) -> str:
    """List variables with their dims, dtypes and sizes, group by group."""
    import xarray as xr

    if isinstance(result, xr.DataTree):
        parts = [(node.path.strip("/"), node.to_dataset(inherit=False)) for node in result.subtree]
    else:
        ds = result if isinstance(result, xr.Dataset) else result.to_dataset(name=result.name)
        parts = [("", ds)]
    lines = []
    for group, ds in parts:
        for name, array in ds.data_vars.items():
            dims = ", ".join(f"{d}: {n}" for d, n in array.sizes.items())
            where = f"{group}/{name}" if group else str(name)
            lines.append(f"{where} ({dims}) {array.dtype}, {_bytes(array.nbytes)}")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
