"""Two Datasets to compare: the same images, matched by name, and shifts or layers that fit."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._frames import frames, written
from vitxr.errors import ArgumentError, DataError

__all__ = ["Across", "pair"]

Array = npt.NDArray[Any]
Across = Literal["layer", "shift"]


def pair(
    ds: xr.Dataset, other: xr.Dataset | None, across: Across, variable: str
) -> tuple[list[xr.DataArray], list[Array]]:
    """Take the activations of both, and where each has the images of the first."""
    if across not in get_args(Across):
        raise ArgumentError(f"across={across!r}: expected 'layer' or 'shift'.")
    if not isinstance(other, xr.Dataset | None):
        raise ArgumentError(
            f"other is a {type(other).__name__}; expected a Dataset of another extraction, such as "
            "vitxr.open('other.zarr')."
        )
    x = frames(ds, variable)
    written(x)
    n = x.sizes["image"]
    if other is None:
        arrays, orders = [x, x], [np.arange(n), np.arange(n)]
    else:
        y = frames(other, variable)
        written(y)
        arrays, orders = [x, y], [np.arange(n), _matched(x, y)]
        if across == "layer":
            for name in ("offset_y", "offset_x"):
                a, b = (v.coords[name].values if name in v.coords else np.empty(0) for v in arrays)
                if not np.array_equal(a, b) or x.shape[1:3] != y.shape[1:3]:
                    raise DataError(
                        f"the two Datasets have other shifts (`{name}` differs), and layers are "
                        "compared at the same ones: select those that both have."
                    )
        elif not np.array_equal(x["layer"], y["layer"]) and (
            x.sizes["layer"],
            y.sizes["layer"],
        ) != (1, 1):
            raise DataError(
                "the two Datasets have other layers, and shifts are compared in the same ones: "
                "select one of each, or those that both have."
            )
    return arrays, orders


def _matched(x: xr.DataArray, y: xr.DataArray) -> Array:
    """Where ``y`` has the images of ``x``."""
    for v in (x, y):
        if "image" not in v.indexes or not v.indexes["image"].is_unique:
            raise DataError("images are matched by name: give them unique ones, coordinate image.")
    mine, theirs = x.indexes["image"], y.indexes["image"]
    order = theirs.get_indexer(mine)
    if (order < 0).any() or len(mine) != len(theirs):
        lack = [str(name) for name in mine[order < 0]] or [
            str(name) for name in theirs.difference(mine)
        ]
        raise DataError(
            f"the Datasets hold {len(mine)} and {len(theirs)} images, of which "
            f"{int((order >= 0).sum())} have the same name; only one of them has "
            f"{', '.join(lack[:3])}. Select those that both have, ds.sel(image=names)."
        )
    if "sha256" in x.coords and "sha256" in y.coords:
        differ = x["sha256"].values.astype(str) != y["sha256"].values.astype(str)[order]
        if differ.any():
            names = ", ".join(str(name) for name in mine[differ][:3])
            raise DataError(
                f"{int(differ.sum())} images of the same name have other contents (sha256): "
                f"{names}. Extract both from the same images."
            )
    return np.asarray(order)
