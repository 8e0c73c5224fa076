"""An extraction as a Dask graph: blocks that run the model when they are computed."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import xarray as xr

from vitxr.extract.plan import Plan
from vitxr.extract.units import Task, compute
from vitxr.models.load import Reference

__all__ = ["lazy"]


def lazy(plan: Plan) -> xr.Dataset:
    """Build the result as Dask blocks, one a unit and variable."""
    import dask
    import dask.array as da
    from dask.base import tokenize

    token = tokenize(plan.fingerprint())
    units = range(len(plan.cut))
    # One key for all: a module that has no name to be loaded by is sent once.
    model = dask.delayed(plan.model, name=f"vitxr-model-{token}", traverse=False)
    pieces = [
        dask.delayed(_block, pure=True, traverse=False)(
            replace(plan.task(unit), model=None), model, dask_key_name=f"vitxr-unit-{token}-{unit}"
        )
        for unit in units
    ]
    ds = plan.coords.copy()
    for name, frame in plan.frame.items():
        blocks = [
            da.from_delayed(
                piece[name],
                shape=(*(s.stop - s.start for s in region.values()), plan.form(name)[1][2], *frame),
                dtype=plan.storage.dtype,
                name=f"vitxr-{name}-{token}-{unit}",
            )
            for unit, piece in zip(units, pieces, strict=True)
            for region in [plan.cut.region(unit)]
        ]
        bands = plan.cut.bands
        images = [
            da.concatenate(blocks[i : i + bands], axis=1) for i in range(0, len(blocks), bands)
        ]
        ds[name] = (plan.form(name)[0], da.concatenate(images, axis=0), plan.attrs_of(name))
    ds.attrs = plan.attrs
    return ds


def _block(task: Task, model: Reference) -> dict[str, np.ndarray]:
    arrays, reports = compute(replace(task, model=model))
    for report in reports:
        warnings.warn(report, RuntimeWarning, stacklevel=2)
    return arrays
