"""The command ``vitxr``: arguments to the same public functions."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vitxr import __version__
from vitxr.cli.arguments import Page, examples
from vitxr.cli.browse import add_browse
from vitxr.cli.catalog import add_catalog
from vitxr.cli.demo import add_demo
from vitxr.cli.extract import add_extract
from vitxr.cli.factorize import add_factorize
from vitxr.cli.stores import add_info, add_verify
from vitxr.errors import VitxrError

__all__ = ["main"]

_TEXT = (
    "Find out what the neurons of a Vision Transformer respond to. Images are shifted circularly, "
    "every shifted image is run, and every activation is kept with its labels (extract); the "
    "neurons are factorized into groups that respond alike (factorize); linked views show the "
    "groups, the images and the shifts (browse). `vitxr COMMAND --help` says more of each."
)
_EXAMPLES = (
    "vitxr demo                       # the whole analysis on the bundled model",
    "vitxr extract photos/ run.zarr --model facebook/dinov2-base --layers 0,11",
    "vitxr factorize run.zarr factors.nc --layer 0 --rank 25",
    "vitxr browse run.zarr --factors factors.nc",
    "vitxr info run.zarr",
)
_STATUS = (
    "Exit status: 0 done; 1 refused or failed, and one message says why; 2 wrong usage; "
    "130 interrupted; 143 terminated."
)


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
        usage="vitxr COMMAND [arguments]",
        description=_TEXT,
        epilog=f"{examples(_EXAMPLES)}\n\n{_STATUS}",
        formatter_class=Page,
    )
    parser.add_argument(
        "--version", action="version", version=f"vitxr {__version__}", help="show the version"
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    add_demo(commands)
    add_extract(commands)
    add_factorize(commands)
    add_browse(commands)
    add_info(commands)
    add_verify(commands)
    add_catalog(commands)
    return parser
