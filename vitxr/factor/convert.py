"""Factor Datasets to tensorly's decompositions, and back."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitxr._version import __version__
from vitxr.errors import ArgumentError, DataError
from vitxr.factor.checks import check_labels, floating
from vitxr.factor.labels import Found, assemble, describe, ordered_cp, ordered_tucker
from vitxr.factor.parts import take_apart
from vitxr.factor.reconstruct import explained
from vitxr.names import provenance

__all__ = ["from_tensorly", "to_tensorly"]


def to_tensorly(f: xr.Dataset, labelled: bool = False) -> Any:
    """Convert a model to tensorly's form.

    Parameters
    ----------
    f
        Factor Dataset of one model.
    labelled
        Factors as pandas DataFrames, whose rows have the labels of the dimension and whose
        columns the component numbers. tlviz takes them, and keeps the labels in its tables and
        plots; tensorly's own functions need arrays.

    Returns
    -------
    tensorly.cp_tensor.CPTensor or tensorly.tucker_tensor.TuckerTensor
        ``(weights, factors)`` or ``(core, factors)``, factors in the order of the tensor's dims;
        NumPy copies in their own dtypes.

    Raises
    ------
    ArgumentError
        If ``f`` holds several replicates.
    DataError
        If ``f`` does not hold the factors of a model.

    References
    ----------
    Kossaifi et al. (2019), TensorLy: Tensor Learning in Python, JMLR 20(26), 1-6; Roald and Moe
    (2022), TLViz: Visualising and analysing tensor decomposition models with Python, JOSS 7(79),
    4754.

    Examples
    --------
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), [[1.0], [0.0]]),
    ...                 "image_factor": (("image", "component"), [[0.6], [0.8]]),
    ...                 "weight": ("component", [5.0])}, coords={"image": ["a", "b"]})
    >>> to_tensorly(f).to_tensor()
    array([[3., 4.],
           [0., 0.]])
    >>> to_tensorly(f, labelled=True).factors[1].loc["b", 0]
    np.float64(0.8)
    """
    from tensorly.cp_tensor import CPTensor
    from tensorly.tucker_tensor import TuckerTensor

    parts = take_apart(f)
    factors: list[Any] = [np.array(a) for a in parts.factors]
    if labelled:
        rows = [f.indexes.get(d, pd.RangeIndex(f.sizes[d], name=d)) for d in parts.dims]
        axes = [f[f"{d}_factor"].dims[1] for d in parts.dims]
        columns = [f.indexes.get(a, pd.RangeIndex(f.sizes[a], name=a)) for a in axes]
        factors = [pd.DataFrame(a, r, c) for a, r, c in zip(factors, rows, columns, strict=True)]
    return (CPTensor if parts.cp else TuckerTensor)((np.array(parts.core), factors))


def from_tensorly(model: Any, like: xr.DataArray) -> xr.Dataset:
    """Label a decomposition that tensorly or another package has found.

    Parameters
    ----------
    model
        A CPTensor, a TuckerTensor, or a pair of weights (or None) or core and the factors. Arrays
        are NumPy, or convert to it; DataFrames have the tensor's labels.
    like
        The tensor it is of, with its labels. It is read, for the objective: see
        :func:`vitxr.factor.explained`.

    Returns
    -------
    xarray.Dataset
        As :func:`vitxr.factor.factorize` gives it: unit columns whose largest entry is positive,
        components by descending weight, ``objective`` on ``like``; without what is known of a
        fit only. Factors are float32 if the tensor is float32 or smaller, otherwise float64.

    Raises
    ------
    ArgumentError
        If ``model`` is not a decomposition, or not of the shape of ``like``.
    DataError
        If its DataFrames have other labels, its values are not finite, or ``like`` is not a
        tensor.

    Examples
    --------
    >>> t = xr.DataArray([[3.0, 4.0], [0.0, 0.0]], dims=("neuron", "image"),
    ...                  coords={"image": ["a", "b"]})
    >>> f = from_tensorly((None, [np.array([[1.0], [0.0]]), np.array([[3.0], [4.0]])]), like=t)
    >>> f.weight.values, f.image_factor.sel(image="b").values, float(f.objective)
    (array([5.]), array([0.8]), 0.0)
    """
    check_labels(like)
    try:
        core, factors = model
        arrays = [np.asarray(a, np.float64) for a in factors]
        weights = np.ones(arrays[0].shape[1]) if core is None else np.asarray(core, np.float64)
    except (TypeError, ValueError, IndexError) as error:
        raise ArgumentError(
            f"expected a CPTensor, a TuckerTensor, or a pair (weights or core, factors), not "
            f"{type(model).__name__}: {error}."
        ) from error
    cp = weights.ndim == 1
    ranks = weights.shape * len(arrays) if cp else weights.shape
    expected = [*zip(like.shape, ranks, strict=False)]
    if [a.shape for a in arrays] != expected or len(ranks) != like.ndim:
        raise ArgumentError(
            f"the model has factors of {', '.join(str(a.shape) for a in arrays)} and weights or a "
            f"core of {weights.shape}; expected factors (n, rank) with n of "
            f"{', '.join(f'{n} {d}' for d, n in like.sizes.items())}, in this order."
        )
    if not all(np.isfinite(a).all() for a in (weights, *arrays)):
        raise DataError("the model holds NaN or infinite values.")
    for dim, given in zip(like.dims, factors, strict=True):
        index = like.indexes.get(dim)
        if isinstance(given, pd.DataFrame) and index is not None and not given.index.equals(index):
            raise DataError(f"the rows of a factor have other labels than {dim} of the tensor.")
    found = Found(weights, arrays, np.empty(0), False, 0.0, 0)
    core, units = (ordered_cp if cp else ordered_tucker)(found, floating(like.dtype))
    ds = assemble(like, core, units)
    ds["objective"] = explained(ds, like)["objective"].variable
    describe(ds)
    used = {"vitxr": __version__, "numpy": np.__version__, "tensorly": version("tensorly")}
    ds.attrs = {
        **provenance(like.attrs),
        "method": "from_tensorly",
        "rank": len(core) if cp else list(core.shape),
        "versions": json.dumps(used),
    }
    return ds
