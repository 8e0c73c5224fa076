"""Bytes, arrays and Pillow images to uint8 sRGB pixels ``(height, width, 3)``: the policies.

One rule for each doubtful case. What has no rule is refused, never guessed:

==========================  =====================================================================
too many pixels             refused above `MAX_PIXELS`, from the header, before decoding (Pillow
                            only warns there); encoded files above `MAX_BYTES` are not read
truncated, damaged          refused; Pillow's ``LOAD_TRUNCATED_IMAGES`` must be off
several frames              refused with their number, except the extra pictures a camera puts
                            in a JPEG (MPO: depth maps, stereo pairs): the main one is read
EXIF orientation            applied
greyscale                   repeated in the three channels
palette, CMYK, YCbCr        Pillow's conversion to RGB; colour profiles are not applied
alpha                       composited over white, so that the colours hidden in transparent
                            pixels do not show: ``(colour a + 255 (255 - a)) / 255``, rounded
16 bits a channel           ``value / 257``, rounded, so that 65535 becomes 255; no clipping and
                            no stretching. 16-bit *colour* files are reduced by Pillow, which
                            keeps the high byte (at most one step away)
uint8 arrays                as they are
uint16 arrays               16 bits a channel; a maximum of at most 255 that is not all zero is
                            refused: it may mean 0..255
other integer arrays        must lie within 0..255
float arrays                must be finite and lie within 0..255, and are rounded. A maximum of
                            at most 1 that is not all zero is refused: it may mean 0..1
bool, complex, object, ...  refused
no pixels                   refused
==========================  =====================================================================
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from vitxr.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "check_pillow",
    "decode_bytes",
    "digest",
    "encode_png",
    "from_array",
    "from_pillow",
]

#: Largest image that is decoded, in pixels: the number at which Pillow starts to warn.
MAX_PIXELS = 89_478_485
#: Largest image file that is read, in bytes.
MAX_BYTES = 2**30

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF")
_PNG_END = b"IEND\xae\x42\x60\x82"
_LOADING = threading.Lock()


def check_pillow() -> None:
    """Refuse to work while Pillow is told to fill truncated files with grey.

    Raises
    ------
    ImageError
        If ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set: truncated files could
        not be told from whole ones.
    """
    from PIL import ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, so truncated files would be filled with "
            "grey without an error. Expected False: set it back before opening images."
        )


def digest(data: bytes | np.ndarray) -> str:
    """SHA-256 in hexadecimal, of bytes or of an array's bytes in C order.

    Examples
    --------
    >>> digest(b"")[:8]
    'e3b0c442'
    """
    raw = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data
    return hashlib.sha256(raw).hexdigest()


def decode_bytes(data: bytes, name: str) -> np.ndarray:
    """Decode an image file held in memory.

    Parameters
    ----------
    data
        The bytes of a PNG, JPEG, BMP, GIF, TIFF, WebP, PPM/PGM or AVIF file; the
        contents decide, not the extension.
    name
        What error messages call it.

    Returns
    -------
    numpy.ndarray
        uint8, ``(height, width, 3)``.

    Raises
    ------
    ImageError
        If the file is refused by a policy of this module or cannot be decoded.
    """
    from PIL import Image

    check_pillow()
    Image.init()
    formats = [f for f in _FORMATS if f in Image.OPEN]
    with _refusals(name), Image.open(io.BytesIO(data), formats=formats) as image:
        _check_pixels(image.height, image.width, name)
        if image.format == "PNG":
            # Loading ends with the last pixel; this looks at every checksum and at the end.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
                again.verify()
            if _PNG_END not in data:
                raise OSError("no end of file")
        return _rgb(image, name)


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError that says what to do."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: {error} Expected at most {MAX_PIXELS} pixels: make the image smaller."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image file that can be read, or its header is damaged. Expected one "
            f"of {', '.join(_FORMATS)}: convert it, for instance to PNG."
        ) from error
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise ImageError(
            f"{name}: truncated, damaged or of an unsupported kind ({error or type(error).__name__}"
            "). Expected a whole image: fetch or export it again."
        ) from error


def from_pillow(image: Image, name: str) -> np.ndarray:
    """Convert a Pillow image by the policies of this module.

    Parameters
    ----------
    image
        Any single-frame image; it is loaded if it is not yet.
    name
        What error messages call it.

    Returns
    -------
    numpy.ndarray
        uint8, ``(height, width, 3)``.

    Raises
    ------
    ImageError
        If it has several frames, no or too many pixels, or values without a rule.

    Examples
    --------
    >>> from PIL import Image
    >>> from_pillow(Image.new("RGBA", (1, 1), (200, 0, 0, 0)), "hidden").tolist()
    [[[255, 255, 255]]]
    """
    with _refusals(name):
        return _rgb(image, name)


def _rgb(image: Image, name: str) -> np.ndarray:
    from PIL import ImageOps

    _check_pixels(image.height, image.width, name)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageError(
            f"{name}: has {frames} frames; expected one. Save the frames you want as images."
        )
    with _LOADING:  # the same Pillow object may be given twice, and loading is not thread-safe
        image.load()
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    if mode.startswith("I") or mode == "F":
        return _deep(image, name)
    if mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        key = image.info.get("transparency")
        if mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
            raise ImageError(
                f"{name}: 16 bits a channel with a transparent colour; expected 8 bits or an alpha "
                "channel: save it as 8-bit RGBA."
            )
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _deep(image: Image, name: str) -> np.ndarray:
    """Images of more than 8 bits: modes I;16 and its byte orders, I, F."""
    values = np.asarray(image)
    if image.mode == "I":
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{name}: 32-bit values from {values.min()} to {values.max()}; expected 16-bit "
                "values, 0..65535: rescale it and save it as 8 or 16 bits."
            )
        values = values.astype(np.uint16)
    # A file says that it holds 16 bits; an array may hold 0..255 as uint16.
    rgb = from_array(_of_16_bits(values) if values.dtype.kind == "u" else values, name)
    key = image.info.get("transparency")
    if key is not None:
        rgb[values == key] = 255
    return rgb


def from_array(array: np.ndarray, name: str) -> np.ndarray:
    """Convert one image held as an array by the policies of this module.

    Parameters
    ----------
    array
        ``(height, width)`` or ``(height, width, c)`` with c = 1 (grey), 3 (RGB)
        or 4 (RGBA).
    name
        What error messages call it.

    Returns
    -------
    numpy.ndarray
        uint8, ``(height, width, 3)``, a copy in C order.

    Raises
    ------
    ImageError
        If the shape, the dtype or a value has no rule.

    Examples
    --------
    >>> from_array(np.array([[0, 128, 65535]], dtype=np.uint16), "deep")[0, :, 0]
    array([  0,   0, 255], dtype=uint8)
    >>> from_array(np.array([[0.0, 0.5]]), "half")
    Traceback (most recent call last):
        ...
    vitxr.errors.ImageError: half: float values up to 0.5, which may mean 0..1 or 0..255; expected \
