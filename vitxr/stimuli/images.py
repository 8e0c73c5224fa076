"""Images from anywhere to one labelled Dataset, and the one reader of its pixels."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError, ImageError
from vitxr.names import VARIABLES, validate
from vitxr.stimuli.decode import (
    check_pillow,
    decode_bytes,
    digest,
    encode_png,
    from_array,
    from_pillow,
)
from vitxr.stimuli.sizes import Size, check_size, is_count, resize
from vitxr.stimuli.sources import Entry, collect, read_source, take_per_class

__all__ = ["Decoded", "altered", "build", "open_images", "read_image"]


def open_images(
    source: Any,
    per_class: int | None = None,
    size: int | tuple[int, int] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Open images as a labelled Dataset.

    Every image is decoded once, so that a bad one is refused before any work;
    the pixels of files are then read again, lazily, when they are asked for.
    How greyscale, 16-bit, transparent, rotated and other doubtful images are
    read is stated in ``vitxr.stimuli.decode``.

    Parameters
    ----------
    source
        One of

        - a folder with one subfolder for each class (images at any depth in it),
          or a folder of images (one class, labelled by the folder's name). Hidden
          files and files that are not images are ignored;
        - a ``.npy`` file, or a folder of them: each a stack ``(n, height, width)``
          or ``(n, height, width, 3)`` of one class, labelled by the file's stem
          (inside a class subfolder, by the subfolder);
        - a path, or a list of paths, of image files (labelled by the folder they
          lie in), stacks or folders;
        - an array, one image or a stack; a list of arrays or Pillow images, one
          image each (the label is empty);
        - a mapping of labels to any of these.
    per_class
        Keep the first `per_class` images of each class; all by default. Folders
        are in natural order ("2" before "10"), lists and mappings as given.
    size
        None keeps the images as they are. An integer n fits them into n x n as
        the original notebook does (section 4): Pillow's ``thumbnail`` with
        ``LANCZOS``, which keeps the aspect and never enlarges. A pair is the
        exact ``(height, width)``.
    progress
        Show a progress bar if decoding takes longer than a second.

    Returns
    -------
    xarray.Dataset
        Dim ``image``, indexed by unique names: the path relative to the common
        folder (``"husky/001.jpg"``), ``"husky[3]"`` for entries of stacks,
        ``"image_0003"`` for images in memory (after their label in a mapping).
        Coordinates ``label``, ``source`` (absolute path, ``"path/husky.npy[3]"``,
        or ``""``), ``height`` and ``width`` in pixels after `size`, ``sha256`` (of
        a file's bytes; of the uint8 RGB pixels before `size` for arrays).
        ``pixels`` (image, row, col, channel), uint8 0..255, where all sizes agree:
        a Dask array of one image a chunk if there are files, else a NumPy array.
        Where sizes differ there is no ``pixels``, and images without a file are in
        ``encoded`` (image), as PNG. The attribute ``size`` holds `size` if given.

    Raises
    ------
    ImageError
        If images are missing, damaged or refused; the message names the first ten.
    DataError
        If nothing is found, the source is ambiguous, names collide, or a class
        has fewer than `per_class` images.
    ArgumentError
        If `per_class` or `size` is not what is described above.

    See Also
    --------
    read_image : the pixels of one image, whatever the source.

    Examples
    --------
    >>> import numpy as np
    >>> grey = np.full((2, 30, 40), 128, dtype=np.uint8)
    >>> stim = open_images({"grey": grey, "black": 0 * grey}, per_class=1, size=20)
    >>> stim.image.values.tolist(), stim.label.values.tolist()
    (['grey/image_0000', 'black/image_0000'], ['grey', 'black'])
    >>> dict(stim.pixels.sizes)
    {'image': 2, 'row': 15, 'col': 20, 'channel': 3}
    """
    size = check_size(size)
    if per_class is not None and not is_count(per_class):
        raise ArgumentError(f"per_class={per_class!r}; expected None or a positive integer.")
    check_pillow()
    entries = collect(source)
    if per_class is not None:
        entries = take_per_class(entries, int(per_class))
    images = _decode_all(entries, size, progress)
    return build(entries, images, size)


@dataclass(frozen=True)
class Decoded:
    """What is kept of an image that was decoded: its size after `size`, its digest.

    ``rgb`` holds the pixels of an image that has no file, None where there is one.
    """

    height: int
    width: int
    sha256: str
    rgb: np.ndarray | None


