"""Draw the pictures of docs/analysis-equivariance.md, docs/similarity.md and docs/activity.md.

All are of the bundled digits model and scikit-learn's digits; some two minutes.

    python scripts/analysis_pictures.py [NAME ...]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

import vitxr
from vitxr import plot

IMAGES = Path(__file__).parents[1] / "docs" / "images"


@functools.cache
def every_pixel() -> xr.Dataset:
    """One image a class, shifted by every pixel."""
    stim = vitxr.datasets.digits(per_class=1)
    return vitxr.extract(stim, vitxr.load_model("digits"), shifts=vitxr.ShiftGrid(1)).compute()


@functools.cache
def many() -> xr.Dataset:
    """Five images a class, 8 x 4 shifts."""
    stim = vitxr.datasets.digits(per_class=5)
    ds = vitxr.extract(stim, vitxr.load_model("digits"), shifts=vitxr.ShiftGrid(4))
    return ds.isel(shift_x=slice(None, None, 2)).compute()


@functools.cache
def moved() -> xr.Dataset:
    """How well the maps move with the image."""
    return every_pixel().vit.equivariance()


@functools.cache
def table() -> xr.Dataset:
    """What each map cares about."""
    return many().vit.map_table()


def unshift() -> Any:
    """Draw the map of block 0 with the smallest error under shifts of whole patches and others."""
    best = int(moved().equivariance_error.sel(layer=0).idxmin("feature_map"))
    return plot.unshift(every_pixel().isel(shift_y=slice(0, None, 2)), best, layer=0,
                        image_at=3, every=2)  # fmt: skip


def sparseness() -> Any:
    """Draw sparseness over layers, of the population and over frames."""
    both = {
        "population": many().vit.population_sparseness(),
        "lifetime": table().lifetime_sparseness,
    }
    return plot.by_layer(both, label="Sparseness")


PICTURES: dict[str, Callable[[], Any]] = {
    "unshift": unshift,
    "equivariance": lambda: plot.equivariance(moved()),
    "invariance": lambda: plot.equivariance(moved(), "invariance"),
    "error_map": lambda: plot.error_map(moved()),
    "phase_tuning": lambda: plot.phase_tuning(moved()),
    "cka": lambda: plot.similarity_by_layer(many().vit.cka(batch_size=50)),
    "rsa": lambda: plot.similarity_by_layer(many().vit.rsa()),
    "cka_by_shift": lambda: plot.similarity_by_shift(many().vit.cka(across="shift", batch_size=50)),
    "rdm": lambda: plot.rdm(many().sel(layer=[0, 3, 5]).isel(shift_y=[0], shift_x=[0]).vit.rdm()),
    "map_table": lambda: plot.map_table(table().sel(layer=5), color="label_share"),
    "d_prime": lambda: plot.map_table(table().sel(layer=5), "d_prime_floor", "d_prime"),
    "class_activity": lambda: plot.class_activity(many().vit.class_activity().sel(layer=[0, 5])),
    "sparseness": sparseness,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        plot.save(PICTURES[name](), IMAGES / f"{name}.png", dpi=150)
        print(name)
