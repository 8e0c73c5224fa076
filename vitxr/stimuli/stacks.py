"""Stacks of images in ``.npy`` files: the header is believed only as far as the file goes."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from vitxr.errors import ImageError

__all__ = ["as_stack", "open_stack"]


def open_stack(path: Path) -> np.ndarray:
    """Map a ``.npy`` stack after its header was checked against the file's size.

    Returns
    -------
    numpy.ndarray
        ``(n, height, width)`` or ``(n, height, width, channels)``, backed by the file.

    Raises
    ------
    ImageError
        If the file is no ``.npy`` file of numbers, does not have the size its
        header says, or its shape is not that of images. Nothing is allocated and
        nothing is unpickled.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = io.BytesIO(file.read(2**16))  # a forged length cannot ask for more than this
        version = np.lib.format.read_magic(head)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
        else:
            raise ValueError(f"version {version} of the format")
    except FileNotFoundError as error:
        raise ImageError(
            f"{path}: no such file. Restore it, or open it where it is now."
        ) from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: not a .npy file that can be read ({error}).") from error
    if dtype.kind not in "uif":
        raise ImageError(
            f"{path}: dtype {dtype}; expected uint8 or other numbers. Pickled objects are never "
            "loaded: save the images as one array of numbers."
        )
    need, have = math.prod(shape) * dtype.itemsize, size - head.tell()
    if need != have or min(shape, default=0) < 1:
        raise ImageError(
            f"{path}: the header says {dtype} {shape}, {need} bytes, but {have} follow it. "
            "Expected as many, and at least one image: the file is truncated, empty or forged; "
            "save it again."
        )
    order: Any = "F" if fortran else "C"
    try:
        array = np.memmap(path, dtype, mode="r", offset=head.tell(), shape=shape, order=order)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be mapped ({error}).") from error
    return as_stack(array.view(np.ndarray), str(path))


def as_stack(array: np.ndarray, name: str) -> np.ndarray:
    """``(n, height, width[, channels])`` of a stack or of one image.

    Three dims are a grey stack, unless the last is 3 or 4 long: then they are one
    colour image.

    Examples
    --------
    >>> as_stack(np.zeros((30, 40, 3)), "one").shape
    (1, 30, 40, 3)
    """
    shape = array.shape
    if array.ndim == 4 and shape[3] in (1, 3, 4):
        return array
    if array.ndim == 3:
        return array[np.newaxis] if shape[2] in (3, 4) else array
    if array.ndim == 2:
        return array[np.newaxis]
    hint = ""
    if array.ndim == 4 and shape[1] in (1, 3, 4):
        hint = " The channels seem to come second: give np.moveaxis(x, 1, -1)."
    raise ImageError(
        f"{name}: shape {shape}; expected a stack (n, height, width) or (n, height, width, "
        f"channels) with 1, 3 or 4 channels, or one image.{hint}"
    )
