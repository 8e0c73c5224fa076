"""One unit of work: an image, some of its shifts, one model, labelled nowhere.

The same functions run in this process, in a Dask graph and on a cluster.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import xarray as xr

from vitxr.extract.plan import Task
from vitxr.models.backbone import Backbone
from vitxr.names import VARIABLES
from vitxr.stimuli import read_image

__all__ = ["compute", "forward", "prepare"]


def prepare(stim: xr.Dataset, image: int, model: Backbone, preprocess: str) -> np.ndarray:
    """Decode one image and make it the model's input, float32 (channel, row, col)."""
    pixels = read_image(stim, image)
    if preprocess == "model":
        return model.preprocess(pixels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def forward(
    model: Backbone,
    image: np.ndarray,
    offsets: np.ndarray,
    layers: Sequence[int],
    variables: Sequence[str],
    channels: np.ndarray | None,
    dtype: str,
    batch: int,
) -> dict[str, np.ndarray]:
    """Roll one image by each offset and capture, batch by batch.

    Returns arrays with the leading dimension ``frame``, one entry an offset.
    """
    import torch

    from vitxr.models.capture import capture

    weights = next(model.module.parameters())
    still = torch.as_tensor(image, device=weights.device).to(weights.dtype)
    parts = []
    for start in range(0, len(offsets), batch):
        frames = torch.stack(
            [
                torch.roll(still, (int(dy), int(dx)), dims=(1, 2))
                for dy, dx in offsets[start : start + batch]
            ]
        )
        parts.append(capture(model, frames, layers, variables, channels, dtype))
    return {name: np.concatenate([part[name] for part in parts]) for name in variables}


def compute(task: Task, image: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Compute one unit: every variable, shaped as its region of the result.

    ``image`` is the model's input, if it is at hand.
    """
    model = task.model.model()
    if image is None:
        image = prepare(task.stim, 0, model, task.preprocess)
    out = forward(
        model,
        image,
        task.offsets,
        task.layers,
        task.variables,
        task.channels,
        task.dtype,
        task.batch,
    )
    shaped = {
        name: array.reshape(1, -1, task.columns, *array.shape[1:]) for name, array in out.items()
    }
    _report_non_finite(task, shaped)
    return shaped


def _report_non_finite(task: Task, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if np.isfinite(array).all():
            continue
        where = np.argwhere(~np.isfinite(array))[0]
        labels = [f"image {str(task.stim['image'].values[0])!r}"]
        labels.append(f"shift ({task.row + where[1]}, {where[2]})")
        if VARIABLES[name].dims[0][3] == "layer":
            labels.append(f"layer {task.layers[where[3]]}")
        warnings.warn(
            f"`{name}` has values that are not finite, first at {', '.join(labels)}"
            + (
                ": it may overflow float16; use storage_dtype='float32'."
                if task.dtype == "float16"
                else "."
            ),
            RuntimeWarning,
            stacklevel=2,
        )
