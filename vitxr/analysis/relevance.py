"""Relevance of patches for a class: attention weighted by its gradient, through all layers."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, ModelError
from vitxr.names import VARIABLES
from vitxr.stimuli.shifts import ShiftGrid, no_shifts

if TYPE_CHECKING:
    from vitxr.models import Backbone

__all__ = ["relevance"]


def relevance(
    stim: xr.Dataset,
    model: Backbone,
    shifts: ShiftGrid | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Literal["model", "raw"] = "model",
    batch_size: int = 8,
) -> xr.Dataset:
    """Compute which patches speak for a class, by attention and its gradient.

    With ``A_l`` the attention weights of layer ``l`` (head, query, key), ``y`` the logit of the
    class, and ``E_h`` the mean over heads::

        R <- I;   R <- R + E_h[max(0, A_l * dy/dA_l)] R   for l = 0, 1, ..., L

    The relevance of the patches is the class token's row of ``R``, on the patch grid. Where a
    head reads other tokens, it is the mean of the rows, less the identity, of the prefix tokens
    that it reads (such as class and distillation token), or if it reads none of these, of the
    patches that it averages; the attribute ``read`` says which. Which tokens it reads is found
    from the gradient with respect to the last block's output.

    Parameters
    ----------
    stim
        Stimuli, as :func:`vitxr.open_images` makes them.
    model
        Model with a classification head. It is left as it was: no gradients in its parameters,
        training flags and attention implementation restored.
    shifts
        Lattice of shifts, or None for none.
    classes
        Names of classes; None for the class that the model predicts of each frame. Each takes one
        backward pass.
    preprocess
        As in :func:`vitxr.extract`.
    batch_size
        Frames a pass takes. A pass keeps the states of all layers: of a ViT-B some 150 MB a frame.

    Returns
    -------
    xarray.Dataset
        ``relevance(image, shift_y, shift_x, patch_row, patch_col[, class])``, float32, 0 or more,
        and ``predicted(image, shift_y, shift_x)``; in memory.

    Raises
    ------
    ArgumentError
        If an argument or a class is unknown.
    ModelError
        If the model has no classification head, or its attention is of no form that is known.

    References
    ----------
    Chefer, Gur & Wolf (2021), Generic attention-model explainability for interpreting bi-modal and
    encoder-decoder transformers, ICCV (equations 5 and 6, for self-attention encoders).

    Examples
    --------
    >>> import vitxr
    >>> stim = vitxr.datasets.digits(per_class=1)
    >>> r = relevance(stim, vitxr.load_model("digits"), classes=["3", "8"])
    >>> r.relevance.sizes
    Frozen({'image': 10, 'shift_y': 1, 'shift_x': 1, 'patch_row': 8, 'patch_col': 8, 'class': 2})
    >>> str(r.predicted.sel(image=r.label == "3").item())
    '3'
    """
    from vitxr.extract import checks
    from vitxr.extract.labels import coordinates, provenance
    from vitxr.extract.units import prepare
    from vitxr.models import Backbone
    from vitxr.models.gradients import attention_relevance

    checks.check_stimuli(stim)
    stim = checks.plain_strings(stim)
    if not isinstance(model, Backbone):
        raise ArgumentError(
            f"model is a {type(model).__name__}; expected what vitxr.load_model returns."
        )
    if preprocess not in ("model", "raw"):
        raise ArgumentError(f"preprocess={preprocess!r}: expected 'model' or 'raw'.")
    if shifts is not None and not isinstance(shifts, ShiftGrid):
        raise ArgumentError(f"shifts={shifts!r}: expected a vitxr.ShiftGrid, or None.")
    whole = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size!r}: expected a number of frames, 1 or more.")
    if not model.classes:
        raise ModelError(
            f"{model.name!r} has no classification head; relevance is for a class. Load a model "
            "that has one."
        )
    checks.check_preprocess(stim, model, preprocess)
    numbers_of = _classes(model, classes)
    lattice = no_shifts() if shifts is None else shifts.lattice(*model.input_size)
    offsets = np.stack(np.broadcast_arrays(*_offsets(lattice)), -1)
    row = {"relevance": VARIABLES["relevance"]}
    coords = coordinates(stim, model, (), row, {"relevance": model.grid}, lattice, {})

    def frames() -> Iterator[np.ndarray]:
        for image in range(stim.sizes["image"]):
            still = prepare(stim, image, model, preprocess)
            for offset in offsets.reshape(-1, 2).tolist():
                yield np.roll(still, offset, (1, 2))

    coming = frames()
    found, best, read = [], [], set()
    while batch := list(itertools.islice(coming, batch_size)):
        values, predicted, names = attention_relevance(model, np.stack(batch), numbers_of)
        found.append(values)
        best.append(predicted)
        read.add(names)
    if len(read) > 1:
        raise ModelError(
            f"{model.name!r}: its head reads other tokens of other frames ({sorted(read)}); their "
            "relevance cannot be compared."
        )
    shape = (stim.sizes["image"], *offsets.shape[:2])
    values = np.concatenate(found)
    values = np.moveaxis(values.reshape(*shape, *values.shape[1:]), 3, -1)
    dims: tuple[str, ...] = ("image", "shift_y", "shift_x", "patch_row", "patch_col", "class")
    if classes is None:
        values, dims = values[..., 0], dims[:-1]
    else:
        coords = coords.assign_coords({"class": np.array(list(classes), dtype=object)})
    labels = np.array(model.classes, dtype=object)[np.concatenate(best)].reshape(shape)
    out = coords.assign(
        relevance=(dims, values, VARIABLES["relevance"].attrs),
        predicted=(dims[:3], labels, VARIABLES["predicted"].attrs),
    )
    out.attrs = {
        **provenance(model, shifts, preprocess, "float32", "float32"),
        "method": "generic attention-model explainability (Chefer et al. 2021)",
        "read": ", ".join(read.pop()) or "mean of patches",
    }
    return out


def _classes(model: Backbone, classes: Any) -> list[int] | None:
    if classes is None:
        return None
    known = {name: number for number, name in enumerate(model.classes)}
    if isinstance(classes, str) or not len(classes):
        raise ArgumentError(f"classes={classes!r}: expected a sequence of names of classes.")
    unknown = [name for name in classes if name not in known]
    if unknown:
        import difflib

        near = difflib.get_close_matches(str(unknown[0]), model.classes, n=5, cutoff=0.4)
        some = ", ".join(map(repr, near or model.classes[:5]))
        raise ArgumentError(
            f"{model.name!r} has no class {', '.join(map(repr, unknown[:5]))}; of its "
            f"{len(known)} classes {'the nearest' if near else 'the first'} are: {some}."
        )
    if len(set(classes)) < len(classes):
        raise ArgumentError(f"classes={list(classes)!r}: a class is named twice.")
    return [known[name] for name in classes]


def _offsets(lattice: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    dy, dx = lattice["offset_y"].values, lattice["offset_x"].values
    return (dy if dy.ndim == 2 else dy[:, None]), (dx if dx.ndim == 2 else dx[None, :])
