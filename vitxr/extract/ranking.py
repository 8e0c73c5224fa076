"""Which feature maps are kept: the ranking of channels by their mean activity."""

from __future__ import annotations

import numpy as np

__all__ = ["rank_channels"]


def rank_channels(mean: np.ndarray) -> np.ndarray:
    """Sort channels by descending mean activity.

    Parameters
    ----------
    mean
        Mean of each channel's rectified activity, (..., channel).

    Returns
    -------
    numpy.ndarray
        Channel positions, most active first. Ties (as among maps that are zero
        everywhere) fall as the original notebook's call lets them fall,
        ``np.argsort(-1 * mean)`` in float32.
    """
    return np.argsort(-1 * mean.astype(np.float32), axis=-1)
