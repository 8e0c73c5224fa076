"""The report: every picture of a run with its numbers, as one page that needs no network."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr import plot
from vitxr._version import __version__
from vitxr.errors import InvalidArgument
from vitxr.plot._select import frame, labels_of, neuron_maps, offset_of, prefix_and_grid, unshifted
from vitxr.report_page import Page, Picture

__all__ = ["RESULTS", "write_report"]

#: What a report is made from; every key may be absent.
RESULTS: dict[str, str] = {
    "stimuli": "Dataset with `pixels`",
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
        A mapping with any of the keys of :data:`RESULTS`; see there.
    title
        Title of the page.
    command
        How to repeat the run; by default the command line of this process.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    InvalidArgument
        If ``results`` is empty or has a key that no section knows. Nothing is
        written before every picture is drawn.
    """
    unknown = [str(k) for k in results if k not in RESULTS]
    if unknown or not results:
        raise InvalidArgument(
            f"results has {', '.join(map(repr, unknown)) or 'no keys'}; expected a mapping with any "
            f"of {', '.join(RESULTS)}."
        )
    page = Page(title)
    for section in (
        _stimuli,
        _predictions,
        _attention,
        _feature_maps,
        _tensors,
        _fits,
        _factors,
        _embeddings,
        _provenance,
    ):
        section(page, results)
    page.lead = _lead(results)
    _add_command(page, command)
    folder = Path(folder)
    return page.write(folder)


def _draw(name: str, make: Callable[[], Any], alt: str, caption: str) -> Picture:
    return Picture(name, alt, caption, plot.render(make(), ("png", "pdf"), dpi=200))


def _missing(page: Page, what: str, remedy: str) -> None:
    page.say(f'<span class="soft">{what}</span>', f"<code>{Page.text(remedy)}</code>")


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _listed(values: Any) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _lead(results: Mapping[str, Any]) -> str:
    ds = results.get("activations", results.get("detail"))
    if ds is None:
        return ""
    frames = ds.sizes.get("shift_y", 1) * ds.sizes.get("shift_x", 1)
    layers = [int(v) for v in np.atleast_1d(ds["layer"].values)] if "layer" in ds.coords else []
    of = f" of {Page.text(ds.attrs['model'])}" if "model" in ds.attrs else ""
    where = f" in {'block' if len(layers) == 1 else 'blocks'} {_listed(layers)}" if layers else ""
    return (
        f"{_count(ds.sizes['image'], 'image')} at {_count(frames, 'circular shift')} each: what "
        f"the patch neurons{of} respond to{where}, and which of them respond alike."
    )


def _stimuli(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Stimuli and shifts")
    stim = results.get("stimuli")
    if stim is None:
        _missing(page, "The stimuli were not given.", "results['stimuli'] = stim")
        return
    labels = labels_of(stim)
    classes = [c for c in pd.unique(np.asarray(labels, dtype=object)) if c]
    text = f"{_count(stim.sizes['image'], 'image')}"
    if classes:
        counts = pd.Series(labels).value_counts()
        each = sorted({int(counts[c]) for c in classes})
        per = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
        text += f" of {_count(len(classes), 'class', 'classes')}, {per} each"
    if "pixels" not in stim:
        page.say(f"{text}, in files of different sizes; they are not drawn here.")
        return
    height, width = stim.sizes["row"], stim.sizes["col"]
    page.show(
        _draw(
            "stimuli",
            lambda: plot.stimuli(stim),
            f"Mosaic of the {stim.sizes['image']} stimulus images with their labels.",
            f"{text}, {height} x {width} pixels, with their labels.",
        )
    )
    ds = results.get("activations")
    if ds is None or "offset_y" not in ds.coords or ds.sizes["shift_y"] * ds.sizes["shift_x"] < 2:
        page.say("The images were not shifted.")
        return
    image, size = _at_input_size(stim, ds)
    dy, dx = _some(ds["offset_y"].values, 4, 4), _some(ds["offset_x"].values, 6, 6)
    ny, nx = ds.sizes["shift_y"], ds.sizes["shift_x"]
    step = ds.attrs.get("shift_step")
    lattice = f"{ny} vertical by {nx} horizontal offsets"
    every = f", {step} pixels apart" if step else ""
    name = Page.text(stim["image"].values[0]) if "image" in stim.coords else "the first image"
    page.show(
        _draw(
            "shifts",
            lambda: plot.shifts(image, dy, dx),
            f"Image {name} shifted circularly by several vertical and horizontal offsets.",
            f"Image {name} at the model's input size, {size[0]} x {size[1]} pixels, at some of the "
            f"{ny * nx} shifts ({lattice}{every}). Shifts are circular: what leaves at one side "
            "enters at the other, so all frames of an image hold the same pixels.",
        )
    )


def _some(offsets: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """At most so many offsets, evenly spaced over the lattice."""

    def spaced(n: int, most: int) -> np.ndarray:
        return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))

    if offsets.ndim == 1:
        return offsets[spaced(len(offsets), rows)]
    return offsets[np.ix_(spaced(offsets.shape[0], rows), spaced(offsets.shape[1], cols))]