def _decode(entry: Entry, size: Size) -> Decoded | ImageError:
    try:
        if entry.source:
            rgb, sha256 = read_source(entry.source)
        elif isinstance(entry.image, np.ndarray):
            rgb = from_array(entry.image, entry.name)
            sha256 = digest(rgb)
        else:
            rgb = from_pillow(entry.image, entry.name)
            sha256 = digest(rgb)
    except ImageError as error:
        return error
    rgb = resize(rgb, size)
    return Decoded(rgb.shape[0], rgb.shape[1], sha256, None if entry.source else rgb)


def _decode_all(entries: Sequence[Entry], size: Size, progress: bool) -> list[Decoded]:
    from tqdm import tqdm

    images: list[Decoded] = []
    bad: list[ImageError] = []
    # Decoding releases the GIL; few threads, because each holds a whole image.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        done = pool.map(_decode, entries, itertools.repeat(size))
        for one in tqdm(
            done, "reading images", len(entries), unit="image", delay=1, disable=not progress
        ):
            if isinstance(one, ImageError):
                bad.append(one)
            else:
                images.append(one)
    finally:
        pool.shutdown(cancel_futures=True)
    if len(bad) == 1:
        raise bad[0]
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ImageError(
            f"{len(bad)} of {len(entries)} images cannot be used:\n  "
            + "\n  ".join(str(error) for error in bad[:10])
            + more
        )
    return images


def build(entries: Sequence[Entry], images: Sequence[Decoded], size: Size) -> xr.Dataset:
    """Assemble the Dataset :func:`open_images` describes from decoded entries."""

    def coord(name: str, values: list[Any], dtype: Any = object) -> tuple[Any, ...]:
        return ("image", np.array(values, dtype=dtype), VARIABLES[name].attrs)

    ds = xr.Dataset(
        coords={
            "image": ("image", np.array([e.name for e in entries], dtype=object)),
            "label": coord("label", [e.label for e in entries]),
            "source": coord("source", [e.source for e in entries]),
            "height": coord("height", [i.height for i in images], np.int64),
            "width": coord("width", [i.width for i in images], np.int64),
            "sha256": coord("sha256", [i.sha256 for i in images]),
        },
        attrs={} if size is None else {"size": size if isinstance(size, int) else list(size)},
    )
    if len({(i.height, i.width) for i in images}) == 1:
        dims = VARIABLES["pixels"].dims[0]
        ds["pixels"] = (dims, _pixels(entries, images, size), VARIABLES["pixels"].attrs)
    elif any(i.rgb is not None for i in images):
        png = np.empty(len(images), dtype=object)
        png[:] = [b"" if i.rgb is None else encode_png(i.rgb) for i in images]
        ds["encoded"] = ("image", png, VARIABLES["encoded"].attrs)
    return validate(ds, require=("label", "source", "height", "width", "sha256"))


def _pixels(entries: Sequence[Entry], images: Sequence[Decoded], size: Size) -> Any:
    """One array of all images; with files among them, one Dask chunk an image."""
    if all(i.rgb is not None for i in images):
        return np.stack([i.rgb for i in images if i.rgb is not None])
    import dask.array as da
    from dask.base import tokenize

    shape = (images[0].height, images[0].width, 3)
    read = functools.partial(_read_block, size=size)
    name = "pixels-" + tokenize(
        [(e.source, i.sha256) for e, i in zip(entries, images, strict=True)], size
    )
    # One dict, not map_blocks: one image is then culled from thousands in milliseconds.
    graph: dict[tuple[str | int, ...], Any] = {
        (name, n, 0, 0, 0): (read, e.source, i.sha256) if i.rgb is None else i.rgb[np.newaxis]
        for n, (e, i) in enumerate(zip(entries, images, strict=True))
    }
    chunks = ((1,) * len(images), *((n,) for n in shape))
    return da.Array(graph, name, chunks, meta=np.empty((0, 0, 0, 0), dtype=np.uint8))


def _read_block(source: str, sha256: str, size: Size) -> np.ndarray:
    return _read_file(source, sha256, size)[np.newaxis]


def _read_file(source: str, sha256: str, size: Size) -> np.ndarray:
    """Read a file again, and refuse it if it is not the one that was opened."""
    rgb, now = read_source(source)
    if now != sha256:
        raise ImageError(
            f"{source}: changed since it was opened (SHA-256 {now[:12]}, expected {sha256[:12]}). "
            "Open the images again, or restore the file."
        )
    return resize(rgb, size)


