"""Sections on what was shown to the model and recorded: stimuli, classes, attention, maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr import plot
from vitxr.plot._select import frame, labels_of, prefix_and_grid, shift_words
from vitxr.plot.images import one_image
from vitxr.report.page import Page, Picture
from vitxr.report.words import count, missing, ordinal, percent

__all__ = ["attention", "feature_maps", "predictions", "stimuli"]


def stimuli(page: Page, results: Mapping[str, Any]) -> None:
    """The images, and one of them at some shifts."""
    page.section("Stimuli and shifts")
    stim = results.get("stimuli")
    if stim is None:
        missing(page, "The stimuli were not given.", "results['stimuli'] = stim")
        return
    labels = labels_of(stim)
    classes = [c for c in pd.unique(np.asarray(labels, dtype=object)) if c]
    text = f"{count(stim.sizes['image'], 'image')}"
    if classes:
        counts = pd.Series(labels).value_counts()
        each = sorted({int(counts[c]) for c in classes})
        per = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
        text += f" of {count(len(classes), 'class', 'classes')}, {per} each"
    sizes = {(int(h), int(w)) for h, w in zip(*_sizes(stim), strict=True)}
    least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
    size = f"{most[0]} x {most[1]} pixels"
    if len(sizes) > 1:
        size = f"{least[0]} x {least[1]} to {size}, each fitted into its tile"
    page.show(
        Picture(
            "stimuli",
            plot.stimuli(stim),
            f"Mosaic of the {stim.sizes['image']} stimulus images with their labels.",
            f"{text}, {size}, with their labels.",
        )
    )
    ds = results.get("activations")
    if ds is None or "offset_y" not in ds.coords or ds.sizes["shift_y"] * ds.sizes["shift_x"] < 2:
        page.say("The images were not shifted.")
        return
    image, size_in = _at_input_size(stim, ds)
    ny, nx = ds.sizes["shift_y"], ds.sizes["shift_x"]
    # evenly spaced: every k-th row and column of the lattice
    down, across = -(-ny // 4), -(-nx // 6)
    dy, dx = (_every(ds[name], down, across) for name in ("offset_y", "offset_x"))
    step = ds.attrs.get("shift_step")
    lattice = f"{ny} vertical by {nx} horizontal offsets"
    apart = f", {step} pixels apart" if step else ""
    name = Page.text(stim["image"].values[0]) if "image" in stim.coords else "the first image"
    shown = f"{ordinal(down)} vertical and {ordinal(across)} horizontal one"
    page.show(
        Picture(
            "shifts",
            plot.shifts(image, dy, dx),
            f"Image {name} shifted circularly by several vertical and horizontal offsets.",
            f"Image {name}, resized for the picture to the model's input, {size_in[0]} x "
            f"{size_in[1]} pixels, at "
            f"{dy.shape[0]} x {dx.shape[-1]} of the {ny * nx} shifts ({lattice}{apart}): {shown}. "
            "Shifts are circular: what leaves at one side "
            "enters at the other, so all frames of an image hold the same pixels.",
        )
    )


def _sizes(stim: xr.Dataset) -> tuple[Any, Any]:
    """Height and width of every image."""
    if "pixels" in stim:
        n = stim.sizes["image"]
        return [stim.sizes["row"]] * n, [stim.sizes["col"]] * n
    return stim["height"].values, stim["width"].values


def _every(offsets: xr.DataArray, down: int, across: int) -> np.ndarray:
    """Offsets of every so many rows and columns of the lattice."""
    steps = {"shift_y": slice(None, None, down), "shift_x": slice(None, None, across)}
    return np.asarray(offsets.isel({d: steps[str(d)] for d in offsets.dims}).values)


def _at_input_size(stim: xr.Dataset, ds: xr.Dataset) -> tuple[np.ndarray, tuple[int, int]]:
    """First image, enlarged or reduced to the size at which the model shifts it."""
    from PIL import Image

    pixels = one_image(stim, 0)
    height = int(ds.attrs.get("input_height") or pixels.shape[0])
    width = int(ds.attrs.get("input_width") or pixels.shape[1])
    if pixels.shape[:2] != (height, width):
        picture = Image.fromarray(pixels)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    return pixels, (height, width)


def predictions(page: Page, results: Mapping[str, Any]) -> None:
    """Class probabilities without shift, and how many are right."""
    page.section("What the model says")
    found = [
        results[k]["logits"] for k in ("detail", "activations") if "logits" in results.get(k, ())
    ]
    if not found:
        missing(
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
    caption = (
        "Probability of each class, the softmax of the logits, for each image, "
        f"{shift_words(still)}."
    )
    alt = "Heatmap of class probabilities, a row an image and a column a class."
    if known:
        right = names[still.transpose("image", "class").values.argmax(1)] == labels
        said = f"{right.sum()} of {count(len(right), 'image')} predicted correctly"
        caption += f" {said}."
        alt += f" {said}."
        moved = found[-1]
        frames = moved.sizes.get("shift_y", 1) * moved.sizes.get("shift_x", 1)
        if frames > 1:
            best = names[moved.transpose("image", "shift_y", "shift_x", "class").values.argmax(-1)]
            share = float((best == labels[:, None, None]).mean())
            caption += f" Over all {frames} shifts of each, {percent(share)} of the frames are."
    page.show(Picture("predictions", plot.predictions(still), alt, caption))


def attention(page: Page, results: Mapping[str, Any]) -> None:
    """Attention matrices of one image, and what its central patch attends to."""
    page.section("Attention")
    ds = results.get("detail", results.get("activations"))
    if ds is None or "attention" not in ds:
        missing(
            page,
            "Attention was not captured.",
            'vitxr.extract(..., variables=("activation", "attention"))',
        )
        return
    if ds["attention"].sizes.get("query") != ds["attention"].sizes.get("key"):
        missing(
            page,
            "Attention was captured of some queries only.",
            'vitxr.extract(..., variables=("activation", "attention"), queries=None)',
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
        f" On average {percent(on_prefix)} of the attention goes to the "
        f"{count(prefix, 'prefix token')}."
        if prefix
        else ""
    )
    page.show(
        Picture(
            "attention_matrices",
            plot.attention_matrices(shown),
            f"Mosaic of {layers * heads} attention matrices, {layers} blocks by {heads} heads.",
            f"Attention of image {name}: {count(layers, 'block')} by {count(heads, 'head')}, "
            f"each matrix {tokens} x {tokens} tokens with the prefix first. A row is a token that "
            f"attends and sums to 1; its largest weight is {strongest:.2f} on average, where "
            f"uniform attention would give {1 / tokens:.3f}.{beside}",
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
        named = int(row["head"].values[head]) if "head" in row.coords else int(head)
        pictures.append(
            Picture(
                f"attention_query_block_{layer}",
                plot.attention_query(shown, query, layer=layer, pixels=results.get("stimuli")),
                f"What patch {query} attends to in block {layer}, one panel a head.",
                f"Block {layer}: what the outlined patch, row {query[0]} and column {query[1]}, "
                f"attends to, per head, prefix tokens left out. The largest weight is "
                f"{patches.max():.2f}, of head {named} on patch {at}; patches receive "
                f"{percent(float(patches.sum(1).mean()))} of the attention.",
            )
        )
    for picture in pictures:
        page.show(picture)


def feature_maps(page: Page, results: Mapping[str, Any]) -> None:
    """One channel from block to block."""
    page.section("Feature maps across blocks")
    ds = results.get("detail", results.get("activations"))
    if ds is None or "activation" not in ds:
        missing(
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
    high = np.abs(values.transpose("layer", ...).values).reshape(values.sizes["layer"], -1).max(1)
    number = [int(v) for v in np.atleast_1d(ds["layer"].values)]
    grown = (
        f" Its largest magnitude over all images is {high[0]:.3g} in block {number[0]} and "
        f"{high[-1]:.3g} in block {number[-1]}."
        if len(high) > 1
        else f" Its largest magnitude over all images is {high[0]:.3g}."
    )
    why = "the most active map of the last tensor below" if chosen in ranked[:1] else "one channel"
    page.show(
        Picture(
            "feature_map_layers",
            plot.feature_map_layers(ds, chosen),
            f"Channel {chosen} on the patch grid, a row an image and a column a block.",
            f"Channel {chosen} ({why}) on the patch grid, from the embedding output to the last "
            f"block: red is positive, blue negative, each column scaled by its own largest "
            f"magnitude among the images shown.{grown}",
        )
    )