def _at_input_size(stim: xr.Dataset, ds: xr.Dataset) -> tuple[np.ndarray, tuple[int, int]]:
    """First image, enlarged or reduced to the size at which the model shifts it."""
    from PIL import Image

    pixels = np.asarray(stim["pixels"].isel(image=0).transpose("row", "col", "channel").values)
    height = int(ds.attrs.get("input_height", pixels.shape[0]))
    width = int(ds.attrs.get("input_width", pixels.shape[1]))
    if pixels.shape[:2] != (height, width):
        picture = Image.fromarray(pixels.squeeze()).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        pixels = np.asarray(picture).reshape(height, width, -1)
    return pixels, (height, width)


def _predictions(page: Page, results: Mapping[str, Any]) -> None:
    page.section("What the model says")
    found = [
        results[k]["logits"] for k in ("detail", "activations") if "logits" in results.get(k, ())
    ]
    if not found:
        _missing(
            page,
            "Class logits were not captured.",
            'vitxr.extract(..., variables=("activation", "logits"))',
        )
        return
    still = frame(found[0]).compute()
    labels = np.asarray(labels_of(still), dtype=object)
    names = (
        np.asarray(still["class"].values).astype(str) if "class" in still.coords else np.array([])
    )
    known = len(names) > 0 and np.isin(labels, names).all()
    caption = "Probability of each class, the softmax of the logits, for each image, not shifted."
    alt = "Heatmap of class probabilities, a row an image and a column a class."
    if known:
        right = names[still.transpose("image", "class").values.argmax(1)] == labels
        said = f"{right.sum()} of {_count(len(right), 'image')} predicted correctly"
        caption += f" {said}."
        alt += f" {said}."
        moved = found[-1]
        frames = moved.sizes.get("shift_y", 1) * moved.sizes.get("shift_x", 1)
        if frames > 1:
            best = names[moved.transpose("image", "shift_y", "shift_x", "class").values.argmax(-1)]
            share = float((best == labels[:, None, None]).mean())
            caption += f" Over all {frames} shifts of each, {_percent(share)} of the frames are."
    page.show(_draw("predictions", lambda: plot.predictions(still), alt, caption))


