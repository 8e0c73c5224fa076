"""The original notebook's choice of feature maps: the most active in the first frame."""

from __future__ import annotations

import numpy as np
import xarray as xr

from vitxr.extract.ranking import rank_channels
from vitxr.extract.units import Task, compute
from vitxr.models.capture import frame_shape
from vitxr.models.load import Reference

__all__ = ["first_frame_channels"]


def first_frame_channels(
    stim: xr.Dataset,
    model: Reference,
    layers: tuple[int, ...],
    lattice: xr.Dataset,
    preprocess: str,
    count: int,
) -> np.ndarray:
    """Channels of each layer, the most active in the first frame of the first image."""
    first = np.array([[lattice["offset_y"].values.flat[0], lattice["offset_x"].values.flat[0]]])
    task = Task(
        model=model,
        stim=stim.isel(image=[0]),
        offsets=first,
        columns=1,
        row=0,
        frame={"activation": frame_shape(model.model(), "activation", len(layers))},
        layers=layers,
        channels=None,
        preprocess=preprocess,
        dtype="float32",
        keepbits=None,
        batch=1,
    )
    activation = compute(task)[0]["activation"][0, 0, 0]
    mean = activation.clip(min=0).mean(axis=(-2, -1), dtype=np.float64)
    return rank_channels(mean)[:, :count]
