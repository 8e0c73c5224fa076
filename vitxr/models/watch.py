"""Attention seen while a model computes it: the dot products of its queries and keys.

Owns three ways in which a module may compute attention: torch's fused function, torch's
``nn.MultiheadAttention``, and a softmax written out between two products. No module is
changed, and only what runs in this thread is seen.
"""

from __future__ import annotations

import contextlib
import functools
import types as python_types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["KNOWN", "DotProduct", "Written", "watching"]

#: What is looked for, for messages.
KNOWN = (
    "Looked for: a call of torch's scaled_dot_product_attention, a torch.nn.MultiheadAttention, "
    "or a softmax over keys of (frames, heads, tokens, tokens) that is multiplied next, "
    "unchanged, with values of (frames, heads, tokens, width)."
)

#: Names of the functions and methods that multiply matrices.
_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}


class _Scored:
    """What has scores, of which attention weights are the softmax."""

    def scores(
        self,
        heads: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError

    def weights(
        self, heads: torch.Tensor | None = None, queries: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention weights, float32 (frame, head, query, key), of all or some heads and queries.

        The softmax of the scores over the keys.
        """
        import torch

        return self.scores(heads, queries, torch.float32).softmax(-1)


@dataclass(frozen=True)
class DotProduct(_Scored):
    """One call of ``scaled_dot_product_attention``.

    Attributes
    ----------
    query, key, value
        (frame, head, token, head_channel), as they enter it: after biases, norms and
        rotations, and before the division by the square root of their width.
    mask
        What is added to the scores, or where they count, broadcastable to (frame, head,
        query, key); None for nothing.
    scale
        What the dot products are multiplied by.
    causal
        Whether a token attends to earlier ones only.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    causal: bool

    @property
    def queries(self) -> torch.Tensor:
        """Queries of which ``softmax(queries key' / sqrt(head_channel))`` attends.

        Those that enter, but where the module scales by another number.
        """
        factor = self.scale * self.query.shape[3] ** 0.5
        return self.query if abs(factor - 1) < 1e-6 else self.query * factor

    def scores(
        self,
        heads: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """What the softmax is of, ``scale * query key' + mask``: (frame, head, query, key).

        Of all or some heads and queries, in the model's precision or another.
        """
        import torch

        query, key, mask = self.query, self.key, self.mask
        shape = (*query.shape[:3], key.shape[2])
        if self.causal:
            mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
        mask = None if mask is None else mask.expand(shape)
        query, key = _some(query, heads, queries), _some(key, heads, None)
        mask = None if mask is None else _some(mask, heads, queries)
        if dtype is not None:
            query, key = query.to(dtype), key.to(dtype)
        scores = (query * self.scale) @ key.transpose(2, 3)
        if mask is not None and mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        return scores if mask is None else scores + mask


@dataclass(frozen=True)
class Written(_Scored):
    """Attention that a module writes out: ``softmax(scores) @ value``.

    Attributes
    ----------
    given
        What enters the softmax, (frame, head, query, key).
    value
        (frame, head, token, head_channel).
    factors
        What was multiplied last before the softmax.
    """

    given: torch.Tensor
    value: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    def scores(
        self,
        heads: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """As of a :class:`DotProduct`."""
        scores = _some(self.given, heads, queries)
        return scores if dtype is None else scores.to(dtype)

    @functools.cached_property
    def projected(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Queries and keys, or None where they are not what was multiplied.

        They are where the scores are their product over the square root of their width: of
        queries that were divided by it before, a captured variable would have another scale.
        """
        if len(self.factors) != 2 or any(f.ndim != 4 for f in self.factors):
            return None
        query, other = self.factors
        form = (*self.given.shape[:3], query.shape[3])
        for key in (other, other.transpose(2, 3)):
            if tuple(query.shape) == tuple(key.shape) == form:
                scores = (query.float() @ key.float().transpose(2, 3)) * form[3] ** -0.5
                off, size = (self.given.float() - scores).abs().max(), scores.abs().max()
                if size > 0 and off <= 1e-2 * size:  # other scales are further off: 0.7 of width 2
                    return query, key
        return None

    @property
    def query(self) -> torch.Tensor | None:
        """Queries before their scaling, (frame, head, token, head_channel), if known."""
        return None if self.projected is None else self.projected[0]

    queries = query

    @property
    def key(self) -> torch.Tensor | None:
        """Keys, likewise."""
        return None if self.projected is None else self.projected[1]


def _some(
    value: torch.Tensor, heads: torch.Tensor | None, queries: torch.Tensor | None
) -> torch.Tensor:
    value = value if heads is None else value.index_select(1, heads)
    return value if queries is None else value.index_select(2, queries)


def watching(
    seen: Callable[[DotProduct | Written], torch.Tensor | None],
) -> contextlib.AbstractContextManager[Any]:
    """Call ``seen`` with every dot product of queries and keys that this thread computes.

    What it returns, if not None, takes the place of the attention weights.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    functional = torch.nn.functional
    attend, multihead = (
        functional.scaled_dot_product_attention,
        functional.multi_head_attention_forward,
    )

    def attended(*args: Any, **kwargs: Any) -> torch.Tensor:
        dot = _read(*args, **kwargs)
        weights = seen(dot)
        return attend(*args, **kwargs) if weights is None else weights @ dot.value

    class Watch(TorchFunctionMode):
        #: What was multiplied last, and then went through a softmax.
        factors: tuple[torch.Tensor, ...] = ()
        softmax: _Softmax | None = None

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if func is attend:
                return attended(*args, **kwargs)
            if func is multihead:
                return _multihead(attended, args, kwargs)
            if name == "softmax":
                result = func(*args, **kwargs)
                self.softmax = None
                if _over_keys(result, args, kwargs) and result is not args[0]:
                    self.softmax = _Softmax(args[0], result, self.factors)
                return result
            if name in _PRODUCTS:
                args = _flat(args)
                written = self.softmax and _written(self.softmax, args)
                self.softmax = None
                if written:
                    self.factors = ()
                    weights = seen(written)
                    if weights is not None:
                        at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
                        weights = weights.to(args[at].dtype).reshape(args[at].shape)
                        args = (*args[:at], weights, *args[at + 1 :])
                else:
                    self.factors = _tensors(args)
            return func(*args, **kwargs)

    return Watch()


def _multihead(attended: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run torch's own multi-head attention by the fused function, which it calls in places only.

    Its code runs unchanged, with ``attended`` where it finds that function.
    """
    import torch

    dots: list[DotProduct] = []

    def kept(*args: Any, **kwargs: Any) -> Any:
        dots.append(_read(*args, **kwargs))
        return attended(*args, **kwargs)

    own: Any = torch.nn.functional.multi_head_attention_forward
    names = {
        **own.__globals__,
        "scaled_dot_product_attention": kept,
        "has_torch_function": lambda _: False,  # it has been asked, or this would not run
    }
    run = python_types.FunctionType(own.__code__, names, own.__name__, own.__defaults__)
    run.__kwdefaults__ = own.__kwdefaults__
    output, _ = run(*args, **{**kwargs, "need_weights": False})
    if not kwargs.get("need_weights", True):
        return output, None
    weights = dots[0].weights().to(output.dtype)
    if kwargs.get("average_attn_weights", True):
        weights = weights.mean(1)
    return output, weights if output.ndim == 3 else weights[0]


def _read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DotProduct:
    if enable_gqa:  # several queries share a key and a value
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return DotProduct(query, key, value, attn_mask, scale, is_causal)


def _tensors(args: Any) -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(a for a in args if isinstance(a, torch.Tensor))


def _flat(args: Any) -> Any:
    """The arguments of a product, those in a list among them."""
    return tuple(b for a in args for b in (a if isinstance(a, list | tuple) else [a]))


def _over_keys(result: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a softmax is over the last dimension of (frame, [head,] token, token)."""
    shape = tuple(result.shape)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return (
        bool(args)
        and len(shape) in (3, 4)
        and shape[-1] == shape[-2]
        and dim in (-1, len(shape) - 1)
    )


class _Softmax:
    """A softmax: of what, its result, what was multiplied before; as they were written then."""

    def __init__(
        self, scores: torch.Tensor, weights: torch.Tensor, factors: tuple[torch.Tensor, ...]
    ):
        self.scores, self.weights, self.factors = scores, weights, factors
        self._written = scores._version, weights._version

    def unchanged(self) -> bool:
        """Whether nothing was written to them since: heads may be switched off in place."""
        return (self.scores._version, self.weights._version) == self._written


def _written(softmax: _Softmax, args: Any) -> Written | None:
    """Attention, if the softmax is what is multiplied next, unchanged, with the values."""
    import torch

    scores, weights, factors = softmax.scores, softmax.weights, softmax.factors
    operands = _tensors(args)
    if len(operands) != 2 or not _summed(args) or not softmax.unchanged():
        return None
    first, value = operands
    if (
        first.shape != weights.shape
        or value.shape[:-1] != weights.shape[:-1]
        or not (first is weights or torch.equal(first, weights.to(first.dtype)))
    ):
        return None
    if weights.ndim == 3:  # of a single head
        scores, value = scores.unsqueeze(1), value.unsqueeze(1)
        factors = tuple(f.unsqueeze(1) for f in factors if f.ndim == 3)
    return Written(scores, value, factors)


def _summed(args: Any) -> bool:
    """Whether an einsum sums over the keys, each frame and head by itself; so do all others."""
    if not isinstance(args[0], str):
        return True
    weights, _, values = args[0].replace(" ", "").partition("->")[0].partition(",")
    return weights[:-2] == values[:-2] and weights[-1:] == values[-2:-1]