0..255: if white is 1, give np.rint(255 * x).astype(np.uint8).
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = " The channels seem to come first: give np.moveaxis(x, 0, -1)."
        raise ImageError(
            f"{name}: shape {array.shape}; expected (height, width) or (height, width, channels) "
            f"with 1, 3 or 4 channels.{hint}"
        )
    _check_pixels(array.shape[0], array.shape[1], name)
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ImageError(f"{name}: masked pixels have no value; give x.filled(value).")
    pixels = _to_uint8(np.asarray(array), name)
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    if pixels.shape[2] == 4:
        return _over_white(pixels)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")


def _of_16_bits(array: np.ndarray) -> np.ndarray:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "uif":
        raise ImageError(
            f"{name}: dtype {array.dtype}; expected uint8, uint16, or other numbers within 0..255. "
            "Convert it, for instance 255 * mask.astype(np.uint8)."
        )
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        if 0 < array.max() <= 255:
            raise ImageError(
                f"{name}: uint16 values up to {array.max()}, which may mean 0..255 or nearly black "
                "of 0..65535; expected no doubt: give x.astype(np.uint8) if white is 255."
            )
        return _of_16_bits(array)
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
        if bad.any():
            where = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
            raise ImageError(
                f"{name}: {int(bad.sum())} values are not finite, the first at {where}; expected "
                "numbers within 0..255: replace them or leave the image out."
            )
    low, high = array.min(), array.max()
    if low < 0 or high > 255:
        raise ImageError(
            f"{name}: {array.dtype} values from {low} to {high}; expected 0..255. Rescale them, or "
            "give 16-bit images as uint16."
        )
    if array.dtype.kind == "f":
        if 0 < high <= 1:
            raise ImageError(
                f"{name}: float values up to {high}, which may mean 0..1 or 0..255; expected "
                "0..255: if white is 1, give np.rint(255 * x).astype(np.uint8)."
            )
        array = np.rint(array)
    return array.astype(np.uint8)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def encode_png(rgb: np.ndarray) -> bytes:
    """Encode uint8 pixels ``(height, width, 3)`` as PNG, without loss."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return out.getvalue()


def _check_pixels(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name}: {height} x {width} pixels; expected at least one: leave it out.")
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"{name}: {height} x {width} = {height * width} pixels; expected at most {MAX_PIXELS}: "
            "make the image smaller."
        )
