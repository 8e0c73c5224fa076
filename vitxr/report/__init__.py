"""The report: every picture of a run with its numbers, as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitxr.errors import ArgumentError
from vitxr.report import found, recorded
from vitxr.report.page import Page
from vitxr.report.provenance import add_command, provenance
from vitxr.report.words import count, listed

__all__ = ["RESULTS", "write_report"]


#: What a report is made from; every key may be absent.
RESULTS: dict[str, str] = {
    "stimuli": "Dataset of images, with `pixels` or files",
    "activations": "extraction Dataset over shifts, with `activation` and perhaps `logits`",
    "detail": "extraction Dataset without shifts, perhaps with `attention`, `embedding`, `logits`",
    "tensors": "{layer: neuron tensor}",
    "matrices": "{layer: neuron matrix}",
    "ensembles": "{layer: ensemble of fits to the tensor}",
    "ensembles_2d": "{layer: ensemble of fits to the matrix}",
    "factors": "{layer: factor Dataset chosen}",
    "embeddings": "{layer: embedding Dataset}",
}


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    title: str = "Neurons of a Vision Transformer under circular shifts",
    command: str | None = None,
    progress: bool = True,
) -> Path:
    """Write ``report.html``, one self-contained page, and its figures, into a folder.

    The sections follow the original notebook. Every number in the text is
    computed from the results. What the results lack is said to be missing, with
    the step that makes it.

    Parameters
    ----------
    folder
        Folder for ``report.html`` and ``figures/*.png, *.pdf``; made if need be.
    results
        A mapping with any of the keys ``stimuli``, ``activations``, ``detail``, ``tensors``,
        ``matrices``, ``ensembles``, ``ensembles_2d``, ``factors``, ``embeddings``;
        ``vitxr.report.RESULTS`` says what each is.
    title
        Title of the page.
    command
        How to repeat the run; by default the command line of this process.
    progress
        Show a bar while the pictures are drawn.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    ArgumentError
        If ``results`` is empty or has a key that no section knows. Nothing is
        written before every picture is drawn.

    Examples
    --------
    >>> import tempfile
    >>> import vitxr
    >>> results = {"stimuli": vitxr.datasets.digits(per_class=1)}
    >>> vitxr.report.write_report(tempfile.mkdtemp(), results, progress=False).name
    'report.html'
    """
    unknown = [str(k) for k in results if k not in RESULTS]
    if unknown or not results:
        raise ArgumentError(
            f"results has {', '.join(map(repr, unknown)) or 'no keys'}; expected a mapping with "
            f"any of {', '.join(RESULTS)}."
        )
    page = Page(title)
    for section in (
        recorded.stimuli,
        recorded.predictions,
        recorded.attention,
        recorded.feature_maps,
        found.tensors,
        found.fits,
        found.factors,
        found.embeddings,
        provenance,
    ):
        section(page, results)
    page.lead = _lead(results)
    add_command(page, command)
    page.draw(progress)
    return page.write(Path(folder))


def _lead(results: Mapping[str, Any]) -> str:
    ds = results.get("activations", results.get("detail"))
    if ds is None:
        return ""
    frames = ds.sizes.get("shift_y", 1) * ds.sizes.get("shift_x", 1)
    layers = [int(v) for v in np.atleast_1d(ds["layer"].values)] if "layer" in ds.coords else []
    of = f" of {Page.text(ds.attrs['model'])}" if "model" in ds.attrs else ""
    where = f" in {'block' if len(layers) == 1 else 'blocks'} {listed(layers)}" if layers else ""
    return (
        f"{count(ds.sizes['image'], 'image')} at {count(frames, 'circular shift')} each: what "
        f"the patch neurons{of} respond to{where}, and which of them respond alike."
    )
