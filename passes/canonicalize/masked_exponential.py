"""``exp(x)`` set to 0 under a mask -> ``exp`` of ``x`` set to -inf; masked probabilities alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_tensor, through, value_of
from attn_rewrite.passes.canonicalize.base import Canonicalization


def zeroed(node: Any, build: GraphBuilder) -> tuple[fx.Node, fx.Node, bool] | None:
    """(x, mask, True where kept) if ``node`` is x where a truth value says so and 0 elsewhere."""
    if is_call(node, "mul"):
        for x, factor in (node.args[:2], node.args[1::-1]):
            mask = through(factor, "to", "float", "type_as")
            if is_call(mask, "tril", "triu") and is_call(mask.args[0], "ones", "ones_like"):
                mask = build.call(aten.ne.Scalar, mask, 0)
            if is_tensor(x) and is_tensor(mask) and value_of(mask).dtype == torch.bool:
                return x, mask, True
        return None
    if is_call(node, "tril", "triu"):
        source: Any = node.args[0]
        shape = source.args[0] if is_call(source, "exp", "softmax") else source  # it may go
        ones = build.call(aten.ones_like.default, shape, dtype=torch.bool)
        return source, build.call(node.target, ones, *node.args[1:], **node.kwargs), True
    if not is_call(node, "masked_fill", "where"):
        return None
    named = arguments(node)
    if is_call(node, "masked_fill"):
        return (named["self"], named["mask"], False) if named["value"] == 0 else None
    yes: Any = named.get("self")
    no: Any = named.get("other")
    if is_zero(no) and is_tensor(yes):
        return yes, named["condition"], True
    return (no, named["condition"], False) if is_zero(yes) and is_tensor(no) else None


def is_zero(value: Any) -> bool:
    """True for the number 0 and for a tensor made of zeros."""
    if isinstance(value, (int, float)):
        return value == 0
    return is_call(value, "zeros", "zeros_like", "new_zeros") or (
        is_call(value, "full", "full_like", "scalar_tensor")
        and arguments(value).get("fill_value", arguments(value).get("s")) == 0
    )


def removed(build: GraphBuilder, x: fx.Node, mask: fx.Node, keeps: bool) -> fx.Node:
    """``x`` with -inf where the mask removes it."""
    drop = build.call(aten.logical_not.default, mask) if keeps else mask
    return build.call(aten.masked_fill.Scalar, x, drop, -math.inf)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MaskedExponential(Canonicalization):
    """exp(-inf) is 0: a mask on the exponential is a mask on the exponent."""

    name: ClassVar[str] = "masked-exponential"
    targets: ClassVar[frozenset[str]] = frozenset({"mul", "masked_fill", "where", "tril", "triu"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the mask is a truth value of the shape of the exponential or smaller."""
        found = zeroed(node, build)
        if found is None or not is_call(found[0], "exp"):
            return None
        exponential, mask, keeps = found
        if value_of(exponential).shape != value_of(node).shape:
            return None
        masked = removed(build, exponential.args[0], mask, keeps)  # type: ignore[arg-type]
        return build.call(aten.exp.default, masked)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Renormalised(Canonicalization):
    """``t / t.sum(dim)`` with ``t = softmax(x, dim)`` masked to 0 -> softmax of the rest."""

    name: ClassVar[str] = "renormalised"
    targets: ClassVar[frozenset[str]] = frozenset({"div", "div_"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the sum is the numerator's own, over the axis of the softmax."""
        top: Any = node.args[0]
        total: Any = node.args[1]
        found = zeroed(top, build)
        if found is None or not is_call(total, "sum") or total.args[0] is not top:
            return None
        probabilities, mask, keeps = found
        if not is_call(probabilities, "softmax", "_softmax"):
            return None
        named, rank = arguments(total), value_of(probabilities).dim()
        dims = named["dim"] if isinstance(named["dim"], (list, tuple)) else [named["dim"]]
        inner = arguments(probabilities)
        if len(dims) != 1 or not named["keepdim"] or dims[0] is None or rank != value_of(top).dim():
            return None
        if dims[0] % rank != inner["dim"] % rank:
            return None
        masked = removed(build, inner["self"], mask, keeps)
        return build.call(aten.softmax.int, masked, inner["dim"], inner.get("dtype"))  # type: ignore[no-any-return]
