"""From labelled arrays to the plain numbers that a picture shows."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr.errors import ArgumentError, DataError

__all__ = [
    "described",
    "frame",
    "image_positions",
    "image_titles",
    "labels_of",
    "lattice_offsets",
    "neuron_maps",
    "one_fit",
    "one_per_label",
    "part_of",
    "prefix_and_grid",
    "shift_words",
    "unshifted",
    "variable",
    "with_dims",
]


def described(data: Any) -> str:
    """Say what was given, for messages.

    Examples
    --------
    >>> described(xr.DataArray(np.zeros((2, 3)), dims=("neuron", "image"), name="activation"))
    'the DataArray `activation` (neuron, image)'
    """
    if isinstance(data, xr.DataArray):
        return f"the DataArray `{data.name or 'unnamed'}` ({', '.join(map(str, data.dims))})"
    if isinstance(data, xr.DataTree):
        return f"a DataTree with {', '.join(data.children) or 'no children'}"
    if isinstance(data, xr.Dataset):
        return f"a Dataset with {', '.join(map(str, data.data_vars)) or 'no variables'}"
    return f"a {type(data).__name__}"


def variable(data: Any, name: str, remedy: str = "") -> xr.DataArray:
    """Take ``name`` from a Dataset or the root of a tree; a DataArray is taken as it is."""
    if isinstance(data, xr.DataArray):
        return data
    if not isinstance(data, xr.Dataset | xr.DataTree) or name not in data:
        raise DataError(
            f"the picture needs the variable `{name}`; given: {described(data)}. "
            f"{remedy or 'Give the data that hold it.'}"
        )
    return data[name]  # type: ignore[return-value]


def with_dims(data: Any, name: str, dims: tuple[str, ...], remedy: str) -> xr.DataArray:
    """Take ``name``, refuse it with other dimensions than ``dims``, and put it in their order."""
    array = variable(data, name, remedy)
    if set(array.dims) != set(dims):
        within = (
            "" if data is array else f", its `{name}` having ({', '.join(map(str, array.dims))})"
        )
        raise DataError(
            f"the picture needs `{name}` with dims ({', '.join(dims)}); given: "
            f"{described(data)}{within}. {remedy}"
        )
    return array.transpose(*dims)


def one_fit(f: Any) -> xr.Dataset:
    """Take the factors of one fit; of an ensemble say how to choose one."""
    if isinstance(f, xr.DataTree):
        ranks = [name for name in f.children if name.startswith("rank_")]
        if ranks:
            raise ArgumentError(
                f"an ensemble was given, of {', '.join(ranks)}; expected the factors of one fit: "
                f"{_choice(int(ranks[0].removeprefix('rank_')))}."
            )
        f = f.to_dataset()
    if not isinstance(f, xr.Dataset):
        raise DataError(
            f"expected the Dataset of factors of one fit; given: {described(f)}. Make one with "
            "t.vit.factorize(rank=25)."
        )
    if "replicate" in f.dims:
        raise ArgumentError(
            f"the factors hold {f.sizes['replicate']} replicates; expected one fit: "
            f"{_choice(f.sizes.get('component', 8))}."
        )
    return f


def _choice(rank: int) -> str:
    return (
        f"the best replicate is tree.vit.best({rank}), any other "
        f'tree["rank_{rank}"].to_dataset().sel(replicate=0), of the ensemble `tree`'
    )


def part_of(title: str, *parts: tuple[int, int, str]) -> str:
    """Say in the title what was left out: (shown, there are, of what).

    Examples
    --------
    >>> part_of("Activity", (3, 6, "images"), (5, 5, "feature maps"))
    'Activity (3 of 6 images)'
    """
    said = [f"{shown} of {whole} {what}" for shown, whole, what in parts if shown < whole]
    return f"{title} ({', '.join(said)})" if said else title


def image_positions(array: xr.DataArray | xr.Dataset, images: Any) -> list[int]:
    """Positions of images given by name or by position; None is all of them."""
    size = array.sizes["image"]
    if images is None:
        return list(range(size))
    wanted: Sequence[Any] = [images] if np.ndim(images) == 0 else list(images)
    names = [str(v) for v in array["image"].values] if "image" in array.coords else []
    out = []
    for one in wanted:
        if isinstance(one, str):
            if one not in names:
                raise ArgumentError(
                    f"there is no image {one!r}; the images are {', '.join(names[:8]) or 'unnamed'}"
                    f"{', ...' if len(names) > 8 else ''}."
                )
            out.append(names.index(one))
        elif -size <= int(one) < size:
            out.append(int(one) % size)
        else:
            raise ArgumentError(
                f"image={one}: there are {size} images; give a position from 0 to {size - 1}, "
                "or a name."
            )
    return out


def labels_of(array: xr.DataArray | xr.Dataset) -> list[str]:
    """Class label of every image, empty strings where there are none."""
    if "label" not in array.coords:
        return [""] * array.sizes["image"]
    return ["" if v is None else str(v) for v in np.atleast_1d(array["label"].values)]


def unshifted(array: xr.DataArray | xr.Dataset) -> tuple[int, int]:
    """Lattice position of the frame nearest to no shift (circularly).

    Examples
    --------
    >>> a = xr.DataArray(np.zeros((2, 3)), dims=("shift_y", "shift_x"),
    ...     coords={"offset_y": ("shift_y", [11, 0]), "offset_x": ("shift_x", [11, 22, 0])})
    >>> unshifted(a)
    (1, 2)
    """
    ny, nx = array.sizes.get("shift_y", 1), array.sizes.get("shift_x", 1)
    if ny * nx == 1 or "offset_y" not in array.coords:
        return 0, 0
    far = np.zeros((ny, nx))
    for name in ("offset_y", "offset_x"):
        offset = array[name]
        values = np.asarray(offset.values, dtype=float)
        if values.ndim == 1:
            values = values[:, None] if offset.dims == ("shift_y",) else values[None, :]
        around = float(offset.attrs.get("period", np.inf))
        far += np.minimum(np.abs(values), np.abs(around - values)) ** 2
    row, col = np.unravel_index(int(far.argmin()), far.shape)
    return int(row), int(col)


def shift_words(array: xr.DataArray | xr.Dataset) -> str:
    """Say how the frame that :func:`unshifted` finds is shifted.

    Examples
    --------
    >>> a = xr.DataArray(np.zeros((2, 1)), dims=("shift_y", "shift_x"),
    ...     coords={"offset_y": ("shift_y", [11, 22]), "offset_x": ("shift_x", [0])})
    >>> shift_words(a)
    'shifted by (11, 0) px'
    """
    if "offset_y" not in array.coords:
        return "not shifted"
    y, x = unshifted(array)
    at = {"shift_y": y, "shift_x": x}
    dy, dx = (
        int(array[name].isel({d: i for d, i in at.items() if d in array[name].dims}))
        for name in ("offset_y", "offset_x")
    )
    return f"shifted by ({dy}, {dx}) px" if dy or dx else "not shifted"


def frame(
    array: xr.DataArray, *, shift: tuple[int, int] | None = None, layer: Hashable | None = None
) -> xr.DataArray:
    """Drop the lattice (the frame nearest to no shift) and, if ``layer`` is given, the layer."""
    shift = shift or unshifted(array)
    at = {d: i for d, i in zip(("shift_y", "shift_x"), shift, strict=True) if d in array.dims}
    array = array.isel(at)
    if layer is not None:
        have = (
            [int(v) for v in np.atleast_1d(array["layer"].values)]
            if "layer" in array.coords
            else []
        )
        if layer not in have:
            raise ArgumentError(f"layer={layer!r} was not captured; the layers are {have}.")
        if "layer" in array.dims:
            array = array.sel(layer=layer)
    return array


def prefix_and_grid(
    data: xr.Dataset | xr.DataArray, tokens: int, grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and the patch grid, for attention over ``tokens`` tokens."""
    if grid is None:
        if "patch_row" not in data.sizes or "patch_col" not in data.sizes:
            raise ArgumentError(
                "the patch grid is unknown: pass the extraction Dataset, whose activation has "
                "patch_row and patch_col, or grid=(rows, columns)."
            )
        grid = (data.sizes["patch_row"], data.sizes["patch_col"])
    prefix = tokens - grid[0] * grid[1]
    if prefix < 0:
        raise ArgumentError(
            f"attention over {tokens} tokens cannot hold a patch grid of {grid[0]} x {grid[1]}: "
            "give the grid of the same model and input size."
        )
    return prefix, grid


