"""Diffusion maps: a kernel that adapts to each point's neighbourhood, its spectrum, new points.

Plain arrays. The kernel is sparse, over nearest neighbours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vitxr.analysis.rows import neighbours, scaled_neighbours
from vitxr.errors import DataError

__all__ = ["Diffusion", "diffusion_maps", "extend"]

#: Points up to which the spectrum is found by a dense method.
_DENSE = 1000


@dataclass(frozen=True)
class Diffusion:
    """A diffusion map.

    Attributes
    ----------
    eigenvalue
        (axis,) of the diffusion operator, descending, without the first, which is 1.
    eigenvector
        (point, axis) right eigenvectors ``psi``, ``sum_i pi_i psi_i^2 = 1`` with ``pi`` the
        stationary distribution; their largest entry is positive.
    bandwidth
        (point,) local scale.
    density
        (point,) row sums of the kernel.
    """

    eigenvalue: np.ndarray
    eigenvector: np.ndarray
    bandwidth: np.ndarray
    density: np.ndarray


def diffusion_maps(
    rows: np.ndarray, n_components: int, n_neighbors: int, scale_neighbor: int, alpha: float
) -> Diffusion:
    """Compute the leading axes of the diffusion operator of a set of points.

    Parameters
    ----------
    rows
        (point, coordinate).
    n_components
        Axes.
    n_neighbors
        Neighbours of a point that the kernel keeps; a pair is kept if either has the other.
    scale_neighbor
        The neighbour whose distance is the local scale.
    alpha
        Exponent of the density that the kernel is divided by.
    """
    n_neighbors = min(n_neighbors, len(rows) - 1)
    scale = scaled_neighbours(rows, scale_neighbor)[:, -1]
    distance, index = neighbours(rows, n_neighbors)
    weight = np.exp(-(distance**2) / (scale[:, None] * scale[index]))
    start = np.arange(0, weight.size + 1, n_neighbors)
    kernel = sparse.csr_array((weight.ravel(), index.ravel(), start), shape=(len(rows),) * 2)
    kernel = kernel.maximum(kernel.T) + sparse.eye_array(len(rows))
    pieces, _ = sparse.csgraph.connected_components(kernel, directed=False)
    if pieces > 1:
        warnings.warn(
            f"the graph of {n_neighbors} neighbours falls into {pieces} pieces: the first "
            f"{pieces - 1} axes of the diffusion map only tell these apart. Give a larger "
            "n_neighbors, or embed the pieces by themselves.",
            RuntimeWarning,
            stacklevel=4,
        )
    density = np.asarray(kernel.sum(axis=1))
    divided = sparse.diags_array(density**-alpha) @ kernel @ sparse.diags_array(density**-alpha)
    root = np.sqrt(np.asarray(divided.sum(axis=1)))
    symmetric = sparse.diags_array(1 / root) @ divided @ sparse.diags_array(1 / root)
    values, vectors = _leading(symmetric, n_components + 1, root)
    psi = vectors[:, 1:] / root[:, None] * np.linalg.norm(root)
    largest = np.abs(psi).argmax(0)
    psi *= np.sign(psi[largest, np.arange(psi.shape[1])])
    if values[-1] <= 1e-10:
        good = int((values[1:] > 1e-10).sum())
        raise DataError(
            f"only {good} of {n_components} eigenvalues of the diffusion operator are above zero: "
            f"ask for n_components={good} or fewer."
        )
    return Diffusion(values[1:], psi, scale, density)


def _leading(
    matrix: sparse.csr_array, count: int, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues and eigenvectors of a symmetric matrix, descending."""
    size = matrix.shape[0]
    if size <= _DENSE or count >= size // 2:
        from scipy.linalg import eigh

        values, vectors = eigh(matrix.toarray(), subset_by_index=[size - count, size - 1])
    else:
        from scipy.sparse.linalg import eigsh

        # A start that is not itself an eigenvector, as the first one is known to be.
        start = first * (1 + 0.1 * np.cos(np.arange(size)))
        values, vectors = eigsh(
            matrix, count, which="LA", v0=start, ncv=min(size - 1, max(4 * count, 60)), maxiter=size
        )
    by_size = np.argsort(-values, kind="stable")
    return values[by_size], vectors[:, by_size]


def extend(
    known: Diffusion,
    rows: np.ndarray,
    new: np.ndarray,
    n_neighbors: int,
    scale_neighbor: int,
    alpha: float,
) -> np.ndarray:
    """Extend eigenvectors to new points (Nyström), (point, axis).

    ``psi(x) = 1 / lambda sum_j p(x, j) psi_j``, with ``p`` the transition probabilities from
    the new point to the known ones, by the same kernel.
    """
    count = min(n_neighbors + 1, len(rows))
    scale = scaled_neighbours(rows, scale_neighbor, new)[:, -1]
    distance, index = neighbours(rows, count, new)
    weight = np.exp(-(distance**2) / (scale[:, None] * known.bandwidth[index]))
    # The new point's own density is a factor of its whole row and cancels.
    weight = weight / known.density[index] ** alpha
    total = weight.sum(1, keepdims=True)
    far = total[:, 0] == 0
    if far.any():
        raise DataError(
            f"{int(far.sum())} of {len(new)} new rows are so far from all embedded ones that the "
            "kernel is zero; a diffusion map cannot be extended to them. Embed them with the rest."
        )
    mean = np.einsum("ij,ijk->ik", weight / total, known.eigenvector[index])
    return mean / known.eigenvalue
