"""The main job from end to end on the bundled model: what ``vitxr demo`` runs."""

from __future__ import annotations

import sys
from pathlib import Path

import vitxr
from vitxr.errors import StoreError

__all__ = ["run_demo"]

CLASSES = ("0", "3", "4", "7")
PER_CLASS = 5
STEP = 3
LAYERS = (0, 5)
FEATURE_MAPS = 20
RANKS = (2, 4, 6, 8, 10, 12)
RANKS_2D = (1, 2, 3, 4, 5)
REPLICATES = 3
#: The notebook picks a rank by eye from the ensemble; so does the demo.
RANK = 8
SEED = 0


def run_demo(folder: str | Path, progress: bool = True) -> Path:
    """Run the original notebook's analysis on held-out handwritten digits.

    4 classes x 5 images, a lattice of 11 x 11 circular shifts, first and last
    block of the bundled model, 3-D and 2-D neuron tensors of the 20 most active
    feature maps, nonnegative CP over ranks and replicates, PCA of the neuron
    factor, and a report.

    Parameters
    ----------
    folder
        New or empty folder for everything that is made.
    progress
        Show progress bars.

    Returns
    -------
    pathlib.Path
        The report, one self-contained page.

    Raises
    ------
    StoreError
        If the folder holds something already.
    """
    from vitxr.report import write_report

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            f"{str(folder)!r} exists and is not an empty folder: nothing was written. "
            "Name another with --output, or delete it."
        )
    folder.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr, flush=True)

    say(f"Extraction: {len(CLASSES) * PER_CLASS} digits, blocks {LAYERS}, shifts by {STEP} px")
    stim = vitxr.datasets.digits(per_class=PER_CLASS)
    stim = stim.isel(image=stim["label"].isin(CLASSES).values)
    model = vitxr.load_model("digits")
    ds = vitxr.extract(
        stim,
        model,
        layers=LAYERS,
        shifts=vitxr.ShiftGrid(step=STEP),
        variables=("activation", "logits"),
        store=folder / "activations.zarr",
        progress=progress,
    )
    detail = vitxr.extract(
        stim,
        model,
        layers="all",
        shifts=None,
        variables=("activation", "embedding", "attention", "logits"),
        store=folder / "detail.zarr",
        progress=progress,
    )
    results: dict[str, dict] = {
        key: {}
        for key in ("tensors", "matrices", "ensembles", "ensembles_2d", "factors", "embeddings")
    }
    for layer in LAYERS:
        say(f"Block {layer}: neuron tensor and matrix, nonnegative factors over ranks")
        tensor = ds.vit.neuron_tensor(layer=layer, feature_maps=FEATURE_MAPS).compute()
        matrix = ds.vit.neuron_matrix(layer=layer, feature_maps=FEATURE_MAPS).compute()
        tensor.vit.to_mat(folder / f"neuron_output_3D_layer{layer}.mat")
        matrix.vit.to_mat(folder / f"neuron_output_2D_layer{layer}.mat")
        options = {"replicates": REPLICATES, "random_state": SEED, "progress": progress}
        ensemble = tensor.vit.fit_ensemble(RANKS, **options)
        ensemble_2d = matrix.vit.fit_ensemble(RANKS_2D, **options)
        factors = ensemble.vit.best(RANK)
        vitxr.save(ensemble, folder / f"ensemble_layer{layer}.nc")
        vitxr.save(ensemble_2d, folder / f"ensemble_2d_layer{layer}.nc")
        vitxr.save(factors, folder / f"factors_layer{layer}.nc")
        for key, value in {
            "tensors": tensor,
            "matrices": matrix,
            "ensembles": ensemble,
            "ensembles_2d": ensemble_2d,
            "factors": factors,
            "embeddings": factors.vit.embed(),
        }.items():
            results[key][layer] = value
    return write_report(
        folder,
        {"stimuli": stim, "activations": ds, "detail": detail, **results},
        progress=progress,
    )
