"""Checks of a factorization before it starts: the methods there are, arguments, data."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.device import check_place
from vitxr.factor.masks import read_mask
from vitxr.factor.rules import Rules, in_one_form, read_rules
from vitxr.factor.scan import scan

__all__ = [
    "METHODS",
    "Method",
    "Tensor",
    "check_arguments",
    "check_labels",
    "check_rank",
    "clipped",
    "floating",
    "is_int",
    "prepare",
    "tensorly_function",
]


@dataclass(frozen=True)
class Method:
    """What a method of :func:`factorize` makes: ``form`` is "cp" or "tucker"."""

    form: str
    nonnegative: bool
    meaning: str


#: Every method of :func:`factorize`. All but the first are tensorly's, under tensorly's names.
METHODS: dict[str, Method] = {
    "ncp_hals": Method("cp", True, "nonnegative CP by HALS, the original notebook's"),
    "parafac": Method("cp", False, "CP by alternating least squares"),
    "non_negative_parafac": Method("cp", True, "nonnegative CP by multiplicative updates"),
    "non_negative_parafac_hals": Method("cp", True, "nonnegative CP by HALS"),
    "randomised_parafac": Method("cp", False, "CP by sampled least squares"),
    "constrained_parafac": Method("cp", True, "constrained CP by ADMM, nonnegative by default"),
    "tucker": Method("tucker", False, "Tucker by higher-order orthogonal iteration"),
    "non_negative_tucker": Method("tucker", True, "nonnegative Tucker, multiplicative updates"),
    "non_negative_tucker_hals": Method("tucker", True, "nonnegative Tucker by HALS"),
}

#: What others call them.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("nmf", "ntf", "nncp", "ncp", "tca"), ("ncp_hals",)),
    **dict.fromkeys(("cp", "cpd", "als", "candecomp"), ("parafac", "ncp_hals")),
    **dict.fromkeys(("hosvd", "hooi"), ("tucker",)),
    "ntd": ("non_negative_tucker_hals", "non_negative_tucker"),
}

#: A Dask tensor of at most this many bytes is read into memory once; a larger one in each pass.
IN_MEMORY_BYTES = 2 << 30

#: Options of "ncp_hals".
OPTIONS = ("compress", "start", "fixed", "nonnegative", "sparsity", "mask", "client", "device")

#: Options of tensorly's functions that are not passed on, and why.
RESERVED = {
    "tensor": "the tensor is the first argument",
    "rank": "it has its own argument",
    "n_iter_max": "give max_iter",
    "tol": "it has its own argument",
    "tol_outer": "give tol",
    "random_state": "it has its own argument",
    "return_errors": "the errors are always kept",
    "callback": "it is used for objective_history",
    "mask": "the objective is that of the full tensor",
    "sparsity": "the sparse part has no place among the factors",
    "linesearch": "its errors skip iterations, so that objective_history would be wrong",
    "fixed_modes": "every factor is fitted",
    "fixed_factors": "every factor is fitted",
}

#: Options of ``constrained_parafac`` any of which replaces the default constraint.
CONSTRAINTS = frozenset(
    (
        "non_negative",
        "l1_reg",
        "group_lasso",
        "l2_reg",
        "l2_square_reg",
        "unimodality",
        "normalize",
        "simplex",
        "normalized_sparsity",
        "soft_sparsity",
        "smoothness",
        "monotonicity",
        "hard_sparsity",
    )
)

#: Those of them that a mode has or has not.
FLAGS = frozenset(("non_negative", "unimodality", "normalize", "monotonicity"))

#: Root mean square beyond which powers of the data leave the range of the dtype.
RANGE = {"float32": (1e-8, 1e8), "float64": (1e-60, 1e60)}

#: Dimensions of the result, which a tensor cannot have.
TAKEN = ("component", "iteration", "rank", "replicate", "pc")


@dataclass(frozen=True)
class Tensor:
    """A checked tensor, as it was given and as it is fitted.

    Attributes
    ----------
    labelled, data
        ``data`` is float, NumPy (C-contiguous) or Dask.
    norm
        Of the entries that count.
    rules
        What is asked of its factors.
    mask
        Entries that count, bool, of the same shape; None where all do.
    start_norm
        What the norm would be if the others were as large.
    mask_said
        The mask as it is recorded: sizes, how many entries count, and a fingerprint of which.
    """

    labelled: xr.DataArray
    data: Any
    norm: float
    rules: Rules
    mask: Any
    start_norm: float
    mask_said: str = ""


def check_arguments(
    method: str, random_state: int, tol: float, max_iter: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Check all that does not depend on the tensor; return the options with defaults filled in."""
    if not isinstance(method, str) or method not in METHODS:
        said = str(method).lower()
        near = ELSEWHERE.get(said) or difflib.get_close_matches(said, METHODS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ArgumentError(f"unknown method {method!r}; {hint}There are: {', '.join(METHODS)}.")
    if not is_int(random_state) or not 0 <= random_state < 2**32:
        raise ArgumentError(
            f"random_state is {random_state!r}; expected an integer from 0 to 2**32 - 1, "
            "so that the fit can be repeated."
        )
    ours = method == "ncp_hals"
    number = isinstance(tol, numbers.Real) and not isinstance(tol, bool | np.bool_)
    if not number or not math.isfinite(tol) or tol < 0 or (tol == 0 and not ours):
        least = "0 or more" if ours else f"more than 0 (without it {method} keeps no objective)"
        raise ArgumentError(f"tol is {tol!r}; expected a finite number, {least}, such as 1e-5.")
    if not is_int(max_iter) or max_iter < 1:
        raise ArgumentError(f"max_iter is {max_iter!r}; expected an integer of 1 or more.")
    if ours:
        other = [name for name in options if name not in OPTIONS]
        if other:
            raise ArgumentError(
                f"ncp_hals has no option {', '.join(other)}: leave it out; it has: "
                f"{', '.join(OPTIONS)}."
            )
        compress = options.get("compress")
        if compress is not None and not isinstance(compress, bool | np.bool_):
            raise ArgumentError(
                f"compress is {compress!r}; expected True, False, or None for True where it pays."
            )
        return in_one_form(options)
    known = inspect.signature(tensorly_function(method)).parameters
    for name in options:
        if name in RESERVED:
            raise ArgumentError(f"{name} cannot be passed to {method}: {RESERVED[name]}.")
        if name not in known:
            free = ", ".join(k for k in known if k not in RESERVED)
            raise ArgumentError(f"tensorly's {method} has no option {name}; it has: {free}.")
    if method == "constrained_parafac" and CONSTRAINTS.isdisjoint(options):
        return {**options, "non_negative": True}
    return dict(options)


def clipped(non_negative: Any, modes: int) -> tuple[bool, ...]:
    """Tell which factors ``constrained_parafac`` keeps nonnegative by its ``non_negative``.

    A dict names modes by their number, by its keys alone; of anything else tensorly reads
    whether it is true, and takes all modes.

    Examples
    --------
    >>> clipped({0: True, 2: True}, 3)
    (True, False, True)
    """
    if isinstance(non_negative, Mapping):
        return tuple(mode in map(int, non_negative) for mode in range(modes))
    return (bool(non_negative),) * modes


def _check_constraints(t: xr.DataArray, options: Mapping[str, Any]) -> None:
    """Check the modes that constraints of ``constrained_parafac`` name."""
    for name in sorted(CONSTRAINTS & set(options)):
        given, flag = options[name], name in FLAGS
        modes = isinstance(given, Mapping)
        known = modes and all(type(mode) is int and 0 <= mode < t.ndim for mode in given)
        if modes and not (known and (not flag or all(v is True for v in given.values()))):
            expected = "the modes it is for by their number" + (", each True" if flag else "")
        elif flag and isinstance(given, Sequence | np.ndarray):
            expected = "True, or a dict of the modes it is for (of a list tensorly takes all)"
        else:
            continue
        dims = ", ".join(f"{mode} is {dim}" for mode, dim in enumerate(t.dims))
        example = {0: True if flag else 0.1}
        raise ArgumentError(
            f"{name} is {given!r}; expected {expected}, such as {name}={example}: {dims}."
        )


def check_labels(t: xr.DataArray) -> None:
    """Check everything about a tensor that can be seen without reading it."""
    if not isinstance(t, xr.DataArray):
        raise ArgumentError(
            f"expected a DataArray with labels, not {type(t).__name__}; wrap an array as "
            'xarray.DataArray(x, dims=("neuron", "image", "shift")).'
        )
    unnamed = [d for d in t.dims if not isinstance(d, str)]
    if unnamed:
        raise ArgumentError(
            f"the tensor has dims ({', '.join(map(repr, t.dims))}); expected names, of which those "
            f"of the factors are made: rename them, t.rename({{{unnamed[0]!r}: 'neuron'}})."
        )
    dims = tuple(map(str, t.dims))
    if t.ndim < 2:
        raise DataError(
            f"the tensor has dims ({', '.join(dims)}); a factorization needs two or more: "
            "make one with neuron_tensor or neuron_matrix."
        )
    if t.dtype.kind not in "iuf":
        raise DataError(
            f"the tensor has dtype {t.dtype}; expected real numbers: convert it with "
            't.astype("float32").'
        )
    if t.size == 0:
        sizes = ", ".join(f"{d}: {n}" for d, n in t.sizes.items())
        raise DataError(f"the tensor is empty ({sizes}); select at least one of each.")
    made = {f"{d}_{end}" for d in dims for end in ("factor", "component")}
    made |= {*TAKEN, "weight", "core", "objective", "objective_history", "converged"}
    made |= {"penalized_objective_history"}
    made |= {"iterations", "compressed_iterations", "seconds", "seed", "similarity"}
    made |= {"factor_match_score", "failed", "dead_components", "congruence", "degenerate"}
    clash = sorted(made & {*dims, *map(str, t.coords)})
    if clash:
        raise ArgumentError(
            f"the tensor has a dimension or coordinate named {', '.join(clash)}, as the result "
            f"will have: rename or drop it first, t.rename({clash[0]}=...)."
        )


def check_rank(t: xr.DataArray, rank: int | Sequence[int], method: str) -> tuple[int, ...]:
    """Check the rank; return one number for CP, one for each dimension for Tucker."""
    tucker = METHODS[method].form == "tucker"
    several = isinstance(rank, Sequence | np.ndarray) and not isinstance(rank, str)
    given: list[Any] = np.array(rank, dtype=object).ravel().tolist()
    if tucker and not several:
        given *= t.ndim
    if (several and not tucker) or any(not is_int(r) or r < 1 for r in given):
        form = "integers of 1 or more, or one" if tucker else "one integer of 1 or more"
        raise ArgumentError(f"rank is {rank!r}; {method} expects {form}.")
    if tucker:
        if len(given) != t.ndim:
            raise ArgumentError(
                f"rank has {len(given)} numbers; the tensor has {t.ndim} dims "
                f"({', '.join(map(str, t.dims))}): give one for each."
            )
        for dim, r in zip(t.dims, given, strict=True):
            if r > t.sizes[dim]:
                raise ArgumentError(
                    f"rank {r} exceeds the size of {dim}, {t.sizes[dim]}, which is the most a "
                    "Tucker model can use: give a rank for each dimension."
                )
    else:
        bound = math.prod(sorted(t.shape)[:-1])
        if given[0] > bound:
            sizes = " x ".join(f"{n} {d}" for d, n in t.sizes.items())
            raise ArgumentError(
                f"rank {given[0]} exceeds {bound}, the product of all dimensions of {sizes} but "
                f"the largest; {bound} components reproduce any such tensor: give a smaller rank."
            )
    return tuple(int(r) for r in given)


def prepare(t: xr.DataArray, method: str, options: dict[str, Any], maskable: bool = True) -> Tensor:
    """Convert a tensor, check the values that count in one pass, and measure their norm.

    ``maskable`` says whether the caller takes a mask, for the remedies of messages.
    """
    import dask

    rules, mask = Rules.plain(t.ndim), None
    nonnegative = METHODS[method].nonnegative
    if method == "constrained_parafac":
        _check_constraints(t, options)
        kept = clipped(options.get("non_negative"), t.ndim)
        rules, nonnegative = replace(rules, nonnegative=kept), all(kept)
    elif method == "ncp_hals":
        rules = read_rules(t, options)
        nonnegative = all(rules.nonnegative)
        if options.get("mask") is not None:
            mask = read_mask(t, options["mask"])
        here = check_place(options, t.data, mask)
        if options.get("compress") and not (rules.is_plain and mask is None and here):
            raise ArgumentError(
                "compress is True, and a compressed tensor is for plain nonnegative CP: leave it "
                "out, or nonnegative, fixed, sparsity, mask, client and device."
            )
    data = t.data.astype(floating(t.dtype), copy=False)
    lazy = t.chunks is not None
    small = data.nbytes <= IN_MEMORY_BYTES and options.get("client") is None
    if not lazy or method != "ncp_hals" or small:
        data, mask = dask.compute(data, mask)  # together: masks are often made from the tensor
        data = np.ascontiguousarray(data)
    square, count, said = scan(
        t, data, mask, method, nonnegative, maskable=maskable and method == "ncp_hals"
    )
    if count == t.size:
        mask = None  # hides nothing
    if square == 0:
        raise DataError(
            "the tensor is zero everywhere, so that there is nothing to factorize: select "
            "feature maps that are active, or another layer."
        )
    low, high = RANGE[data.dtype.name]
    size = math.sqrt(square / count)
    if not low <= size <= high:
        raise DataError(
            f"the root mean square of the tensor is {size:.3g}; {data.dtype} fits need "
            f"{low:g} to {high:g}: divide the tensor by that number."
        )
    start_norm = math.sqrt(square * (t.size / count))
    return Tensor(t, data, math.sqrt(square), rules, mask, start_norm, said)


def floating(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Dtype that data are fitted in: float32 for it, of any byte order, and for up to 16 bits."""
    single = dtype.itemsize <= 2 or (dtype.kind == "f" and dtype.itemsize == 4)
    return np.dtype(np.float32 if single else np.float64)


def tensorly_function(method: str) -> Callable[..., Any]:
    """Return tensorly's function of that name."""
    import tensorly.decomposition

    function: Callable[..., Any] = getattr(tensorly.decomposition, method)
    return function


def is_int(value: object) -> bool:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
