"""Equivariance on the patch grid: where it fails, tuning to the phase, frames rolled back."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._facets import draw, taken
from vitxr.plot._select import described, image_positions, variable
from vitxr.plot._style import SIGNED

__all__ = ["error_map", "phase_tuning", "unshift"]

_REMEDY = "Give the Dataset of ds.vit.equivariance()."
_PHASE = ("phase_y", "phase_x")


def _of_maps(array: xr.DataArray) -> tuple[xr.DataArray, str]:
    """Median over the feature maps, and the words that say so."""
    if "feature_map" not in array.dims:
        return array, ""
    if array.sizes["feature_map"] == 1:
        return array.isel(feature_map=0), ""
    return array.median("feature_map"), f", median of {array.sizes['feature_map']} maps"


def error_map(e: xr.Dataset | xr.DataArray, *, title: str | None = None) -> Any:
    """Draw where on the patch grid feature maps fail to move with the image, by layer.

    Parameters
    ----------
    e
        Dataset of ``ds.vit.equivariance()``, or its ``error_map`` ([layer, feature_map,]
        patch_row, patch_col). Over several feature maps the median is taken; select some
        first, ``e.sel(feature_map=7)``, to see one.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``: squared error / chance, from 0; a facet a layer, one scale.
    """
    array, said = _of_maps(taken(e, "error_map", _REMEDY))
    return draw(array, "Squared error / chance", title=title or f"Equivariance error{said}")


def phase_tuning(e: xr.Dataset, variable: str = "phase_error", *, title: str | None = None) -> Any:
    """Draw the tuning to the phase, the place of things within a patch.

    Phases are circular: half a patch up is half a patch down. Where all phases occur and the
    patch has an even number of pixels, that phase is drawn at both ends.

    Parameters
    ----------
    e
        Dataset of ``ds.vit.equivariance()``.
    variable
        ``"phase_error"``, the squared error / chance of the shifts of each phase, the median of
        the feature maps, a facet a layer, from 0. Or ``"phase_activity"``, the mean activity,
        a facet a layer and feature map (select some): less its mean over phases, divided
        by the largest difference from it.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``, a pixel a phase, phase 0 in the middle; down and to the right.

    Raises
    ------
    ArgumentError
        If the variable is neither of the two.
    """
    if variable not in ("phase_error", "phase_activity"):
        raise ArgumentError(f"variable={variable!r}: expected 'phase_error' or 'phase_activity'.")
    array = taken(e, variable, _REMEDY, _PHASE)
    words: dict[str, Any] = {}
    if variable == "phase_error":
        array, said = _of_maps(array)
        quantity, heading = "Squared error / chance", f"Equivariance error by phase{said}"
    else:
        array = array - array.mean(_PHASE)
        most = abs(array).max(_PHASE)
        array = array / most.where(most > 0, 1)
        quantity, heading = "Activity, less its mean / largest", "Activity by phase"
        words = {"cmap": SIGNED, "clim": (-1.0, 1.0)}
    array = _closed(array)
    down, right = ([(float(k), str(int(v))) for k, v in enumerate(array[d].values)] for d in _PHASE)
    return draw(
        array,
        quantity,
        title=title or heading,
        over=("phase_y", "phase_x"),
        ticks=(right, down),
        axes=("phase right (px)", "phase down (px)"),
        **words,
    )


def _closed(array: xr.DataArray) -> xr.DataArray:
    """Repeat the phase of half a patch at the other end, where all phases are there."""
    for dim in _PHASE:
        phases = array[dim].values
        n = len(phases)
        if n > 1 and n % 2 == 0 and np.array_equal(phases, np.arange(-(n // 2), n - n // 2)):
            end = array.isel({dim: [0]}).assign_coords({dim: [n // 2]})
            array = xr.concat([array, end], dim)
    return array


def unshift(
    ds: xr.Dataset,
    feature_map: int,
    *,
    layer: int,
    image_at: int | str = 0,
    along: str = "shift_y",
    every: int | None = None,
    title: str | None = None,
) -> Any:
    """Draw one feature map under shifts, as it is and rolled back on the patch grid.

    Parameters
    ----------
    ds
        Extraction Dataset with shifts. Of lazy data only the frames drawn are read.
    feature_map
        Channel number.
    layer
        Block, 0-based.
    image_at
        Name or position of the image.
    along
        ``"shift_y"`` or ``"shift_x"``: the shifts along which to go, the other being the first.
    every
        Draw every so many shifts only; by default so many that at most eight are drawn.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I``: above the frames as they are, below them rolled back.

    Raises
    ------
    ArgumentError
        If the feature map, layer or image is not there.
    DataError
        If a circular shift of the image is no roll of the patch grid.
    """
    from vitxr.analysis import unshift as rolled_back

    if along not in ("shift_y", "shift_x"):
        raise ArgumentError(f"along={along!r}: expected 'shift_y' or 'shift_x'.")
    array = variable(ds, "activation")
    if not isinstance(ds, xr.Dataset) or along not in array.dims:
        raise DataError(
            f"the picture needs `activation` with shifts; given: {described(ds)}. Give the Dataset "
            "of vitxr.extract(..., shifts=vitxr.ShiftGrid(step=4))."
        )
    for name, value in (("layer", layer), ("feature_map", feature_map)):
        known = np.atleast_1d(array[name].values)
        if value not in known:
            raise ArgumentError(
                f"{name}={value!r} is not in the data; they hold {', '.join(map(str, known[:8]))}"
                f"{', ...' if len(known) > 8 else ''}."
            )
    other = "shift_x" if along == "shift_y" else "shift_y"
    count = array.sizes[along]
    every = -(-count // 8) if every is None else every
    if not isinstance(every, int | np.integer) or every < 1:
        raise ArgumentError(f"every={every!r}: expected a positive integer.")
    at = image_positions(array, image_at)
    part = ds.isel({"image": at, along: slice(None, None, every), other: [0]})
    part = part[["activation"]].sel(feature_map=[feature_map])
    part = part.sel(layer=[layer]) if "layer" in part["activation"].dims else part
    both = xr.concat(
        [part["activation"], rolled_back(part).drop_vars(("phase_y", "phase_x"))], "how"
    ).assign_coords(how=["as it is", "rolled back"])
    return draw(
        both.compute(), "Activation", title=title or "Rolled back by the shift", rows_of="how",
        **_signed(both),
    )  # fmt: skip


def _signed(array: xr.DataArray) -> dict[str, Any]:
    """Diverging colours, symmetric about zero."""
    reach = float(abs(array).max()) or 1.0
    return {"cmap": SIGNED, "clim": (-reach, reach)}
