"""Shift-aligned nonnegative CP: every response is rolled to where the model fits it best."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Hashable
from importlib.metadata import version

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.errors import ArgumentError, DataError
from vitxr.factor import checks
from vitxr.factor.blocks import own_threads
from vitxr.factor.labels import Found, assemble, describe, ordered_cp
from vitxr.factor.lattice import Axis, lattice
from vitxr.factor.reconstruct import explained
from vitxr.factor.rolling import Rolled, places, rolled
from vitxr.factor.same import difference
from vitxr.names import provenance

__all__ = ["factorize_aligned", "roll"]


def factorize_aligned(
    t: xr.DataArray,
    rank: int,
    random_state: int = 0,
    tol: float = 1e-5,
    max_iter: int = 2000,
) -> xr.Dataset:
    r"""Fit nonnegative CP to responses that are rolled on the shift lattice to fit it.

    With ``R_d`` the roll of the lattice by ``d = (roll_y, roll_x)`` places, the objective is ::

        sum_ij | R_{d_ij} x_ij - sum_r w_r a_ir b_jr c_r |^2

    over nonnegative ``a``, ``b``, ``c`` and one roll for each neuron ``i`` and image ``j``, where
    ``x_ij`` is the response of the neuron to the image over all shifts. Plain CP has all rolls
    zero: there, two neurons that respond alike at different shifts are different.

    An iteration (1) takes for each ``d_ij`` the place of the largest circular cross-correlation of
    ``x_ij`` with its model, by FFT, which given the factors is the best roll; (2) updates ``a``,
    ``b``, ``c`` by three sweeps of HALS each on the rolled tensor. Neither raises the objective.
    Where that ends (3) one component at a time is rolled against the others, as looks best on a
    sample of responses, and the iteration goes on from there; what does not lower the objective
    is undone. Without this most fits end where components lie wrong to one another.

    All components of a response share its roll, so that the rolled tensor exists
    (:func:`roll`) and everything that is done with plain factors can be done with these.

    Parameters
    ----------
    t
        Tensor with three dims, one of them the stacked ``shift``, whose lattice closes after one
        period along both axes: then a roll is a circular shift of the image. Nonnegative. A Dask
        tensor larger than 2.1 GB is read from its chunks in each iteration.
    rank
        Number of components.
    random_state
        Seed of the start, an integer from 0 to 2**32 - 1: of the response to which all others are
        first aligned (drawn with probability as its sum of squares), and of the factors.
    tol
        (1) and (2) end when the objective falls by less than this in an iteration with new rolls,
        the fit when no component gains as much by (3).
    max_iter
        Most iterations, those of (3) included. Many are needed: ``converged`` is False where they
        were too few. From the sixth on only each fifth, and the last, looks for new rolls.

    Returns
    -------
    xarray.Dataset
        Factors, ``weight``, ``objective``, ``objective_history`` and so on as
        :func:`vitxr.factor.factorize` gives them, of the rolled tensor (the history is the lowest
        objective so far); and, over the two other
        dims, ``roll_y`` and ``roll_x`` (lattice steps, signed, the shorter way round),
        ``roll_offset_y`` and ``roll_offset_x`` (pixels). A response whose maximum is at the offset
        ``p`` is rolled by about ``-p``: only differences between rolls come from the data, and
        they are fixed so that the shift profile of the model, ``sum_r w_r c_r``, is largest at
        the first place of the lattice. Where a response or its model is zero the roll is 0.

    Raises
    ------
    ArgumentError
        If an argument is out of range, as for :func:`vitxr.factor.factorize`.
    DataError
        If ``t`` has other dims, or its lattice does not close after one period (with the axis and
        the reason), or for the reasons of :func:`vitxr.factor.factorize`.

    Notes
    -----
    Rolls are parameters, one for each response: even noise is fitted better than by plain CP,
    because its peaks are brought together. To know what an improvement is worth, fit a tensor of
    which each response is permuted over shifts as well. There are local minima: compare seeds.

    References
    ----------
    Dyballa, Rudzite, Hoseini, Thapa, Stryker, Field and Zucker (2024), Population encoding of
    stimulus features along the visual hierarchy, PNAS 121(4), e2317773121 (factorization with
    circular permutations); Morup, Hansen, Arnfred, Lim and Madsen (2008), Shift-invariant
    multilinear decomposition of neuroimaging data, NeuroImage 42, 1439-1450.

    Examples
    --------
    >>> import pandas as pd
    >>> c = np.array([9.0, 4.0, 1.0, 0.0])  # the same response at several shifts
    >>> data = np.stack([[np.roll(c, 0), np.roll(c, 2)], [np.roll(c, 2), np.roll(c, 1)]])
    >>> shift = pd.MultiIndex.from_product([[0], range(4)], names=["shift_y", "shift_x"])
    >>> t = xr.DataArray(data, dims=("neuron", "image", "shift"),
    ...                  coords=xr.Coordinates.from_pandas_multiindex(shift, "shift"))
    >>> t = t.assign_coords(offset_x=("shift", [0, 8, 16, 24], {"period": 32}))
    >>> f = factorize_aligned(t, rank=1)
    >>> f.roll_x.values, bool(f.objective < 1e-6)
    (array([[ 0, -2],
           [-2, -1]]), True)
    >>> f.roll_offset_x.values
    array([[  0, -16],
           [-16,  -8]])
    """
    began = time.perf_counter()
    checks.check_arguments("ncp_hals", random_state, tol, max_iter, {})
    checks.check_labels(t)
    rows, axes = _check(t)
    (number,) = checks.check_rank(t, rank, "ncp_hals")
    tensor = checks.prepare(t.transpose(*rows, "shift"), "ncp_hals", {}, maskable=False)
    sizes = axes[0].size, axes[1].size
    with own_threads() as pool:
        fit = Rolled(tensor.data, sizes, tensor.norm, pool)
        fit.start(number, int(random_state))
        history, converged = fit.fit(tol, int(max_iter))
        fit.settle()
    found = Found(np.ones(number), [f.T for f in fit.factors], np.array(history), converged, 0.0, 0)
    core, units = ordered_cp(found, tensor.data.dtype)
    ds = assemble(tensor.labelled, core, units)
    for along, axis in enumerate(axes):
        steps = np.stack(np.unravel_index(fit.rolls, sizes))[along]
        shorter = (steps + axis.size // 2) % axis.size - axis.size // 2
        name = axis.dim.removeprefix("shift_")
        ds[f"roll_{name}"] = (rows, shorter)
        ds[f"roll_offset_{name}"] = (rows, shorter * axis.step)
    ds["objective"] = explained(ds, roll(tensor.labelled, ds))["objective"].variable
    ds["objective_history"] = ("iteration", np.array(history))
    ds = ds.assign_coords(iteration=np.arange(len(history)))
    ds["converged"], ds["iterations"] = converged, len(history)
    ds["seconds"], ds["seed"] = time.perf_counter() - began, np.int64(random_state)
    describe(ds)
    used = {"vitxr": __version__, "numpy": np.__version__, "scipy": version("scipy")}
    ds.attrs = {
        **provenance(t.attrs),
        "method": "ncp_aligned",
        "rank": number,
        "tol": float(tol),
        "max_iter": int(max_iter),
        "options": "{}",
        "versions": json.dumps(used),
    }
    return ds


def roll(t: xr.DataArray, f: xr.Dataset, back: bool = False) -> xr.DataArray:
    """Roll every response of a tensor as an aligned fit has rolled it, or back.

    ``x'(shift) = x(shift - roll)`` on the circle of the lattice, for each of the other labels.

    Parameters
    ----------
    t
        The tensor, its model (``f.vit.reconstruct()``), or another one with the labels of ``f``.
    f
        Dataset from :func:`factorize_aligned`.
    back
        Roll a rolled tensor back: then the model lies as the responses do.

    Returns
    -------
    xarray.DataArray
        As ``t``, lazy if ``t`` is, every chunk with all shifts; with ``roll_y`` and ``roll_x`` as
        coordinates where it is rolled, without where it is not.

    Raises
    ------
    ArgumentError
        If ``t`` has been rolled already, or is to be rolled back and is not rolled.
    DataError
        If ``f`` has no rolls, or ``t`` other dims or labels.

    Examples
    --------
    >>> f = xr.Dataset({"roll_y": (("neuron", "image"), [[0]]),
    ...                 "roll_x": (("neuron", "image"), [[1]])})
    >>> import pandas as pd
    >>> shift = pd.MultiIndex.from_product([[0], range(3)], names=["shift_y", "shift_x"])
    >>> t = xr.DataArray([[[5, 6, 7]]], dims=("neuron", "image", "shift"),
    ...                  coords=xr.Coordinates.from_pandas_multiindex(shift, "shift"))
    >>> roll(t, f).values, roll(roll(t, f), f, back=True).values
    (array([[[7, 5, 6]]]), array([[[5, 6, 7]]]))
    """
    if "roll_y" not in f or "roll_x" not in f:
        raise DataError("the Dataset has no roll_y and roll_x: give one from factorize_aligned.")
    axes = lattice(t)
    rows = f["roll_y"].dims
    if set(t.dims) != {*rows, "shift"}:
        raise DataError(
            f"the tensor has dims ({', '.join(map(str, t.dims))}); the rolls are of "
            f"{', '.join(map(str, rows))}, and shift."
        )
    if ("roll_y" in t.coords) is not back:
        done = "has not been rolled" if back else "has been rolled already"
        raise ArgumentError(f"the tensor {done}: give it as it is with back={not back}.")
    for dim in (*rows, "shift"):
        if dim in f.sizes and (found := difference(f, t, dim, ("the rolls", "the tensor"))):
            kind, how = found
            raise DataError(f"the tensor and the rolls differ in the {kind} of {dim}: {how}.")
    sizes = axes[0].size, axes[1].size
    steps = [f[name].variable for name in ("roll_y", "roll_x")]
    sign = -1 if back else 1
    flat = np.ravel_multi_index([sign * s.values for s in steps], sizes, mode="wrap")
    table = places(sizes)
    # Its data alone: coordinates stay in memory.
    whole = t if t.chunks is None else t.copy(data=t.variable.chunk(shift=-1).data)
    out: xr.DataArray = xr.apply_ufunc(
        lambda block, where: rolled(block, where, table),
        whole,
        xr.Variable(rows, flat),
        input_core_dims=[["shift"], []],
        output_core_dims=[["shift"]],
        dask="parallelized",
        output_dtypes=[t.dtype],
        keep_attrs=True,
    )
    out = out.transpose(*t.dims)
    if back:
        return out.drop_vars(["roll_y", "roll_x"])
    return out.assign_coords(roll_y=steps[0], roll_x=steps[1])


def _check(t: xr.DataArray) -> tuple[tuple[Hashable, ...], tuple[Axis, Axis]]:
    """Check dims and lattice; return the dims of the rows, and the axes."""
    rows = tuple(d for d in t.dims if d != "shift")
    if t.ndim != 3 or len(rows) != 2:
        raise DataError(
            f"the tensor has dims ({', '.join(map(str, t.dims))}); expected three, one of them the "
            "stacked shift, as neuron_tensor gives."
        )
    if "roll_y" in t.coords or "roll_x" in t.coords:
        raise ArgumentError(
            "the responses of the tensor have been rolled already: give it as it was before, "
            "vitxr.factor.roll(t, f, back=True)."
        )
    axes = lattice(t)
    if math.prod(axis.size for axis in axes) == 1:
        raise DataError("the tensor has one shift, so that nothing can be rolled: use factorize.")
    for axis in axes:
        if axis.open:
            raise DataError(
                f"{axis.dim} does not close after one period: {axis.open}. A roll of it is no "
                "circular shift of the image, so that responses cannot be aligned by rolls: "
                "extract with the scheme 'grid' and a step that divides the image's size."
            )
    return rows, axes
