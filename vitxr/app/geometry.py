"""Points seen through a camera, and which of them lie in a polygon: plain arrays.

The browser does the same arithmetic in the same order (``points.js``), in float64 on
float32 coordinates, so that both come to the same points to the last bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["fitted", "inside", "project"]

Array = npt.NDArray[np.float64]


def project(points: npt.NDArray[np.float32], camera: Array) -> Array:
    """Place points on the screen: ``x = c0 + c1 p1 + c2 p2 (+ c3 p3)``, and y alike.

    Parameters
    ----------
    points
        (n, 2) or (n, 3) float32.
    camera
        (2, 3) or (2, 4): of x and of y the constant, then the factor of each axis. The
        projection is parallel: there is no perspective, so that distances compare.

    Returns
    -------
    numpy.ndarray
        (2, n) float64, x to the right and y upwards.

    Examples
    --------
    >>> project(np.float32([[1, 2]]), np.array([[0.5, 1, 0], [0, 0, 2]])).tolist()
    [[1.5], [4.0]]
    """
    p = points.astype(np.float64)
    out = np.empty((2, len(p)))
    for row in (0, 1):
        total = camera[row, 0] + camera[row, 1] * p[:, 0]
        for axis in range(1, p.shape[1]):
            total = total + camera[row, axis + 1] * p[:, axis]
        out[row] = total
    return out


def inside(x: Array, y: Array, polygon: Array) -> npt.NDArray[np.bool_]:
    """Tell which points lie in a polygon, by the even-odd rule.

    A point is inside if a ray to the right crosses the outline an odd number of times; a
    polygon that crosses itself has holes. Of the edges through a point the lower end
    counts and the upper does not. NaN is outside.

    Parameters
    ----------
    x, y
        Points, (n,).
    polygon
        Corners, (k, 2); the last is joined to the first.

    References
    ----------
    W. R. Franklin, PNPOLY; Haines (1994), Point in polygon strategies, Graphics Gems IV.

    Examples
    --------
    >>> square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    >>> inside(np.array([1.0, 3.0]), np.array([1.0, 1.0]), square).tolist()
    [True, False]
    """
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    near = np.flatnonzero((x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]))
    near = near[np.argsort(y[near], kind="stable")]
    px, py = x[near], y[near]
    odd = np.zeros(len(near), bool)
    for (xi, yi), (xj, yj) in zip(polygon, np.roll(polygon, 1, axis=0), strict=True):
        # Only the points between the ends of an edge, in height, can have it beside them.
        first, last = np.searchsorted(py, (min(yi, yj), max(yi, yj)), side="left")
        part = slice(first, last)
        if first < last:
            odd[part] ^= px[part] < (xj - xi) * (py[part] - yi) / (yj - yi) + xi
    out = np.zeros(len(x), bool)
    out[near] = odd
    return out


def fitted(points: npt.NDArray[np.float32]) -> Array:
    """Camera that shows all points, straight on: one scale for all axes, the middle at 0.

    Examples
    --------
    >>> fitted(np.float32([[0, 0], [4, 2]])).tolist()
    [[-0.9, 0.45, 0.0], [-0.45, 0.0, 0.45]]
    """
    axes = points.shape[1]
    known = points[np.isfinite(points).all(axis=1)].astype(np.float64)
    low, high = known.min(axis=0), known.max(axis=0)
    scale = 1.8 / (float((high - low).max()) or 1.0)
    camera = np.zeros((2, axes + 1))
    for row in (0, 1):
        camera[row, row + 1] = scale
        camera[row, 0] = -scale * (low[row] + high[row]) / 2
    return camera
