"""Images that come with packages vitxr depends on: nothing is downloaded."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DependencyError
from vitxr.stimuli.decode import digest, from_array
from vitxr.stimuli.images import Decoded, build, open_images
from vitxr.stimuli.sizes import is_count
from vitxr.stimuli.sources import Entry, take_per_class

__all__ = ["digits", "photos"]

Split = Literal["train", "test"]

#: First sample of the test split.
_TEST_START = 1347
_PHOTOS = {
    "sklearn": {"palace": "china.jpg", "flower": "flower.jpg"},
    "skimage": {
        "astronaut": "astronaut.png",
        "cat": "chelsea.png",
        "coffee": "coffee.png",
        "motorcycle": "motorcycle_left.png",
        "rocket": "rocket.jpg",
    },
}


def digits(per_class: int | None = 5, split: Split = "test") -> xr.Dataset:
    """Handwritten digits, 8 x 8 pixels, shipped with scikit-learn.

    Parameters
    ----------
    per_class
        Keep the first `per_class` samples of each digit; None keeps all.
    split
        ``"train"`` is samples 0..1346, ``"test"`` the rest (450). Neighbouring
        samples look like one writer's, though the data do not say who wrote
        what; a contiguous split keeps all but one writer to one side.

    Returns
    -------
    xarray.Dataset
        As :func:`vitxr.open_images` makes it. ``pixels`` (image, row, col, channel)
        in memory, uint8: the grey values 0..16 times 255/16, rounded, in all three
        channels. ``label`` is the digit, the names are ``"digit_3/1352"`` with the
        sample's number in scikit-learn's ``load_digits``, ``source`` the same as
        ``"scikit-learn digits[1352]"``, which is no path: the pixels are only here.
        Ordered by digit, then by sample.

    Raises
    ------
    ArgumentError
        If `per_class` or `split` is not one of the above.
    DataError
        If a digit has fewer than `per_class` samples in the split.

    References
    ----------
    E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits,
    UCI Machine Learning Repository, https://doi.org/10.24432/C50P49.

    Examples
    --------
    >>> stim = digits(per_class=2)
    >>> stim.sizes["image"], stim.label.values[:3].tolist()
    (20, ['0', '0', '1'])
    """
    from sklearn.datasets import load_digits

    if split not in get_args(Split):
        raise ArgumentError(f"split={split!r}; expected one of {get_args(Split)}.")
    if per_class is not None and not is_count(per_class):
        raise ArgumentError(f"per_class={per_class!r}; expected None or a positive integer.")
    bunch = load_digits()
    start, stop = (0, _TEST_START) if split == "train" else (_TEST_START, len(bunch.images))
    samples = sorted(range(start, stop), key=lambda i: (bunch.target[i], i))
    entries = [
        Entry(
            f"digit_{bunch.target[i]}/{i:04d}",
            str(bunch.target[i]),
            f"scikit-learn digits[{i}]",
            np.rint(bunch.images[i] * (255 / 16)).astype(np.uint8),
        )
        for i in samples
    ]
    if per_class is not None:
        entries = take_per_class(entries, int(per_class))
    pixels = [from_array(entry.image, entry.name) for entry in entries]
    return build(entries, [Decoded(p.shape[0], p.shape[1], digest(p), p) for p in pixels], None)


def photos(size: int | tuple[int, int] | None = None) -> xr.Dataset:
    """Seven colour photographs of different sizes, shipped with scikit-learn and scikit-image.

    Parameters
    ----------
    size
        As in :func:`vitxr.open_images`.

    Returns
    -------
    xarray.Dataset
        As :func:`vitxr.open_images` makes it from the files. ``label`` says what
        is on the photograph, the names are those of the files.

    Raises
    ------
    DependencyError
        If scikit-image, or a file of it, is not installed.

    Examples
    --------
    >>> photos().label.values.tolist()
    ['palace', 'flower', 'astronaut', 'cat', 'coffee', 'motorcycle', 'rocket']
    """
    found = importlib.util.find_spec("skimage")  # looks it up without importing it
    if found is None or not found.submodule_search_locations:
        raise DependencyError(
            "photos() needs the photographs of scikit-image, which is not installed. "
            'Install it with: pip install "vitxr[photos]"'
        )
    folders = {
        "sklearn": Path(str(importlib.resources.files("sklearn.datasets.images"))),
        "skimage": Path(found.submodule_search_locations[0]) / "data",
    }
    files = {
        label: folders[package] / name
        for package, names in _PHOTOS.items()
        for label, name in names.items()
    }
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise DependencyError(
            f"photos() did not find {', '.join(missing)}. Expected the files scikit-learn and "
            'scikit-image ship; install them again with: pip install "vitxr[photos]"'
        )
    stim = open_images(files, size=size, progress=False)
    # Named by file alone: the common folder depends on where the packages are installed.
    names = np.array([Path(s).name for s in stim["source"].values], dtype=object)
    return stim.assign_coords(image=names)
