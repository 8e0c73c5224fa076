"""Sizes of results as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["amount", "sizes"]


def sizes(result: xr.DataArray | xr.Dataset | xr.DataTree) -> str:
    """List variables with their dims, dtypes and sizes, group by group."""
    import xarray as xr

    if isinstance(result, xr.DataTree):
        parts = [(node.path.strip("/"), node.to_dataset(inherit=False)) for node in result.subtree]
    else:
        ds = result if isinstance(result, xr.Dataset) else result.to_dataset(name=result.name)
        parts = [("", ds)]
    lines = []
    for group, ds in parts:
        for name, array in ds.data_vars.items():
            dims = ", ".join(f"{d}: {n}" for d, n in array.sizes.items())
            where = f"{group}/{name}" if group else str(name)
            lines.append(f"{where} ({dims}) {array.dtype}, {amount(array.nbytes)}")
    return "\n".join(lines)


def amount(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
