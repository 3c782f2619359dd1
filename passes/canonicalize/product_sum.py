"""``(a * b).sum(dim)`` -> ``einsum(a, b)``: a product written with broadcasting."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_tensor, shape_of, value_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True)
class ProductSum(Canonicalization):
    """A sum over one axis of an elementwise product in which both sides carry that axis."""

    name: ClassVar[str] = "product-sum"
    targets: ClassVar[frozenset[str]] = frozenset({"sum"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite ``sum(mul(a, b), [dim])`` where a and b broadcast against each other."""
        product = node.args[0] if node.args else None
        if not is_call(product, "mul") or not isinstance(product, fx.Node):
            return None
        dims = arguments(node).get("dim")
        left, right = product.args[0], product.args[1]
        if not (is_tensor(left) and is_tensor(right)):
            return None
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        if value_of(left).dtype != value_of(right).dtype:
            return None  # einsum promotes nothing
        rank = len(shape_of(product))
        where = [dims] if isinstance(dims, int) else list(dims or ())
        if len(where) != 1 or rank > 20:
            return None
        if arguments(node).get("keepdim") and len(product.users) > 1:
            return None  # weights that are normalised by their sum
        place = int(where[0]) % rank
        result = _einsum(node, build, left, right, rank, place)
        if result is None or not arguments(node).get("keepdim"):
            return result
        return build.call(aten.unsqueeze.default, result, place)  # type: ignore[no-any-return]


def _einsum(
    node: fx.Node, build: GraphBuilder, left: Any, right: Any, rank: int, summed: int
) -> fx.Node | None:
    letters = string.ascii_lowercase[:rank]
    specs, tensors = [], []
    single = same_size(as_size(shape_of(node.args[0])[summed]), 1)  # type: ignore[arg-type]
    for operand in (left, right):
        shape = shape_of(operand)
        own = letters[rank - len(shape) :]
        ones = [i for i, s in enumerate(shape) if same_size(as_size(s), 1)]
        if letters[summed] not in own:
            return None
        if own.index(letters[summed]) in ones:
            if not single:
                return None
            ones.remove(own.index(letters[summed]))  # a width of 1 is summed by both
        for i in reversed(ones):
            operand = build.call(aten.squeeze.dim, operand, i)
        tensors.append(operand)
        specs.append("".join(c for i, c in enumerate(own) if i not in ones))
    if set(specs[0]) == set(specs[1]):
        return None  # an ordinary weighted sum
    out = "".join(c for c in letters if c != letters[summed])
    named = "".join(c for c in out if c in specs[0] + specs[1])
    result = build.call(aten.einsum.default, f"{specs[0]},{specs[1]}->{named}", tensors)
    for place, letter in enumerate(out):  # axes of length 1 in both
        if letter not in named:
            result = build.call(aten.unsqueeze.default, result, place)
    return result  # type: ignore[no-any-return]
