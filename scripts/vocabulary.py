"""Write docs/vocabulary.md from the registry of names; --check only compares."""

import sys
from pathlib import Path

from vitxr.names import DIMS, LATTICE, VARIABLES

PAGE = Path(__file__).parent.parent / "docs" / "vocabulary.md"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page() -> str:
    """Return the page."""
    variables = [
        (
            f"`{name}`",
            " or ".join("(" + ", ".join(form) + ")" for form in v.dims),
            v.units or "-",
            v.meaning.replace("|", "\\|"),
        )
        for name, v in VARIABLES.items()
    ]
    return (
        "# Vocabulary\n\n"
        "Every name that vitxr gives, made from `vitxr.names`. Dimensions stand in this order "
        f"wherever they occur: {', '.join(f'`{d}`' for d in LATTICE)}.\n\n"
        "## Dimensions\n\n"
        + table(("dimension", "meaning"), [(f"`{k}`", v) for k, v in DIMS.items()])
        + "\n\n## Variables and coordinates\n\n"
        + table(("name", "dimensions", "unit", "meaning"), variables)
        + "\n"
    )


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text("utf-8") != text:
            sys.exit(f"{PAGE} is not what vitxr.names says: run python scripts/vocabulary.py")
    else:
        PAGE.write_text(text, "utf-8")
