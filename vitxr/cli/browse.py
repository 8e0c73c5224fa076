"""``vitxr browse``."""

from __future__ import annotations

import argparse
from typing import Any

from vitxr.cli.arguments import command

__all__ = ["add_browse"]


def add_browse(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "browse",
        _run_browse,
        "Browse a store in a web browser. Stimuli, attention, feature maps, factors, embedding and "
        "responses are linked: draw around neurons on the manifold, and see where they lie on the "
        "patch grid and what drives them. Ends with Ctrl-C.\n\nOnly this machine is listened to. "
        "For another address a password is needed: it is taken from the environment variable "
        "VITXR_BROWSE_PASSWORD, or asked for.",
        "STORE [--factors FILE] [options]",
        [
            "vitxr browse run.zarr",
            "vitxr browse run.zarr --factors factors.nc",
            "vitxr browse run.zarr --factors ensemble.zarr --port 0 --no-show",
        ],
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument("store", metavar="STORE", help="store that vitxr extract wrote")
    what.add_argument(
        "--factors",
        metavar="FILE",
        help="factors or an ensemble that vitxr factorize wrote of this store",
    )
    where = parser.add_argument_group("where it is served")
    where.add_argument(
        "--port", type=int, default=5006, metavar="N", help="port; 0 for any that is free"
    )
    where.add_argument("--address", default="127.0.0.1", help="address to listen on")
    where.add_argument("--no-show", action="store_true", help="do not open a web browser")


def _run_browse(args: argparse.Namespace) -> None:
    try:
        from vitxr.app.serve import serve
    except ImportError as error:
        from vitxr.errors import DependencyError

        raise DependencyError(
            f"the browser needs Panel and HoloViews, and {error.name!r} is missing: install them "
            "with `pip install 'vitxr[plot]'`."
        ) from error
    serve(args.store, args.factors, port=args.port, address=args.address, show=not args.no_show)
