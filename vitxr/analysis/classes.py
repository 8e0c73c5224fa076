"""What the model takes a frame for: the classes of largest logit, by name."""

from __future__ import annotations

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.names import VARIABLES, provenance, validate

__all__ = ["top_classes"]


def top_classes(ds: xr.Dataset, k: int = 5) -> xr.Dataset:
    r"""Find the ``k`` classes of largest logit of every frame.

    The probability of class :math:`c` is :math:`e^{z_c} / \sum_j e^{z_j}` over the logits
    :math:`z` of all classes, computed in float64. It says how a model divides its belief
    among its classes where it was trained with this softmax; of others, such as SigLIP, it
    orders classes only.

    Parameters
    ----------
    ds
        Dataset with ``logits``, as :func:`vitxr.extract` makes it.
    k
        How many classes.

    Returns
    -------
    xarray.Dataset
        Over the dims of ``logits``, with ``place`` (1 is the largest logit) in the stead of
        ``class``; lazy if ``ds`` is:

        - ``top_class``: names; classes of the same name stay apart
        - ``class_number``: numbers in the model, 0-based
        - ``top_logit``: logits, as stored
        - ``probability``: float32

        Of equal logits the class of the lower number comes first. Where a logit is not a
        number, as in an unfinished store, ``class_number`` is -1, the name empty and the rest
        NaN. A class of logit -inf has probability 0; where the largest logit is infinite, as
        after an overflow, no probability is defined, and all of the frame are NaN.

    Raises
    ------
    DataError
        If ``ds`` has no ``logits``, or they have no classes.
    ArgumentError
        If there are fewer than ``k`` classes.

    Examples
    --------
    >>> ds = xr.Dataset({"logits": (("image", "class"), [[0.0, 3.0, 1.0], [2.0, 0.0, 2.0]])},
    ...                 coords={"class": ["crane", "cat", "crane"]})
    >>> top = top_classes(ds, 2)
    >>> top.top_class.values.tolist(), top.class_number.values.tolist()
    ([['cat', 'crane'], ['crane', 'crane']], [[1, 2], [0, 2]])
    >>> top.probability.round(2).values.tolist()[0]
    [0.8399999737739563, 0.10999999940395355]
    """
    if "logits" not in ds:
        validate(ds, require=["logits"])
    logits = ds["logits"]
    if "class" not in logits.dims or "class" not in logits.coords or logits.dtype.kind != "f":
        raise DataError(
            f"`logits` has dims ({', '.join(map(str, logits.dims))}) and dtype {logits.dtype}; "
            "expected floating-point numbers with the dimension `class` and the classes' names as "
            "its coordinate, as vitxr.extract makes them."
        )
    have = logits.sizes["class"]
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= have:
        raise ArgumentError(f"k={k!r}: the model has {have} classes; expected 1 to {have}.")
    names = np.array([*map(str, logits["class"].values), ""], dtype=object)
    # By position from here on: names may occur twice.
    z = logits.drop_vars([n for n, c in logits.coords.items() if "class" in c.dims])
    if z.chunks is not None:
        # Of the variable alone: coordinates stay in memory.
        z = z.copy(data=z.variable.chunk({"class": -1}).data)
    makers = {
        "class_number": (lambda a: _largest(a, k), np.int64),
        "top_class": (lambda a: names[_largest(a, k)], object),
        "top_logit": (lambda a: _taken(a, a, k), z.dtype),
        "probability": (lambda a: _taken(_softmax(a), a, k).astype(np.float32), np.float32),
    }
    top = xr.Dataset(
        {
            name: xr.apply_ufunc(
                maker,
                z,
                input_core_dims=[["class"]],
                output_core_dims=[["place"]],
                dask="parallelized",
                output_dtypes=[dtype],
                dask_gufunc_kwargs={"output_sizes": {"place": int(k)}},
            ).assign_attrs(VARIABLES[name].attrs)
            for name, (maker, dtype) in makers.items()
        }
    )
    top = top.assign_coords(place=np.arange(1, k + 1))
    top.attrs = provenance(ds.attrs)
    return top[["top_class", "class_number", "top_logit", "probability"]]


def _largest(z: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k largest along the last axis, -1 in rows that hold NaN."""
    # A stable sort of the negative: of equal ones the first comes first.
    order = np.argsort(-z, axis=-1, kind="stable")[..., :k]
    return np.where(np.isnan(z).any(-1, keepdims=True), -1, order)


def _taken(values: np.ndarray, z: np.ndarray, k: int) -> np.ndarray:
    """``values`` at the k largest of ``z``; NaN in rows of ``z`` that hold NaN."""
    taken = np.take_along_axis(values, np.maximum(_largest(z, k), 0), axis=-1)
    return np.where(np.isnan(z).any(-1, keepdims=True), values.dtype.type(np.nan), taken)


def _softmax(z: np.ndarray) -> np.ndarray:
    """Softmax along the last axis; NaN in rows whose largest entry is infinite."""
    top = z.max(-1, keepdims=True)
    z, top = (np.where(np.isfinite(top), a, np.nan).astype(np.float64) for a in (z, top))
    e = np.exp(z - top)
    return e / e.sum(-1, keepdims=True)
