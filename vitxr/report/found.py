"""Sections on what was made of it: neuron tensors, fits, factors, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr import plot
from vitxr.plot._select import labels_of
from vitxr.report.page import Page, Picture
from vitxr.report.words import count, missing, percent

__all__ = ["embeddings", "factors", "fits", "tensors"]


_COLORINGS = (
    ("feature_map", "feature map"),
    ("patch_row", "patch row"),
    ("patch_col", "patch column"),
    ("both", "patch row and column"),
)


def tensors(page: Page, results: Mapping[str, Any]) -> None:
    """Neuron tensors and matrices, activity and responses across shifts."""
    page.section("Neuron tensors")
    tensors, matrices = results.get("tensors") or {}, results.get("matrices") or {}
    if not tensors and not matrices:
        missing(page, "No neuron tensors were given.", "ds.vit.neuron_tensor(layer=0)")
        return
    page.say(
        "A neuron is one feature map at one patch. Responses are rectified, and each map is "
        "divided by its largest value in each frame unless the tensor was made otherwise."
    )
    for layer, t in tensors.items():
        page.part(f"Block {layer}: tensor")
        maps = pd.unique(t["feature_map"].values)
        shape = " x ".join(str(n) for n in t.shape)
        silent = float((t == 0).mean())
        page.say(
            f"{shape} ({Page.text(', '.join(map(str, t.dims)))}): "
            f"{count(len(maps), 'feature map')}, {percent(silent)} of the responses are zero."
        )
        if "shift" not in t.dims or t.sizes["shift"] < 2:
            page.say(
                "The tensor has one frame an image, so there is nothing to show across shifts."
            )
            continue
        first = int(maps[0])
        level = _activity(t)
        spread = float((level.std(-1) / np.maximum(level.mean(-1), 1e-12)).mean())
        page.show(
            Picture(
                f"activity_block_{layer}",
                plot.activity(t),
                f"Mean activity of each feature map of block {layer} over the shift lattice.",
                "Mean over patches of each feature map: each small map is the lattice, down the "
                "vertical and across the horizontal shift. Over the shifts of an image the mean "
                f"activity varies by {percent(spread)} (standard deviation over mean, averaged "
                "over maps and images); 0 would be invariance to shifts.",
            )
        )
        page.show(
            Picture(
                f"filmstrip_block_{layer}",
                plot.filmstrip(t, first, every=max(1, -(-int(np.sqrt(t.sizes["shift"])) // 14))),
                f"Responses of feature map {first} of block {layer} on the patch grid, by shift.",
                f"Feature map {first} for the first image, one patch map a shift, laid out as the "
                "shifts are. A map that follows the stimulus moves from frame to frame as it does.",
            )
        )
    for layer, matrix in matrices.items():
        page.part(f"Block {layer}: matrix")
        shown, title, row = _few_rows(matrix)
        page.show(
            Picture(
                f"neuron_matrix_block_{layer}",
                plot.neuron_matrix(shown, title=title),
                f"Mean responses of block {layer}, a row {row} and a column a feature map.",
                f"The mean over shifts, {matrix.sizes['neuron']} neurons by "
                f"{count(matrix.sizes['image'], 'image')}, each neuron at its place on the patch "
                f"grid, a row {row}; the largest of the matrix is {float(matrix.max()):.2f}.",
            )
        )


def _few_rows(matrix: xr.DataArray, most: int = 8) -> tuple[xr.DataArray, str, str]:
    """Rows that can be told apart: of many images the mean of each class, else the first ones."""
    n = matrix.sizes["image"]
    labels = np.asarray(labels_of(matrix), dtype=object)
    classes = [c for c in pd.unique(labels) if c]
    title = "Neuron matrix: mean response over shifts"
    if n <= most:
        return matrix, title, "an image"
    if len(classes) in (0, n):
        return matrix.isel(image=slice(most)), f"{title} ({most} of {n} images)", "an image"
    # of Variables: the neurons' multi-index stays out of the arithmetic
    means = [matrix.isel(image=labels == c).variable.mean("image") for c in classes[:12]]
    coords = {k: v for k, v in matrix.coords.items() if "image" not in v.dims}
    shown = xr.DataArray(
        xr.Variable.concat(means, "image"), coords={**coords, "image": classes[:12]}
    ).transpose("neuron", "image")
    whole = f" ({len(means)} of {len(classes)} classes)" if len(means) < len(classes) else ""
    title = f"Neuron matrix: mean response over shifts and images of a class{whole}"
    return shown, title, "a class (the mean of its images)"


def _activity(t: xr.DataArray) -> np.ndarray:
    """Mean response of each feature map, (feature_map, image, shift)."""
    values = t.transpose("neuron", "image", "shift").values
    numbers = t["feature_map"].values
    return np.stack([values[numbers == m].mean(0) for m in pd.unique(numbers)])


def fits(page: Page, results: Mapping[str, Any]) -> None:
    """Objective and similarity against rank."""
    page.section("Fit and agreement against rank")
    kinds = (("ensembles", "tensor", ""), ("ensembles_2d", "matrix", "_2d"))
    if not any(results.get(k) for k, _, _ in kinds):
        missing(page, "No ensembles were given.", "t.vit.fit_ensemble(ranks=[20, 25, 30])")
        return
    page.say(
        "Every point is one fit of a nonnegative model from its own random start. The relative "
        "residual says how much of the tensor a model leaves out; the similarity says whether "
        "another start finds the same components (1 is the same)."
    )
    for key, kind, ending in kinds:
        for layer, tree in (results.get(key) or {}).items():
            page.part(f"Block {layer}: {kind}")
            objective = tree["objective"].transpose("rank", "replicate")
            ranks = [int(r) for r in objective["rank"].values]
            least = objective.min("replicate").values
            k = objective.sizes["replicate"]
            low, high = int(np.argmin(ranks)), int(np.argmax(ranks))
            said = f"The least residual is {least[low]:.3f} at rank {ranks[low]}"
            said += f" and {least[high]:.3f} at rank {ranks[high]}" if len(ranks) > 1 else ""
            said = f"{count(k, 'replicate')} a rank. {said}."
            pictures = [
                Picture(
                    f"objective{ending}_block_{layer}",
                    plot.objective_by_rank(tree),
                    f"Relative residual against rank for the {kind} of block {layer}.",
                    said,
                )
            ]
            if k > 1:
                mean = _mean_similarity(tree)
                best = int(np.nanargmax(mean))
                pictures.append(
                    Picture(
                        f"similarity{ending}_block_{layer}",
                        plot.similarity_by_rank(tree),
                        f"Similarity of replicates against rank for the {kind} of block {layer}.",
                        f"Mean similarity to the best replicate: {np.nanmin(mean):.2f} to "
                        f"{np.nanmax(mean):.2f} over the ranks, largest at rank {ranks[best]}.",
                    )
                )
            page.show(*pictures)
            if k == 1:
                page.say("One replicate a rank: fit two or more to see whether they agree.")


def _mean_similarity(tree: Any) -> np.ndarray:
    similarity = tree["similarity"].transpose("rank", "replicate").values.astype(float).copy()
    best = tree["objective"].transpose("rank", "replicate").values.argmin(1)
    similarity[np.arange(len(best)), best] = np.nan
    return np.nanmean(similarity, axis=1)


def factors(page: Page, results: Mapping[str, Any]) -> None:
    """The factors chosen, as small maps with their profiles."""
    page.section("Factors")
    chosen = results.get("factors") or {}
    if not chosen:
        missing(page, "No factors were given.", "t.vit.factorize(rank=25)")
        return
    page.say(
        "A component is a group of neurons, a profile over images and a profile over shifts that "
        "occur together; its product, summed over components, approximates the tensor."
    )
    for layer, f in chosen.items():
        rank = f.sizes["component"]
        objective = f", relative residual {float(f['objective']):.3f}" if "objective" in f else ""
        page.part(f"Block {layer}: {count(rank, 'component')}{objective}")
        image = f["image_factor"].transpose("image", "component").values
        labels = np.asarray(labels_of(f["image_factor"]), dtype=object)
        caption = f"{count(rank, 'component')} by descending weight."
        classes = [c for c in pd.unique(labels) if c]
        if len(classes) > 1:
            mean = np.stack([image[labels == c].mean(0) for c in classes])
            share = mean / np.maximum(mean.sum(0), 1e-30)
            best, most = np.unravel_index(int(share.argmax()), share.shape)
            caption += (
                f" The most selective is component {most}: {percent(float(share[best, most]))} of "
                f"its mean loading over classes is on label {Page.text(classes[best])}, where "
                f"equal loadings would put {percent(1 / len(classes))}."
            )
        if "shift_factor" in f:
            loading = f["shift_factor"].transpose("shift", "component").values.astype(float)
            spread = loading.std(0) / np.maximum(loading.mean(0), 1e-30)
            caption += (
                f" Over shifts the loadings vary by {percent(float(spread.min()))} to "
                f"{percent(float(spread.max()))} (standard deviation over mean)."
            )
        page.show(
            Picture(
                f"factors_block_{layer}",
                plot.factors(f),
                f"Factors of block {layer}: neurons, images and shifts by component.",
                caption,
            )
        )


def embeddings(page: Page, results: Mapping[str, Any]) -> None:
    """The manifold, coloured by what the neurons are, and its explained variance."""
    page.section("The manifold of neurons")
    found = results.get("embeddings") or {}
    if not found:
        missing(page, "No embeddings were given.", "f.vit.embed(n_components=10)")
        return
    page.say(
        "Each point is a neuron, placed by its loadings on the components: neurons close together "
        "respond alike. The same points are coloured by feature map and by place on the patch grid."
    )
    wide = {layer: e for layer, e in found.items() if e.sizes["pc"] > 1}
    if not wide:
        page.say("The embedding has one axis only, so there is no plane to show.")
    for color, words in _COLORINGS if wide else ():
        page.part(f"By {words}")
        page.show(
            *(
                Picture(
                    f"embedding_{color}_block_{layer}",
                    plot.embedding(e, color, title=f"Block {layer}, by {words}"),
                    f"Neurons of block {layer} on two axes of their embedding, by {words}.",
                    f"Block {layer}: {count(e.sizes['neuron'], 'neuron')}; {words} explains "
                    f"{percent(_between(e['score'].values, _groups(e, color)))} of the variance.",
                )
                for layer, e in wide.items()
            )
        )
    with_variance = {k: e for k, e in found.items() if "explained_variance_ratio" in e}
    if with_variance:
        page.part("Explained variance")
        page.show(
            *(
                Picture(
                    f"explained_variance_block_{layer}",
                    plot.explained_variance(e, title=f"Block {layer}"),
                    f"Share of the variance along each axis of the embedding of block {layer}.",
                    _variance_sentence(layer, e),
                )
                for layer, e in with_variance.items()
            )
        )


def _variance_sentence(layer: Any, e: xr.Dataset) -> str:
    ratio = e["explained_variance_ratio"].values
    total = np.cumsum(ratio)
    need = np.flatnonzero(total >= 0.9)
    most = (
        f"90 % needs {count(int(need[0]) + 1, 'axis', 'axes')}"
        if len(need)
        else "90 % is not reached"
    )
    first = (
        f"the first two axes hold {percent(float(total[1]))}"
        if len(total) > 1
        else f"the only axis holds {percent(float(total[0]))}"
    )
    return f"Block {layer}: {first} of the variance; {most}."


def _groups(e: xr.Dataset, color: str) -> np.ndarray:
    """Number of the group of each neuron: its feature map, row, column or patch."""
    if color != "both":
        return np.asarray(e[color].values)
    return (
        np.asarray(e["patch_row"].values) * (1 + int(e["patch_col"].max())) + e["patch_col"].values
    )


def _between(score: np.ndarray, groups: np.ndarray) -> float:
    """Share of the variance between the groups' means: 1 if groups are points, 0 if all alike."""
    centred = score - score.mean(0)
    total = float((centred**2).sum())
    parts = [centred[groups == g] for g in np.unique(groups)]
    between = sum(len(p) * float((p.mean(0) ** 2).sum()) for p in parts)
    return between / total if total else 0.0
