"""Stores on disk: layout, ledger of finished work, opening and saving.

The only room that knows Zarr. A finished store is a plain Zarr v3 group that
``xarray.open_zarr`` reads.
"""

from vitxr.store.files import open_store as open_store
from vitxr.store.files import save as save
from vitxr.store.verify import verify as verify

__all__ = ["open_store", "save", "verify"]
