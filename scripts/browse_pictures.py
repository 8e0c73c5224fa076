"""Pictures of the browser of a store for docs/browse.md: the demo's, in a real browser.

    python scripts/browse_pictures.py DEMO [FOLDER]

DEMO is the folder that ``vitxr demo`` wrote; FOLDER is docs/images if it is not given.
"""

import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browsing import lasso, opened, quiet, served, visit  # noqa: E402

WIDE, NARROW = (1400, 900), (760, 1100)
#: Name, tab, size, theme, state.
PICTURES = (
    ("embedding", "embedding", WIDE, "light", {"rank": 8}),
    ("embedding_dark", "embedding", NARROW, "dark", {"rank": 8, "axes": 3, "color": "both"}),
    ("maps", "maps", WIDE, "dark", {"layer": 5, "feature_map": 16}),
    ("stimuli", "stimuli", NARROW, "light", {"image": "digit_3/1347", "shift_y": 3, "shift_x": 2}),
)
STAR = [(-0.45, 0.5), (-0.6, -0.2), (-0.1, -0.3), (0.05, 0.45)]


def main() -> None:
    """Visit the demo and take the pictures."""
    demo = Path(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "images"
    store, fits = demo / "activations.zarr", demo / "ensemble_layer0.nc"
    with served(store, "--factors", fits) as address, opened() as browser:
        for name, tab, size, theme, state in PICTURES:
            page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
            visit(page, address, tab, theme=theme, **state)
            page.wait_for_timeout(1500)
            quiet(page)
            if tab == "embedding":
                lasso(page, STAR)
                page.wait_for_timeout(1500)
            path = folder / f"browse_{name}.png"
            page.screenshot(path=path)
            page.close()
            # As many colours as a picture of a page needs, in a third of the bytes.
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
