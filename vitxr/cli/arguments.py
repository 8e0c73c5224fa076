"""What the commands share: how one is added and its page of help, and the types of arguments."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = [
    "Page",
    "add_quiet",
    "batch",
    "command",
    "examples",
    "layers",
    "maps",
    "modules",
    "numbers",
    "queries",
    "size",
    "workers",
]


class Page(argparse.HelpFormatter):
    """A page of help: paragraphs filled, examples as they are, a default where there is one."""

    def add_argument(self, action: argparse.Action) -> None:
        """Count an action's width in."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # they stand further in, which argparse forgets

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [
            part if part.startswith("examples:") else textwrap.fill(part, width)
            for part in text.split("\n\n")
        ]
        return textwrap.indent("\n\n".join(parts), indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        none = default is None or default is False or default in ("", argparse.SUPPRESS)
        if none or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


def examples(lines: Sequence[str]) -> str:
    """Lay examples out for the end of a page of help."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def command(
    commands: Any, name: str, run: Any, text: str, usage: str, lines: Sequence[str]
) -> argparse.ArgumentParser:
    """Add a command that runs ``run``.

    The first sentence of its text stands in the list of commands; ``usage`` is what follows the
    command's name; ``lines`` are examples, as one would type them.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text[0].lower() + text[1:].split(".")[0],
        description=text,
        usage=f"vitxr {name} {usage}",
        epilog=examples(lines),
        formatter_class=Page,
    )
    parser.set_defaults(run=run)
    return parser


def add_quiet(parser: Any) -> None:
    """Add ``--quiet`` to a parser or a group."""
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")


def numbers(text: str) -> list[int]:
    """0,11."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers separated by commas, such as 0,11"
        ) from None


def layers(text: str) -> list[int] | str:
    """0,11 or all."""
    return text if text == "all" else numbers(text)


def maps(text: str) -> int | list[int] | None:
    """A count, a list (of one: 3,), or all."""
    if text == "all":
        return None
    channels = numbers(text.rstrip(","))
    return channels[0] if len(channels) == 1 and not text.endswith(",") else channels


def queries(text: str) -> str | list[int | tuple[int, ...]]:
    """``prefix``, ``patches``, or tokens 0,3:4."""
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


def modules(text: str) -> dict[str, str]:
    """NAME=PATH, several separated by commas."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and path for name, _, path in pairs) or len({n for n, *_ in pairs}) < len(
        pairs
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=PATH, several separated by commas, such as "
            "gate=layers.{layer}.mlp.fc1"
        )
    return {name: path for name, _, path in pairs}


def size(text: str) -> int | tuple[int, int]:
    """224 or 224x448, height first."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 224 or 224x224 (height x width)")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def batch(text: str) -> int | str:
    """A number of frames, or auto."""
    return text if text == "auto" else int(text)


def workers(text: str) -> int | list[str]:
    """A number of processes, or the device of each."""
    try:
        return int(text)
    except ValueError:
        return text.split(",")
