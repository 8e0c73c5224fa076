"""The command line's pages of help, and the commands that pages of the documentation show."""

import re
import shlex
from pathlib import Path

import pytest

from vitxr.cli import _parser, main

ROOT = Path(__file__).parent.parent
PARSER = _parser()
COMMANDS = next(a for a in PARSER._actions if a.dest == "command").choices
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def typed(text):
    """The commands in a text, lines that go on joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("vitxr ")]


def parsed(line):
    """What the command line makes of a line, which must not end it."""
    try:
        return PARSER.parse_args(shlex.split(line, comments=True)[1:])
    except SystemExit:
        pytest.fail(f"{line!r} is not understood")


def page(capsys, monkeypatch, *command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_page_of_help(name, capsys, monkeypatch):
    text = page(capsys, monkeypatch, name)
    usage, purpose, *_, shown = text.split("\n\n")
    assert usage.startswith(f"usage: vitxr {name}")
    assert len(usage.splitlines()) == 1
    assert purpose.endswith(".")
    assert len(purpose) > 100
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"\(default: *(\)|None|False)", text) is None
    assert shown.startswith("examples:\n")
    lines = typed(shown)
    assert len(lines) >= 2
    for line in lines:
        assert parsed(line).command == name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_argument_says_what_it_is(name):
    parser = COMMANDS[name]
    usage = parser.format_usage()
    for action in parser._actions:
        assert action.help, action.dest
        assert not action.help.endswith("."), action.dest
        if action.required:
            assert (action.option_strings or [action.metavar])[-1] in usage


def test_the_first_page(capsys, monkeypatch):
    text = page(capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 80
    lines = typed(text.partition("examples:")[2])
    assert {parsed(line).command for line in lines} <= set(COMMANDS)
    assert len(lines) >= 5
    for name in COMMANDS:
        assert re.search(rf"^    {name} +[a-z]", text, re.MULTILINE), name


def test_commands_that_pages_show():
    lines = [
        line
        for path in PAGES
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
        for line in typed(block)
    ]
    assert len(lines) > 8
    for line in lines:
        parsed(line)
