"""Shift lattices: which circular shifts an image makes, and their labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError
from vitxr.names import SHIFT, VARIABLES

__all__ = ["ShiftGrid", "no_shifts"]

Scheme = Literal["grid", "raster"]


def grid_offsets(height: int, width: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the rectangular lattice: ``0, step, 2 step, ...`` below the image size."""
    dy = np.arange(math.ceil(height / step), dtype=np.int64) * step
    dx = np.arange(math.ceil(width / step), dtype=np.int64) * step
    return dy, dx


def raster_offsets(height: int, width: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the notebook's running rolls, both of shape (rows, columns).

    The image is rolled down before each row, and to the right before each frame
    of the row but its first; neither roll is ever undone, so row ``i`` starts at
    the horizontal offset at which row ``i - 1`` ended.
    """
    rows, rolls = math.ceil(height / step), math.ceil(width / step)
    i = np.arange(rows, dtype=np.int64)[:, None]
    j = np.arange(rolls + 1, dtype=np.int64)[None, :]
    dy = np.broadcast_to((i + 1) * step % height, (rows, rolls + 1))
    dx = (i * rolls + j) * step % width
    return dy.copy(), dx


@dataclass(frozen=True)
class ShiftGrid:
    """A lattice of circular shifts, in pixels of the model's input.

    Parameters
    ----------
    step
        Pixels between neighbouring shifts, at least 1. The original notebook uses 11.
    scheme
        ``"grid"``: a true lattice, ``ceil(H / step)`` rows of one vertical offset
        each and ``ceil(W / step)`` columns of one horizontal offset each, starting
        at no shift. ``"raster"``: the original notebook's order (section 5,
        ``apply_all_shifts``), ``ceil(H / step)`` rows of ``1 + ceil(W / step)``
        frames; the first frame is already shifted down by one step and the
        horizontal offset runs on from row to row.

    Raises
    ------
    ArgumentError
        If ``step`` is not a positive integer or ``scheme`` is unknown.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.ShiftGrid(step=11).lattice(224, 224).sizes
    Frozen({'shift_y': 21, 'shift_x': 21})
    >>> lattice = vitxr.ShiftGrid(step=11, scheme="raster").lattice(224, 224)
    >>> lattice.sizes
    Frozen({'shift_y': 21, 'shift_x': 22})
    >>> lattice.offset_x[1, :3].values  # row 1 goes on where row 0 ended
    array([ 7, 18, 29])
    """

    step: int = 11
    scheme: Scheme = "grid"

    def __post_init__(self) -> None:
        if (
            isinstance(self.step, bool)
            or not isinstance(self.step, int | np.integer)
            or self.step < 1
        ):
            raise ArgumentError(
                f"step={self.step!r}: expected a whole number of pixels, 1 or more. "
                "For no shifts at all pass shifts=None to extract."
            )
        object.__setattr__(self, "step", int(self.step))
        if self.scheme not in get_args(Scheme):
            raise ArgumentError(
                f"scheme={self.scheme!r}: expected 'grid' (a true lattice) or 'raster' "
                "(the original notebook's order)."
            )

    def lattice(self, height: int, width: int) -> xr.Dataset:
        """Label the lattice for an image of ``height`` x ``width`` pixels.

        Returns
        -------
        xarray.Dataset
            Coordinates only: ``shift_y``, ``shift_x`` (index) and ``offset_y``,
            ``offset_x`` (pixels; down and right positive), 1-D under ``"grid"``,
            2-D under ``"raster"``; their attribute ``period`` is the image's size.

        Raises
        ------
        ArgumentError
            If the step is larger than the image.
        """
        if self.step > min(height, width):
            raise ArgumentError(
                f"step={self.step} px is larger than the image, {height} x {width} px "
                f"(height x width): use a step of at most {min(height, width)}, "
                "or shifts=None for no shifts."
            )
        if self.scheme == "grid":
            dy, dx = grid_offsets(height, width, self.step)
            lattice = _label(("shift_y",), dy, ("shift_x",), dx)
        else:
            dy, dx = raster_offsets(height, width, self.step)
            lattice = _label(SHIFT, dy, SHIFT, dx)
        # What a circular shift by is none at all; pictures and comparisons of shifts need it.
        lattice["offset_y"].attrs["period"] = height
        lattice["offset_x"].attrs["period"] = width
        return lattice


def no_shifts() -> xr.Dataset:
    """Return the lattice of one frame, not shifted."""
    zero = np.zeros(1, dtype=np.int64)
    return _label(("shift_y",), zero, ("shift_x",), zero)


def _label(
    dims_y: tuple[str, ...], dy: np.ndarray, dims_x: tuple[str, ...], dx: np.ndarray
) -> xr.Dataset:
    rows, columns = dy.shape[0], dx.shape[-1]
    return xr.Dataset(
        coords={
            "shift_y": ("shift_y", np.arange(rows)),
            "shift_x": ("shift_x", np.arange(columns)),
            "offset_y": (dims_y, dy, VARIABLES["offset_y"].attrs),
            "offset_x": (dims_x, dx, VARIABLES["offset_x"].attrs),
        }
    )