def neuron_maps(array: xr.DataArray) -> tuple[xr.DataArray, list[int]]:
    """Put neurons back on the patch grid.

    Returns the array with dims (..., feature_map, patch_row, patch_col), in the order
    in which the feature maps stand, NaN where a neuron was left out, and the feature maps. The
    grid reaches from the first to the last row and column of which there are neurons.
    """
    for name in ("feature_map", "patch_row", "patch_col"):
        if name not in array.coords:
            raise DataError(
                f"the neurons have no coordinate `{name}`: make the tensor with "
                "ds.vit.neuron_tensor, which labels them."
            )
    maps = pd.unique(array["feature_map"].values)
    row, col = (np.asarray(array[n].values, dtype=int) for n in ("patch_row", "patch_col"))
    rows, cols = (np.arange(v.min(), v.max() + 1) for v in (row, col))
    at = (
        pd.Index(maps).get_indexer(array["feature_map"].values),
        row - rows[0],
        col - cols[0],
    )
    others = [d for d in array.dims if d != "neuron"]
    values = np.asarray(array.transpose("neuron", *others).values)
    out = np.full((len(maps), len(rows), len(cols), *values.shape[1:]), np.nan, dtype=np.float32)
    out[at] = values
    out = np.moveaxis(out, (0, 1, 2), (-3, -2, -1))
    coords = {d: array[d].values for d in others if d in array.coords and d != "shift"}
    result = xr.DataArray(
        out,
        dims=(*others, "feature_map", "patch_row", "patch_col"),
        coords={**coords, "feature_map": maps, "patch_row": rows, "patch_col": cols},
    )
    return result, [int(m) for m in maps]


