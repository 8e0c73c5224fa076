"""The ``size`` argument: its check and the resizing it asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from vitxr.errors import ArgumentError
from vitxr.stimuli.decode import MAX_PIXELS

__all__ = ["Size", "check_size", "is_count", "resize"]

#: ``None``, the side of the thumbnail box, or ``(height, width)``.
Size = int | tuple[int, int] | None


def is_count(n: Any) -> bool:
    """Whether `n` is a positive integer, and not a bool."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool) and int(n) >= 1


def check_size(size: Any) -> Size:
    """Check and normalise the `size` argument of :func:`vitxr.open_images`.

    Parameters
    ----------
    size
        None, a positive integer, or a pair of positive integers ``(height, width)``.

    Returns
    -------
    int, tuple of int or None
        The same in plain Python integers.

    Raises
    ------
    ArgumentError
        If it is anything else, or asks for more than `MAX_PIXELS` pixels.

    Examples
    --------
    >>> check_size([120, 160])
    (120, 160)
    """
    if size is None:
        return None
    if is_count(size):
        return int(size)
    pair = tuple(size) if isinstance(size, list | tuple) else ()
    if len(pair) != 2 or not all(map(is_count, pair)):
        raise ArgumentError(
            f"size={size!r}; expected None (keep), a positive integer n (fit into n x n) or a pair "
            "(height, width) of positive integers."
        )
    height, width = int(pair[0]), int(pair[1])
    if height * width > MAX_PIXELS:
        raise ArgumentError(
            f"size={size!r} is {height * width} pixels; expected at most {MAX_PIXELS}."
        )
    return height, width


def resize(rgb: np.ndarray, size: Size) -> np.ndarray:
    """Resize as :func:`vitxr.open_images` does.

    Parameters
    ----------
    rgb
        uint8, ``(height, width, 3)``.
    size
        None returns the array itself. An integer n fits the image into n x n as
        the original notebook does (section 4): Pillow's ``thumbnail`` with
        ``LANCZOS`` on the decoded image, which keeps the aspect and never
        enlarges. A pair is the exact ``(height, width)``, by ``LANCZOS``.

    Returns
    -------
    numpy.ndarray
        uint8, ``(height, width, 3)``.

    Examples
    --------
    >>> resize(np.zeros((300, 400, 3), np.uint8), 224).shape
    (168, 224, 3)
    """
    from PIL import Image

    if size is None:
        return rgb
    image = Image.fromarray(rgb)
    if isinstance(size, int):
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    elif (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image)
