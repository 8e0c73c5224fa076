"""The shift lattice of a tensor: its axes, and whether they close after one period."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import SHIFT

__all__ = ["Axis", "lattice"]


@dataclass(frozen=True)
class Axis:
    """One axis of the lattice.

    Attributes
    ----------
    dim
        ``shift_y`` or ``shift_x``.
    size
        How many shifts.
    step
        Pixels from one to the next, 0 where the axis does not close or has one shift.
    open
        Why a roll of the axis is not a circular shift of the image; empty if it is.
    """

    dim: str
    size: int
    step: int
    open: str


def lattice(t: xr.DataArray) -> tuple[Axis, Axis]:
    """Find the axes of a tensor's shift lattice.

    An axis closes where its offsets are evenly spaced on the circle of the image's size, which is
    the attribute ``period`` of ``offset_y`` and ``offset_x``: ``n`` shifts of ``period / n``
    pixels. Then rolling the axis by a place shifts every image by a step. Otherwise, as for 21
    shifts of 11 pixels with a period of 224, the last step is a shorter one.

    Raises
    ------
    DataError
        If the tensor has no shifts, or its stacked ``shift`` is not a full lattice, row by row.

    Examples
    --------
    >>> t = xr.DataArray(np.zeros((4, 3)), dims=("shift_y", "shift_x"), coords={
    ...     "offset_y": ("shift_y", [0, 8, 16, 24], {"period": 32}),
    ...     "offset_x": ("shift_x", [0, 11, 22], {"period": 32})})
    >>> y, x = lattice(t)
    >>> y.step, y.open, x.open
    (8, '', 'its 3 steps of 11 px do not make the period, 32 px')
    """
    if not isinstance(t, xr.DataArray):
        raise ArgumentError(f"expected a DataArray with labels, not {type(t).__name__}.")
    if "shift" in t.dims:
        index = t.indexes.get("shift")
        if not isinstance(index, pd.MultiIndex) or tuple(index.names) != SHIFT:
            raise DataError("`shift` has no labels (shift_y, shift_x): keep them when you select.")
        levels = [index.get_level_values(name).unique() for name in SHIFT]
        if len(index) != len(levels[0]) * len(levels[1]) or not index.equals(
            pd.MultiIndex.from_product(levels, names=SHIFT)
        ):
            raise DataError(
                "the shifts of the tensor are not a full lattice, row by row: select whole rows "
                "and columns, t.unstack('shift').sel(shift_y=..., shift_x=...)."
            )
        sizes = tuple(len(level) for level in levels)
    elif set(SHIFT) <= set(t.dims):
        sizes = tuple(t.sizes[d] for d in SHIFT)
    else:
        raise DataError(
            f"the tensor has dims ({', '.join(map(str, t.dims))}); expected shift, or shift_y and "
            "shift_x."
        )
    y, x = (_axis(t, dim, sizes) for dim in SHIFT)
    return y, x


def _axis(t: xr.DataArray, dim: str, sizes: tuple[int, ...]) -> Axis:
    """Describe one axis."""
    along = SHIFT.index(dim)
    size, name = sizes[along], dim.replace("shift", "offset")
    if size == 1:
        return Axis(dim, 1, 0, "")
    if name not in t.coords or "period" not in t[name].attrs:
        return Axis(dim, size, 0, f"the tensor does not say its {name} with the attribute `period`")
    offsets, period = t[name], int(t[name].attrs["period"])
    if offsets.ndim == 2 or offsets.dims == ("shift",):
        ordered = offsets if offsets.ndim == 1 else offsets.transpose(*SHIFT)
        table = np.moveaxis(ordered.values.reshape(sizes), along, 0)
        if (table != table[:, :1]).any():
            other = SHIFT[1 - along]
            return Axis(dim, size, 0, f"{name} is another for each {other}, as in scheme 'raster'")
        values = table[:, 0]
    else:
        values = offsets.values
    steps = (np.roll(values, -1) - values) % period
    step = int(steps[0])
    if (steps[:-1] != step).any() or step == 0:
        return Axis(dim, size, 0, "its offsets are not evenly spaced")
    if step * size != period:
        why = f"its {size} steps of {step} px do not make the period, {period} px"
        return Axis(dim, size, 0, why)
    return Axis(dim, size, step, "")
