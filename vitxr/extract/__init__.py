"""Extraction: stimuli and a model to labelled activations, lazily or into a store.

``plan`` decides what is computed in which units, ``units`` computes one. ``lazy`` makes a Dask
graph of them; ``run`` fills a store, by one of the executors ``pipeline`` (this process),
``processes`` and ``cluster``; ``cost`` says beforehand what that takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from vitxr.stimuli.shifts import ShiftGrid

if TYPE_CHECKING:
    from vitxr.extract.cost import Cost
    from vitxr.models import Backbone

__all__ = ["estimate", "extract"]

_DEFAULT_SHIFTS = ShiftGrid()


def extract(
    stim: xr.Dataset,
    model: Backbone,
    layers: int | Sequence[int] | Literal["all"] = "all",
    shifts: ShiftGrid | None = _DEFAULT_SHIFTS,
    variables: Sequence[str] = ("activation",),
    feature_maps: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: Literal["prefix", "patches"] | Sequence[int | tuple[int, int]] | None = None,
    modules: Mapping[str, str] | None = None,
    preprocess: Literal["model", "raw"] = "model",
    precision: Literal["float32", "bfloat16"] = "float32",
    storage_dtype: str = "float32",
    store: str | Path | None = None,
    resume: bool = True,
    batch_size: int | Literal["auto"] = "auto",
    client: Any = None,
    workers: int | Sequence[str] = 1,
    progress: bool = True,
) -> xr.Dataset:
    """Run a Vision Transformer on every image and every circular shift of it.

    Each image is preprocessed once, then rolled over the lattice of ``shifts`` (in
    pixels of the model's input; down and right positive) and run. What is kept of
    every frame is labelled. The forward pass stops after the deepest wanted block.

    Parameters
    ----------
    stim
        Stimuli, as :func:`vitxr.open_images` makes them.
    model
        Model, as :func:`vitxr.load_model` makes it.
    layers
        One block, several, or ``"all"``; 0-based.
    shifts
        The lattice, or None for no shifts.
    variables
        Which of these to keep, all in the same pass:

        - ``activation``: output of the block after the residual, patch tokens on
          the patch grid, not rectified
        - ``prefix``: the same of the tokens before the patches
        - ``embedding``: what enters the first block, patch tokens
        - ``attention``: attention weights, the softmax in float32; rows sum to one
        - ``attention_query``, ``attention_key``, ``attention_value``: as they enter the
          attention's dot product, after biases, norms and rotations (of DINOv3, say),
          before the division by the square root of their width; patch tokens
        - ``attention_output``: output of the attention sublayer, after its output
          projection, before layer scale and residual; patch tokens
        - ``mlp_hidden``: hidden units of the MLP after the nonlinearity, which is what
          enters its down projection (of a gated MLP the gated product); patch tokens
        - ``logits``: scores of the classes (needs the whole model)

        An empty sequence will do where there are ``modules``.
    feature_maps
        Channels of ``activation`` to keep: all (None); a sequence of channel
        numbers; or a count, the most active in the first frame of the first image,
        ranked for each layer (then ``feature_map`` is the rank and ``channel(layer,
        feature_map)`` the channel's number). Of no other variable.
    heads
        Heads to keep of every variable that has heads; None keeps all.
    queries
        Tokens whose rows of ``attention`` to keep: all (None), ``"prefix"``, ``"patches"``,
        or a sequence of tokens, each its number (prefix tokens first, then patches row by
        row) or the (row, column) of a patch: ``[2, 3]`` are two tokens, ``[(2, 3)]`` is one
        patch, and ``(2, 3)``, which could be either, is refused. Of these only the weights are
        computed.
    modules
        More variables: outputs of modules, by name and path. ``{layer}`` in a path stands
        for the number of the block, and the variable has the dimension ``layer``. A path may
        lack its beginning if no other module has this end. A module gives (frame, token,
        width) with the model's tokens, of which the patches are kept on the grid, or (frame,
        width), or (frame, width, row, column) on the patch grid; of a tuple the first counts.
        The width is labelled ``<name>_unit``.
    preprocess
        ``"model"``: the model's own resizing and normalisation. ``"raw"``: pixel
        values 0..255 as they are, as the original notebook does; images must have
        the size the model takes.
    precision
        Arithmetic of the forward pass.
    storage_dtype
        How what is kept is stored. ``"float32"``: as it is. ``"float16"``: half the bytes,
        relative error at most 2^-11 (4.9e-4), overflow beyond 65504 is reported.
        ``"bitroundN"``: float32 rounded to N bits of its mantissa (to nearest, ties to
        even) and compressed, relative error at most 2^-(N+1); ``"bitround7"`` (3.9e-3)
        takes some 40 % of the bytes. The error is stated in the variable's attributes.
    store
        Zarr store to write, ending in ``.zarr``: a folder, or an fsspec URL such as
        ``"s3://bucket/run.zarr"``; None makes a lazy result. Before work starts the run
        is refused if the disk has no room for it.
    resume
        Go on with a store that an earlier run with the same settings left. Units whose
        record or shards are missing or cut short are run, and no others; coordinates and
        metadata that were altered are written anew. Of shards only the sizes are compared,
        because reading terabytes would take as long as writing them: one that was altered in
        place raises when it is read, and :func:`vitxr.verify`, with ``reset=True``, takes its
        unit back.
    batch_size
        Frames a forward pass takes, or ``"auto"``.
    client
        A ``dask.distributed.Client`` that runs the units; needs a store that its workers
        share, and a model loaded by name or path.
    workers
        Processes of this machine that run the units: a number (they share the cores), or
        a device for each, such as ``["cuda:0", "cuda:1"]``. Needs a store, and in a
        script a guard ``if __name__ == "__main__":``.
    progress
        Show a progress bar with the rate and an estimate.

    Returns
    -------
    xarray.Dataset
        Dask-backed. With ``store=None`` its blocks run the model when they are
        computed; with a store the work is done and is read back lazily.

    Raises
    ------
    ArgumentError, DataError, ImageError, ModelError, StoreError
        Before any work and before anything is written, if an argument, the model or the
        store does not fit; later, if an image file has changed since it was opened, or if
        writing fails. What is recorded as done then is safe, and the next run goes on.

    Warns
    -----
    RuntimeWarning
        If values are not finite; the image, the shift and the layer of the first are named.

    References
    ----------
    The original notebook, section 5.

    Examples
    --------
    >>> import vitxr
    >>> stim = vitxr.datasets.digits(per_class=1)
    >>> ds = vitxr.extract(stim, vitxr.load_model("digits"), layers=[0, 5],
    ...                    shifts=vitxr.ShiftGrid(step=16), variables=["activation", "logits"])
    >>> ds.activation.sizes
    Frozen({'image': 10, 'shift_y': 2, 'shift_x': 2, 'layer': 2, 'feature_map': 48, \
'patch_row': 8, 'patch_col': 8})
    >>> str(ds.logits.isel(image=3, shift_y=0, shift_x=0).idxmax("class").values)
    '3'

    Attention from the class token and one patch, in two heads of the last block; and what a
    module gives, by its path:

    >>> ds = vitxr.extract(stim, vitxr.load_model("digits"), layers=[5], shifts=None,
    ...                    variables=["attention", "mlp_hidden"], heads=[0, 2],
    ...                    queries=[0, (3, 4)], modules={"norm": "layers.{layer}.layernorm_before"})
    >>> ds.attention.isel(image=0, shift_y=0, shift_x=0, layer=0).sizes
    Frozen({'head': 2, 'query': 2, 'key': 65})
    >>> bool(abs(ds.attention.sum("key") - 1).max() < 1e-5)
    True
    >>> ds.mlp_hidden.sizes["hidden_unit"], ds.norm.sizes["norm_unit"]
    (192, 48)
    """
    from vitxr.extract import run
    from vitxr.extract.lazy import lazy
    from vitxr.extract.plan import make_plan

    run.check(store, client, workers, model)
    plan = make_plan(
        stim,
        model,
        layers=layers,
        shifts=shifts,
        variables=variables,
        feature_maps=feature_maps,
        heads=heads,
        queries=queries,
        modules=modules,
        preprocess=preprocess,
        precision=precision,
        storage_dtype=storage_dtype,
        batch_size=batch_size,
    )
    if store is None:
        return lazy(plan)
    return run.into_store(plan, store, resume, client, workers, progress)


def estimate(
    stim: xr.Dataset,
    model: Backbone,
    layers: int | Sequence[int] | Literal["all"] = "all",
    shifts: ShiftGrid | None = _DEFAULT_SHIFTS,
    variables: Sequence[str] = ("activation",),
    feature_maps: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: Literal["prefix", "patches"] | Sequence[int | tuple[int, int]] | None = None,
    modules: Mapping[str, str] | None = None,
    preprocess: Literal["model", "raw"] = "model",
    precision: Literal["float32", "bfloat16"] = "float32",
    storage_dtype: str = "float32",
    store: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
) -> Cost:
    """Say what :func:`extract` would cost: forward passes, bytes, files and time.

    Nothing is written. One batch is run three times to learn the time of a frame. Of a store
    that an earlier run left, only what is missing counts.

    Parameters
    ----------
    stim, model, layers, shifts, variables, feature_maps, heads, queries, modules, \
preprocess, precision, storage_dtype, batch_size
        As in :func:`extract`.
    store
        The store that would be written or gone on with; None if that is not known yet.

    Returns
    -------
    Cost
        ``frames``, ``batches``, ``bytes`` (before compression, if ``compressed``), ``files``,
        ``free`` bytes on the disk, ``seconds``: frames times the measured time of one, on this
        machine as busy as it is now; and frames that are ``written`` already. Prints as a
        sentence.

    Raises
    ------
    ArgumentError, DataError, ImageError, ModelError, StoreError
        If an argument or the store does not fit, as :func:`extract`; the lack of room is told,
        not refused.

    Examples
    --------
    >>> import vitxr
    >>> cost = vitxr.estimate(vitxr.datasets.digits(per_class=5), vitxr.load_model("digits"),
    ...                       shifts=vitxr.ShiftGrid(step=4))
    >>> cost.frames, cost.bytes
    (3200, 240648192)
    """
    from vitxr.extract import run
    from vitxr.extract.cost import cost, cost_of_store, probe
    from vitxr.extract.plan import make_plan
    from vitxr.store.location import Location

    run.check(store, client=None, workers=1, model=model)
    plan = make_plan(
        stim,
        model,
        layers=layers,
        shifts=shifts,
        variables=variables,
        feature_maps=feature_maps,
        heads=heads,
        queries=queries,
        modules=modules,
        preprocess=preprocess,
        precision=precision,
        storage_dtype=storage_dtype,
        batch_size=batch_size,
    )
    if store is None:
        return probe(plan, cost(plan, None, range(len(plan.cut))))
    return probe(plan, cost_of_store(plan, Location(store)))
