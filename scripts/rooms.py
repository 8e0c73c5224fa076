"""Draw docs/images/rooms.svg, who imports whom, by the rules and the imports that are tested.

Rooms are those of tests/test_imports.py, arrows the imports it finds in vitxr, without those that
follow from others. --check only compares.
"""

import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_imports import FILES, ROOMS, imported_rooms, room  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "rooms.svg"

#: Rooms that all may use stand on a bar of their own; what only starts the command is left out.
GROUND = ("errors", "memory", "names")
LEFT_OUT = ("_version", "__main__")
#: What each room gives.
GIVES = {
    "stimuli": "labelled images, shifts",
    "models": "any ViT, in one form",
    "store": "Zarr on disk",
    "catalog": "stores by name",
    "extract": "activations",
    "tensors": "neuron tensors",
    "matlab": "MATLAB files",
    "factor": "components",
    "analysis": "embeddings, measures",
    "plot": "pictures",
    "report": "one page",
    "app": "linked views",
    "accessor": "ds.vit, t.vit, f.vit",
    "__init__": "import vitxr",
    "demo": "the whole analysis",
    "cli": "the command vitxr",
}
NAMES = {"__init__": "vitxr"}

#: Pixels: a room, the way of an arrow past one, between two, from layer to layer.
WIDE, THIN, GAP, HIGH, STEP, TOP, MARGIN = 156, 12, 26, 44, 88, 76, 12


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports, those that follow from others left out."""
    rooms = [r for r in ROOMS if r not in (*GROUND, *LEFT_OUT)]
    direct: dict[str, set[str]] = {r: set() for r in rooms}
    for path in FILES:
        if room(path) in direct:
            direct[room(path)] |= set(imported_rooms(path)) & set(rooms) - {room(path)}
    above: dict[str, set[str]] = {}
    for name in rooms:  # from top to bottom: what is imported comes first
        above[name] = direct[name].union(*(above[other] for other in direct[name]))
    return {
        name: {o for o in direct[name] if not any(o in above[p] for p in direct[name])}
        for name in rooms
    }


def layered(uses: dict[str, set[str]]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Return layers of rooms, and of places where long arrows pass, and the arrows' pieces."""
    depth: dict[str, int] = {}
    for name, others in uses.items():
        depth[name] = 1 + max((depth[o] for o in others), default=-1)
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in uses:
        layers[depth[name]].append(name)
    pieces = []
    for name, others in uses.items():
        for other in sorted(others):
            last = other
            for level in range(depth[other] + 1, depth[name]):
                place = f"{other}>{name}>{level}"
                layers[level].append(place)
                pieces.append((last, place))
                last = place
            pieces.append((last, name))
    return layers, pieces


def crossings(layers: list[list[str]], pieces: list[tuple[str, str]]) -> int:
    """Count how often arrows cross."""
    at = {name: (level, i) for level, row in enumerate(layers) for i, name in enumerate(row)}
    ends = [(at[a][0], at[a][1], at[b][1]) for a, b in pieces]
    return sum(
        la == lb and (a - c) * (b - d) < 0
        for k, (la, a, b) in enumerate(ends)
        for lb, c, d in ends[:k]
    )


