"""``exp(x) / (exp(x).sum(dim) + exp(s))`` -> a softmax with one more logit s, dropped again.

Softmax-off-by-one is s = 0 (Miller 2023); an epsilon in the denominator is a sink of log(epsilon).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import (
    GraphBuilder,
    arguments,
    aten,
    is_call,
    is_tensor,
    shape_of,
    through,
    value_of,
)
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.canonicalize.softmax_quotient import (
    is_shifted,
    softmax_of,
    summed_exponential,
)
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True)
class DenominatorSink(Canonicalization):
    """A positive term in the denominator is the exponential of a sink logit."""

    name: ClassVar[str] = "denominator-sink"
    targets: ClassVar[frozenset[str]] = frozenset({"div", "div_"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the term is a positive number or an exponential constant along the axis.

        Not after a shift by the maximum, where the sink would depend on the scores: there a number
        below the rounding of 1 is nothing, and any other is left.
        """
        top, bottom = node.args[0], through(node.args[1], "to")
        if not is_call(bottom, "add") or arguments(bottom).get("alpha", 1) != 1:
            return None
        for total, term in (bottom.args[:2], bottom.args[1::-1]):
            found = summed_exponential(total) if is_tensor(total) else None
            if found is None or through(top, "to", "clone") is not found[0]:
                continue
            scores, axis = found[0].args[0], found[1]
            if _vanishes(term, found[0]):
                return softmax_of(build, *found)
            unshifted = _without_shift(scores, axis, term)
            if unshifted is not None:
                scores, logit = unshifted
                place = build.call(aten.slice.Tensor, scores, axis, 0, 1)
                column = build.call(
                    aten.mul.Tensor, build.call(aten.ones_like.default, place), logit
                )
            else:
                column = None if _is_shifted(scores) else _column(build, scores, axis, term)
            if column is None:
                return None
            whole = build.call(aten.cat.default, [scores, column], axis)
            weights = build.call(aten.softmax.int, whole, axis)
            return build.call(aten.slice.Tensor, weights, axis, 0, -1)  # type: ignore[no-any-return]
        return None


def _without_shift(scores: Any, axis: int, term: Any) -> tuple[Any, Any] | None:
    """(x, s) of ``exp(x - m)`` and ``exp(s - m)``, where s may be missing and is 0 then."""
    if not is_call(scores, "sub") or scores.kwargs or not is_call(term, "exp"):
        return None
    source, shift = scores.args
    if is_call(term.args[0], "neg") and term.args[0].args[0] is shift:
        return source, 0.0
    other = term.args[0]
    if not is_call(other, "sub") or other.kwargs or other.args[1] is not shift:
        return None
    logit = other.args[0]
    if not isinstance(logit, (int, float)):
        shape, rank = shape_of(logit), len(shape_of(source))
        if len(shape) == rank and not same_size(as_size(shape[axis]), 1):
            return None
    return source, logit


def _vanishes(term: Any, exponential: fx.Node) -> bool:
    """Zero, or a number that is lost in rounding beside a sum of at least exp(0)."""
    small = torch.finfo(value_of(exponential).dtype).eps / 2 if is_shifted(exponential) else 0.0
    return isinstance(term, (int, float)) and abs(term) <= small


def _is_shifted(scores: Any) -> bool:
    shift = through(scores.args[1], "detach") if is_call(scores, "sub", "sub_") else None
    return is_call(shift, "amax", "getitem")


def _column(build: GraphBuilder, scores: Any, axis: int, term: Any) -> Any:
    """The sink's column of logits, or None."""
    place = build.call(aten.slice.Tensor, scores, axis, 0, 1)
    if isinstance(term, (int, float)):
        return build.call(aten.full_like.default, place, math.log(term)) if term > 0 else None
    opened = []
    while is_call(term, "view", "reshape", "unsqueeze", "expand"):
        opened.append(term)
        term = term.args[0]
    if not is_call(term, "exp"):
        return None
    logit = term.args[0]
    for step in reversed(opened):
        logit = build.call(step.target, logit, *step.args[1:], **step.kwargs)
    shape, rank = shape_of(logit), len(shape_of(scores))
    at = axis - rank + len(shape)
    if len(shape) > rank or (at >= 0 and not same_size(as_size(shape[at]), 1)):
        return None
    return build.call(aten.mul.Tensor, build.call(aten.ones_like.default, place), logit)