def _attention(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Attention")
    ds = results.get("detail", results.get("activations"))
    if ds is None or "attention" not in ds:
        _missing(
            page,
            "Attention was not captured.",
            'vitxr.extract(..., variables=("activation", "attention"))',
        )
        return
    name = Page.text(ds["image"].values[0]) if "image" in ds.coords else "0"
    one = frame(ds["attention"].isel(image=[0])).isel(image=0).compute()
    layers, heads, tokens = (one.sizes.get(d, 1) for d in ("layer", "head", "query"))
    prefix, (rows, cols) = prefix_and_grid(ds, tokens, None)
    shown = xr.Dataset(
        {"attention": one}, coords={"patch_row": range(rows), "patch_col": range(cols)}
    )
    strongest = float(one.max("key").mean())
    on_prefix = float(one.isel(key=slice(prefix)).sum("key").mean())
    beside = (
        f" On average {_percent(on_prefix)} of the attention goes to the {_count(prefix, 'prefix token')}."
        if prefix
        else ""
    )
    page.show(
        _draw(
            "attention_matrices",
            lambda: plot.attention_matrices(shown),
            f"Mosaic of {layers * heads} attention matrices, {layers} blocks by {heads} heads.",
            f"Attention of image {name}: {_count(layers, 'block')} by {_count(heads, 'head')}, each "
            f"matrix {tokens} x {tokens} tokens with the prefix first. A row is a token that attends "
            f"and sums to 1; its largest weight is {strongest:.2f} on average, where uniform "
            f"attention would give {1 / tokens:.3f}.{beside}",
        )
    )
    query = (rows // 2, cols // 2)
    number = [int(v) for v in np.atleast_1d(one["layer"].values)]
    pictures = []
    for layer in dict.fromkeys((number[0], number[-1])):
        row = frame(one, layer=layer).isel(query=prefix + query[0] * cols + query[1])
        patches = row.transpose("head", "key").values[:, prefix:]
        head, place = np.unravel_index(int(patches.argmax()), patches.shape)
        at = tuple(int(v) for v in divmod(int(place), cols))
        pictures.append(
            _draw(
                f"attention_query_block_{layer}",
                lambda layer=layer: plot.attention_query(
                    shown, query, layer=layer, pixels=_first_pixels(results)
                ),
                f"What patch {query} attends to in block {layer}, one panel a head.",
                f"Block {layer}: what the outlined patch, row {query[0]} and column {query[1]}, "
                f"attends to, per head, prefix tokens left out. The largest weight is "
                f"{patches.max():.2f}, of head {head} on patch {at}; patches receive "
                f"{_percent(float(patches.sum(1).mean()))} of the attention.",
            )
        )
    for picture in pictures:
        page.show(picture)


def _first_pixels(results: Mapping[str, Any]) -> np.ndarray | None:
    stim = results.get("stimuli")
    if stim is None or "pixels" not in stim:
        return None
    return np.asarray(stim["pixels"].isel(image=0).transpose("row", "col", "channel").values)


def _feature_maps(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Feature maps across blocks")
    ds = results.get("detail", results.get("activations"))
    if ds is None or "activation" not in ds:
        _missing(
            page, "Activations of all blocks were not given.", "vitxr.extract(..., layers='all')"
        )
        return
    if "channel" in ds.coords and ds["channel"].dims == ("layer", "feature_map"):
        page.say("The store keeps other channels for each block, so none can be followed across.")
        return
    tensors = results.get("tensors") or {}
    known = ds["feature_map"].values
    ranked = [
        int(m) for t in list(tensors.values())[-1:] for m in pd.unique(t["feature_map"].values)
    ]
    chosen = next((m for m in ranked if m in known), int(known[0]))
    values = frame(ds["activation"].sel(feature_map=chosen)).compute()
    high = np.abs(values).max([d for d in values.dims if d != "layer"]).values.ravel()
    number = [int(v) for v in np.atleast_1d(ds["layer"].values)]
    grown = (
        f" Its largest magnitude over all images is {high[0]:.3g} in block {number[0]} and "
        f"{high[-1]:.3g} in block {number[-1]}."
        if len(high) > 1
        else f" Its largest magnitude over all images is {high[0]:.3g}."
    )
    why = "the most active map of the last tensor below" if chosen in ranked[:1] else "one channel"
    page.show(
        _draw(
            "feature_map_layers",
            lambda: plot.feature_map_layers(ds, chosen),
            f"Channel {chosen} on the patch grid, a row an image and a column a block.",
            f"Channel {chosen} ({why}) on the patch grid, from the embedding output to the last "
            f"block: red is positive, blue negative, each column scaled by its own largest "
            f"magnitude among the images shown.{grown}",
        )
    )


def _tensors(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Neuron tensors")
    tensors, matrices = results.get("tensors") or {}, results.get("matrices") or {}
    if not tensors and not matrices:
        _missing(page, "No neuron tensors were given.", "ds.vit.neuron_tensor(layer=0)")
        return
    page.say(
        "A neuron is one feature map at one patch. Responses are rectified, and each map is divided "
        "by its largest value in each frame unless the tensor was made otherwise."
    )
    for layer, t in tensors.items():
        page.part(f"Block {layer}: tensor")
        maps = pd.unique(t["feature_map"].values)
        shape = " x ".join(str(n) for n in t.shape)
        silent = float((t == 0).mean())
        page.say(
            f"{shape} ({Page.text(', '.join(map(str, t.dims)))}): {_count(len(maps), 'feature map')}, "
            f"{_percent(silent)} of the responses are zero."
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
            _draw(
                f"activity_block_{layer}",
                lambda t=t: plot.activity(t),
                f"Mean activity of each feature map of block {layer} over the shift lattice.",
                "Mean over patches of each feature map: each small map is the lattice, down the "
                "vertical and across the horizontal shift. Over the shifts of an image the mean "
                f"activity varies by {_percent(spread)} (standard deviation over mean, averaged over "
                "maps and images); 0 would be invariance to shifts.",
            )
        )
        page.show(
            _draw(
                f"filmstrip_block_{layer}",
                lambda t=t, first=first: plot.filmstrip(
                    t, first, every=max(1, -(-int(np.sqrt(t.sizes["shift"])) // 14))
                ),
                f"Responses of feature map {first} of block {layer} on the patch grid at each shift.",
                f"Feature map {first} for the first image, one patch map a shift, laid out as the "
                "shifts are. A map that follows the stimulus moves from frame to frame as it does.",
            )
        )
    for layer, matrix in matrices.items():
        page.part(f"Block {layer}: matrix")
        page.show(
            _draw(
                f"neuron_matrix_block_{layer}",
                lambda matrix=matrix: plot.neuron_matrix(matrix),
                f"Mean responses of block {layer}, a row an image and a column a feature map.",
                f"The mean over shifts, {matrix.sizes['neuron']} neurons by "
                f"{_count(matrix.sizes['image'], 'image')}, each neuron at its place on the patch "
                f"grid; the largest is {float(matrix.max()):.2f}.",
            )
        )


def _activity(t: xr.DataArray) -> np.ndarray:
    """Mean response of each feature map, (feature_map, image, shift)."""
    values = t.transpose("neuron", "image", "shift").values
    numbers = t["feature_map"].values
    return np.stack([values[numbers == m].mean(0) for m in pd.unique(numbers)])


def _fits(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Fit and agreement against rank")
    kinds = (("ensembles", "tensor", ""), ("ensembles_2d", "matrix", "_2d"))
    if not any(results.get(k) for k, _, _ in kinds):
        _missing(page, "No ensembles were given.", "t.vit.fit_ensemble(ranks=[20, 25, 30])")
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
            k, low, high = (
                objective.sizes["replicate"],
                int(np.argmin(ranks)),
                int(np.argmax(ranks)),
            )
            said = f"{_count(k, 'replicate')} a rank. The least residual is {least[low]:.3f} at rank {ranks[low]}"
            said += f" and {least[high]:.3f} at rank {ranks[high]}." if len(ranks) > 1 else "."
            pictures = [
                _draw(
                    f"objective{ending}_block_{layer}",
                    lambda tree=tree: plot.objective_by_rank(tree),
                    f"Relative residual against rank for the {kind} of block {layer}.",
                    said,
                )
            ]
            if k > 1:
                mean = _mean_similarity(tree)
                best = int(np.nanargmax(mean))
                pictures.append(
                    _draw(
                        f"similarity{ending}_block_{layer}",
                        lambda tree=tree: plot.similarity_by_rank(tree),
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


def _factors(page: Page, results: Mapping[str, Any]) -> None:
    page.section("Factors")
    chosen = results.get("factors") or {}
    if not chosen:
        _missing(page, "No factors were given.", "t.vit.factorize(rank=25)")
        return
    page.say(
        "A component is a group of neurons, a profile over images and a profile over shifts that "
        "occur together; its product, summed over components, approximates the tensor."
    )
    for layer, f in chosen.items():
        rank = f.sizes["component"]
        objective = f", relative residual {float(f['objective']):.3f}" if "objective" in f else ""
        page.part(f"Block {layer}: {_count(rank, 'component')}{objective}")
        image = f["image_factor"].transpose("image", "component").values
        labels = np.asarray(labels_of(f["image_factor"]), dtype=object)
        caption = f"{_count(rank, 'component')} by descending weight."
        classes = [c for c in pd.unique(labels) if c]
        if len(classes) > 1:
            mean = np.stack([image[labels == c].mean(0) for c in classes])
            share = mean / np.maximum(mean.sum(0), 1e-30)
            best, most = np.unravel_index(int(share.argmax()), share.shape)
            caption += (
                f" The most selective is component {most}: {_percent(float(share[best, most]))} of "
                f"its mean loading over classes is on label {Page.text(classes[best])}, where "
                f"{_percent(1 / len(classes))} would be none."
            )
        if "shift_factor" in f:
            loading = f["shift_factor"].transpose("shift", "component").values.astype(float)
            spread = loading.std(0) / np.maximum(loading.mean(0), 1e-30)
            caption += (
                f" Over shifts the loadings vary by {_percent(float(spread.min()))} to "
                f"{_percent(float(spread.max()))} (standard deviation over mean)."
            )
        page.show(
            _draw(
                f"factors_block_{layer}",
                lambda f=f: plot.factors(f),
                f"Factors of block {layer}: neuron maps, image loadings and shift maps by component.",
                caption,
            )
        )


def _embeddings(page: Page, results: Mapping[str, Any]) -> None:
    page.section("The manifold of neurons")
    found = results.get("embeddings") or {}
    if not found:
        _missing(page, "No embeddings were given.", "f.vit.embed(n_components=10)")
        return
    page.say(
        "Each point is a neuron, placed by its loadings on the components: neurons close together "
        "respond alike. The same points are coloured by feature map and by place on the patch grid."
    )
    rows = []
    for layer, e in found.items():
        score = e["score"].transpose("neuron", "pc").values
        shares = [_between(score, e[n].values) for n in ("feature_map", "patch_row", "patch_col")]
        rows.append((f"Block {layer}", *map(_percent, shares)))
    page.table(rows, ("Variance explained by", "feature map", "patch row", "patch column"))
    for color, words in (
        ("feature_map", "feature map"),
        ("patch_row", "patch row"),
        ("patch_col", "patch column"),
        ("both", "patch row and column"),
    ):
        page.part(f"By {words}")
        page.show(
            *(
                _draw(
                    f"embedding_{color}_block_{layer}",
                    lambda e=e, color=color, layer=layer: plot.embedding(
                        e, color, title=f"Block {layer}, by {words}"
                    ),
                    f"Neurons of block {layer} on two axes of their embedding, coloured by {words}.",
                    f"Block {layer}: {e.sizes['neuron']} neurons.",
                )
                for layer, e in found.items()
                if e.sizes["pc"] > 1
            )
        )
    with_variance = {k: e for k, e in found.items() if "explained_variance_ratio" in e}
    if with_variance:
        page.part("Explained variance")
        page.show(
            *(
                _draw(
                    f"explained_variance_block_{layer}",
                    lambda e=e, layer=layer: plot.explained_variance(e, title=f"Block {layer}"),
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
        f"90 % needs {_count(int(need[0]) + 1, 'axis', 'axes')}"
        if len(need)
        else "90 % is not reached"
    )
    first = (
        f"the first two axes hold {_percent(float(total[1]))}"
        if len(total) > 1
        else f"the only axis holds {_percent(float(total[0]))}"
    )
    return f"Block {layer}: {first} of the variance; {most}."


def _between(score: np.ndarray, groups: np.ndarray) -> float:
    """Share of the variance between the groups' means: 1 if groups are points, 0 if all alike."""
    centred = score - score.mean(0)
    total = float((centred**2).sum())
    parts = [centred[groups == g] for g in np.unique(groups)]
    between = sum(len(p) * float((p.mean(0) ** 2).sum()) for p in parts)
    return between / total if total else 0.0


def _provenance(page: Page, results: Mapping[str, Any]) -> None:
    page.section("What was measured, and where to go next")
    rows: list[tuple[str, Any]] = []
    for key in ("activations", "detail"):
        ds = results.get(key)
        if ds is None:
            continue
        ny, nx = ds.sizes.get("shift_y", 1), ds.sizes.get("shift_x", 1)
        rows.append((f"{key}: frames", f"{ds.sizes['image']} images x {ny} x {nx} shifts"))
        if "layer" in ds.coords:
            rows.append(
                (
                    f"{key}: blocks",
                    ", ".join(str(int(v)) for v in np.atleast_1d(ds["layer"].values)),
                )
            )
        rows.append((f"{key}: variables", ", ".join(map(str, ds.data_vars))))
    attrs = dict(results.get("detail", xr.Dataset()).attrs) | dict(
        results.get("activations", xr.Dataset()).attrs
    )
    rows += [(name.replace("_", " "), _plain(value)) for name, value in attrs.items()]
    for key in ("ensembles", "ensembles_2d"):
        for layer, tree in (results.get(key) or {}).items():
            seeds = (
                sorted({int(s) for s in np.ravel(tree["seed"].values)}) if "seed" in tree else []
            )
            start = tree.attrs.get("random_state")
            words = f"random_state {start}; " if start is not None else ""
            few = ", ".join(map(str, seeds[:6])) + (", ..." if len(seeds) > 6 else "")
            rows.append((f"{key}, block {layer}", f"{words}{_count(len(seeds), 'seed')}: {few}"))
    for layer, f in (results.get("factors") or {}).items():
        words = [f"{k} {f.attrs[k]}" for k in ("method", "tol", "max_iter") if k in f.attrs]
        words += [f"{k} {f[k].item()}" for k in ("seed", "iterations", "converged") if k in f]
        rows.append((f"factors, block {layer}", "; ".join(words)))
    rows.append(("versions here", _versions()))
    page.table(rows, ("Item", "Value"))
    page.say(
        "Next: choose a rank where the residual flattens and replicates still agree; fit it with "
        "more replicates; open the store with <code>vitxr browse</code> to walk between a point "
        "of the manifold, its patch, the images and the shifts."
    )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def _versions() -> str:
    words = [f"vitxr {__version__}", f"Python {platform.python_version()}"]
    for name in (
        "numpy",
        "xarray",
        "dask",
        "zarr",
        "scikit-learn",
        "torch",
        "transformers",
        "holoviews",
        "matplotlib",
    ):
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(words)


def _add_command(page: Page, command: str | None) -> None:
    if command is None:
        script = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c") else ""
        command = shlex.join([script, *sys.argv[1:]]) if script else "an interactive session"
    page.say(f"Made by <code>{Page.text(command)}</code>.")
