"""The browser of a store: linked pictures of what was extracted and found.

State, views and their layout; drawing is left to :mod:`vitxr.plot`. Importing this package
loads neither Panel nor HoloViews; :func:`browse` does.
"""

from __future__ import annotations

from typing import Any

import xarray as xr

from vitxr.errors import DependencyError

__all__ = ["browse"]


def browse(
    ds: xr.Dataset,
    factors: xr.Dataset | xr.DataTree | None = None,
    stimuli: xr.Dataset | None = None,
) -> Any:
    """Browse an extraction in a notebook, or under ``panel serve``.

    Linked views: stimuli and their shifts, attention, feature maps, factors, ranks, embedding,
    responses. Neurons lassoed on the embedding are shown on the patch grid, with the images and
    shifts that they respond to, and patches chosen there light up on the embedding.

    Parameters
    ----------
    ds
        As :func:`vitxr.open` opens a store of :func:`vitxr.extract`. Read lazily.
    factors
        Factors of a neuron tensor of ``ds``, or an ensemble: with them there are the views of
        factors and embedding, of an ensemble also that of ranks.
    stimuli
        The images, where they are not files that can still be read.

    Returns
    -------
    panel.viewable.Viewer
        What a notebook shows; ``.servable()`` puts it on the page of ``panel serve``. Its
        ``state`` is what is shown and selected: ``app.state.selection``.

    Raises
    ------
    DataError
        If ``ds`` has no activations on the patch grid, or the factors are not of it.
    DependencyError
        If Panel or HoloViews is not installed.

    Examples
    --------
    >>> import vitxr
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[0, 5], shifts=None, progress=False)
    >>> app = vitxr.browse(ds)
    >>> app.state.layer = 5
    """
    try:
        import panel as pn

        from vitxr.app.serve import session
        from vitxr.app.source import Source
    except ImportError as error:
        raise DependencyError(
            f"the browser needs Panel and HoloViews, and {error.name!r} is missing: install them "
            "with `pip install 'vitxr[plot]'`."
        ) from error
    pn.extension()
    return session(Source(ds, factors, stimuli))