def lattice_offsets(array: xr.DataArray | xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lattice row and column of every stacked shift, and the size of the lattice."""
    if "shift_y" not in array.coords or "shift_x" not in array.coords:
        raise DataError(
            "the shifts have no coordinates `shift_y` and `shift_x`: make the tensor with "
            "ds.vit.neuron_tensor, which labels them."
        )
    rows, at_y = np.unique(array["shift_y"].values, return_inverse=True)
    cols, at_x = np.unique(array["shift_x"].values, return_inverse=True)
    return at_y, at_x, np.array([len(rows), len(cols)])


def image_titles(array: xr.DataArray | xr.Dataset, at: list[int]) -> list[str]:
    """What to call the images at the positions: the name, and the label if it says more."""
    labels = labels_of(array)
    names = [str(v) for v in array["image"].values] if "image" in array.coords else []
    out = []
    for i in at:
        name = names[i] if names else f"image {i}"
        said = re.search(rf"(?<![0-9A-Za-z]){re.escape(labels[i])}(?![0-9A-Za-z])", name)
        # names of files differ at the end
        name = name if len(name) <= 16 else f"{name[:6]}…{name[-9:]}"
        out.append(name if said or not labels[i] else f"{name} ({labels[i]})")
    return out


def one_per_label(array: xr.DataArray | xr.Dataset, most: int = 6) -> list[int]:
    """Position of the first image of every class, or the first images without classes."""
    labels = labels_of(array)
    if not any(labels):
        return list(range(min(most, len(labels))))
    return [labels.index(v) for v in pd.unique(np.asarray(labels, dtype=object))][:most]
