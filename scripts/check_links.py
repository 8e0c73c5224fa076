"""Fail if a Markdown page links to a file or heading that is not there."""

import re
import sys
from pathlib import Path

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def broken(page: Path) -> list[str]:
    """Return the page's links that lead nowhere."""
    out = []
    for match in LINK.finditer(page.read_text("utf-8")):
        target = match.group(1) or match.group(2)
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            out.append(f"{page}: {target}")
    return out


if __name__ == "__main__":
    roots = [Path(a) for a in sys.argv[1:]]
    pages = [p for r in roots for p in ([r] if r.is_file() else sorted(r.rglob("*.md")))]
    bad = [line for page in pages for line in broken(page)]
    if bad or not pages:
        sys.exit("broken links:\n" + "\n".join(bad) if bad else "no pages found")
