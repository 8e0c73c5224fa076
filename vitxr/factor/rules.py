"""What is asked of the factors: which stay as they are, are nonnegative, are sparse; the start."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.same import difference, other_source

__all__ = ["Rules", "in_one_form", "read_rules", "start_factors", "told"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rules:
    """What is asked of the factor of each mode.

    Attributes
    ----------
    nonnegative
        Whether it is kept nonnegative.
    fixed
        Whether it stays as in the start.
    sparsity
        Weight of its L1 penalty, of a tensor of norm one; 0 is none.
    """

    nonnegative: tuple[bool, ...]
    fixed: tuple[bool, ...]
    sparsity: tuple[float, ...]

    @classmethod
    def plain(cls, modes: int) -> Rules:
        """All factors are nonnegative, and nothing else.

        Examples
        --------
        >>> Rules.plain(2)
        Rules(nonnegative=(True, True), fixed=(False, False), sparsity=(0.0, 0.0))
        """
        return cls((True,) * modes, (False,) * modes, (0.0,) * modes)

    @property
    def is_plain(self) -> bool:
        """Whether this is nonnegative CP without more."""
        return self == Rules.plain(len(self.fixed))

    def turned(self, mode: int) -> Rules:
        """Return the rules with a mode in front, the others behind it in cyclic order.

        Examples
        --------
        >>> Rules((True, True), (False, True), (0.0, 0.0)).turned(1).fixed
        (True, False)
        """
        each = (self.nonnegative, self.fixed, self.sparsity)
        return Rules(*(field[mode:] + field[:mode] for field in each))  # type: ignore[arg-type]


def read_rules(t: xr.DataArray, options: Mapping[str, Any]) -> Rules:
    """Read the rules from the options of "ncp_hals", and check them.

    Raises
    ------
    ArgumentError
        If they name no dimension of ``t``, ask for a penalty that makes no sense, fix a dimension
        without a start, or fix all.

    Examples
    --------
    >>> t = xr.DataArray(np.zeros((3, 2)), dims=("neuron", "image"))
    >>> read_rules(t, {"nonnegative": ["neuron"], "sparsity": {"neuron": 0.01}})
    Rules(nonnegative=(True, False), fixed=(False, False), sparsity=(0.01, 0.0))
    """
    dims = tuple(map(str, t.dims))
    given = options.get("nonnegative")
    nonnegative = dims if given is None else _dims(dims, "nonnegative", given)
    fixed = _dims(dims, "fixed", options.get("fixed") or ())
    penalties = {} if options.get("sparsity") is None else options["sparsity"]
    if not isinstance(penalties, Mapping):
        raise ArgumentError(
            f"sparsity is {penalties!r}; expected weights by dimension, such as "
            f'{{"{dims[0]}": 0.01}}.'
        )
    for dim in _dims(dims, "sparsity", list(penalties)):
        weight = penalties[dim]
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool | np.bool_)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ArgumentError(
                f"sparsity of {dim} is {weight!r}; expected a finite number, 0 or more."
            )
        if dim in fixed:
            raise ArgumentError(f"sparsity of {dim}, which is fixed: leave out one of the two.")
        if dim not in nonnegative:
            raise ArgumentError(
                f"sparsity of {dim}, which is not kept nonnegative: the penalty is for nonnegative "
                "factors; name it in nonnegative, or leave the penalty out."
            )
    if fixed and options.get("start") is None:
        raise ArgumentError(
            f"fixed is {', '.join(fixed)}, and there is no start whose factors could stay: give "
            "start, a Dataset of factors."
        )
    if len(fixed) == len(dims):
        raise ArgumentError(f"fixed names all of {', '.join(dims)}: leave one to be fitted.")
    return Rules(
        tuple(d in nonnegative for d in dims),
        tuple(d in fixed for d in dims),
        tuple(float(penalties.get(d, 0)) for d in dims),
    )


def start_factors(t: xr.DataArray, start: Any, rank: int, rules: Rules) -> list[Array]:
    """Read the factors of a start: unit columns of fixed ones, the others share the weight.

    Returns
    -------
    list of numpy.ndarray
        One float64 matrix ``(n, rank)`` for each dimension of ``t``.

    Raises
    ------
    ArgumentError
        If the start is no CP model of that rank, or is negative where it is not to be.
    DataError
        If its labels are others, or the offsets of its shifts or the SHA-256 of its images; if some
        of its factors are fixed, and are of other activations or otherwise made ones
        (:func:`vitxr.factor.same.other_source`); or if it holds NaN.

    Examples
    --------
    >>> t = xr.DataArray(np.zeros((2, 3)), dims=("neuron", "image"))
    >>> f = xr.Dataset({"neuron_factor": (("neuron", "component"), [[1.0], [0.0]]),
    ...                 "image_factor": (("image", "component"), [[0.0], [1.0], [0.0]]),
    ...                 "weight": ("component", [9.0])})
    >>> start_factors(t, f, 1, Rules.plain(2))[0].T
    array([[3., 0.]])
    """
    dims = tuple(map(str, t.dims))
    needed = {f"{d}_factor": (d, "component") for d in dims} | {"weight": ("component",)}
    if not isinstance(start, xr.Dataset):
        raise ArgumentError(
            f"start is a {type(start).__name__}; expected a Dataset of factors, as factorize "
            "returns it, or vitxr.factor.best(ensemble, rank)."
        )
    for name, its_dims in needed.items():
        if name not in start or set(start[name].dims) != set(its_dims):
            have = f" with dims ({', '.join(map(str, start[name].dims))})" if name in start else ""
            hint = " Choose one replicate." if "replicate" in start.dims else ""
            raise ArgumentError(
                f"start has {'`' + name + '`' + have if have else 'no `' + name + '`'}; expected "
                f"`{name}` ({', '.join(its_dims)}), of a CP model of the same dims.{hint}"
            )
    if start.sizes["component"] != rank:
        raise ArgumentError(
            f"start has {start.sizes['component']} components and rank is {rank}: give that rank."
        )
    for dim in dims:
        if found := difference(start, t, dim, ("start", "the tensor")):
            kind, how = found
            raise DataError(
                f"start has other {kind} of {dim} than the tensor ({how}): select the same in both."
            )
    if any(rules.fixed):
        new = "neuron" in dims and not rules.fixed[dims.index("neuron")]
        if other := other_source(start.attrs, t.attrs, free=new):
            raise DataError(f"of start some factors are fixed, but {other}.")
    weight = start["weight"].values.astype(np.float64)
    factors = [
        start[f"{d}_factor"].transpose(d, "component").values.astype(np.float64) for d in dims
    ]
    if not all(np.isfinite(values).all() for values in (weight, *factors)):
        raise DataError("start holds NaN or infinite values: its fit has failed; give another.")
    for dim, factor, kept in zip(dims, factors, rules.nonnegative, strict=True):
        if kept and (factor < 0).any():
            raise ArgumentError(
                f"start is negative in {dim}_factor, and {dim} is to be nonnegative: leave it out "
                "of nonnegative, or start from a nonnegative model."
            )
    free = [m for m in range(len(dims)) if not rules.fixed[m]]
    if (weight < 0).any():
        raise ArgumentError("start has negative weights; expected them as factorize gives them.")
    for mode in free:
        factors[mode] = factors[mode] * weight ** (1 / len(free))
    return factors


def in_one_form(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that mean the same, written in the same way: they are recorded, and compared.

    What is None is left out; names of dimensions, from a set, an array or anything that can be
    iterated over, are sorted in a tuple.

    Examples
    --------
    >>> in_one_form({"nonnegative": {"image"}, "fixed": "shift", "compress": None})
    {'nonnegative': ('image',), 'fixed': ('shift',)}
    """
    out = {name: value for name, value in options.items() if value is not None}
    if isinstance(out.get("compress"), np.bool_):
        out["compress"] = bool(out["compress"])
    for name in ("nonnegative", "fixed"):
        given: Any = out.get(name)
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if isinstance(given, str):
            out[name] = (given,)
        elif isinstance(given, Iterable) and not isinstance(given, Mapping):
            out[name] = tuple(sorted(map(str, given)))
    return out


