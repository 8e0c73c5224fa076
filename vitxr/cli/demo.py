"""``vitxr demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitxr.cli.arguments import add_quiet, command

__all__ = ["add_demo"]


def add_demo(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "demo",
        _run_demo,
        "Run the whole analysis on the bundled model and write a report. Images, shifts, "
        "activations, neuron tensors, ensembles over ranks, embeddings, pictures: 4 classes x 5 "
        "handwritten digits, 121 shifts, the first and the last block. Works without a network.",
        "[--output FOLDER] [--quiet]",
        ["vitxr demo", "vitxr demo --output trial"],
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("demo"), help="new folder to write"
    )
    add_quiet(parser)


def _run_demo(args: argparse.Namespace) -> None:
    from vitxr.demo import run_demo

    report = run_demo(args.output, progress=not args.quiet)
    print(f"The report is {report}")
