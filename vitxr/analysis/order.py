"""Spatial order: how well the patch grid is laid out on the manifold, a feature map at a time."""

from __future__ import annotations

import numpy as np
import xarray as xr

from vitxr.analysis.rows import check_count, points
from vitxr.errors import DataError
from vitxr.names import VARIABLES, provenance

__all__ = ["spatial_order"]


def spatial_order(e: xr.Dataset, n_permutations: int = 999, random_state: int = 0) -> xr.Dataset:
    """Correlate distances on the patch grid with distances on the manifold, by feature map.

    Over all pairs of one map's neurons: the Spearman rank correlation (ties have their mean rank)
    of the Euclidean distance of their patches, in patches, and the Euclidean distance of their
    points. 1: the map is laid out on the manifold as on the grid; 0: no order. Distances of pairs
    are not independent, so the p-value is that of Mantel's test: the map's neurons are shuffled
    over its patches ``n_permutations`` times, and with ``b`` of them at least as well ordered,
    ``p = (1 + b) / (1 + n_permutations)``, one-sided, of each map by itself (for many maps, correct
    for that).

    Parameters
    ----------
    e
        Embedding, whose ``score`` is taken on all its axes (``e.sel(pc=slice(3))`` for fewer), or
        Dataset of factors, whose neuron factor is; neurons labelled by ``feature_map``,
        ``patch_row``, ``patch_col``.
    n_permutations
        Shuffles a map.
    random_state
        Seed.

    Returns
    -------
    xarray.Dataset
        ``spatial_order(feature_map)``, ``spatial_order_p(feature_map)``, the baseline
        ``shuffled_spatial_order(feature_map, permutation)``, and the picture's data:
        ``manifold_distance(feature_map, grid_distance)``, the mean distance on the manifold of
        the ``pairs(feature_map, grid_distance)`` so far apart on the grid; float64. Neurons that
        are no points (dead, or NaN in ``score``) do not count. Maps of fewer than three neurons, or
        of no variation, are NaN.

    Raises
    ------
    ArgumentError, DataError
        If an argument is out of range, or neurons have no place on the patch grid.

    References
    ----------
    Mantel (1967), The detection of disease clustering, Cancer Research 27. Phipson & Smyth (2010),
    Permutation p-values should never be zero (the 1 that is added). The original notebook's
    section 7 (``get_spatial_order_plot``) looks at the same by eye.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=0, shifts=vitxr.ShiftGrid(8))
    >>> e = ds.vit.neuron_tensor(0, 3).vit.factorize(4, max_iter=20).vit.embed()
    >>> s = spatial_order(e, n_permutations=19)
    >>> s.spatial_order.sizes, s.shuffled_spatial_order.sizes
    (Frozen({'feature_map': 3}), Frozen({'feature_map': 3, 'permutation': 19}))
    """
    n_permutations = check_count("n_permutations", n_permutations)
    seed = check_count("random_state", random_state, 0)
    score = points(e, "neuron")
    missing = {"feature_map", "patch_row", "patch_col"} - set(score.coords)
    if missing:
        raise DataError(
            f"the neurons have no {', '.join(sorted(missing))}: spatial order needs their place on "
            "the patch grid. Embed the factors of a neuron tensor made with stack=True."
        )
    maps = score["feature_map"].values
    names = np.array(list(dict.fromkeys(maps.tolist())))
    place = np.stack([score["patch_row"].values, score["patch_col"].values], 1).astype(np.int64)
    alive = np.isfinite(score.values).all(axis=1)
    rng = np.random.default_rng(seed)

    order = np.full(len(names), np.nan)
    p_value = np.full(len(names), np.nan)
    shuffled = np.full((len(names), n_permutations), np.nan)
    curves = []
    for i, name in enumerate(names):
        at = (maps == name) & alive
        grid, manifold = _pairs(place[at].astype(np.float64)), _pairs(score.values[at])
        curves.append((np.round(grid**2).astype(np.int64), manifold))
        if at.sum() >= 3 and np.ptp(grid) > 0 and np.ptp(manifold) > 0:
            order[i], shuffled[i] = mantel(grid, manifold, n_permutations, rng)
            # What differs by rounding only is as well ordered.
            above = shuffled[i] >= order[i] - 1e-12
            p_value[i] = (1 + above.sum()) / (1 + n_permutations)
    apart = np.unique(np.concatenate([squares for squares, _ in curves]))
    count = np.zeros((len(names), len(apart)), np.int64)
    total = np.zeros(count.shape)
    for i, (squares, manifold) in enumerate(curves):
        where = np.searchsorted(apart, squares)
        count[i] = np.bincount(where, minlength=len(apart))
        total[i] = np.bincount(where, manifold, len(apart))
    with np.errstate(invalid="ignore"):
        mean = total / count
    out = xr.Dataset(
        {
            "spatial_order": ("feature_map", order),
            "spatial_order_p": ("feature_map", p_value),
            "shuffled_spatial_order": (("feature_map", "permutation"), shuffled),
            "manifold_distance": (("feature_map", "grid_distance"), mean),
            "pairs": (("feature_map", "grid_distance"), count),
        },
        coords={
            "feature_map": names,
            "permutation": np.arange(n_permutations),
            "grid_distance": np.sqrt(apart),
        },
    )
    for variable in out.data_vars:
        out[variable].attrs.update(VARIABLES[str(variable)].attrs)
    out.attrs = {
        **provenance(e.attrs),
        "method": str(e.attrs.get("method", "")),
        "random_state": seed,
    }
    return out


def _pairs(rows: np.ndarray) -> np.ndarray:
    """Euclidean distances of all pairs, first row first."""
    from scipy.spatial.distance import pdist

    return pdist(rows) if len(rows) > 1 else np.empty(0)


def mantel(
    one: np.ndarray, other: np.ndarray, n_permutations: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Rank correlation of two sets of pair distances, and after shuffles of the rows of one."""
    from scipy.spatial.distance import squareform
    from scipy.stats import rankdata

    ranks = [rankdata(v) - (len(v) + 1) / 2 for v in (one, other)]
    scale = np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1])
    # Shuffling rows moves distances about; the set of ranks stays.
    square = squareform(ranks[1], checks=False)
    whole = squareform(ranks[0], checks=False)
    shuffled = np.empty(n_permutations)
    for i in range(n_permutations):
        p = rng.permutation(len(square))
        shuffled[i] = np.vdot(whole, square[p][:, p]) / 2
    return float(ranks[0] @ ranks[1] / scale), shuffled / scale