def read_image(stim: xr.Dataset, i: int | str) -> np.ndarray:
    """Pixels of one image, from wherever they are.

    They come from ``pixels`` if the Dataset has them, else from ``encoded``, else
    from the file, which is resized by ``stim.attrs["size"]``.

    Parameters
    ----------
    stim
        A Dataset from :func:`open_images`, or a selection of one.
    i
        Position (negative from the end) or name of the image.

    Returns
    -------
    numpy.ndarray
        uint8, ``(height, width, 3)``, sRGB; a copy.

    Raises
    ------
    ArgumentError
        If there is no such image.
    ImageError
        If the file is missing, damaged, or no longer has the recorded ``sha256``.
    DataError
        If the Dataset holds neither pixels nor a file for the image, or the file
        does not come out in the recorded ``height`` and ``width``.

    Examples
    --------
    >>> import numpy as np
    >>> stim = open_images([np.zeros((2, 3), np.uint8), np.ones((4, 5), np.uint8)])
    >>> "pixels" in stim
    False
    >>> read_image(stim, "image_0001").shape
    (4, 5, 3)
    """
    validate(stim, require=("image", "source", "height", "width", "sha256"))
    at = _position(stim, i)
    one = stim.isel(image=at)
    if "pixels" in stim:
        pixels = one["pixels"].transpose("row", "col", "channel").data
        if hasattr(pixels, "dask"):
            # One small task, often asked for inside a worker: not one for its scheduler.
            pixels = pixels.compute(scheduler="synchronous")
        return np.array(pixels)
    source, sha256 = str(one["source"].values), str(one["sha256"].values)
    name = str(stim.indexes["image"][at])
    png = bytes(one["encoded"].values.item()) if "encoded" in stim else b""
    if png:
        rgb = decode_bytes(png, name)
    elif os.path.isabs(source):  # noqa: PTH117
        rgb = _read_file(source, sha256, check_size(stim.attrs.get("size")))
    else:
        raise DataError(
            f"the image {name!r} has neither `pixels`, `encoded` nor a file (source {source!r}). "
            "Expected one of them: open the images again and keep `pixels`."
        )
    expected = (int(one["height"]), int(one["width"]))
    if rgb.shape[:2] != expected:
        raise DataError(
            f"the image {name!r} is {rgb.shape[:2]}; expected {expected} from `height` and "
            f"`width`. attrs['size'] is {stim.attrs.get('size')!r}: put back the one the images "
            "were opened with."
        )
    return rgb


def altered(stim: xr.Dataset) -> list[str | None]:
    """Say for each image whether its pixels are others than its ``sha256`` is of.

    Parameters
    ----------
    stim
        A Dataset from :func:`open_images`, its ``pixels`` masked, blurred or inverted since
        perhaps.

    Returns
    -------
    list of str or None
        None where the pixels are those of the file, or have the recorded SHA-256; else
        their own SHA-256.

    Examples
    --------
    >>> import numpy as np
    >>> stim = open_images(np.zeros((2, 5, 6), np.uint8))
    >>> altered(stim)
    [None, None]
    >>> altered(stim.assign(pixels=255 - stim.pixels)) == altered(stim)
    False
    """
    if "pixels" not in stim:
        return [None] * stim.sizes["image"]
    if getattr(stim["pixels"].data, "name", "").startswith("pixels-"):
        return [None] * stim.sizes["image"]  # the Dask array that open_images made
    size = check_size(stim.attrs.get("size"))
    out: list[str | None] = []
    for i in range(stim.sizes["image"]):
        one = stim.isel(image=i)
        source, sha256 = str(one["source"].values), str(one["sha256"].values)
        now = read_image(stim, i)
        same = digest(now) == sha256
        if not same and os.path.isabs(source):  # noqa: PTH117
            same = np.array_equal(now, _read_file(source, sha256, size))
        out.append(None if same else digest(now))
    return out


def _position(stim: xr.Dataset, i: int | str) -> int:
    index = stim.indexes["image"]
    if isinstance(i, str):
        if i not in index:
            raise ArgumentError(
                f"no image {i!r}; expected one of {len(index)} names such as {index[0]!r}."
            )
        return int(index.get_loc(i))
    if (
        isinstance(i, int | np.integer)
        and not isinstance(i, bool)
        and -len(index) <= i < len(index)
    ):
        return int(i) % len(index)
    raise ArgumentError(f"image {i!r}; expected a name or a position below {len(index)}.")
