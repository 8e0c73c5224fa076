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
        "Browse a store in a web browser: stimuli, attention, feature maps, factors, embedding and "
        "responses, linked. Listens on this machine only; for another address the password is "
        "taken from VITXR_BROWSE_PASSWORD or asked for.",
    )
    add = parser.add_argument
    add("store", help="store that vitxr extract wrote")
    add("--factors", metavar="FILE", help="factors or an ensemble that vitxr factorize wrote of it")
    add("--port", type=int, default=5006, help="port to listen on; 0 for any that is free")
    add("--address", default="127.0.0.1", help="address to listen on")
    add("--no-show", action="store_true", help="do not open a browser")


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
