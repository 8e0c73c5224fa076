"""Open and save results: Zarr stores and netCDF files, multi-indexes included.

Multi-indexes (``neuron``, ``shift``) are written in the CF convention's
compression by gathering, through cf-xarray, and come back as they were.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, StoreError
from vitxr.names import DIMS, VARIABLES
from vitxr.store.drafts import replacing
from vitxr.store.layout import is_laid_out
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location
from vitxr.store.plans import (
    GROUP,
    ROOT,
    check_layout,
    check_root,
    differences_of_root,
    is_finished,
    read_plan,
    root_json,
)
from vitxr.store.reader import lazy

__all__ = ["open_store", "save", "unfinished"]

Result = xr.DataArray | xr.Dataset | xr.DataTree

#: Attribute of a Dataset that was saved from a DataArray: the array's name.
_ARRAY = "vitxr_array"


def open_store(path: str | Path, partial: bool = False) -> Result:
    """Open what vitxr wrote: a store of activations, factors, an ensemble, an embedding.

    Parameters
    ----------
    path
        A Zarr store, a folder or an fsspec URL such as ``"s3://bucket/run.zarr"``; or a
        netCDF file (``.nc``).
    partial
        Open a store of an extraction that is not finished. What is not written yet is NaN,
        and the coordinate ``written`` (image, shift_y) says where that is.

    Returns
    -------
    xarray.Dataset, xarray.DataTree or xarray.DataArray
        What was saved. Lazy: variables are Dask arrays, in chunks of some megabytes that
        are whole shards, along ``feature_map`` and the like the chunks inside them. Coordinates
        are in memory, multi-indexes are rebuilt.

    Raises
    ------
    StoreError
        If there is nothing at ``path``, the store is unfinished or unreadable, or its
        coordinates or metadata are not as they were written (their checksums are compared).
        Shards are checked when they are read.

    Examples
    --------
    >>> import vitxr
    >>> vitxr.open("nowhere.zarr")
    Traceback (most recent call last):
        ...
    vitxr.errors.StoreError: there is no store at 'nowhere.zarr'. ...
    """
    location = Location(path)
    if not location.exists():
        raise StoreError(
            f"there is no store at {str(location)!r}. Expected a folder or URL written by "
            "vitxr.extract or vitxr.save, or a netCDF file."
        )
    plan = read_plan(location)
    if partial:
        if plan is None:
            raise StoreError(
                f"{str(location)!r} is not a store of vitxr.extract: partial=True opens only those."
            )
        if not is_laid_out(location):
            raise StoreError(
                f"the store {str(location)!r} is not laid out yet: its run was stopped at the very "
                "start. Run extract again with the same arguments."
            )
        return _open_partial(location, plan)
    if plan is not None:
        return _open_finished(location, plan)
    folder = location.folder
    if (folder is None or folder.is_dir()) and location.read(ROOT) is None:
        raise StoreError(f"{str(location)!r} is not a Zarr v3 store (no zarr.json in it).")
    if folder is not None and folder.suffix == ".mat":
        raise StoreError(f"{str(location)!r} is a MATLAB file: read it with vitxr.read_mat.")
    try:
        tree = _open_tree(location)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"{str(location)!r} cannot be read ({error}). Expected a Zarr v3 store or a netCDF-4 "
            "file, as vitxr.extract and vitxr.save write them."
        ) from error
    if tree.children:
        return xr.DataTree.from_dict(
            {node.path: _decode(node.to_dataset(inherit=False)) for node in tree.subtree}
        )
    ds = _decode(tree.to_dataset())
    name = ds.attrs.pop(_ARRAY, None)
    return ds if name is None else ds[name]


def unfinished(path: str | Path) -> str | None:
    """Say how far an unfinished store has come; None if it is not one."""
    location = Location(path)
    plan = read_plan(location)
    if plan is None or is_finished(location, plan["root"]):
        return None
    return _progress(location, plan)


def _progress(location: Location, plan: dict[str, Any]) -> str:
    if not is_laid_out(location):
        return "nothing is written"
    book = Ledger(location, plan)
    return f"{int(book.done().sum())} of {len(book.cut)} units are written"


def _open_tree(location: Location) -> xr.DataTree:
    if location.folder is None or location.folder.is_dir():
        return xr.open_datatree(location.key_value, engine="zarr", consolidated=False, chunks=None)
    return xr.open_datatree(location.folder, engine="netcdf4", chunks=None)


def _open_finished(location: Location, plan: dict[str, Any]) -> xr.Dataset:
    root = location.read(ROOT)
    if differences_of_root(root, plan["root"]):
        how_far = _progress(location, plan)
        if root is not None and is_laid_out(location) and Ledger(location, plan).done().all():
            check_root(location, plan)
        raise StoreError(
            f"the store {str(location)!r} is not finished: {how_far}. "
            "Run extract again with the same arguments, which goes on where it stopped; or, in "
            "Python, open what there is: vitxr.open(path, partial=True)."
        )
    objects = check_layout(location, plan) | {ROOT: root or b""}
    return _open_activations(Ledger(location, plan), objects)


def _open_partial(location: Location, plan: dict[str, Any]) -> xr.Dataset:
    objects = check_layout(location, plan) | {ROOT: root_json(plan["root"])}
    book = Ledger(location, plan)
    written = np.zeros((book.cut.images, book.cut.rows), bool)
    for unit in np.flatnonzero(book.done()):
        region = book.cut.region(int(unit))
        written[region["image"], region["shift_y"]] = True
    ds = _open_activations(book, objects, written)
    dims = VARIABLES["written"].dims[0]
    return ds.assign_coords(written=(dims, written, VARIABLES["written"].attrs))


def _open_activations(
    book: Ledger, objects: Mapping[str, bytes], written: np.ndarray | None = None
) -> xr.Dataset:
    """Open a store of an extraction: coordinates by xarray, activations by our own reader.

    xarray reads the very bytes whose checksums were compared.
    """
    import zarr

    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    memory = {k: buffer.from_bytes(v) for k, v in objects.items() if not k.startswith(GROUP)}
    store = zarr.storage.MemoryStore(memory, read_only=True)
    ds = xr.open_dataset(store, engine="zarr", consolidated=False, chunks=None)
    attrs = {name: ds[name].attrs for name in book.arrays}
    ds = _decode(ds.drop_vars(list(book.arrays))).drop_encoding()
    ds = xr.Dataset(coords={n: ds[n].variable for n in _in_order(ds.coords)}, attrs=ds.attrs)
    for name, shards in book.arrays.items():
        ds[name] = (shards.dims, lazy(book.location, shards, written), attrs[name])
    return ds


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
    names = _in_order(ds.data_vars)
    return ds[names] if names else ds


def _in_order(names: Iterable[Hashable]) -> list[Hashable]:
    """Sort names: a folder lists its arrays in any order, the vocabulary has one."""
    known = {name: i for i, name in enumerate((*DIMS, *VARIABLES))}
    return sorted(names, key=lambda name: known.get(str(name), len(known)))


def save(result: Result, path: str | Path) -> Path:
    """Write a tensor, factors, an ensemble or an embedding to disk.

    Parameters
    ----------
    result
        A DataArray, Dataset or DataTree; multi-indexes are allowed.
    path
        New path ending in ``.nc`` (netCDF-4) or ``.zarr`` (Zarr v3); a local one.

    Returns
    -------
    pathlib.Path
        The path written; :func:`vitxr.open` reads it back.

    Raises
    ------
    StoreError
        If the path exists.
    ArgumentError
        If the ending is another, or the path is a URL.

    Notes
    -----
    What is written lies in a hidden folder beside ``path``, ``.<name>.unfinished-<number>``, and
    becomes ``path`` when it is whole. If the process is killed, it stays behind; the next save to
    the same path deletes it (not on Windows, nor where the file system has no locks: there a
    folder of that name may be deleted by hand once nothing is being saved).
    """
    folder = Location(path).folder
    if folder is None:
        raise ArgumentError(
            f"path={str(path)!r} is a URL: expected a local path. Save there, and copy the file."
        )
    path = folder
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
        if variable.dtype.kind in "TU":
            # netCDF knows object strings, not NumPy's StringDType; Zarr v3 none of a fixed width.
            ds[name] = variable.astype(object)
    return ds
