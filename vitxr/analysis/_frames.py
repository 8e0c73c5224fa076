"""What the analyses take from a Dataset: all frames in order, and by how much each was shifted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import DataError
from vitxr.names import SHIFT, unwritten
from vitxr.tensors import maps_of

__all__ = ["Rolls", "frames", "has_layers", "rolls", "written"]

Array = npt.NDArray[Any]


def frames(ds: xr.Dataset, variable: str = "activation") -> xr.DataArray:
    """Take a variable with all its dims: what was selected by a scalar comes back as one.

    Its maps are called ``feature_map``; what has no layers has one, without a number.
    """
    x = maps_of(ds, variable)
    if "layer" not in x.dims:
        x = x.expand_dims("layer", 3)
    if 0 in x.shape:
        empty = ", ".join(str(d) for d, n in x.sizes.items() if n == 0)
        raise DataError(f"`{variable}` is empty along {empty}: select at least one.")
    return x


def has_layers(ds: xr.Dataset, variable: str) -> bool:
    """Whether a variable is of blocks: the embedding output and some modules are not."""
    return "layer" in maps_of(ds, variable).dims


def written(x: xr.DataArray) -> None:
    """Refuse what a store does not hold yet, where a result is of all images and shifts."""
    remedy = unwritten(x, "ds")
    if remedy:
        raise DataError(
            f"`{x.name}` is NaN where it is not written yet, and this takes all of it{remedy}."
        )


@dataclass(frozen=True)
class Rolls:
    """Shifts in whole patches and what is left over, each (shift_y, shift_x).

    Attributes
    ----------
    steps_y, steps_x
        Patches that the content of the frame lies further down and to the right, from 0.
    phase_y, phase_x
        Pixels left over, at least ``-(patch // 2)`` and less than ``patch - patch // 2``.
    """

    steps_y: Array
    steps_x: Array
    phase_y: Array
    phase_x: Array


def rolls(ds: xr.Dataset, x: xr.DataArray, relative: bool) -> Rolls:
    """Divide offsets into whole patches and phases.

    With ``relative`` they are those between a frame and the first one of the lattice.

    Raises
    ------
    DataError
        If a circular shift of the image by a patch is not a roll of the patch grid by one, or
        that cannot be told.
    """
    if "phase_y" in x.coords:
        raise DataError(
            f"`{x.name}` was rolled back already, as its coordinate phase_y says: "
            "take the Dataset as vitxr.extract made it."
        )
    for name in ("patch_row", "patch_col"):
        if name in x.coords and not np.array_equal(x[name], np.arange(x.sizes[name])):
            raise DataError(
                f"{name} does not run from 0 to {x.sizes[name] - 1} in order, and frames are "
                "rolled in the order of the grid. Keep all patches, and sort them: "
                f"ds.sortby({name!r})."
            )
    found = []
    for along, (name, side) in enumerate((("y", "height"), ("x", "width"))):
        offset = x.coords.get(f"offset_{name}")
        patch = ds.attrs.get(f"patch_{side}")
        if offset is None or patch is None:
            lacking = f"attribute patch_{side}" if patch is None else f"coordinate offset_{name}"
            raise DataError(
                f"the Dataset has no {lacking}, and without it nobody knows by how many patches a "
                "frame was shifted: take the Dataset as vitxr.extract made it."
            )
        pixels = np.broadcast_to(
            offset.expand_dims([d for d in SHIFT if d not in offset.dims]).transpose(*SHIFT).values,
            tuple(x.sizes[d] for d in SHIFT),
        )
        if "period" not in offset.attrs:
            if pixels.size == 1 or not pixels.any():
                raise DataError(
                    "the Dataset has frames that are not shifted and no others: extract with "
                    "shifts=vitxr.ShiftGrid(step)."
                )
            raise DataError(
                f"offset_{name} has no attribute `period`, the input's {side} in pixels, after "
                "which a circular shift is none: take the Dataset as vitxr.extract made it."
            )
        period, patch = int(offset.attrs["period"]), int(patch)
        patches = x.sizes[("patch_row", "patch_col")[along]]
        if period != patches * patch:
            raise DataError(
                f"{patches} patches of {patch} px do not make the input's {side}, {period} px, so "
                "that a circular shift of the image is not a roll of this patch grid. Keep all "
                "patches; a model whose patches leave a margin cannot be rolled back."
            )
        if relative:
            pixels = pixels - pixels[0, 0]
        phase = (pixels + patch // 2) % patch - patch // 2
        found.append(((pixels - phase) // patch % patches, phase))
    (steps_y, phase_y), (steps_x, phase_x) = found
    return Rolls(steps_y, steps_x, phase_y, phase_x)
