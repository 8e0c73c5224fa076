"""What of an image a model takes: resizing and cropping, by the settings that a store records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitxr.errors import DataError

__all__ = ["centre_crop", "framed", "resized_shape"]

#: An image processor's sizes that are known here.
_SIZES = ({"height", "width"}, {"shortest_edge"})


def resized_shape(
    shape: tuple[int, int], resize: int | tuple[int, int] | None, cover: bool = False
) -> tuple[int, int]:
    """Height and width that an image is resized to.

    Parameters
    ----------
    shape
        Its own.
    resize
        Length of the shorter side, the other in proportion, rounded down; or (height, width);
        None leaves it.
    cover
        Whether an image resized to (height, width) keeps its proportions and covers both.

    Examples
    --------
    >>> resized_shape((300, 400), 256), resized_shape((300, 400), (64, 64), cover=True)
    ((256, 341), (64, 85))
    """
    height, width = shape
    if resize is None:
        return height, width
    if not isinstance(resize, int):
        if not cover:
            return resize
        ratio = min(height / resize[0], width / resize[1])
        return round(height / ratio), round(width / ratio)
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def centre_crop(image: np.ndarray, crop: tuple[int, int] | None) -> np.ndarray:
    """Cut the middle out of an image (row, col, channel), as torchvision rounds.

    Where the image is smaller it is padded with 0; with None it stays as it is.
    """
    if crop is None:
        return image
    out = np.zeros((*crop, image.shape[2]), image.dtype)
    places = [_centre(have, want) for have, want in zip(image.shape, crop, strict=False)]
    (rows, into_rows), (columns, into_columns) = places
    out[into_rows, into_columns] = image[rows, columns]
    return out


def _centre(have: int, want: int) -> tuple[slice, slice]:
    """Return where to cut the middle, and where to put it, as torchvision rounds."""
    if have >= want:
        start = round((have - want) / 2)
        return slice(start, start + want), slice(0, want)
    before = (want - have) // 2
    return slice(0, have), slice(before, before + have)


def framed(image: np.ndarray, settings: Mapping[str, Any] | str) -> np.ndarray:
    """Resize and crop an image as a model's preprocessing does, to look at it.

    To a pixel, and in 8 bits, whatever the preprocessing computes in.

    Parameters
    ----------
    image
        uint8, (row, col, channel), with three or four channels.
    settings
        The attribute ``preprocess_settings`` of an extraction: those of
        :class:`vitxr.models.Preprocess` or of an image processor of transformers, or JSON of
        them. Empty where images go to the model as they are.

    Returns
    -------
    numpy.ndarray
        uint8, (row, col, channel), as large as the model's input.

    Raises
    ------
    DataError
        If the settings are of another form.

    Examples
    --------
    >>> wide = np.zeros((40, 90, 3), np.uint8)
    >>> framed(wide, {"do_resize": True, "size": {"shortest_edge": 20}, "resample": 3,
    ...               "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}).shape
    (16, 16, 3)
    """
    from PIL import Image

    known: dict[str, Any] = dict(json.loads(settings) if isinstance(settings, str) else settings)
    if not known:
        return image
    resize, crop, how, cover = _plan(known)
    shape = resized_shape(image.shape[:2], resize, cover)
    if shape != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize(shape[::-1], how))
    return centre_crop(image, crop)


def _plan(settings: dict[str, Any]) -> tuple[Any, tuple[int, int] | None, Any, bool]:
    """Resize, crop, Pillow's filter, and whether to cover."""
    from PIL import Image

    def sides(value: Any) -> Any:
        return tuple(map(int, value)) if isinstance(value, list | tuple) else value

    try:
        if "interpolation" in settings:  # Preprocess
            how = Image.Resampling[settings["interpolation"].upper()]
            resize, crop = sides(settings["resize"]), sides(settings["crop"])
            return resize, crop, how, bool(settings["cover"])
        size = {k: int(v) for k, v in (settings.get("size") or {}).items() if v}
        resize = None
        if settings.get("do_resize", True):
            if set(size) not in _SIZES:
                raise KeyError("size")
            resize = size.get("shortest_edge") or (size["height"], size["width"])
        crop = None
        if settings.get("do_center_crop"):
            crop = int(settings["crop_size"]["height"]), int(settings["crop_size"]["width"])
        return resize, crop, Image.Resampling(int(settings.get("resample") or 2)), False
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"how images were resized and cropped is not known from preprocess_settings "
            f"{json.dumps(settings, default=str)[:300]}; expected those of "
            'vitxr.models.Preprocess, or of an image processor with size {"height", "width"} or '
            '{"shortest_edge"}.'
        ) from error