def told(options: Mapping[str, Any], mask: str = "") -> str:
    """Write options down as JSON, a Dataset by its sizes, the mask as it is described.

    Where the work is done, the client or the device, is left out.

    Examples
    --------
    >>> told({"nonnegative": ("image",), "compress": None})
    '{"nonnegative": ["image"], "compress": null}'
    """
    kept = {name: option for name, option in options.items() if name not in ("client", "device")}
    if "mask" in kept:
        kept["mask"] = mask
    return json.dumps(kept, default=_told)


def _told(option: object) -> Any:
    if isinstance(option, np.generic):
        return option.item()
    if not isinstance(option, xr.DataArray | xr.Dataset):
        return repr(option)
    sizes = ", ".join(f"{dim}: {n}" for dim, n in option.sizes.items())
    return f"{type(option).__name__} ({sizes})"


def _dims(dims: Sequence[str], name: str, given: Any) -> tuple[str, ...]:
    """Check names of dimensions; one may stand by itself."""
    names = [given] if isinstance(given, str) else given
    if isinstance(given, Mapping):
        raise ArgumentError(
            f"{name} is {given!r}; expected the names of the dimensions it is for, of "
            f"{', '.join(dims)}."
        )
    try:
        unknown = [d for d in names if d not in dims]
    except TypeError:
        unknown = [given]
    if unknown:
        raise ArgumentError(
            f"{name} names {', '.join(map(repr, unknown))}; the tensor has the dimensions "
            f"{', '.join(dims)}: name some of these."
        )
    return tuple(names)
