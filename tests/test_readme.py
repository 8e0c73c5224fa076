"""The README's commands, one after the other, as a reader would give them."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("torch")

import vitxr
from vitxr.cli import main

TEXT = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_commands_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) if "vitxr" in b)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [c[0] for c in commands] == [
        *("extract", "factorize", "browse", "verify", "info", "catalog")
    ]
    for command in commands:
        if command[0] != "browse":  # which serves until it is stopped: tests/test_serve.py
            quiet = ["--quiet"] if command[0] in ("extract", "factorize", "verify") else []
            assert main([*command, *quiet]) == 0, capsys.readouterr().err
    assert vitxr.open("factors.nc").sizes["component"] == 8
    assert vitxr.catalog.open("run", "lab.yaml").sizes["image"] == 20


def test_the_two_commands_of_set_up_come_first():
    first = re.search(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert [line.split("  ")[0] for line in first[1].splitlines()] == ["make demo", "make test"]
    assert first.start() < 200
