"""Write the table of families in docs/models.md from the tests that pass; --check only compares."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
#: Columns of the table, by the test that speaks for them.
COLUMNS = {
    "test_block_output": "blocks, embedding",
    "test_prefix_tokens": "prefix tokens",
    "test_attention": "attention",
    "test_classes": "classes",
    "test_own_preprocessing": "own preprocessing",
    "test_other_image_sizes": "other sizes",
}
BEGIN, END = (f"<!-- families: {word}" for word in ("begin", "end"))


class Outcomes:
    """What became of each family in each test, as pytest reports it."""

    def __init__(self) -> None:
        self.passed: dict[str, dict[str, bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one phase of one test."""
        found = re.search(r"::(test_\w+)\[(.+)\]$", report.nodeid)
        if found and (found[1] in COLUMNS or found[1] == "test_structure"):
            row = self.passed.setdefault(found[2], {})
            row[found[1]] = row.get(found[1], True) and report.outcome == "passed"


def table() -> str:
    """Run the tests and return the table."""
    outcomes = Outcomes()
    status = pytest.main(
        ["-q", "--no-header", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_families.py")],
        plugins=[outcomes],
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not outcomes.passed:
        sys.exit(f"the tests of the families did not run (pytest's exit status {int(status)})")
    head = ("family", *COLUMNS.values())
    lines = [head, tuple("---" for _ in head)]
    for family, row in outcomes.passed.items():
        if "test_structure" in row:
            marks = ({None: "-", True: "yes", False: "no"}[row.get(test)] for test in COLUMNS)
            lines.append((family, *marks))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    first, _, tail = rest.partition("\n")
    _, _, after = tail.partition(END)
    text = f"{before}{BEGIN}{first}\n{table()}\n{END}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE} is not what the tests say: run python scripts/families.py")
