"""Picture of hidden states as matrices: tokens down, channels across, a panel a block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.plot._mosaic import Words, canvas, image, small
from vitxr.plot._select import described, frame, image_positions, image_titles, variable
from vitxr.plot._style import SIGNED, bar

__all__ = ["hidden_states"]

#: Share of a panel's magnitudes within its colours.
_WITHIN = 0.99
#: Inches that the panels fill, and that one is wide at most.
_ROOM, _LARGEST = 6.2, 3.0


def hidden_states(
    activation: xr.DataArray | xr.Dataset,
    *,
    image_at: int | str = 0,
    embedding: bool = True,
    title: str | None = None,
) -> Any:
    """Draw the hidden states of one image as matrices, a panel a block.

    A row is a token, prefix tokens first where the Dataset has them, then the
    patches row by row; a column is a channel. A few channels are much larger than
    all others and states grow with depth, so a panel's colours reach to plus and
    minus the 99 % quantile of its magnitudes, which is written above it; larger
    values have the last colour.

    Parameters
    ----------
    activation
        Extraction Dataset, with ``prefix`` and ``embedding`` or without, or its
        ``activation``; the frame nearest to no shift is taken of a lattice. Select
        blocks with ``ds.sel(layer=[0, 11])``. Of lazy data only what is drawn is read.
    image_at
        Name or position of the image.
    embedding
        Begin with the embedding output, where the Dataset has one; its prefix
        tokens are not kept and left blank.
    title
        Title of the picture.

    Returns
    -------
    holoviews.Overlay
        ``Image.I`` has the drawn value and, beside it, the activation itself.

    References
    ----------
    The original notebook, section 3 (``plt.matshow`` of hidden states 0, 1 and 11).
    """
    array = variable(activation, "activation")
    if {"image", "feature_map", "patch_row", "patch_col"} - set(array.dims):
        raise DataError(
            "the picture needs `activation` with dims (image, layer, feature_map, patch_row, "
            f"patch_col); given: {described(activation)}. Give the extraction Dataset."
        )
    at = image_positions(array, image_at)[0]
    name = image_titles(array, [at])[0]

    def states(source: xr.DataArray, *tokens: str) -> np.ndarray:
        one = frame(source.isel(image=at))
        one = one if "layer" in one.dims else one.expand_dims("layer")
        values = np.asarray(one.transpose("layer", *tokens, "feature_map").values)
        return values.reshape(len(values), -1, values.shape[-1]).astype(np.float32)

    values = states(array, "patch_row", "patch_col")
    if "layer" in array.coords:
        heads = [f"block {int(n)}" for n in np.atleast_1d(array["layer"].values)]
    else:
        heads = [f"block {n}" for n in range(len(values))]
    prefix = 0
    if isinstance(activation, xr.Dataset) and "prefix" in activation:
        first = states(activation["prefix"], "token")
        prefix = first.shape[1]
        values = np.concatenate([first, values], axis=1)
    if embedding and isinstance(activation, xr.Dataset) and "embedding" in activation:
        begin = states(activation["embedding"], "patch_row", "patch_col")
        blank = np.full((1, prefix, begin.shape[2]), np.nan, np.float32)
        values = np.concatenate([np.concatenate([blank, begin], axis=1), values])
        heads = ["embedding", *heads]
    count, tokens, channels = values.shape
    reach = np.nanquantile(np.abs(values), _WITHIN, axis=(1, 2), keepdims=True)
    relative = np.divide(values, reach, out=np.zeros_like(values), where=reach > 0)
    relative[np.isnan(values)] = np.nan

    # panels as wide as there is room; a channel is as wide as a token is high, within limits
    wide = max(1, min(count, math.floor(_ROOM / min(_LARGEST, max(0.9, 0.02 * channels)))))
    down = math.ceil(count / wide)
    wide = math.ceil(count / down)
    across = min(_LARGEST, (_ROOM + 0.1) / wide - 0.1)
    scale = across / channels
    tall = float(np.clip(tokens * scale, 0.5 * across, 1.6 * across))
    stretch = tall / (tokens * scale)  # mosaic pixels a token is high
    gap = math.ceil(0.1 / scale)
    gap_down = math.ceil(0.36 / (scale * stretch))
    shape = down * (tokens + gap_down) - gap_down, wide * (channels + gap) - gap
    mosaic, exact = (np.full(shape, np.nan, np.float32) for _ in range(2))
    for k in range(count):
        top, left = (k // wide) * (tokens + gap_down), (k % wide) * (channels + gap)
        block = slice(top, top + tokens), slice(left, left + channels)
        mosaic[block], exact[block] = relative[k], values[k]
    size = (shape[1], shape[0] * stretch)
    box = (size[0] - 0.5 + 0.12 / scale, -0.5, 0.09 / scale, min(size[1], 1.6 / scale))
    picture = image(
        mosaic,
        "Activation / panel's 99 % quantile",
        cmap=SIGNED,
        clim=(-1.0, 1.0),
        origin=(0.0, (stretch - 1) / 2),
        pixel=(1.0, stretch),
        hook=bar("Activation / panel's 99 % quantile", box, ticks=[-1, 0, 1]),
        extra={"activation": exact},
    )
    edge = 0.04 / scale
    words, spans = [], []
    for k, head in enumerate(heads):
        i, j = divmod(k, wide)
        x = j * (channels + gap) + (channels - 1) / 2
        y = i * (tokens + gap_down) * stretch - 0.5 - edge
        words.append((x, y - 0.1 / scale, head))
        spans.append((x, y, f"±{reach[k, 0, 0]:.3g}"))
    parts = [picture, Words(words, va="bottom"), small(spans, va="bottom", color="#555555")]
    sides = [
        (-0.5 - edge, i * (tokens + gap_down) * stretch + tall / scale / 2) for i in range(down)
    ]
    parts.append(small([(x - edge, y, "token") for x, y in sides], angle=90, ha="right"))
    below = size[1] - 0.5 + edge
    last = count - (down - 1) * wide
    said = _channels(array, channels)
    ends = [(j * (channels + gap) + (channels - 1) / 2, below, said) for j in range(last)]
    parts.append(small(ends, va="top"))
    return canvas(
        parts,
        span=size,
        scale=scale,
        margins=(0.22, 0.3, 0.8, 0.16),
        title=title or f"Hidden states of {name}",
    )


def _channels(array: xr.DataArray, count: int) -> str:
    """What the columns are: all channels of the model, or those that were kept."""
    known = array["feature_map"].values if "feature_map" in array.coords else np.arange(count)
    if "channel" in array.coords or not np.array_equal(known, np.arange(count)):
        return f"channel ({count} that were kept)"
    return f"channel (0 to {count - 1})"
