"""Equivariance: do feature maps move with the image, where not, and what of that is the phase."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._frames import frames, has_layers, rolls, written
from vitxr.analysis._rolled import Sums, frame_sums, merge, roll_back, summary
from vitxr.errors import DataError
from vitxr.names import SHIFT, VARIABLES, provenance
from vitxr.tensors import whose

__all__ = ["equivariance", "unshift"]

Array = npt.NDArray[Any]
Shifts = tuple[Array, Array, Array]

#: Partial sums that are added up at a time.
_AT_A_TIME = 8


def unshift(ds: xr.Dataset, variable: str = "activation") -> xr.DataArray:
    """Roll every frame back on the patch grid by the shift that made it.

    An offset is ``patch * steps + phase``, with ``phase`` between minus half a patch and half a
    patch. The frame is rolled back by ``steps`` patches, after which a patch stands where its
    content stood before the shift: exactly if ``phase`` is 0, and else ``phase`` pixels too far
    down or to the right. The phase is kept as a coordinate.

    Parameters
    ----------
    ds
        Dataset with ``variable``, its offsets and their attribute ``period``.
    variable
        "activation", "embedding", "attention_output", a module's, or any other on the patch grid;
        of queries, keys and values one head.

    Returns
    -------
    xarray.DataArray
        The variable, of the same dtype and dims (maps are called ``feature_map``), with
        coordinates ``phase_y`` and ``phase_x`` in pixels, of the dims of ``offset_y`` and
        ``offset_x``. Lazy if ``ds`` is.

    Raises
    ------
    DataError
        If a circular shift of the image is not a roll of the patch grid: patches were selected or
        leave a margin, or there are no shifts.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[0], shifts=vitxr.ShiftGrid(step=3), progress=False)
    >>> back = ds.vit.unshift()
    >>> back.offset_y.values[:5], back.phase_y.values[:5]  # patches of 4 px
    (array([ 0,  3,  6,  9, 12]), array([ 0, -1, -2,  1,  0]))
    """
    x, layered = frames(ds, variable), has_layers(ds, variable)
    by = rolls(ds, x, relative=False)
    at = x.dims.index("shift_y")
    shape = tuple(x.sizes[d] if d in SHIFT else 1 for d in x.dims)
    y, z = by.steps_y.reshape(shape), by.steps_x.reshape(shape)
    if x.chunks is None:
        data = roll_back(x.values, y, z, at)
    else:
        import dask.array as da

        whole = x.variable.chunk({"patch_row": -1, "patch_col": -1})
        chunks = tuple(c if d in SHIFT else 1 for d, c in whole.chunksizes.items())
        steps = [da.from_array(s, chunks=chunks) for s in (y, z)]
        data = da.map_blocks(
            roll_back, whole.data, *steps, at, dtype=x.dtype, meta=np.empty((0,) * x.ndim, x.dtype)
        )
    out = x.copy(data=data)
    for name, phase in (("phase_y", by.phase_y), ("phase_x", by.phase_x)):
        dims = [d for d in SHIFT if d in x[name.replace("phase", "offset")].dims]
        part = phase[tuple(slice(None) if d in dims else 0 for d in SHIFT)]
        out = out.assign_coords({name: (dims, part, VARIABLES[name].attrs)})
    out.attrs = {
        **provenance(ds.attrs),
        **whose(ds, variable),
        **x.attrs,
        "long_name": f"{x.attrs.get('long_name', variable)}, rolled back by the shift",
    }
    return out if layered else out.isel(layer=0, drop=True)


def equivariance(ds: xr.Dataset, variable: str = "activation") -> xr.Dataset:
    r"""How well feature maps move with the image.

    With :math:`a_{is}(p)` a feature map's value for image :math:`i`, shift :math:`s` and patch
    :math:`p`, shift 0 the first frame of the lattice, and :math:`q_s` the shift from there to
    :math:`s` in patches, rounded to the nearest:

    .. math::

        E = \frac{\langle (a_{is}(p + q_s) - a_{i0}(p))^2 \rangle_{i,\, s \ne 0,\, p}}{2 V}, \qquad
        V = \langle a^2 \rangle - \langle a \rangle^2

    over all images, shifts and patches. 0: the map moves exactly with the image. 1: the two values
    differ as much as two that are drawn at random from the map's values, of any image, shift and
    patch; independent noise gives 1. More than 1: they are anticorrelated.

    Parameters
    ----------
    ds
        Dataset with ``variable``, of two shifts or more.
    variable
        As of :func:`unshift`. Results of one without layers, "embedding", have no ``layer``.

    Returns
    -------
    xarray.Dataset
        Lazy if ``ds`` is: ``.compute()`` takes one pass over the data.

        - ``equivariance_error(layer, feature_map)``: :math:`E`
        - ``still_error(layer, feature_map)``: the same with :math:`q_s = 0`, nothing rolled. A map
          that answers to the place on the grid alone has 0 here.
        - ``error_map(layer, feature_map, patch_row, patch_col)``: :math:`E` by the patch
          :math:`p + q_s` at which the shifted frame was looked at; its mean is :math:`E`
        - ``phase_error(layer, feature_map, phase_y, phase_x)``: :math:`E` over the shifts of one
          phase, the pixels by which the shift is more than whole patches. At phase (0, 0): whole
          patches
        - ``phase_activity(layer, feature_map, phase_y, phase_x)``: mean over images, patches and
          shifts of one phase: tuning to the phase
        - ``phase_frames(phase_y, phase_x)``: how many shifts have that phase, the first frame left
          out
        - ``invariance(layer, feature_map)``: intraclass correlation of the map's mean over
          patches, with images as classes and shifts as repetitions,
          ``(B - W) / (B + (S - 1) W)``, of S shifts, B and W the mean squares between and within
          images. 1: it tells images apart and does not change with the shift; 0: it changes as
          much with the shift as with the image; least ``-1 / (S - 1)``
        - ``variance(layer, feature_map)``: :math:`V`

        NaN where a map is constant or holds NaN, a phase does not occur, or, of ``invariance``,
        there is one image. (``phase_activity`` of a constant map is its value, and of one that
        holds NaN is NaN at the phases of the frames that do; ``variance`` of a constant map is 0.)

    Raises
    ------
    DataError
        If a circular shift of the image is not a roll of the patch grid, there is one shift, or a
        store does not hold all of them yet.

    Notes
    -----
    Whole patches apart, no model of patches can give 0: half a patch's shift gives patches with
    other contents. For an exact question take ``phase_error.sel(phase_y=0, phase_x=0)``.

    Under the scheme "raster" no frame is unshifted; offsets are taken relative to the first one.

    References
    ----------
    Normalised equivariance errors: Lenc and Vedaldi (2015), Understanding image representations by
    measuring their equivariance and equivalence, CVPR. Intraclass correlation: Shrout and Fleiss
    (1979), Intraclass correlations, Psychological Bulletin 86, 420-428, ICC(1, 1).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers="all", shifts=vitxr.ShiftGrid(step=8), progress=False)
    >>> e = ds.vit.equivariance().compute()
    >>> e.equivariance_error.weighted(e.variance).mean("feature_map").dims  # of whole layers
    ('layer',)
    """
    x, layered = frames(ds, variable), has_layers(ds, variable)
    written(x)
    by = rolls(ds, x, relative=True)
    if by.steps_y.size < 2:
        raise DataError("one shift: equivariance compares two or more. Select more of the lattice.")
    phases_y, phases_x = np.unique(by.phase_y), np.unique(by.phase_x)
    # Which of all pairs of phases each shift has.
    phase = np.searchsorted(phases_y, by.phase_y) * len(phases_x)
    phase += np.searchsorted(phases_x, by.phase_x)
    count = np.bincount(phase.ravel(), minlength=len(phases_y) * len(phases_x))
    shifts = (by.steps_y, by.steps_x, phase)
    data = _in_blocks(x, shifts, count) if x.chunks is not None else _at_once(x, shifts, count)

    map_dims = ("layer", "feature_map")
    of_result = {*map_dims, *_PATCH}
    grid = (len(phases_y), len(phases_x))
    out = xr.Dataset(
        coords={
            **{n: c.variable for n, c in x.coords.items() if c.dims and set(c.dims) <= of_result},
            "phase_y": ("phase_y", phases_y, VARIABLES["phase_y"].attrs),
            "phase_x": ("phase_x", phases_x, VARIABLES["phase_x"].attrs),
        }
    )
    for name, values in data.items():
        if name.startswith("phase"):
            values = values.reshape(*values.shape[:2], *grid)
        dims = (*map_dims, *_MORE.get(name, ()))
        out[name] = (dims, values, VARIABLES[name].attrs)
    frames_of = count.copy()
    frames_of[phase[0, 0]] -= 1
    out["phase_frames"] = (
        ("phase_y", "phase_x"), frames_of.reshape(grid), VARIABLES["phase_frames"].attrs,
    )  # fmt: skip
    out.attrs = {**provenance(ds.attrs), **whose(ds, variable)}
    for name in ("shift_scheme", "shift_step"):
        if name in ds.attrs:
            out.attrs[name] = ds.attrs[name]
    return out if layered else out.isel(layer=0, drop=True)


_PATCH = ("patch_row", "patch_col")
_PHASE = ("phase_y", "phase_x")
_MORE = {"error_map": _PATCH, "phase_error": _PHASE, "phase_activity": _PHASE}


def _at_once(x: xr.DataArray, shifts: Shifts, count: Array) -> dict[str, Any]:
    a = x.values
    return summary(frame_sums(a, a[:, 0, 0], shifts, len(count)), count, int(shifts[-1][0, 0]))


def _first_frames(a: Array) -> Array:
    """Copy them: a part would keep the whole block in memory."""
    return np.ascontiguousarray(a[:, 0, 0])


def _in_blocks(x: xr.DataArray, shifts: Shifts, count: Array) -> dict[str, Any]:
    """Build the same as a Dask graph: one task a block, sums added up as they come."""
    import dask
    import dask.array as da

    a = x.variable.chunk({"patch_row": -1, "patch_col": -1}).data
    blocks = a.to_delayed()
    first_frames, merged, summed = (
        dask.delayed(f, pure=False) for f in (_first_frames, merge, _summaries)
    )
    ends = [np.cumsum((0, *c)) for c in a.chunks]
    # What each shift is, for each block of shifts.
    sums_of: dict[tuple[int, ...], Any] = {}
    for j, k in np.ndindex(*blocks.shape[1:3]):
        y, z = (slice(e[at], e[at + 1]) for e, at in zip(ends[1:3], (j, k), strict=True))
        part = (shifts[0][y, z], shifts[1][y, z], shifts[2][y, z])
        kernel = functools.partial(frame_sums, shifts=part, phases=len(count))
        sums_of[j, k] = dask.delayed(kernel, pure=False)

    def add_up(tasks: list[Any], same_images: bool) -> Any:
        while len(tasks) > 1:
            tasks = [
                merged(tasks[i : i + _AT_A_TIME], same_images)
                for i in range(0, len(tasks), _AT_A_TIME)
            ]
        return tasks[0]

    done = []
    for layer in range(blocks.shape[3]):
        of_maps = []
        for maps in range(blocks.shape[4]):
            of_images = []
            for i in range(blocks.shape[0]):
                reference = first_frames(blocks[i, 0, 0, layer, maps, 0, 0])
                sums = [
                    kernel(blocks[i, j, k, layer, maps, 0, 0], reference)
                    for (j, k), kernel in sums_of.items()
                ]
                of_images.append(add_up(sums, True))
            of_maps.append(add_up(of_images, False))
        done.append(summed(of_maps, count, int(shifts[-1][0, 0])))
    grid = tuple(x.sizes[d] for d in _PATCH)
    more = {"error_map": grid, "phase_error": (len(count),), "phase_activity": (len(count),)}
    return {
        name: da.concatenate(
            [
                da.from_delayed(of_layer[name], (size, a.shape[4], *more.get(name, ())), np.float64)
                for of_layer, size in zip(done, a.chunks[3], strict=True)
            ]
        )
        for name in ("equivariance_error", "still_error", "invariance", "variance", *more)
    }


def _summaries(of_maps: list[Sums], count: Array, first: int) -> Sums:
    """Make :func:`vitxr.analysis._rolled.summary` of sums of some feature maps each."""
    each = [summary(sums, count, first) for sums in of_maps]
    return {name: np.concatenate([one[name] for one in each], axis=1) for name in each[0]}
