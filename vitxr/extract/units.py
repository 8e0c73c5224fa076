"""One unit of work: some frames of some images, one model, labelled nowhere.

The same functions run in this process, in others, in a Dask graph and on a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from vitxr.errors import ModelError
from vitxr.models.backbone import Backbone
from vitxr.models.capture import capture, exclusive, is_out_of_memory
from vitxr.models.load import Reference
from vitxr.models.site import Site
from vitxr.stimuli import read_image

__all__ = ["Task", "compute", "prepare"]


@dataclass(frozen=True)
class Task:
    """A unit with all it needs and nothing else: what is sent to a worker.

    Attributes
    ----------
    model
        The model, or how to load it; None until it is put in.
    stim
        The unit's images.
    offsets
        (frame, 2) vertical and horizontal offsets of each image's frames, row by row.
    columns
        Frames in a row.
    row
        Lattice row of the first frame, for messages.
    frame
        Shape of each variable for one frame; its keys are the variables.
    layers, channels, preprocess, dtype, keepbits, batch, sites, heads, queries
        As in the plan.
    """

    model: Reference | None
    stim: xr.Dataset
    offsets: np.ndarray
    columns: int
    row: int
    frame: dict[str, tuple[int, ...]]
    layers: tuple[int, ...]
    channels: np.ndarray | None
    preprocess: str
    dtype: str
    keepbits: int | None
    batch: int
    sites: Mapping[str, Site] = field(default_factory=dict)
    heads: np.ndarray | None = None
    queries: np.ndarray | None = None

    def empty(self) -> dict[str, np.ndarray]:
        """Make arrays for the results, (frame, ...)."""
        frames = self.stim.sizes["image"] * len(self.offsets)
        return {n: np.empty((frames, *shape), self.dtype) for n, shape in self.frame.items()}


def prepare(stim: xr.Dataset, image: int, model: Backbone, preprocess: str) -> np.ndarray:
    """Decode one image and make it the model's input, float32 (channel, row, col)."""
    pixels = read_image(stim, image)
    if preprocess == "model":
        return model.preprocess(pixels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def compute(
    task: Task,
    images: Sequence[np.ndarray] | None = None,
    out: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Compute one unit: every variable, shaped as its region of the result.

    Parameters
    ----------
    task
        The unit.
    images
        The model's inputs, if they are at hand.
    out
        Arrays of :meth:`Task.empty` to write to; the longer ones of another unit will do.

    Returns
    -------
    dict of str to numpy.ndarray
        Views of ``out``.
    list of str
        What is not finite, a sentence a variable.
    """
    assert task.model is not None
    model = task.model.model()
    if images is None:
        images = [
            prepare(task.stim, i, model, task.preprocess) for i in range(task.stim.sizes["image"])
        ]
    frames = len(images) * len(task.offsets)
    # Held for the whole unit: threads that wait for the model have no arrays yet.
    with exclusive():
        out = task.empty() if out is None else {n: array[:frames] for n, array in out.items()}
        finite = _forward(task, task.model, images, out)
    shaped = {
        name: array.reshape(len(images), -1, task.columns, *array.shape[1:])
        for name, array in out.items()
    }
    return shaped, [] if finite else _not_finite(task, shaped)


def _forward(
    task: Task, reference: Reference, images: Sequence[np.ndarray], out: dict[str, np.ndarray]
) -> bool:
    """Roll every image by every offset, capture batch by batch; say if all may be finite."""
    import torch

    model = reference.model()
    reference.check()
    weights = next(model.module.parameters())
    still = [torch.as_tensor(i, device=weights.device).to(weights.dtype) for i in images]
    finite = True

    def run(start: int, stop: int) -> None:
        nonlocal finite
        limit = reference.limit or stop - start
        if stop - start > limit:
            for low in range(start, stop, limit):
                run(low, min(low + limit, stop))
            return
        into = {name: array[start:stop] for name, array in out.items()}
        try:
            frames = torch.stack([_rolled(still, task.offsets, f) for f in range(start, stop)])
            capture(
                model, frames, task.layers, list(into), task.channels, task.dtype, task.keepbits,
                into, task.sites, task.heads, task.queries,
            )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if stop - start == 1:
                raise ModelError(
                    f"{model.name!r}: one frame does not fit into the memory of {model.device} "
                    f"({str(error).splitlines()[0]}). Use precision='bfloat16', fewer variables, "
                    "or a device with more memory."
                ) from error
            reference.limit = math.ceil((stop - start) / 2)
        else:
            finite &= all(_may_be_finite(array) for array in into.values())
            return
        # Outside the handler, whose traceback keeps the failed pass's tensors alive.
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        run(start, stop)

    for start in range(0, len(images) * len(task.offsets), task.batch):
        run(start, min(start + task.batch, len(images) * len(task.offsets)))
    return finite


def _rolled(still: Sequence, offsets: np.ndarray, frame: int):  # type: ignore[no-untyped-def]
    import torch

    image, shift = divmod(frame, len(offsets))
    dy, dx = offsets[shift].tolist()
    return torch.roll(still[image], (dy, dx), dims=(1, 2)) if dy or dx else still[image]


def _may_be_finite(array: np.ndarray) -> bool:
    """Whether the sum is finite, which costs a quarter of looking at every value."""
    import torch

    total = torch.from_numpy(array).sum(dtype=torch.float32)
    return bool(torch.isfinite(total))


def _not_finite(task: Task, arrays: dict[str, np.ndarray]) -> list[str]:
    """Say for each variable where the first value is that is not finite."""
    out = []
    for name, array in arrays.items():
        bad = ~np.isfinite(array)
        if not bad.any():
            continue
        where = np.argwhere(bad)[0]
        labels = [f"image {str(task.stim['image'].values[where[0]])!r}"]
        labels.append(f"shift ({task.row + where[1]}, {where[2]})")
        site = task.sites.get(name)
        if name in ("activation", "prefix") or (site is not None and site.layered):
            labels.append(f"layer {task.layers[where[3]]}")
        out.append(
            f"`{name}` has {int(bad.sum())} values that are not finite, first at "
            f"{', '.join(labels)}"
            + (
                ": it may overflow float16; use storage_dtype='float32'."
                if task.dtype == "float16"
                else "."
            )
        )
    return out
