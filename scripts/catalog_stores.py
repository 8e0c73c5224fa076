"""Write the stores that ship inside vitxr, and the catalogs that name them.

    python scripts/catalog_stores.py    # writes vitxr/catalogs, all but models.yaml

Small, so that whoever has installed vitxr has real activations to try: ten held-out digits, and
the first and last block of the bundled model on four shifts of each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import vitxr

FOLDER = Path(__file__).resolve().parents[1] / "vitxr" / "catalogs"
NESTED = """\
# Read by vitxr.catalog and, unchanged, by Intake. Written by scripts/catalog_stores.py.
metadata:
  version: 1
sources:
"""
ENTRY = """\
  {name}:
    description: {text}
    driver: yaml_file_cat
    args:
      path: "{{{{ CATALOG_DIR }}}}/{name}.yaml"
"""
LICENCE = "CC BY 4.0"
IMAGES = "E. Alpaydin and C. Kaynak (1998), doi:10.24432/C50P49"


def main() -> None:
    """Write all of it anew."""
    stim = vitxr.datasets.digits(per_class=1).assign_attrs(
        vitxr_version=vitxr.__version__, made_by="vitxr.datasets.digits(per_class=1)"
    )
    for name in ("stimuli", "activations"):
        (FOLDER / f"{name}.yaml").unlink(missing_ok=True)
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        (FOLDER / name).mkdir()
    vitxr.catalog.add(
        vitxr.save(stim, FOLDER / "stimuli" / "digits.zarr"),
        FOLDER / "stimuli.yaml",
        description=f"Ten handwritten digits, one of each. {IMAGES}",
        licence=LICENCE,
    )
    vitxr.extract(
        stim,
        vitxr.load_model("digits"),
        layers=[0, 5],
        shifts=vitxr.ShiftGrid(step=16),
        storage_dtype="bitround10",
        store=FOLDER / "activations" / "digits.zarr",
        progress=False,
    )
    vitxr.catalog.add(
        FOLDER / "activations" / "digits.zarr",
        FOLDER / "activations.yaml",
        description=f"First and last block of the bundled model on ten digits. {IMAGES}",
        licence=LICENCE,
    )
    entries = [
        ENTRY.format(name="stimuli", text="Images"),
        ENTRY.format(name="activations", text="Activations of models on images and their shifts"),
    ]
    (FOLDER / "intake.yaml").write_text(NESTED + "".join(entries), "utf-8")


if __name__ == "__main__":
    main()
