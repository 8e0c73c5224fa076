"""``vitxr catalog``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitxr.cli.arguments import command
from vitxr.cli.show import amount
from vitxr.errors import ArgumentError

__all__ = ["add_catalog"]


def add_catalog(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "catalog",
        _run_catalog,
        "List the stores of a catalog, or add a finished store to it. A catalog is a YAML file "
        "that says of every store what is in it, how it was made and under which licence; Intake "
        "reads it as it is. Without a file, the catalog that comes with vitxr is listed.",
        "[CATALOG] [--add STORE [options]]",
        [
            "vitxr catalog",
            "vitxr catalog lab.yaml",
            "vitxr catalog lab.yaml --add run.zarr --licence 'CC BY 4.0'",
        ],
    )
    what = parser.add_argument_group("what is listed")
    what.add_argument("catalog", metavar="CATALOG", type=Path, nargs="?", help="YAML file")
    new = parser.add_argument_group("a new entry")
    add = new.add_argument
    add("--add", metavar="STORE", help="store to add; the catalog is made if there is none")
    add("--name", help="name of the entry; the store's own if not given")
    add("--description", metavar="TEXT", default="", help="what it is")
    add("--licence", metavar="TEXT", default="", help="under which terms it may be used")


def _run_catalog(args: argparse.Namespace) -> None:
    import vitxr

    if args.add is None:
        if args.name or args.description or args.licence:
            raise ArgumentError("--name, --description and --licence go with --add STORE.")
        for name, row in vitxr.catalog.entries(args.catalog).iterrows():
            said = [] if row["bytes"] is None else [amount(row["bytes"])]
            said += [row["model"] or "no model", row["licence"] or "no licence given"]
            print(f"{name}  {', '.join(said)}")
            for text in (row["description"], row["url"]):
                if text:
                    print(f"  {text}")
        return
    if args.catalog is None:
        raise ArgumentError("--add takes a catalog: vitxr catalog lab.yaml --add run.zarr")
    name = vitxr.catalog.add(
        args.add,
        args.catalog,
        name=args.name,
        description=args.description,
        licence=args.licence,
    )
    print(f"{name} is in {args.catalog}")
