"""Smoothing of responses over the shift lattice, before they are factorized."""

from __future__ import annotations

import json
import math
import numbers
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.checks import floating
from vitxr.factor.lattice import lattice
from vitxr.names import SHIFT

__all__ = ["smooth"]

Mode = Literal["wrap", "reflect"]


def smooth(
    t: xr.DataArray, sigma: float | tuple[float, float] = 1.0, mode: Mode | None = None
) -> xr.DataArray:
    """Smooth each neuron's response to each image by a Gaussian over the shift lattice.

    :func:`scipy.ndimage.gaussian_filter` along ``shift_y`` and ``shift_x``, cut off at four
    ``sigma``; the original notebook's filter, which it leaves switched off.

    Parameters
    ----------
    t
        Tensor with the stacked dimension ``shift``, which is a full lattice, or with ``shift_y``
        and ``shift_x``; other dimensions are free. NumPy or Dask.
    sigma
        Standard deviation in steps of the lattice, one for both axes or one for each (y, x). The
        notebook's is 1; 0 leaves an axis as it is.
    mode
        What lies beyond the edge of the lattice: "wrap", its other end; "reflect", its mirror
        image, edge included, as in the notebook. By default "wrap" for an axis that closes after
        one period, and "reflect" for one that does not (``vitxr.factor.lattice.lattice``).

    Returns
    -------
    xarray.DataArray
        As ``t``, in float32 if ``t`` is float32 or smaller, otherwise float64; lazy if ``t`` is,
        every chunk with the whole lattice. The attribute ``smoothing`` says by what, as JSON, and
        factors keep it.

    Raises
    ------
    ArgumentError
        If ``sigma`` is not finite or negative, or ``mode`` is unknown, or "wrap" and an axis does
        not close.
    DataError
        If the tensor has no shifts, or they are not a full lattice, or it is not numeric.

    References
    ----------
    The original notebook's section 7 (``get_tensor_factors``).

    Examples
    --------
    >>> t = xr.DataArray(np.eye(4)[:1].T * np.eye(4)[0], dims=("shift_y", "shift_x"))
    >>> smooth(t, sigma=(0, 1)).values[0].round(3)
    array([0.641, 0.296, 0.058, 0.005])
    """
    from scipy.ndimage import gaussian_filter

    sigmas: tuple[Any, ...] = tuple(np.array(sigma, dtype=object).ravel())
    sigmas = sigmas * 2 if len(sigmas) == 1 else sigmas
    if len(sigmas) != 2 or not all(_is_length(s) for s in sigmas):
        raise ArgumentError(
            f"sigma is {sigma!r}; expected a finite number of lattice steps, 0 or more, or two of "
            "them (y, x)."
        )
    if mode is not None and mode not in get_args(Mode):
        raise ArgumentError(f"mode={mode!r}; expected 'wrap', 'reflect' or None.")
    axes = lattice(t)
    if t.dtype.kind not in "iuf":
        raise DataError(f"the tensor has dtype {t.dtype}; expected real numbers.")
    for axis in axes:
        if mode == "wrap" and axis.open:
            raise ArgumentError(
                f"mode='wrap': {axis.dim} does not close after one period: {axis.open}. Use "
                "mode='reflect', or a step that divides the image's size."
            )
    modes = [mode or ("reflect" if axis.open else "wrap") for axis in axes]
    sizes = [axis.size for axis in axes]
    dtype = floating(t.dtype)

    def filtered(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        grid = block.astype(dtype, copy=False).reshape(*block.shape[: -len(core)], *sizes)
        out = gaussian_filter(grid, sigmas, mode=modes, axes=(-2, -1))
        return out.reshape(block.shape)

    core = ["shift"] if "shift" in t.dims else list(SHIFT)
    # Its data alone: coordinates stay in memory.
    chunked = t.chunks is not None
    whole = t.copy(data=t.variable.chunk(dict.fromkeys(core, -1)).data) if chunked else t
    out: xr.DataArray = xr.apply_ufunc(
        filtered,
        whole,
        input_core_dims=[core],
        output_core_dims=[core],
        dask="parallelized",
        output_dtypes=[dtype],
        keep_attrs=True,
    )
    out = out.transpose(*t.dims)
    out.attrs["smoothing"] = json.dumps({"sigma": [float(s) for s in sigmas], "mode": modes})
    if "long_name" in out.attrs:
        out.attrs["long_name"] += ", smoothed over shifts"
    return out


def _is_length(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    return real and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]
