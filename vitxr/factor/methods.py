"""Factorizations of a labelled tensor: our nonnegative CP, and tensorly's methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import DataError
from vitxr.factor import hals
from vitxr.factor.blocks import blocked_mode, own_threads
from vitxr.factor.checks import (
    METHODS,
    Tensor,
    check_arguments,
    check_labels,
    check_rank,
    prepare,
    tensorly_function,
)
from vitxr.factor.compress import pays
from vitxr.factor.kernels import random_start
from vitxr.factor.labels import Found, label
from vitxr.factor.rules import read_rules, start_factors

__all__ = ["factorize", "fit"]

#: Seconds after which the bar of one fit is shown.
SHOWN_AFTER = 1.0
#: Why a fit has no model.
INTERRUPTED = "it was interrupted"


def factorize(
    t: xr.DataArray,
    rank: int | Sequence[int],
    method: str = "ncp_hals",
    random_state: int = 0,
    tol: float = 1e-5,
    max_iter: int = 500,
    progress: bool = True,
    **options: Any,
) -> xr.Dataset:
    r"""Factorize a labelled tensor, and keep the labels.

    A CP model of rank R approximates ``t`` by
    ``sum_r weight[r] * a[:, r] o b[:, r] o c[:, r] ...`` with one factor for each dimension; a
    Tucker model by a ``core`` multiplied along every dimension by a factor. Whatever the method,
    the result has the same form:

    - columns of factors have unit norm and their largest entry is positive; what that takes away
      is in ``weight`` or ``core`` (where the weight of an unconstrained CP component would be
      negative, the factor of the first dimension that may have signs changes sign instead);
    - components are in the order of descending weight (of Tucker: of the norm of their slice of
      the core). A component that has died has weight 0 and at least one column of zeros;
    - ``objective`` is computed here, from the residual on the full tensor in float64.

    Parameters
    ----------
    t
        Tensor with two or more dimensions of any names; of a neuron tensor ``neuron`` comes
        first. Integers become float32 (up to 16 bits) or float64, float16 becomes float32;
        float32 stays float32. With "ncp_hals" a Dask tensor larger than 2.1 GB is read from its
        chunks in each iteration, and a few times besides: store it before. It is walked over
        along the dimension that its chunks divide most. A smaller one, or any one for the other
        methods, is read into memory once.
    rank
        Number of components. For Tucker an int or one for each dimension.
    method
        "ncp_hals" (``vitxr.factor.hals.ncp_hals``, the original notebook's), or one of
        tensorly's functions by its own name: see ``METHODS``.
    random_state
        Seed of the random start (unused where ``start`` is given), an integer from 0 to
        2**32 - 1. All CP methods start from the same point for the same seed,
        ``vitxr.factor.kernels.random_start``; tensorly's Tucker methods from tensorly's
        random start. tensorly's own default, a start by SVD, ignores the seed; ``init="svd"``
        asks for it.
    tol
        The fit ends when the objective falls by less than this in an iteration.
    max_iter
        Most iterations.
    progress
        Show a bar over iterations if the fit takes longer than a second ("ncp_hals" only;
        tensorly's functions have none).
    **options
        Of tensorly's methods further arguments. ``constrained_parafac`` is nonnegative unless
        constraints are given; ``randomised_parafac`` draws ``n_samples = 10 R log(R + 1)`` rows,
        rounded up, unless told otherwise. Of "ncp_hals":

        - ``nonnegative``, names of the dimensions whose factors are kept nonnegative: by default
          all. Negative data are refused only then.
        - ``start``, factors to start from in place of random ones: a CP Dataset of this form, of
          the same dimensions, labels and rank. Its weights are shared out over the dimensions.
        - ``fixed``, names of the dimensions whose factors stay as they are in ``start``.
        - ``sparsity``, weights by dimension, ``{"neuron": 0.01}``, of an L1 penalty. Minimised is
          then, of ``X`` and the model divided by ``|X|``,
          ``|X - M|^2 / 2 + sum_r weight[r] sum_d sparsity[d] |<d>_factor[:, r]|_1``, with unit
          columns: the scale of the factors has no part in it.
        - ``mask``, a DataArray of bool, broadcast against ``t``: True where a value is observed.
          Others, which may be NaN, have no part in the fit, nor in ``objective``, which is then
          ``|W (X - M)| / |W X|``: each model fills them in as it goes (EM). The tensor is walked
          over along its longest dimension as always, which here comes first in an iteration.
        - ``client``, a ``dask.distributed.Client``, with a Dask tensor of any size: its workers
          load the tensor once, a range of chunks each, and keep it; between passes only sums
          come and go. This process reads it twice besides, block by block, to check its values
          and for ``objective``.
        - ``device``, "auto", "cpu", "cuda" or "cuda:1" as for :func:`vitxr.load_model`: torch makes
          the passes there, with float32 products in full whatever torch is set to. The tensor
          stays on the device if it fits, and comes over block by block in each pass if not. Not
          with a mask or a client. By default NumPy makes them.
        - ``compress``, whether to iterate on a compressed tensor in between, and finish on the
          tensor itself (``vitxr.factor.compress``): by default where that is much less work, and
          none of the others is given.

    Returns
    -------
    xarray.Dataset
        CP: ``<dim>_factor(dim, component)`` in the dtype of the data, ``weight(component)``
        float64. Tucker: ``<dim>_factor(dim, <dim>_component)`` and
        ``core(<dim>_component, ...)``. Both: ``objective`` (relative residual
        ``|X - M| / |X|``), ``objective_history(iteration)`` (as the method saw it, of
        ``randomised_parafac`` an estimate from a sample), ``converged`` (False where the
        limit on iterations or, in ``randomised_parafac``, stagnation ended the fit),
        ``iterations``, ``seconds``, ``seed``. With "ncp_hals" ``compressed_iterations``: so many,
        after the first seven, were made on the compressed tensor, and their objectives are
        estimates; with
        ``sparsity``, ``penalized_objective_history(iteration)``, the square root of
        ``objective^2`` and twice the penalty, by whose fall the fit ends.
        All coordinates of ``t``; attributes ``method``,
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
        large or small that its powers leave the range of its dtype, or lies in chunks that would
        fill the memory; if its factors do not fit into the memory of the device; or if tensorly
        meets a singular system on the way.
    DependencyError
        If a device is given and torch is not installed.

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
    from tqdm.auto import tqdm

    options = check_arguments(method, random_state, tol, max_iter, options)
    check_labels(t)
    ranks = check_rank(t, rank, method)
    if method == "ncp_hals" and options.get("start") is not None:
        start_factors(t, options["start"], ranks[0], read_rules(t, options))  # before it is read
    tensor = prepare(t, method, options)
    hidden = not progress or method != "ncp_hals"
    bar = tqdm(total=max_iter, desc=f"{method} rank {rank}", disable=hidden, delay=SHOWN_AFTER)

    def show(_: int, iteration: int, objective: float, done: bool) -> None:
        bar.set_postfix(objective=f"{objective:.6f}", refresh=False)
        bar.update()

    with bar:
        tell = show if progress else None
        found, interrupted = fit(
            tensor, [ranks], [int(random_state)], method, tol, max_iter, options, tell
        )
    if interrupted:
        raise KeyboardInterrupt
    if found[0].failure:
        raise DataError(found[0].failure)
    return label(tensor, found, method, tol, max_iter, options)[0]


def fit(
    tensor: Tensor,
    ranks: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    method: str,
    tol: float,
    max_iter: int,
    options: dict[str, Any],
    tell: Callable[[int, int, float, bool], object] | None = None,
) -> tuple[list[Found], bool]:
    """Fit models to a checked tensor, one for each rank and seed.

    With "ncp_hals" all at a time, otherwise one after the other. ``tell`` is called with the
    number of the model, its iteration, its objective, and whether that was the last; of
    tensorly's methods after the last only. Returns what was found, and whether a
    KeyboardInterrupt ended it: fits that were not finished then are marked as failed, and so are
    those in which tensorly met a singular system.
    """
    if method == "ncp_hals":
        return _fit_ours(tensor, ranks, seeds, tol, max_iter, options, tell)
    found: list[Found] = []
    interrupted = False
    for number, (rank, seed) in enumerate(zip(ranks, seeds, strict=True)):
        try:
            if interrupted:
                one = _failed(tensor, rank, method, seed, INTERRUPTED)
            else:
                one = _fit_tensorly(tensor, rank, method, seed, tol, max_iter, options)
        except DataError as error:
            one = _failed(tensor, rank, method, seed, str(error))
        except KeyboardInterrupt:
            interrupted = True
            one = _failed(tensor, rank, method, seed, INTERRUPTED)
        found.append(one)
        if tell is not None and len(one.history):
            tell(number, len(one.history) - 1, float(one.history[-1]), True)
    return found, interrupted


def _failed(tensor: Tensor, ranks: tuple[int, ...], method: str, seed: int, why: str) -> Found:
    """A model that is not there."""
    cp, shape = METHODS[method].form == "cp", tensor.data.shape
    columns = ranks * len(shape) if cp else ranks
    factors = [np.full((n, r), np.nan) for n, r in zip(shape, columns, strict=True)]
    return Found(np.full(ranks, np.nan), factors, np.empty(0), False, 0.0, seed, failure=why)


def _fit_ours(
    tensor: Tensor,
    ranks: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    tol: float,
    max_iter: int,
    options: dict[str, Any],
    tell: Callable[[int, int, float, bool], object] | None,
) -> tuple[list[Found], bool]:
    shape, rules, start = tensor.data.shape, tensor.rules, options.get("start")
    if start is not None:
        starts: Iterable[list[np.ndarray]] = [
            start_factors(tensor.labelled, start, ranks[0][0], rules)
        ]
    else:
        # One at a time: in float64 all of them are twice the factors.
        starts = (
            random_start(shape, rank, tensor.start_norm, seed)
            for (rank,), seed in zip(ranks, seeds, strict=True)
        )
    compressed = options.get("compress")  # None is for where it pays
    if compressed is None:
        mode = blocked_mode(tensor.data)
        plain = rules.is_plain and start is None and tensor.mask is None
        here = options.get("client") is None and options.get("device") is None
        compressed = [
            plain and here and pays(shape[mode:] + shape[:mode], rank) for (rank,) in ranks
        ]
    with own_threads() as pool:
        fits = hals.fit_models(
            tensor.data,
            starts,
            norm=tensor.norm,
            tol=tol,
            max_iter=max_iter,
            pool=pool,
            rules=rules,
            mask=tensor.mask,
            client=options.get("client"),
            device=options.get("device"),
            compressed=compressed,
            callback=tell,
        )
    found = []
    for (rank,), seed, fit in zip(ranks, seeds, fits, strict=True):
        if fit.interrupted:
            one = _failed(tensor, (rank,), "ncp_hals", seed, INTERRUPTED)
        else:
            shown = (fit.history, fit.converged, fit.seconds, seed, fit.compressed_iterations)
            one = Found(np.ones(rank), fit.factors, *shown)
            if any(rules.sparsity):
                one = replace(one, penalized=fit.penalized)
        found.append(one)
    return found, any(fit.interrupted for fit in fits)


def _fit_tensorly(
    tensor: Tensor,
    ranks: tuple[int, ...],
    method: str,
    seed: int,
    tol: float,
    max_iter: int,
    options: dict[str, Any],
) -> Found:
    import tensorly

    began = time.perf_counter()

    data, cp = tensor.data, METHODS[method].form == "cp"
    given: dict[str, Any] = {"random_state": seed, "n_iter_max": max_iter, "tol": tol}
    history: list[float] = []
    if cp:
        start = random_start(data.shape, ranks[0], tensor.norm, seed)
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
    return Found(
        np.asarray(core, np.float64),
        [np.asarray(f, np.float64) for f in factors],
        np.array(history),
        converged,
        time.perf_counter() - began,
        seed,
    )
