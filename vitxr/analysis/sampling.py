"""Sampling of neurons by their activity: feature maps first, then neurons within them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from vitxr.analysis.rows import check_count
from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, unwritten

__all__ = ["sample_neurons"]


def sample_neurons(
    t: xr.DataArray, n: int, feature_maps: int | None = None, random_state: int = 0
) -> xr.DataArray:
    """Draw neurons without replacement: maps by their activity, then neurons by theirs.

    With ``m_i`` the largest response of neuron ``i`` to any image and shift, each draw takes a
    feature map with a probability in proportion to the mean of its neurons' ``m_i``, then one of
    its neurons that are left in proportion to ``m_i``. A map of which no neuron with ``m_i > 0``
    is left is drawn no more. So active maps give more neurons, and silent neurons are never drawn.

    Take a tensor that is not normalised by feature map and frame (``normalize=False``), or the
    maxima hardly differ.

    Parameters
    ----------
    t
        Neuron tensor or matrix, (neuron, image[, shift]), of values of 0 or more. The maxima are
        computed, in one pass over it; it stays lazy itself.
    n
        Neurons to draw.
    feature_maps
        Draw so many feature maps first, without replacement, in the same proportion, and neurons
        only from these; None for all.
    random_state
        Seed. The result depends on it, on the maxima and on the order of the neurons, and not on
        chunks.

    Returns
    -------
    xarray.DataArray
        The neurons drawn, in the order they have in ``t``, with the coordinate
        ``response_maximum(neuron)``; the attribute ``sampling`` says how they were drawn.

    Raises
    ------
    ArgumentError
        If there are not so many neurons, or feature maps, that respond at all.
    DataError
        If neurons have no ``feature_map``, or responses are negative or not finite.

    References
    ----------
    Dyballa et al. (2024), Population encoding of stimulus features along the visual hierarchy,
    PNAS 121 (neurons of convolutional networks sampled by their activity).

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=5, shifts=None)
    >>> t = ds.vit.neuron_tensor(5, feature_maps=None, normalize=False)
    >>> sample_neurons(t, 500).sizes
    Frozen({'neuron': 500, 'image': 10, 'shift': 1})
    """
    n = check_count("n", n)
    seed = check_count("random_state", random_state, 0)
    if not isinstance(t, xr.DataArray) or "neuron" not in t.dims or "feature_map" not in t.coords:
        given = getattr(t, "dims", type(t).__name__)
        raise DataError(
            "sample_neurons needs a neuron tensor whose neurons are labelled by feature_map; "
            f"given: {given}. Make it with ds.vit.neuron_tensor(layer)."
        )
    others = [d for d in t.dims if d != "neuron"]
    high_low = {"high": t.max(others, skipna=False), "low": t.min(others, skipna=False)}
    ends = xr.Dataset(high_low).compute()
    high = ends["high"].values.astype(np.float64)
    if not np.isfinite(high).all() or not (ends["low"].values >= 0).all():
        raise DataError(
            "responses are negative or not finite; expected values of 0 or more. Take "
            f"ds.vit.neuron_tensor(layer, rectify=True){unwritten(t)}."
        )
    names, of = np.unique(t["feature_map"].values, return_inverse=True)
    rng = np.random.default_rng(seed)
    activity = np.bincount(of, high) / np.bincount(of)
    chosen = activity
    if feature_maps is not None:
        count = check_count("feature_maps", feature_maps)
        if count > (activity > 0).sum():
            raise ArgumentError(
                f"feature_maps is {count}; {int((activity > 0).sum())} of {len(names)} feature "
                "maps respond at all."
            )
        taken = _race(rng, activity)[:count]
        chosen = np.zeros_like(activity)
        chosen[taken] = activity[taken]
    able = int((high[chosen[of] > 0] > 0).sum())
    if n > able:
        raise ArgumentError(
            f"n is {n}; {able} neurons of the feature maps in question respond at all. Draw fewer, "
            "or from more feature maps."
        )
    at = np.sort(draw(rng, high, of, chosen, n))
    text = f"{n} neurons by activity, seed {seed}"
    if feature_maps is not None:
        text = f"{n} neurons of {feature_maps} feature maps by activity, seed {seed}"
    out = t.isel(neuron=at).assign_coords(
        response_maximum=("neuron", high[at], VARIABLES["response_maximum"].attrs)
    )
    out.attrs["sampling"] = text
    return out


def draw(
    rng: np.random.Generator, high: np.ndarray, of: np.ndarray, activity: np.ndarray, n: int
) -> np.ndarray:
    """Draw ``n`` neurons: their numbers, in the order drawn.

    ``high``: of each neuron; ``of``: its map's number; ``activity``: of each map, 0 for none.
    """
    weight = activity.copy()
    queues: dict[int, list[int]] = {}
    out = np.empty(n, np.int64)
    for i in range(n):
        shares = np.cumsum(weight)
        # To the right: maps of no weight have no width.
        one = int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
        if one not in queues:
            members = np.flatnonzero((of == one) & (high > 0))
            queues[one] = members[_race(rng, high[members])].tolist()[::-1]
        out[i] = queues[one].pop()
        if not queues[one]:
            weight[one] = 0
    return out


def _race(rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
    """Order of successive draws without replacement, each in proportion to the weights left.

    The arrival times of exponential clocks with these rates come in that order (Efraimidis and
    Spirakis 2006). What has no weight comes last.
    """
    times = rng.exponential(size=len(weight))
    with np.errstate(divide="ignore"):
        return np.argsort(times / weight, kind="stable")
