"""Arithmetic of equivariance: rolls of maps on the patch grid, sums of squared differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["frame_sums", "merge", "roll_back", "summary"]

Array = npt.NDArray[Any]
Shifts = tuple[Array, Array, Array]
Sums = dict[str, Array]

#: Bytes of the buffers of :func:`frame_sums`, three of which fit into a core's own cache.
_BUFFER_BYTES = 1 << 18
#: Sums that belong to one image each; all others are over images.
_OF_IMAGES = ("pivot", "image_sum", "image_squares", "squares")


def roll_back(a: Array, steps_y: Array, steps_x: Array, at: int) -> Array:
    """Roll maps on the patch grid up and to the left.

    Parameters
    ----------
    a
        Maps, the last two axes rows and columns of patches; shift_y and shift_x are the axes
        ``at`` and ``at + 1``.
    steps_y, steps_x
        By how many patches, for each shift; all other axes have one entry.
    """
    rows, columns = a.shape[-2:]
    out = np.empty_like(a)
    shape = steps_y.shape[at : at + 2]
    y, x = steps_y.reshape(shape), steps_x.reshape(shape)
    for i, j in np.ndindex(*shape):
        where = (slice(None),) * at + (i, j)
        of, to = a[where], out[where]
        up, left = int(y[i, j]) % rows, int(x[i, j]) % columns
        for upper, lower in ((slice(up, None), slice(0, rows - up)),
                             (slice(0, up), slice(rows - up, None))):  # fmt: skip
            to[..., lower, : columns - left] = of[..., upper, left:]
            to[..., lower, columns - left :] = of[..., upper, :left]
    return out


def frame_sums(a: Array, reference: Array, shifts: Shifts, phases: int) -> Sums:
    """Sum what :func:`summary` needs over some frames of some images.

    Parameters
    ----------
    a
        Frames, (image, shift_y, shift_x, layer, map, row, col).
    reference
        The frame of each image that others are compared with, (image, layer, map, row, col).
    shifts
        Of each shift, (shift_y, shift_x): the patches by which a frame's content lies down of
        where it lies in the reference, and to the right, from 0 to less than the size of the
        grid; and which of ``phases`` it has.

    Returns
    -------
    dict of numpy.ndarray
        Sums, float64: ``error`` (layer, map, row, col) and ``still`` (layer, map) of squared
        differences, ``phase_error`` of the same and ``phase_sum`` of the maps' means over patches,
        (phase, layer, map). And (image, layer, map), of what is left after subtracting ``pivot``,
        the mean of the reference: ``image_sum`` and ``image_squares`` of the maps' means,
        ``squares`` of values. Products are of the dtype of ``a``, at least float32.
    """
    steps_y, steps_x, phase = shifts
    n, height, width, layers, maps, rows, columns = a.shape
    patches, dtype = rows * columns, np.result_type(a.dtype, np.float32)
    of_maps, of_images = (layers, maps), (n, layers, maps)
    sums: Sums = {
        "error": np.zeros((layers, maps, rows, columns)),
        "still": np.zeros(of_maps),
        "phase_error": np.zeros((phases, layers, maps)),
        "phase_sum": np.zeros((phases, layers, maps)),
        **{name: np.zeros(of_images) for name in _OF_IMAGES},
    }
    has_phase = np.zeros((phases, height * width))
    has_phase[phase.ravel(), np.arange(phase.size)] = 1
    # Few maps at a time, so that what is done with a row of frames stays in the cache.
    some = max(1, min(maps, _BUFFER_BYTES // (width * patches * dtype.itemsize)))
    ones = np.ones(patches, dtype)
    for i, layer, first in np.ndindex(n, layers, -(-maps // some)):
        part = slice(first * some, min((first + 1) * some, maps))
        of = (i, layer, part)
        ref = reference[of].astype(dtype)
        size = len(ref)
        # Subtracted from all: sums of large values would lose small differences.
        pivot = ref.mean((1, 2), dtype=np.float64).astype(dtype)
        ref -= pivot[:, None, None]
        # Rolled to the right, and twice below itself: any roll down is then a part of it.
        table = {
            int(step): np.tile(np.roll(ref, step, axis=2), (1, 2, 1)) for step in np.unique(steps_x)
        }
        row, other = (np.empty((width, size, rows, columns), dtype) for _ in range(2))
        flat, flat_other = (b.reshape(width * size, patches) for b in (row, other))
        means = np.empty((height * width, size))
        errors = np.empty((height * width, size))
        for y in range(height):
            here = slice(y * width, (y + 1) * width)
            np.subtract(a[i, y, :, layer, part], pivot[:, None, None], out=row)
            means[here] = (flat @ ones).reshape(width, size)
            sums["squares"][of] += _squares(flat).reshape(width, size).sum(0, np.float64)
            np.subtract(row, ref, out=other)
            sums["still"][layer, part] += (
                _squares(flat_other).reshape(width, size).sum(0, np.float64)
            )
            for x in range(width):
                down = rows - steps_y[y, x]
                rolled = table[int(steps_x[y, x])][:, down : down + rows]
                np.subtract(row[x], rolled, out=other[x])
            np.multiply(other, other, out=other)
            errors[here] = (flat_other @ ones).reshape(width, size)
            sums["error"][layer, part] += other.sum(0)
        means /= patches
        sums["pivot"][of] = pivot
        sums["image_sum"][of] = means.sum(0)
        sums["image_squares"][of] = np.einsum("sf,sf->f", means, means)
        sums["phase_sum"][:, layer, part] += has_phase @ (means + pivot)
        sums["phase_error"][:, layer, part] += has_phase @ errors
    return sums


def _squares(rows: Array) -> Array:
    """Sum of squares of each row."""
    return np.einsum("ip,ip->i", rows, rows)


def merge(parts: list[Sums], same_images: bool) -> Sums:
    """Add up sums of the same images over other shifts, or of other images, in their order."""
    if len(parts) == 1:
        return parts[0]
    out = {}
    for name in parts[0]:
        of = [part[name] for part in parts]
        if name not in _OF_IMAGES:
            out[name] = np.sum(of, axis=0)
        elif not same_images:
            out[name] = np.concatenate(of)
        else:  # the reference, hence the pivot, is the same one
            out[name] = of[0] if name == "pivot" else np.sum(of, axis=0)
    return out


def summary(sums: Sums, count: Array, first: int) -> Sums:
    """Turn sums over all frames into what :func:`vitxr.analysis.equivariance` returns.

    Parameters
    ----------
    sums
        As of :func:`frame_sums`, of all images and shifts.
    count
        How many shifts have each phase.
    first
        The phase of the reference.
    """
    n, shifts = len(sums["pivot"]), int(count.sum())
    patches = sums["error"].shape[-2] * sums["error"].shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums["pivot"] + sums["image_sum"] / shifts
        between = ((mean - mean.mean(0)) ** 2).sum(0)
        total = (sums["squares"] - patches / shifts * sums["image_sum"] ** 2).sum(0)
        variance = np.maximum(total, 0) / (n * shifts * patches) + between / n
        within = (sums["image_squares"] - sums["image_sum"] ** 2 / shifts).sum(0)
        within = np.maximum(within, 0) / (n * (shifts - 1))
        between = shifts * between / (n - 1) if n > 1 else np.full_like(between, np.nan)
        compared = count.copy()
        compared[first] -= 1  # the reference differs from itself by nothing
        # Two values drawn at random differ by this much.
        unit = 2 * n * patches * variance
        # Every patch of the grid is looked at once in each frame.
        each = sums["error"] / (shifts - 1) / (unit / patches)[..., None, None]
        return {
            "equivariance_error": sums["error"].sum((-2, -1)) / (shifts - 1) / unit,
            "still_error": sums["still"] / (shifts - 1) / unit,
            "invariance": (between - within) / (between + (shifts - 1) * within),
            "variance": variance,
            "error_map": each,
            "phase_error": np.moveaxis(sums["phase_error"] / compared[:, None, None] / unit, 0, -1),
            "phase_activity": np.moveaxis(sums["phase_sum"] / (n * count[:, None, None]), 0, -1),
        }
