"""MATLAB files of neuron tensors: the original notebook's names, and all labels beside them."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError, StoreError
from vitxr.names import NEURON, SHIFT, VARIABLES

__all__ = ["read_mat", "to_mat"]


def to_mat(t: xr.DataArray, path: str | Path) -> Path:
    """Write a neuron tensor or matrix as a MATLAB file, as the original notebook does.

    The array is ``neuron_output_3D`` (neuron, image, frame) or ``neuron_output_2D``
    (neuron, image). Beside it stand all its coordinates, one entry an index, counted
    from 0 as in Python: ``image`` and ``label`` (cell arrays of strings),
    ``feature_map``, ``patch_row``, ``patch_col``, ``shift_y``, ``shift_x``, ``offset_y``,
    ``offset_x`` and others; ``attributes``, its attributes as JSON, and
    ``coordinate_attributes``, those of the coordinates.

    Parameters
    ----------
    t
        Neuron tensor or matrix. It is computed and held in memory.
    path
        New file, ending in ``.mat``.

    Raises
    ------
    ArgumentError
        If the ending is another.
    StoreError
        If the file exists.
    DataError
        If ``t`` has other dims, or is too large for the format (2.1 GB).

    Examples
    --------
    >>> import tempfile, vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[0], shifts=None, progress=False)
    >>> t = ds.vit.neuron_matrix(layer=0, feature_maps=3)
    >>> path = t.vit.to_mat(tempfile.mkdtemp() + "/digits.mat")
    >>> bool((vitxr.read_mat(path) == t).all())
    True
    """
    from scipy.io import savemat

    name: dict[tuple[Hashable, ...], str] = {
        ("neuron", "image", "shift"): "neuron_output_3D",
        ("neuron", "image"): "neuron_output_2D",
    }
    if t.dims not in name:
        given = ", ".join(map(str, t.dims))
        raise DataError(
            f"to_mat: the array has dims ({given}); expected (neuron, image, shift) or "
            "(neuron, image), as neuron_tensor and neuron_matrix give."
        )
    if t.nbytes >= 2**31:
        raise DataError(
            f"to_mat: the tensor holds {t.nbytes / 1e9:.1f} GB; a MATLAB 5 file holds less than "
            "2.1 GB in a variable. Select fewer feature maps or images, or use vitxr.save."
        )
    path = Path(path)
    if path.suffix != ".mat":
        raise ArgumentError(f"path={str(path)!r}: expected a name ending in .mat.")
    if path.exists():
        raise StoreError(f"{str(path)!r} exists: choose another path, or delete it first.")
    content: dict[str, Any] = {name[t.dims]: t.values, "attributes": _json(t.attrs)}
    described: dict[Hashable, Any] = {}
    for key, coord in t.coords.items():
        if coord.ndim == 1 and key not in ("neuron", "shift"):
            values = coord.values
            content[str(key)] = values if values.dtype.kind in "iufb" else values.astype(object)
            described[str(key)] = coord.attrs
    content["coordinate_attributes"] = _json(described)
    savemat(path, content, do_compression=True)
    return path


def _json(attrs: dict[Hashable, Any]) -> str:
    """Write attributes as JSON; netCDF gives them back as NumPy scalars."""
    plain = (np.generic, np.ndarray)
    return json.dumps(attrs, default=lambda v: v.tolist() if isinstance(v, plain) else str(v))


def read_mat(path: str | Path) -> xr.DataArray:
    """Read a neuron tensor or matrix from a MATLAB file.

    Parameters
    ----------
    path
        File written by ``to_mat``, or by the original notebook.

    Returns
    -------
    xarray.DataArray
        ``(neuron, image, shift)`` or ``(neuron, image)``, with all labels that the
        file holds; the notebook's files hold none.

    Raises
    ------
    StoreError
        If the file cannot be read.
    DataError
        If it holds neither ``neuron_output_3D`` nor ``neuron_output_2D``.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path)
    except (OSError, ValueError, NotImplementedError, MatReadError) as error:
        raise StoreError(f"{str(path)!r} cannot be read as a MATLAB 5 file: {error}") from error
    forms = {
        "neuron_output_3D": ("neuron", "image", "shift"),
        "neuron_output_2D": ("neuron", "image"),
    }
    found = [key for key in forms if key in content]
    if len(found) != 1:
        have = ", ".join(k for k in content if not k.startswith("__")) or "nothing"
        raise DataError(f"{str(path)!r} holds {have}; expected one of {' or '.join(forms)}.")
    dims = forms[found[0]]
    data = content[found[0]]
    if data.ndim < len(dims):
        # MATLAB drops trailing dimensions of length one.
        data = data.reshape(data.shape + (1,) * (len(dims) - data.ndim))

    def column(key: str) -> np.ndarray:
        values = content[key].ravel()
        if values.dtype != object:
            return values
        return np.array([str(v.item()) if v.size else "" for v in values], dtype=object)

    t = xr.DataArray(data, dims=dims, name="activation")
    for dim, levels in (("neuron", NEURON), ("shift", SHIFT)):
        if dim in dims and all(key in content for key in levels):
            index = pd.MultiIndex.from_arrays([column(k) for k in levels], names=list(levels))
            t = t.assign_coords(xr.Coordinates.from_pandas_multiindex(index, dim))
    for key in content:
        known = VARIABLES[key].dims if key in VARIABLES else (("image",),) * (key == "image")
        for dim in dims:
            if (dim,) in known:
                t = t.assign_coords({key: (dim, column(key))})
    if "attributes" in content:
        t.attrs = json.loads(str(content["attributes"].item()))
        t.name = t.attrs.get("variable", t.name)
    if "coordinate_attributes" in content:
        for key, attrs in json.loads(str(content["coordinate_attributes"].item())).items():
            if key in t.coords:
                t[key].attrs = attrs
    return t
