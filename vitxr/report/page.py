"""The self-contained page: headings, sentences, pictures and tables as one HTML file.

Knows nothing of what is reported. Pictures are drawn when all are known, and
embedded as data URIs; the page has no script and refers to nothing outside itself.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from vitxr import plot

__all__ = ["Page", "Picture"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --line: #d9dde1;
  --page: #ffffff; --panel: #f5f6f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a3aab2; --line: #3a4047;
  --page: #16181b; --panel: #1f2226; --link: #7db7f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; max-width: 48rem; }
.lead { font-size: 1.08rem; }
.soft, figcaption { color: var(--soft); }
a { color: var(--link); }
nav { background: var(--panel); border-radius: .5rem; padding: .7rem 1.1rem; margin: 1.2rem 0; }
nav h2 { border: 0; margin: 0; padding: 0; font-size: 1rem; }
nav ol { margin: .3rem 0 0; padding-left: 1.3rem; columns: 17rem; }
figure { margin: 1.1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .4rem; padding: .5rem; }
figcaption { font-size: .92rem; margin-top: .45rem; max-width: 48rem; }
.row { display: grid; gap: 0 1.4rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
footer { padding-top: 1rem; padding-bottom: 3rem; color: var(--soft); font-size: .9rem; }
@media print { nav { display: none; } figure { break-inside: avoid; } }
"""


#: Points of the screen a pixel of a picture: sharp on dense screens, text of 7 pt still legible.
_SIZE = 0.62


@dataclass
class Picture:
    """File name without ending, what to draw, what it shows, and its bytes once drawn."""

    name: str
    element: Any
    alt: str
    caption: str
    files: dict[str, bytes] = field(default_factory=dict)

    def draw(self) -> None:
        """Draw as PNG and PDF, and let go of the element."""
        self.files = plot.render(self.element, ("png", "pdf"), dpi=200)
        self.element = None

    def html(self) -> str:
        """A figure with the PNG inside, as large as the window allows."""
        png = self.files["png"]
        width, height = (int.from_bytes(png[k : k + 4], "big") for k in (16, 20))
        data = base64.b64encode(png).decode("ascii")
        size = f'width="{round(width * _SIZE)}" height="{round(height * _SIZE)}"'
        return (
            f'<figure id="{escape(self.name)}"><img src="data:image/png;base64,{data}" '
            f'alt="{escape(self.alt, quote=True)}" {size}>'
            f"<figcaption>{self.caption}</figcaption></figure>"
        )


@dataclass
class Page:
    """Sections in order; text is HTML already, made with :meth:`text` where it is not."""

    title: str
    lead: str = ""
    sections: list[tuple[str, list[str | tuple[Picture, ...]]]] = field(default_factory=list)

    @staticmethod
    def text(value: Any) -> str:
        """Escape text for HTML."""
        return escape(str(value), quote=True)

    def section(self, heading: str) -> None:
        """Begin a section."""
        self.sections.append((heading, []))

    def add(self, html: str) -> None:
        """Add a block of HTML to the section."""
        self.sections[-1][1].append(html)

    def say(self, *sentences: str) -> None:
        """Add a paragraph."""
        self.add(f"<p>{' '.join(sentences)}</p>")

    def part(self, heading: str) -> None:
        """Begin a part of the section."""
        self.add(f"<h3>{self.text(heading)}</h3>")

    def show(self, *pictures: Picture) -> None:
        """Add pictures, side by side where the window is wide enough."""
        self.sections[-1][1].append(pictures)

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, in order."""
        blocks = (block for _, section in self.sections for block in section)
        return [picture for block in blocks if not isinstance(block, str) for picture in block]

    def draw(self, progress: bool = True) -> None:
        """Draw every picture."""
        from tqdm.auto import tqdm

        for picture in tqdm(self.pictures, desc="report", unit="picture", disable=not progress):
            picture.draw()

    def table(self, rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> None:
        """Add a table whose first column names the row."""
        top = ""
        if head:
            cells = "".join(f'<th scope="col">{self.text(h)}</th>' for h in head)
            top = f"<thead><tr>{cells}</tr></thead>"
        body = ""
        for name, *values in rows:
            cells = "".join(f"<td>{self.text(v)}</td>" for v in values)
            body += f'<tr><th scope="row">{self.text(name)}</th>{cells}</tr>'
        self.add(f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>')

    def html(self) -> str:
        """The whole page."""
        anchors = [re.sub(r"[^a-z0-9]+", "-", h.lower()).strip("-") for h, _ in self.sections]
        contents = "".join(
            f'<li><a href="#{a}">{self.text(h)}</a></li>'
            for a, (h, _) in zip(anchors, self.sections, strict=True)
        )
        body = "\n".join(
            f'<section aria-labelledby="{a}"><h2 id="{a}">{self.text(h)}</h2>\n'
            + "\n".join(map(_block, blocks))
            + "</section>"
            for a, (h, blocks) in zip(anchors, self.sections, strict=True)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{self.text(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f'<header><h1>{self.text(self.title)}</h1><p class="lead">{self.lead}</p></header>\n'
            f'<main>\n<nav aria-label="Contents"><h2>Contents</h2><ol>{contents}</ol></nav>\n'
            f"{body}\n</main>\n"
            "<footer>One file: it needs no network, and the pictures are in the folder "
            "<code>figures</code> beside it as PNG and PDF.</footer>\n</body>\n</html>\n"
        )

    def write(self, folder: Path) -> Path:
        """Write the figures, then the page; the page appears whole or not at all."""
        figures = folder / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            for ending, content in picture.files.items():
                (figures / f"{picture.name}.{ending}").write_bytes(content)
        path = folder / "report.html"
        part = folder / ".report.html.part"
        part.write_text(self.html(), encoding="utf-8")
        part.replace(path)
        return path


def _block(block: str | tuple[Picture, ...]) -> str:
    if isinstance(block, str):
        return block
    html = "\n".join(picture.html() for picture in block)
    return html if len(block) == 1 else f'<div class="row">{html}</div>'
