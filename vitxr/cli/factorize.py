"""``vitxr factorize``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitxr.cli.arguments import add_quiet, command, maps, numbers
from vitxr.cli.show import amount
from vitxr.errors import ArgumentError
from vitxr.memory import available as _available

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["add_factorize"]

#: Feature maps that are factorized by default.
_MAPS = 20


def add_factorize(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "factorize",
        _run_factorize,
        "Factorize the neuron tensor of one block. Its neurons (feature map x patch), images and "
        "shifts are written as a sum of components, each a group of neurons that respond alike. "
        "One rank and one replicate give factors, more give an ensemble with the agreement of its "
        "fits.\n\nA tensor of more than half of the memory that is available is not loaded: each "
        "iteration of ncp_hals reads it from the store. Ctrl-C keeps the fits that are finished.",
        "STORE OUTPUT --layer N --rank RANKS [options]",
        [
            "vitxr factorize run.zarr factors.nc --layer 0 --rank 25",
            "vitxr factorize run.zarr ensemble.nc --layer 0 --rank 20,25,30 --replicates 3",
            "vitxr factorize run.zarr more.nc --layer 0 --rank 20,25,30 --replicates 5 \\",
            "    --resume ensemble.nc",
        ],
    )
    what = parser.add_argument_group("what is factorized")
    add = what.add_argument
    add("store", metavar="STORE", help="store that vitxr extract wrote")
    add("output", metavar="OUTPUT", type=Path, help="file to write, ending in .nc or .zarr")
    add("--layer", type=int, required=True, metavar="N", help="block, from 0; required")
    add(
        "--feature-maps",
        type=maps,
        default=argparse.SUPPRESS,
        metavar="MAPS",
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
    how = parser.add_argument_group("how it is fitted")
    add = how.add_argument
    add(
        "--rank",
        type=numbers,
        required=True,
        metavar="RANKS",
        help="number of components; several, as 20,25,30, fit an ensemble; required",
    )
    add("--replicates", type=int, default=1, metavar="N", help="fits a rank, from distinct seeds")
    add(
        "--method",
        default="ncp_hals",
        help="ncp_hals, our nonnegative CP, or a tensorly decomposition by its name",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the random starts")
    add("--tol", type=float, default=1e-5, help="stop when the objective improves by less")
    add("--max-iter", type=int, default=500, metavar="N", help="iterations at most")
    add(
        "--floors",
        action="store_true",
        help="fit shuffled data as well, for what agreement there is by chance",
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume",
        metavar="FILE",
        help="ensemble that this command wrote when it was interrupted, or with fewer ranks or "
        "replicates: its fits are kept",
    )
    add_quiet(running)


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
    room = "" if available is None else f", and {amount(available)} of memory are available"
    print(f"The tensor has {amount(t.nbytes)}{room}: it is not loaded")
    return t
