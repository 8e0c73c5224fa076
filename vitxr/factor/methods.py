"""Labelled factorizations: checks, our nonnegative CP, tensorly's methods, one form of result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr._version import __version__
from vitxr.errors import DataError
from vitxr.factor import hals
from vitxr.factor.checks import (
    METHODS,
    Tensor,
    check_arguments,
    check_labels,
    check_rank,
    prepare,
    tensorly_function,
)
from vitxr.names import VARIABLES, provenance

__all__ = ["factorize", "fit"]

Array = npt.NDArray[Any]


def factorize(
    t: xr.DataArray,
    rank: int | Sequence[int],
    method: str = "ncp_hals",
    random_state: int = 0,
    tol: float = 1e-5,
    max_iter: int = 500,
    progress: bool = False,
    **options: Any,
) -> xr.Dataset:
    r"""Factorize a labelled tensor, and keep the labels.

    A CP model of rank R approximates ``t`` by
    ``sum_r weight[r] * a[:, r] o b[:, r] o c[:, r] ...`` with one factor for each dimension; a
    Tucker model by a ``core`` multiplied along every dimension by a factor. Whatever the method,
    the result has the same form:

    - columns of factors have unit norm and their largest entry is positive; what that takes away
      is in ``weight`` or ``core`` (where the weight of an unconstrained CP component would be
      negative, the factor of the first dimension changes sign instead);
    - components are in the order of descending weight (of Tucker: of the norm of their slice of
      the core). A component that has died has weight 0 and at least one column of zeros;
    - ``objective`` is computed here, from the residual on the full tensor in float64.

    Parameters
    ----------
    t
        Tensor with two or more dimensions of any names; of a neuron tensor ``neuron`` comes
        first. Integers become float32 (up to 16 bits) or float64, float16 becomes float32;
        float32 stays float32. With "ncp_hals" a Dask tensor larger than 2 GiB is read from its
        chunks along the first dimension in each iteration, and twice besides: store it before. A
        smaller one, or any one for the other methods, is read into memory once.
    rank
        Number of components. For Tucker an int or one for each dimension.
    method
        "ncp_hals" (:func:`vitxr.factor.hals.ncp_hals`, the original notebook's), or one of
        tensorly's functions by its own name: see :data:`METHODS`.
    random_state
        Seed of the random start, an integer from 0 to 2**32 - 1. All CP methods start from
        the same point for the same seed, :func:`vitxr.factor.hals.random_start`; tensorly's Tucker
        methods from tensorly's random start. tensorly's own default, a start by SVD, ignores
        the seed; ``init="svd"`` asks for it.
    tol
        The fit ends when the objective falls by less than this in an iteration.
    max_iter
        Most iterations.
    progress
        Show a bar over iterations ("ncp_hals" only; tensorly's functions have none).
    **options
        Further arguments of tensorly's function. ``constrained_parafac`` is nonnegative unless
        constraints are given; ``randomised_parafac`` draws ``n_samples = 10 R log(R + 1)`` rows,
        rounded up, unless told otherwise.

    Returns
    -------
    xarray.Dataset
        CP: ``<dim>_factor(dim, component)`` in the dtype of the data, ``weight(component)``
        float64. Tucker: ``<dim>_factor(dim, <dim>_component)`` and
        ``core(<dim>_component, ...)``. Both: ``objective`` (relative residual
        ``|X - M| / |X|``), ``objective_history(iteration)`` (as the method saw it, of
        ``randomised_parafac`` an estimate from a sample), ``converged`` (False where the
        limit on iterations or, in ``randomised_parafac``, stagnation ended the fit),
        ``iterations``, ``seconds``, ``seed``. All coordinates of ``t``; attributes ``method``,
        ``rank``, ``tol``, ``max_iter``, ``options`` and ``versions`` (the last two as JSON).

    Raises
    ------
    ArgumentError
        If an argument is unknown or out of range. A CP rank is at most the product of all
        dimensions but the largest, which is enough to reproduce any tensor; a Tucker rank is at
        most the size of its dimension.
    DataError
        If ``t`` has fewer than two dimensions, no elements, is not numeric, holds NaN or infinite
        values, holds negative values and the method is nonnegative, is zero everywhere, or is so
        large or small that its powers leave the range of its dtype; or if tensorly meets a
        singular system on the way.

    References
    ----------
    The original notebook's section 7, which fits a matrix as ``(n, m, 1)``: to do as it does,
    append a dimension of length one. Kossaifi et al. (2019), TensorLy: Tensor Learning in
    Python, JMLR 20(26), 1-6. Battaglino, Ballard and Kolda (2018), A practical randomized CP
    tensor decomposition, SIAM J. Matrix Anal. Appl. 39, 876-901.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> data = np.einsum("ir,jr,kr->ijk", *(rng.random((n, 2)) for n in (6, 4, 5)))
    >>> t = xr.DataArray(data, dims=("neuron", "image", "shift"), coords={"image": list("abcd")})
    >>> f = factorize(t, rank=2)
    >>> f.image_factor.dims, f.image.values.tolist(), bool(f.objective < 0.05)
    (('image', 'component'), ['a', 'b', 'c', 'd'], True)
    """
    options = check_arguments(method, random_state, tol, max_iter, options)
    check_labels(t)
    ranks = check_rank(t, rank, method)
    tensor = prepare(t, method, options)
    return fit(tensor, ranks, method, int(random_state), tol, int(max_iter), progress, options)


def fit(
    tensor: Tensor,
    ranks: tuple[int, ...],
    method: str,
    seed: int,
    tol: float,
    max_iter: int,
    progress: bool,
    options: dict[str, Any],
) -> xr.Dataset:
    """Fit one model to a checked tensor and label it."""
    began = time.perf_counter()
    run = _fit_ours if method == "ncp_hals" else _fit_tensorly
    core, factors, history, converged = run(
        tensor, ranks, method, seed, tol, max_iter, progress, options
    )
    seconds = time.perf_counter() - began

    dtype, t = tensor.data.dtype, tensor.labelled
    scaled = [_unit_columns(f) for f in factors]
    units = [unit.astype(dtype) for unit, _ in scaled]
    names = [f"{d}_factor" for d in t.dims]
    ds = xr.Dataset(coords=t.coords)
    if METHODS[method].form == "cp":
        weight = core * np.prod([scale for _, scale in scaled], axis=0)
        units[0] *= np.where(weight < 0, -1, 1).astype(dtype)
        order = np.argsort(-abs(weight), kind="stable")
        weight, units = abs(weight)[order], [u[:, order] for u in units]
        left, right = units[0] * weight, hals.khatri_rao([u.T.astype(float) for u in units[1:]])
        ds["weight"] = ("component", weight)
        axes = ["component"] * t.ndim
        ds = ds.assign_coords(component=np.arange(len(weight)))
    else:
        axes = [f"{d}_component" for d in t.dims]
        for mode, (_, scale) in enumerate(scaled):
            core = np.moveaxis(np.moveaxis(core, mode, -1) * scale, -1, mode)
        for mode in range(t.ndim):
            order = np.argsort(-np.linalg.norm(_unfold(core, mode), axis=1), kind="stable")
            core, units[mode] = core.take(order, axis=mode), units[mode][:, order]
        product = core
        for mode in range(1, t.ndim):
            product = np.moveaxis(np.tensordot(product, units[mode], (mode, 1)), -1, mode)
        left, right = units[0], product.reshape(len(core), -1)
        ds["core"] = (axes, core)
        ds = ds.assign_coords({a: np.arange(n) for a, n in zip(axes, core.shape, strict=True)})
    for name, dim, axis, unit in zip(names, t.dims, axes, units, strict=True):
        ds[name] = ((dim, axis), unit)
    ds["objective"] = hals.relative_residual(tensor.data, left, right, tensor.norm)
    ds["objective_history"] = ("iteration", np.asarray(history, np.float64))
    ds = ds.assign_coords(iteration=np.arange(len(history)))
    ds["converged"] = bool(converged)
    ds["iterations"] = len(history)
    ds["seconds"] = seconds
    ds["seed"] = np.int64(seed)
    for variable in ds.data_vars:
        known = VARIABLES.get(str(variable), VARIABLES["neuron_factor"])
        ds[variable].attrs.update(known.attrs)
    used = {"vitxr": __version__, "numpy": np.__version__, "tensorly": version("tensorly")}
    ds.attrs = {
        **provenance(t.attrs),
        "method": method,
        "rank": ranks[0] if METHODS[method].form == "cp" else list(ranks),
        "tol": float(tol),
        "max_iter": max_iter,
        "options": json.dumps(options, default=repr),
        "versions": json.dumps(used),
    }
    return ds


def _fit_ours(
    tensor: Tensor,
    ranks: tuple[int, ...],
    method: str,
    seed: int,
    tol: float,
    max_iter: int,
    progress: bool,
    options: dict[str, Any],
) -> tuple[Array, Sequence[Array], Array, bool]:
    from threadpoolctl import threadpool_limits
    from tqdm.auto import tqdm

    # One BLAS thread: where another pool keeps the cores busy, two spin against it, and an
    # iteration takes many times as long; that loses more than a second gains on an idle machine.
    with (
        threadpool_limits(1, user_api="blas"),
        tqdm(total=max_iter, desc=f"{method} rank {ranks[0]}", disable=not progress) as bar,
    ):

        def show(iteration: int, objective: float) -> None:
            bar.set_postfix(objective=f"{objective:.6f}", refresh=False)
            bar.update()

        result = hals.ncp_hals(
            tensor.data,
            ranks[0],
            seed=seed,
            tol=tol,
            max_iter=max_iter,
            norm=tensor.norm,
            callback=show if progress else None,
        )
    return np.ones(ranks[0]), result.factors, result.history, result.converged


def _fit_tensorly(
    tensor: Tensor,
    ranks: tuple[int, ...],
    method: str,
    seed: int,
    tol: float,
    max_iter: int,
    progress: bool,
    options: dict[str, Any],
) -> tuple[Array, Sequence[Array], Array, bool]:
    import tensorly

    data, cp = tensor.data, METHODS[method].form == "cp"
    given: dict[str, Any] = {"random_state": seed, "n_iter_max": max_iter, "tol": tol}
    history: list[float] = []
    if cp:
        start = hals.random_start(data.shape, ranks[0], tensor.norm, seed)
        given["init"] = (None, [f.astype(data.dtype) for f in start])
    else:
        given["init"] = "random"
    if method == "constrained_parafac":
        given["tol_outer"] = given.pop("tol")
    if method == "randomised_parafac":
        given["n_samples"] = math.ceil(10 * ranks[0] * math.log(ranks[0] + 1))

        def keep(_: object, error: float | None = None) -> None:
            if error is not None:  # the first call is before the first iteration
                history.append(float(error))

        given["callback"] = keep
    else:
        given["return_errors"] = True
    rank = ranks[0] if cp else list(ranks)
    with tensorly.backend_context("numpy", local_threadsafe=True):
        try:
            model = tensorly_function(method)(data, rank, **{**given, **options})
        except np.linalg.LinAlgError as error:
            raise DataError(
                f"tensorly's {method} met a singular system at rank {rank} ({error}): a component "
                "has died. Try a smaller rank, weaker penalties, or another random_state."
            ) from error
    if method != "randomised_parafac":
        model, errors = model
        history.extend(float(e) for e in errors)
    core, factors = model
    converged = len(history) > 1 and abs(history[-2] - history[-1]) < tol
    return (
        np.asarray(core, np.float64),
        [np.asarray(f, np.float64) for f in factors],
        np.array(history),
        converged,
    )


def _unit_columns(factor: Array) -> tuple[Array, Array]:
    """Columns of unit norm whose largest entry is positive, and what they were divided by."""
    factor = np.asarray(factor, np.float64)
    length = np.linalg.norm(factor, axis=0)
    largest = factor[abs(factor).argmax(axis=0), np.arange(factor.shape[1])]
    scale = np.where(largest < 0, -length, length)
    return factor / np.where(length > 0, scale, 1.0), scale


def _unfold(x: Array, mode: int) -> Array:
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)