def ordered(layers: list[list[str]], pieces: list[tuple[str, str]]) -> list[list[str]]:
    """Order each layer by the mean place of its neighbours, and keep what crosses least."""
    near: dict[str, list[str]] = {name: [] for row in layers for name in row}
    for a, b in pieces:
        near[a].append(b)
        near[b].append(a)
    best, fewest = [list(row) for row in layers], crossings(layers, pieces)
    rows = [list(row) for row in layers]
    for sweep in range(24):
        levels = range(len(rows)) if sweep % 2 == 0 else reversed(range(len(rows)))
        for level in levels:
            place = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
            rows[level].sort(
                key=lambda name, place=place: _mean(place[o] for o in near[name] or [name])
            )
        if crossings(rows, pieces) < fewest:
            best, fewest = [list(row) for row in rows], crossings(rows, pieces)
    return best


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def placed(layers: list[list[str]], pieces: list[tuple[str, str]]) -> dict[str, float]:
    """Return the middle of each place: near its neighbours, in the layer's order, apart."""
    near: dict[str, list[str]] = {name: [] for row in layers for name in row}
    for a, b in pieces:
        near[a].append(b)
        near[b].append(a)
    middle: dict[str, float] = {}
    offsets = {}
    for row in layers:
        x = 0.0
        for name in row:
            wide = THIN if ">" in name else WIDE
            offsets[name] = x + wide / 2
            x += wide + GAP
        for name in row:
            middle[name] = offsets[name] - (x - GAP) / 2
    for _ in range(60):
        for row in layers:
            wanted = [
                _mean(middle[o] for o in near[name] or [name]) - offsets[name] for name in row
            ]
            for name, shift in zip(row, _rising(wanted), strict=True):
                middle[name] = offsets[name] + shift
    left = min(x - (THIN if ">" in name else WIDE) / 2 for name, x in middle.items())
    return {name: x - left + MARGIN for name, x in middle.items()}


def _rising(values: list[float]) -> list[float]:
    """Return the numbers nearest to these that do not fall (pooling adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [value for value, count in pools for _ in range(count)]


def picture() -> str:
    """Return the picture. Text lies on boxes of its own, so that any page's colour will do."""
    layers, pieces = layered(imports())
    layers = ordered(layers, pieces)
    x = placed(layers, pieces)
    y = {name: TOP + level * STEP for level, row in enumerate(layers) for name in row}
    wide = round(max(x[name] + (THIN if ">" in name else WIDE) / 2 for name in x) + MARGIN)
    high = TOP + (len(layers) - 1) * STEP + HIGH + MARGIN
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
            f'height="{high}" font-family="system-ui, sans-serif" text-anchor="middle">'
        ),
        "<title>The rooms of vitxr, and who imports whom</title>",
        (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#6f7f95"/></marker>'
            "</defs>"
        ),
        (
            f'<rect x="{MARGIN}" y="{MARGIN}" width="{wide - 2 * MARGIN}" height="36" rx="6" '
            'fill="#f3e6c8" stroke="#a07a1c"/>'
        ),
        (
            f'<text x="{wide / 2:g}" y="{MARGIN + 23}" font-size="13" fill="#3a2c05">'
            f'<tspan font-weight="600">{", ".join(GROUND)}</tspan>: for every room</text>'
        ),
    ]
    for a, b in pieces:
        top = y[a] + (HIGH / 2 if ">" in a else HIGH)
        end = y[b] + (HIGH / 2 if ">" in b else 0)
        bend = (end - top) * 0.5
        head = "" if ">" in b else ' marker-end="url(#head)"'
        lines.append(
            f'<path d="M{x[a]:.0f} {top:g}C{x[a]:.0f} {top + bend:g} {x[b]:.0f} {end - bend:g} '
            f'{x[b]:.0f} {end:g}" fill="none" stroke="#6f7f95" stroke-width="1.6"{head}/>'
        )
    for name in (name for row in layers for name in row if ">" not in name):
        left, middle = x[name] - WIDE / 2, x[name]
        lines += [
            (
                f'<rect x="{left:.0f}" y="{y[name]}" width="{WIDE}" height="{HIGH}" rx="6" '
                'fill="#dbe8f7" stroke="#3b6ea5"/>'
            ),
            (
                f'<text x="{middle:.0f}" y="{y[name] + 19}" font-size="14" font-weight="600" '
                f'fill="#10263f">{escape(NAMES.get(name, name))}</text>'
            ),
            (
                f'<text x="{middle:.0f}" y="{y[name] + 35}" font-size="11.5" '
                f'fill="#2c4460">{escape(GIVES[name])}</text>'
            ),
        ]
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    text = picture()
    if "--check" in sys.argv:
        if not PICTURE.exists() or PICTURE.read_text("utf-8") != text:
            sys.exit(f"{PICTURE} is not what the imports are: run python scripts/rooms.py")
    else:
        PICTURE.write_text(text, "utf-8")
