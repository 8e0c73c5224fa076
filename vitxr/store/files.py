"""Open and save results: Zarr stores and netCDF files, multi-indexes included.

Multi-indexes (``neuron``, ``shift``) are written in the CF convention's
compression by gathering, through cf-xarray, and come back as they were.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from vitxr.errors import ArgumentError, StoreError
from vitxr.names import VARIABLES
from vitxr.store.ledger import GROUP, unfinished

__all__ = ["open_store", "save"]

Result = xr.Dataset | xr.DataTree


def open_store(path: str | Path) -> Result:
    """Open what vitxr wrote: a store of activations, factors, an ensemble, an embedding.

    Parameters
    ----------
    path
        A Zarr store, or a netCDF file (``.nc``).

    Returns
    -------
    xarray.Dataset or xarray.DataTree
        Lazy: variables are Dask arrays, chunked as they are stored (whole shards).
        Coordinates are in memory, multi-indexes are rebuilt.

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
    try:
        tree = _open_tree(path)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error}") from error
    if set(tree.children) - {GROUP}:
        return xr.DataTree.from_dict(
            {
                node.path: _decode(node.to_dataset(inherit=False))
                for node in tree.subtree
                if not node.path.startswith(f"/{GROUP}")
            }
        )
    return _decode(tree.to_dataset())


def _open_tree(path: Path) -> xr.DataTree:
    if path.is_dir():
        tree = xr.open_datatree(path, engine="zarr", consolidated=False, chunks=None)
    else:
        tree = xr.open_datatree(path, engine="netcdf4", chunks=None)
    return tree


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
        stored = array.encoding.get("shards") or array.encoding.get("chunks")
        if array.ndim and array.dtype.kind in "fiu":
            sizes = dict(zip(array.dims, stored or array.shape, strict=True))
            # A Variable: assigning a DataArray would drop levels of its multi-indexes.
            ds[name] = array.variable.chunk(sizes)
    # A folder lists its arrays in any order; the vocabulary has one.
    known = {name: i for i, name in enumerate(VARIABLES)}
    return ds[sorted(ds.data_vars, key=lambda name: known.get(str(name), len(known)))]


def save(result: xr.DataArray | Result, path: str | Path) -> Path:
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
    if isinstance(result, xr.Dataset):
        tree = xr.DataTree(_encode(result))
    else:
        tree = xr.DataTree.from_dict(
            {node.path: _encode(node.to_dataset(inherit=False)) for node in result.subtree}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".nc":
        tree.to_netcdf(path, engine="netcdf4")
    else:
        tree.to_zarr(path, consolidated=False, zarr_format=3)
    return path


def _encode(ds: xr.Dataset) -> xr.Dataset:
    """Pack multi-indexes and drop the encodings of where the data came from."""
    import cf_xarray
    import pandas as pd

    ds = ds.drop_encoding()
    packed = [d for d in ds.dims if isinstance(ds.indexes.get(d), pd.MultiIndex)]
    if packed:
        ds = cf_xarray.encode_multi_index_as_compress(ds, packed)
    for name, variable in ds.variables.items():
        if variable.dtype.kind == "T":
            # netCDF writers know object strings, not NumPy's StringDType.
            ds[name] = variable.astype(object)
    return ds
