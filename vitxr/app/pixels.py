"""Pixels of a stored extraction's images: from their files, from the packages, or as given."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr

from vitxr.errors import DataError, ImageError

__all__ = ["at_offset", "pixels"]

_DIGITS = re.compile(r"scikit-learn digits\[(\d+)\]")


def pixels(ds: xr.Dataset, image: str, stimuli: xr.Dataset | None = None) -> np.ndarray:
    """One image as the model took it, resized and cropped, uint8 (height, width, 3).

    By the recorded ``preprocess_settings``; where a store has none it is stretched to the
    input's size.

    Raises
    ------
    ImageError
        If its file is missing or has changed.
    DataError
        If there is no file, and the images were not given.
    """
    from vitxr.stimuli import read_image
    from vitxr.stimuli.framing import framed

    if stimuli is not None and image in stimuli.indexes["image"]:
        rgb = read_image(stimuli, image)
    else:
        rgb = _from_source(ds.sel(image=image))
    if "preprocess_settings" in ds.attrs:
        rgb = framed(rgb, ds.attrs["preprocess_settings"])
    height = int(ds.attrs.get("input_height") or rgb.shape[0])
    width = int(ds.attrs.get("input_width") or rgb.shape[1])
    if rgb.shape[:2] == (height, width):
        return rgb
    from PIL import Image

    picture = Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _from_source(one: xr.Dataset) -> np.ndarray:
    source = str(one["source"].values) if "source" in one.coords else ""
    name = str(one["image"].values)
    digit = _DIGITS.fullmatch(source)
    if digit:
        from sklearn.datasets import load_digits

        grey = np.rint(load_digits().images[int(digit[1])] * (255 / 16)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if not source or (not source.startswith(("/", "\\")) and ":" not in source[:3]):
        raise DataError(
            f"the image {name!r} has no file (source {source!r}): the store keeps activations, "
            "not pixels. Open it in Python, vitxr.browse(ds, stimuli=stim), with the images that "
            "were extracted."
        )
    from vitxr.stimuli.sizes import resize
    from vitxr.stimuli.sources import read_source

    rgb, now = read_source(source)
    recorded = str(one["sha256"].values)
    if now != recorded:
        raise ImageError(
            f"{source}: changed since it was extracted (SHA-256 {now[:12]}, recorded "
            f"{recorded[:12]}). Restore the file."
        )
    return resize(rgb, (int(one["height"]), int(one["width"])))  # open_images(size=)


def at_offset(rgb: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
    """Shift circularly, down and to the right.

    Examples
    --------
    >>> at_offset(np.arange(4).reshape(2, 2), (1, 0)).tolist()
    [[2, 3], [0, 1]]
    """
    return np.roll(rgb, offset, axis=(0, 1))
