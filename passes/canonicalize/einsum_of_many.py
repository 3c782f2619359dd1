"""``einsum`` of three or more operands -> products of two, factors and masks multiplied in.

An operand whose axes all belong to another operand, or all to the result, is a factor of it; what
is left is contracted from left to right.  Reassociated: one sum of products in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_tensor, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization

_Term = tuple[str, Any]  # the letters of a tensor, and the tensor


@dataclass(frozen=True)
class EinsumOfMany(Canonicalization):
    """One product of two operands at a time."""

    name: ClassVar[str] = "einsum-of-many"
    targets: ClassVar[frozenset[str]] = frozenset({"einsum"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite equations without ellipsis and without a letter twice in one operand."""
        named = arguments(node)
        tensors, equation = named["tensors"], named["equation"].replace(" ", "")
        inputs, arrow, out = equation.partition("->")
        specs = inputs.split(",")
        if len(tensors) < 3 or not arrow or "." in equation:
            return None
        if any(
            len(set(s)) != len(s) or len(shape_of(t)) != len(s)
            for s, t in zip(specs, tensors, strict=True)
        ):
            return None
        terms: list[_Term] = list(zip(specs, tensors, strict=True))
        late: list[_Term] = []
        while len(terms) > 2 and (place := _factor(terms, out)) is not None:
            spec, factor = terms.pop(place)
            home = next((i for i, (s, _) in enumerate(terms) if set(spec) <= set(s)), None)
            if home is None:
                late.append((spec, factor))
            else:
                whole, tensor = terms[home]
                terms[home] = (
                    whole,
                    build.call(aten.mul.Tensor, tensor, _aligned(build, spec, factor, whole)),
                )
        result = _contracted(build, terms, out)
        for spec, factor in late:
            result = build.call(aten.mul.Tensor, result, _aligned(build, spec, factor, out))
        return result if is_tensor(result) else None


def _factor(terms: list[_Term], out: str) -> int | None:
    """The place of an operand that is a factor of another one, or of the result; the last such."""
    for place in reversed(range(len(terms))):
        spec = set(terms[place][0])
        others = [set(s) for i, (s, _) in enumerate(terms) if i != place]
        if any(spec <= o for o in others) or (spec <= set(out) and spec <= set().union(*others)):
            return place
    return None


def _aligned(build: GraphBuilder, spec: str, tensor: Any, whole: str) -> Any:
    """``tensor`` with the axes ``spec``, laid out to broadcast against ``whole``."""
    order = [spec.index(c) for c in whole if c in spec]
    if order != list(range(len(order))):
        tensor = build.call(aten.permute.default, tensor, order)
    first = next((i for i, c in enumerate(whole) if c in spec), len(whole))
    for place, letter in enumerate(whole[first:]):
        if letter not in spec:
            tensor = build.call(aten.unsqueeze.default, tensor, place)
    return tensor


def _contracted(build: GraphBuilder, terms: list[_Term], out: str) -> Any:
    while len(terms) > 1:
        (left, a), (right, b) = terms[:2]
        needed = set(out).union(*(set(s) for s, _ in terms[2:]))
        spec = "".join(dict.fromkeys(c for c in left + right if c in needed))
        spec = out if len(terms) == 2 else spec
        result = build.call(aten.einsum.default, f"{left},{right}->{spec}", [a, b])
        terms = [(spec, result), *terms[2:]]
    return terms[0][1]
