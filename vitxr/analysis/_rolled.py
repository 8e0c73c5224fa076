"""Arithmetic of equivariance: rolls of maps on the patch grid, sums of squared differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["frame_sums", "merge", "roll_back", "summary"]

Array = npt.NDArray[Any]
Shifts = tuple[Array, Array, Array]
Sums = dict[str, Array]

#: Bytes of the buffer of :func:`frame_sums`, which a core's own cache should hold.
_BUFFER_BYTES = 3 << 18
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
    by_phase = np.argsort(phase, axis=None, kind="stable")
    found, starts = np.unique(phase.ravel()[by_phase], return_index=True)
    # Shifts side by side that are down by as many patches; of a lattice, those of a row.
    steps = np.unique(steps_x).tolist()
    ends = [[*(np.flatnonzero(np.diff(row)) + 1).tolist(), width] for row in steps_y]
    same = [False, *(steps_x[1:] == steps_x[:-1]).all(axis=1).tolist()]
    # Few maps and rows of the lattice at a time, so that what is done with them stays in the
    # cache, and many enough that the work in NumPy outweighs the calls of it.
    row = width * patches * dtype.itemsize
    size = min(maps, max(1, _BUFFER_BYTES // row))
    high = min(height, max(1, _BUFFER_BYTES // (size * row)))
    # Products of rows with rows throughout: of whole matrices BLAS would start threads of its own
    # within those of Dask.
    ones = np.ones(patches, dtype)
    room = np.empty(high * width * size * patches, dtype)
    for i, layer in np.ndindex(n, layers):
        for first in range(0, maps, size):
            part = slice(first, min(first + size, maps))
            some = part.stop - first
            of = (i, layer, part)
            ref = reference[of].astype(dtype)
            # Sums of squares are about it: of large values they would lose small differences.
            pivot = ref.mean((1, 2), dtype=np.float64)
            off = ref.reshape(some, -1) - pivot[:, None]
            # Twice beside and below itself: every roll is then a part of it.
            around = np.tile(ref, (1, 2, 2))
            rolled = {step: around[:, :, columns - step : 2 * columns - step] for step in steps}
            means, errors = (np.empty((height * width, some)) for _ in range(2))
            for top in range(0, height, high):
                many = min(high, height - top)
                here = slice(top * width, (top + many) * width)
                flat = room[: many * width * some * patches].reshape(-1, patches)
                each = flat.reshape(many * width, -1)
                differ = flat.reshape(many, width, some, rows, columns)
                frame = a[i, top : top + many, :, layer, part]
                np.subtract(frame, ref, out=differ)
                means[here] = np.linalg.vecdot(flat, ones).reshape(-1, some)
                still = _squares(flat, some).sum(0)
                sums["still"][layer, part] += still
                # The squares of reference - pivot + difference.
                crossed = np.linalg.vecdot(off, each.sum(0).reshape(some, -1))
                sums["squares"][of] += (
                    still + 2 * crossed + many * width * np.linalg.vecdot(off, off)
                )
                for y in range(many):
                    if not same[top + y]:
                        table = np.stack([rolled[step] for step in steps_x[top + y].tolist()])
                    start = 0
                    for end in ends[top + y]:
                        down, along = rows - steps_y[top + y, start], slice(start, end)
                        np.subtract(
                            frame[y, along],
                            table[along, :, down : down + rows],
                            out=differ[y, along],
                        )
                        start = end
                errors[here] = _squares(flat, some)
                sums["error"][layer, part] += np.einsum("fp,fp->p", each, each).reshape(
                    some, rows, columns
                )
            means /= patches
            sums["pivot"][of] = pivot
            sums["image_sum"][of] = means.sum(0)
            sums["image_squares"][of] = np.einsum("sf,sf->f", means, means)
            for name, values in (("phase_sum", means + pivot), ("phase_error", errors)):
                sums[name][found, layer, part] += np.add.reduceat(values[by_phase], starts)
    return sums


def _squares(flat: Array, maps: int) -> Array:
    """Sums of squares of frames of maps, (frame, map), float64."""
    of_rows: Array = np.linalg.vecdot(flat, flat)
    return of_rows.reshape(-1, maps).astype(np.float64)


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
        between = np.where(variance == 0, np.nan, between)
        compared = count.copy()
        compared[first] -= 1  # the reference differs from itself by nothing
        # What is left of maps that do not vary is rounding.
        variance = np.where(variance > 1e-28 * (mean**2).mean(0), variance, 0 * variance)
        # Two values drawn at random differ by this much.
        unit = np.where(variance == 0, np.nan, 2 * n * patches * variance)
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
