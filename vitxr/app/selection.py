"""A selection of neurons: a mask, and how it was made, so that it can be made again.

How is plain data that fits into an address and a file: a polygon and the camera it was
drawn through, a predicate on feature map, row and column, or several joined by and, or, not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.app.geometry import inside, project
from vitxr.errors import ArgumentError, DataError
from vitxr.names import NEURON, VARIABLES, provenance

__all__ = ["Selection", "neurons_of", "select"]

Mask = npt.NDArray[np.bool_]
How = dict[str, Any]

#: Corners of a polygon, and selections joined, at most: what an address may ask for.
_CORNERS, _DEPTH = 512, 64
#: Of rows, columns, feature maps and axes, at most.
_LARGEST = 2**31
_PREDICATE = {"feature_maps", "rows", "cols"}
_FORMS = (
    '{"polygon": [[x, y], ...], "camera": [[c0, c1, ...], [...]], "pcs": [1, 2]}, '
    '{"feature_maps": [5, 7], "rows": [0, 3], "cols": [0, 3]}, {"and": [a, b]}, {"or": [a, b]} '
    'or {"not": a}'
)


@dataclass(frozen=True, eq=False)
class Selection:
    """Neurons, and how they were chosen. Join with ``&``, ``|`` and ``~``.

    Attributes
    ----------
    mask
        Whether a neuron is selected, (neuron,), in the order of the embedding.
    how
        What :func:`select` makes the same mask from.
    name
        What it is called.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([[5, 9], [0, 1], [0, 1]],
    ...     names=["feature_map", "patch_row", "patch_col"])
    >>> e = xr.Dataset(coords=xr.Coordinates.from_pandas_multiindex(index, "neuron"))
    >>> top = select(e, {"rows": [0, 0]})
    >>> (top & ~select(e, {"feature_maps": [9]})).mask.astype(int).tolist()
    [1, 1, 0, 0, 0, 0, 0, 0]
    """

    mask: Mask
    how: How
    name: str = "selection"

    def __and__(self, other: Selection) -> Selection:
        return Selection(self.mask & other.mask, _joined("and", self.how, other.how))

    def __or__(self, other: Selection) -> Selection:
        return Selection(self.mask | other.mask, _joined("or", self.how, other.how))

    def __invert__(self) -> Selection:
        twice = set(self.how) == {"not"}
        return Selection(~self.mask, self.how["not"] if twice else {"not": self.how})

    @property
    def count(self) -> int:
        """Neurons selected."""
        return int(self.mask.sum())

    def called(self, name: str) -> Selection:
        """Give it a name."""
        return replace(self, name=name)

    def to_dataarray(self, neurons: xr.Dataset) -> xr.DataArray:
        """Label the mask with the neurons: ``selected`` (neuron), bool.

        The attributes ``selection`` and ``how`` (JSON) say what it is, beside those that say
        where the neurons come from.
        """
        labels = neurons_of(neurons)
        if labels.sizes["neuron"] != len(self.mask):
            raise DataError(
                f"the selection is of {len(self.mask)} neurons, and the Dataset has "
                f"{labels.sizes['neuron']}. Give the embedding that it was made of."
            )
        attrs = {**provenance(neurons.attrs), **VARIABLES["selected"].attrs}
        attrs |= {"selection": self.name, "how": self.to_json()}
        return xr.DataArray(
            self.mask, coords=labels.coords, dims="neuron", name="selected", attrs=attrs
        )

    def patch_map(self, neurons: xr.Dataset) -> xr.DataArray:
        """Count the selected neurons at each place of the patch grid, over feature maps."""
        rows, cols = (np.asarray(neurons[n].values, dtype=int) for n in NEURON[1:])
        counts = np.zeros((rows.max() + 1, cols.max() + 1), dtype=np.int64)
        np.add.at(counts, (rows[self.mask], cols[self.mask]), 1)
        return xr.DataArray(
            counts,
            dims=NEURON[1:],
            coords={n: np.arange(k) for n, k in zip(NEURON[1:], counts.shape, strict=True)},
            name="selected",
        )

    def to_json(self) -> str:
        """Write how it was made in one line."""
        return json.dumps(self.how, separators=(",", ":"))


def select(e: xr.Dataset, how: How | str, name: str = "selection") -> Selection:
    """Select neurons of an embedding.

    Parameters
    ----------
    e
        Dataset with the labels ``feature_map``, ``patch_row``, ``patch_col`` of ``neuron``;
        for a polygon also ``score`` (neuron, pc), which is taken in float32.
    how
        ``{"polygon": [[x, y], ...], "camera": [[c0, c1, c2], [...]], "pcs": [1, 2]}``: those
        whose places, seen through the camera, lie inside (see :mod:`vitxr.app.geometry`).
        ``{"feature_maps": [5, 7], "rows": [first, last], "cols": [first, last]}``, each
        optional: those of the maps, and from the first to the last row and column.
        ``{"and": [...]}``, ``{"or": [...]}``, ``{"not": ...}`` of these. Or the same as JSON.
    name
        What it is called.

    Raises
    ------
    ArgumentError
        If `how` is none of these.
    DataError
        If ``e`` lacks the labels or the axes.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([[5, 9], [0, 1], [0, 1]],
    ...     names=["feature_map", "patch_row", "patch_col"])
    >>> e = xr.Dataset(coords=xr.Coordinates.from_pandas_multiindex(index, "neuron"))
    >>> select(e, '{"feature_maps": [9], "rows": [1, 1]}').count
    2
    """
    made: Any = how
    if isinstance(how, str):
        try:
            made = json.loads(how)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(
                f"the selection {how[:60]!r} is not JSON ({error}); expected {_FORMS}."
            ) from error
    return Selection(_mask(e, made, _DEPTH), made, name)


def _joined(join: str, *parts: How) -> How:
    """Join, what is joined alike in one list: no selection nests deeper than it has to."""
    flat = [one for part in parts for one in (part[join] if set(part) == {join} else [part])]
    return {join: flat}


def neurons_of(e: xr.Dataset) -> xr.Dataset:
    """Take the labels of the neurons alone."""
    missing = [n for n in NEURON if n not in e.coords or e[n].dims != ("neuron",)]
    if missing:
        raise DataError(
            f"the neurons have no coordinate {', '.join(f'`{n}`' for n in missing)}: make the "
            "tensor with ds.vit.neuron_tensor, which labels them."
        )
    own = [n for n, c in e.coords.items() if c.dims == ("neuron",)]
    return xr.Dataset(coords={n: e.coords[n] for n in own})


def _mask(e: xr.Dataset, how: Any, depth: int) -> Mask:
    if not isinstance(how, Mapping) or depth == 0:
        raise ArgumentError(f"the selection {str(how)[:60]!r} cannot be read; expected {_FORMS}.")
    keys = set(how)
    if keys == {"not"}:
        return ~_mask(e, how["not"], depth - 1)
    if keys in ({"and"}, {"or"}):
        (join,) = keys
        parts = how[join]
        if not isinstance(parts, list) or not 1 <= len(parts) <= _CORNERS:
            raise ArgumentError(f"{join!r} joins a list of selections; given: {str(parts)[:60]!r}.")
        masks = [_mask(e, part, depth - 1) for part in parts]
        return np.logical_and.reduce(masks) if join == "and" else np.logical_or.reduce(masks)
    if keys == {"polygon", "camera", "pcs"}:
        return _by_polygon(e, how)
    if keys <= _PREDICATE and keys:
        return _by_predicate(e, how)
    raise ArgumentError(
        f"the selection has {', '.join(map(repr, sorted(map(str, keys)))) or 'nothing'}; expected "
        f"{_FORMS}."
    )


def _by_polygon(e: xr.Dataset, how: Mapping[str, Any]) -> Mask:
    pcs = _numbers(how["pcs"], "pcs", whole=True).astype(int)
    axes = pcs.size
    polygon, camera = _numbers(how["polygon"], "polygon"), _numbers(how["camera"], "camera")
    if (
        pcs.shape not in ((2,), (3,))
        or camera.shape != (2, axes + 1)
        or polygon.ndim != 2
        or polygon.shape[1] != 2
        or not 3 <= len(polygon) <= _CORNERS
    ):
        raise ArgumentError(
            f"pcs have shape {pcs.shape}, camera {camera.shape} and polygon {polygon.shape}; "
            f"expected (k,), (2, k + 1) and (corners, 2) with k = 2 or 3 and 3 to {_CORNERS} "
            "corners."
        )
    if "score" not in e or not np.isin(pcs, e["pc"].values).all():
        raise DataError(
            f"a polygon over axes {pcs.tolist()} needs an embedding that has them. Embed the "
            "factors with f.vit.embed()."
        )
    points = e["score"].transpose("neuron", "pc").sel(pc=pcs).values.astype(np.float32)
    x, y = project(points, camera)
    return inside(x, y, polygon)


def _by_predicate(e: xr.Dataset, how: Mapping[str, Any]) -> Mask:
    labels = neurons_of(e)
    mask = np.ones(labels.sizes["neuron"], bool)
    if "feature_maps" in how:
        wanted = _numbers(how["feature_maps"], "feature_maps", whole=True)
        unknown = np.setdiff1d(wanted, labels["feature_map"].values)
        if wanted.ndim != 1 or unknown.size:
            raise ArgumentError(
                f"feature_maps={how['feature_maps']!r}: expected a list of the feature maps of "
                f"the neurons; {unknown.tolist()} are not among them."
            )
        mask &= np.isin(labels["feature_map"].values, wanted)
    for key, coord in (("rows", "patch_row"), ("cols", "patch_col")):
        if key in how:
            span = _numbers(how[key], key, whole=True)
            if span.shape != (2,):
                raise ArgumentError(f"{key}={how[key]!r}: expected the first and the last.")
            mask &= (labels[coord].values >= span[0]) & (labels[coord].values <= span[1])
    return mask


def _numbers(values: Any, name: str, whole: bool = False) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray("")
    known = array.dtype.kind in "iuf" and array.size <= 4 * _CORNERS + 4096
    if not known or not np.isfinite(array).all():
        raise ArgumentError(f"{name}={str(values)[:60]!r}: expected finite numbers.")
    if whole and ((array != np.rint(array)) | (abs(array) > _LARGEST)).any():
        raise ArgumentError(f"{name}={str(values)[:60]!r}: expected whole numbers.")
    return array.astype(np.float64)
