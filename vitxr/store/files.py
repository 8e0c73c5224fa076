"""Open and save results: Zarr stores and netCDF files, multi-indexes included.

Multi-indexes (``neuron``, ``shift``) are written in the CF convention's
compression by gathering, through cf-xarray, and come back as they were.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, StoreError
from vitxr.names import VARIABLES
from vitxr.store.ledger import GROUP, replacing, unfinished

__all__ = ["open_store", "save"]

Result = xr.DataArray | xr.Dataset | xr.DataTree

#: Attribute of a Dataset that was saved from a DataArray: the array's name.
_ARRAY = "vitxr_array"


def open_store(path: str | Path) -> Result:
    """Open what vitxr wrote: a store of activations, factors, an ensemble, an embedding.

    Parameters
    ----------
    path
        A Zarr store, or a netCDF file (``.nc``).

    Returns
    -------
    xarray.Dataset, xarray.DataTree or xarray.DataArray
        What was saved. Lazy: variables are Dask arrays, chunked by shards, and along
        ``feature_map`` by the chunks inside them. Coordinates are in memory,
        multi-indexes are rebuilt.

    Raises
    ------
    StoreError
        If there is nothing at ``path``, or the store is unfinished or unreadable.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.open("nowhere.zarr")
    Traceback (most recent call last):
        ...
    vitxr.errors.StoreError: there is no store at 'nowhere.zarr'. ...
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(
            f"there is no store at {str(path)!r}. Expected a folder written by vitxr.extract or "
            "vitxr.save, or a netCDF file."
        )
    progress = unfinished(path) if path.is_dir() else None
    if progress:
        raise StoreError(
            f"the store {str(path)!r} is not finished: {progress}. Run extract again with the same "
            "arguments; it goes on where it stopped."
        )
    if path.is_dir() and not (path / "zarr.json").exists():
        raise StoreError(
            f"{str(path)!r} is a folder, but not a Zarr v3 store (no zarr.json in it)."
        )
    if path.suffix == ".mat":
        raise StoreError(f"{str(path)!r} is a MATLAB file: read it with vitxr.read_mat.")
    try:
        tree = _open_tree(path)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"{str(path)!r} cannot be read ({error}). Expected a Zarr v3 store or a netCDF-4 file, "
            "as vitxr.extract and vitxr.save write them."
        ) from error
    if set(tree.children) - {GROUP}:
        return xr.DataTree.from_dict(
            {
                node.path: _decode(node.to_dataset(inherit=False))
                for node in tree.subtree
                if not node.path.startswith(f"/{GROUP}")
            }
        )
    ds = _decode(tree.to_dataset())
    name = ds.attrs.pop(_ARRAY, None)
    return ds if name is None else ds[name]


def _open_tree(path: Path) -> xr.DataTree:
    if path.is_dir():
        return xr.open_datatree(path, engine="zarr", consolidated=False, chunks=None)
    return xr.open_datatree(path, engine="netcdf4", chunks=None)


def _decode(ds: xr.Dataset) -> xr.Dataset:
    """Load coordinates, chunk variables by their shards, rebuild multi-indexes."""
    import cf_xarray

    for name in ds.coords:
        ds[name].load()
        if ds[name].dtype.kind == "T":
            # Zarr's strings; object strings are what pandas and netCDF know.
            ds[name] = ds[name].astype(object)
    packed = [str(n) for n, v in ds.variables.items() if "compress" in v.attrs]
    if packed:
        ds = cf_xarray.decode_compress_to_multi_index(ds, packed)
    for name, array in ds.data_vars.items():
        inner = array.encoding.get("chunks") or array.shape
        if array.ndim and array.dtype.kind in "fiu":
            sizes = dict(zip(array.dims, array.encoding.get("shards") or inner, strict=True))
            if "feature_map" in sizes:
                # Finer than a shard: a few maps of many are read without the others.
                sizes["feature_map"] = inner[array.dims.index("feature_map")]
            # A Variable: assigning a DataArray would drop levels of its multi-indexes.
            ds[name] = array.variable.chunk(sizes)
    # A folder lists its arrays in any order; the vocabulary has one.
    known = {name: i for i, name in enumerate(VARIABLES)}
    return ds[sorted(ds.data_vars, key=lambda name: known.get(str(name), len(known)))]


def save(result: Result, path: str | Path) -> Path:
    """Write a tensor, factors, an ensemble or an embedding to disk.

    Parameters
    ----------
    result
        A DataArray, Dataset or DataTree; multi-indexes are allowed.
    path
        New path ending in ``.nc`` (netCDF-4) or ``.zarr`` (Zarr v3).

    Returns
    -------
    pathlib.Path
        The path written; :func:`vitxr.open` reads it back.

    Raises
    ------
    StoreError
        If the path exists.
    ArgumentError
        If the ending is another.
    """
    path = Path(path)
    if path.suffix not in (".nc", ".zarr"):
        raise ArgumentError(f"path={str(path)!r}: expected a name ending in .nc or .zarr.")
    if path.exists():
        raise StoreError(f"{str(path)!r} exists: choose another path, or delete it first.")
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "data")
        result.attrs[_ARRAY] = str(next(iter(result.data_vars)))
    if not isinstance(result, xr.Dataset | xr.DataTree):
        raise ArgumentError(
            f"save: the result is a {type(result).__name__}; expected a DataArray, Dataset or "
            "DataTree."
        )
    if isinstance(result, xr.Dataset):
        tree = xr.DataTree(_encode(result, path.suffix == ".nc"))
    else:
        tree = xr.DataTree.from_dict(
            {
                node.path: _encode(node.to_dataset(inherit=False), path.suffix == ".nc")
                for node in result.subtree
            }
        )
    with replacing(path) as draft:
        if path.suffix == ".nc":
            tree.to_netcdf(draft, engine="netcdf4")
        else:
            tree.to_zarr(draft, consolidated=False, zarr_format=3)
    return path


def _encode(ds: xr.Dataset, netcdf: bool) -> xr.Dataset:
    """Pack multi-indexes and drop the encodings of where the data came from."""
    import cf_xarray
    import pandas as pd

    ds = ds.drop_encoding()
    half = [name for name, v in ds.variables.items() if v.dtype == np.float16]
    if half and netcdf:
        # netCDF has no float16; float32 holds the same numbers.
        ds = ds.assign({name: ds[name].variable.astype(np.float32) for name in half})
    packed = [d for d in ds.dims if isinstance(ds.indexes.get(d), pd.MultiIndex)]
    if packed:
        ds = cf_xarray.encode_multi_index_as_compress(ds, packed)
    for name, variable in ds.variables.items():
        if variable.dtype.kind == "T":
            # netCDF writers know object strings, not NumPy's StringDType.
            ds[name] = variable.astype(object)
    return ds
