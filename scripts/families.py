"""Write the table of families in docs/models.md from the tests that pass; --check only compares.

    python scripts/families.py [--check] [--timm FOLDER]

A row is what a test is about, a column the test's name: "yes" where that test passed for that row,
"-" where there is none. timm's are run in a process of their own, with the folder that
`make test-timm` installs timm to.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
#: Tests that speak for a row, by the columns they speak for; all of a column must have passed.
COLUMNS = {
    "blocks": ["test_block_output"],
    "embedding": ["test_embedding"],
    "prefix": ["test_prefix_tokens"],
    "attention": ["test_attention", "test_attention_is_timms_own"],
    "queries, keys, values": [
        "test_queries_keys_values", "test_queries_and_keys", "test_values_and_output",
    ],
    "attention output": ["test_attention_output", "test_values_and_output"],
    "MLP units": ["test_mlp_hidden", "test_the_residual_adds_up"],
    "modules": ["test_modules"],
    "classes": ["test_classes"],
    "own preprocessing": ["test_own_preprocessing", "test_preprocessing"],
    "other sizes": ["test_other_image_sizes"],
    "sides that differ": ["test_sides_that_differ"],
}  # fmt: skip
BEGIN, END = (f"<!-- families: {word}" for word in ("begin", "end"))


def outcomes(paths: list[Path], folder: Path | None = None) -> dict[str, dict[str, bool]]:
    """Run tests; return whether each test passed, for each row."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if folder is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), env.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", f"--confcutdir={paths[0].parent}", *map(str, paths)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():
            sys.exit(f"the tests of the families did not run:\n{done.stdout}{done.stderr}")
        cases = list(ET.parse(report).iter("testcase"))
    if any(case.find("skipped") is not None for case in cases):
        sys.exit(f"tests of {paths[0].parent} were skipped: is everything installed?")
    found: dict[str, dict[str, bool]] = {}
    for case in cases:
        named = re.fullmatch(r"(test_\w+)\[(.+?)(-shape\d)?\]", case.get("name", ""))
        if named:
            row = found.setdefault(named[2], {})
            passed = not any(case.findall(kind) for kind in ("failure", "error"))
            row[named[1]] = row.get(named[1], True) and passed
    return found


def table(timm: Path) -> str:
    """Run the tests and return the table."""
    tests = ROOT / "tests"
    if not (timm / "timm").is_dir():
        sys.exit(f"no timm in {timm}: run `make test-timm`, which installs it there, or --timm")
    rows = outcomes([tests / "test_families.py", tests / "test_adapter_inside.py"])
    rows = {name: row for name, row in rows.items() if "test_structure" in row}
    beside = [tests / "timm" / "test_timm.py", tests / "timm" / "test_timm_sites.py"]
    # Those with a space in their name are variants that a test of its own wants.
    made = {name: row for name, row in outcomes(beside, timm).items() if re.match(r"\w+$", name)}
    made = {name: row for name, row in made.items() if "test_block_output" in row}
    rows |= {f"timm:{name}": row for name, row in made.items()}
    head = ("family", *COLUMNS)
    lines = [head, tuple("---" for _ in head)]
    for family, row in rows.items():
        spoken = [[row[test] for test in column if test in row] for column in COLUMNS.values()]
        lines.append((family, *("-" if not s else "yes" if all(s) else "no" for s in spoken)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--timm", type=Path, default=Path(f"{sys.prefix}-timm"), help="its folder")
    args = parser.parse_args()
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    first, _, tail = rest.partition("\n")
    _, _, after = tail.partition(END)
    text = f"{before}{BEGIN}{first}\n{table(args.timm)}\n{END}{after}"
    if not args.check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE} is not what the tests say: run python scripts/families.py")
