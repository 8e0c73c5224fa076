"""The movie over all shifts: frames of feature maps and a player that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.plot._coloring import period
from vitxr.plot._player import PLAYER
from vitxr.plot._select import image_positions, image_titles, neuron_maps, part_of, with_dims
from vitxr.plot._style import VALUES, data_uri
from vitxr.plot.images import seen

__all__ = ["Movie", "movie"]

_REMEDY = "Give a neuron tensor, ds.vit.neuron_tensor(layer=0)."
#: Code of a place where there is no neuron; the others run from 0 to one less.
_NONE = 255


@dataclass(frozen=True)
class Movie:
    """Frames of a movie, and the page that plays them.

    A notebook shows the player; :func:`vitxr.plot.save` writes it as ``.html``.

    Attributes
    ----------
    frames
        Responses (shift, feature_map, patch_row, patch_col), float32, in the order in
        which they are played, with the offsets of the shifts.
    html
        The player, a whole page: it asks for no other file.
    """

    frames: xr.DataArray
    html: str

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        return (
            f'<iframe srcdoc="{page}" title="Movie over shifts" '
            "onload=\"this.style.height = this.contentDocument.body.scrollHeight + 32 + 'px'\" "
            'style="width:100%;height:560px;border:0"></iframe>'
        )


def movie(
    tensor: xr.DataArray | xr.Dataset,
    feature_maps: int | Sequence[int] | None = None,
    *,
    image_at: int | str = 0,
    pixels: xr.Dataset | xr.DataArray | np.ndarray | None = None,
    most: int = 24,
    rate: float = 15.0,
    title: str | None = None,
) -> Movie:
    """Play the response of feature maps to one image over all shifts.

    All frames are in one block of bytes that the player steps through, 255 shades
    each, so that hundreds of frames are built in a fraction of a second and played
    without a server. All maps share one colour scale. The player stands still until
    it is started; frames go row by row over the lattice of shifts.

    Parameters
    ----------
    tensor
        Neuron tensor (neuron, image, shift), or a Dataset that holds it as ``activation``.
        Of a lazy one only what is shown is computed.
    feature_maps
        Channel numbers, of those in the tensor; by default the first `most`.
    image_at
        Name or position of the image.
    pixels
        Show the shifted image beside the maps: the stimuli, of which the one image is
        read, then resized and cropped as for the model if the tensor says how
        (``preprocess_settings``); or the image itself as the model took it, (row, col,
        channel) uint8.
    most
        Feature maps shown at most unless `feature_maps` says which. The title says how
        many of how many.
    rate
        Frames a second, at first.
    title
        Title of the picture.

    Returns
    -------
    Movie
        ``frames`` and ``html``.

    Raises
    ------
    ArgumentError
        If a feature map or the image is not in the tensor, or `rate` is not positive.
    DataError
        If neurons or shifts are not labelled.

    References
    ----------
    The original notebook, section 7 (the loop over 484 frames).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=0, shifts=vitxr.ShiftGrid(16), progress=False)
    >>> m = movie(ds.vit.neuron_tensor(0, 3))
    >>> m.frames.sizes
    Frozen({'shift': 4, 'feature_map': 3, 'patch_row': 8, 'patch_col': 8})
    >>> "http" in m.html
    False
    """
    tensor = with_dims(tensor, "activation", ("neuron", "image", "shift"), _REMEDY)
    if not (isinstance(rate, int | float) and 0 < rate <= 60):
        raise ArgumentError(f"rate={rate!r}: expected frames a second, more than 0 and at most 60.")
    missing = [n for n in ("offset_y", "offset_x", "feature_map") if n not in tensor.coords]
    if missing:
        raise DataError(f"the tensor has no coordinate {', '.join(map(repr, missing))}. {_REMEDY}")
    have = [int(v) for v in pd.unique(tensor["feature_map"].values)]
    wanted = have[:most] if feature_maps is None else [int(v) for v in np.atleast_1d(feature_maps)]
    unknown = [v for v in wanted if v not in have]
    if unknown or not wanted:
        raise ArgumentError(
            f"feature_maps={feature_maps!r}: the tensor has the maps {', '.join(map(str, have))}."
        )
    at = image_positions(tensor, image_at)[0]
    name = image_titles(tensor, [at])[0]
    chosen = np.flatnonzero(np.isin(tensor["feature_map"].values, wanted))
    one = tensor.isel(image=at, neuron=chosen).compute()
    maps, _ = neuron_maps(one)
    frames = maps.sel(feature_map=wanted).transpose(
        "shift", "feature_map", "patch_row", "patch_col"
    )
    offsets = {n: one[n].values.astype(int) for n in ("offset_y", "offset_x")}
    frames = frames.assign_coords(
        {"image": name, **{n: ("shift", v, tensor[n].attrs) for n, v in offsets.items()}}
    ).rename("response")
    codes, low, high = _codes(frames.values)
    title = title or part_of(
        f"Response to {name} over {len(codes)} shifts",
        (len(wanted), len(have) if feature_maps is None else 0, "feature maps"),
    )
    facts: dict[str, Any] = {
        "title": title,
        "maps": wanted,
        "shape": list(frames.shape),
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "rate": float(rate),
        "offsets": [offsets["offset_y"].tolist(), offsets["offset_x"].tolist()],
        "periods": [period(tensor, "offset_y"), period(tensor, "offset_x")],
        "palette": _palette(),
        "codes": base64.b64encode(codes.tobytes()).decode("ascii"),
        "image": None if pixels is None else data_uri(seen(pixels, tensor, at)),
    }
    # nothing in the data may end the script that holds them
    data = json.dumps(facts).replace("<", "\\u003c")
    # At once: what takes a place may itself read like one.
    given = {"@TITLE@": html.escape(title), "@DATA@": data}
    page = re.sub("|".join(given), lambda found: given[found[0]], PLAYER)
    return Movie(frames, page)


def _codes(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Shades 0 to 254 from the least (at most 0) to the largest value, 255 for none."""
    low, high = min(0.0, float(np.nanmin(values))), float(np.nanmax(values))
    high = high if high > low else low + 1.0
    scaled = np.rint((values - low) * ((_NONE - 1) / (high - low)))
    return np.where(np.isnan(values), _NONE, scaled).astype(np.uint8), low, high


def _palette() -> list[list[int]]:
    import matplotlib

    shades = matplotlib.colormaps[VALUES](np.linspace(0, 1, _NONE), bytes=True)[:, :3]
    return shades.tolist()
