"""Scores by distance and by angle -> products: ``|a - b|^2`` is ``|a|^2 + |b|^2 - 2 a.b``.

Reassociated: the expansion cancels where a and b are close, which verification measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_tensor, shape_of, value_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.sizes import as_size, same_size


def _squared(node: Any) -> Any:
    """``x`` if ``node`` is its square, else None."""
    if is_call(node, "square"):
        return node.args[0]
    if is_call(node, "pow") and node.args[1] == 2:
        return node.args[0]
    return node.args[0] if is_call(node, "mul") and node.args[0] is node.args[1] else None


def _outer(left: Any, right: Any) -> bool:
    """True if each side has an axis that the other lacks: a pair for every two rows."""
    a, b = (tuple(map(as_size, shape_of(x))) for x in (left, right))
    if len(a) != len(b):
        return False
    ones = [(same_size(x, 1), same_size(y, 1)) for x, y in zip(a, b, strict=True)]
    return (True, False) in ones and (False, True) in ones


@dataclass(frozen=True)
class SquaredDifference(Canonicalization):
    """``((a - b) ** 2).sum(dim)`` over pairs of rows."""

    name: ClassVar[str] = "squared-difference"
    targets: ClassVar[frozenset[str]] = frozenset({"sum"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where a and b broadcast against each other and one axis is summed."""
        difference = _squared(node.args[0] if node.args else None)
        dims = arguments(node).get("dim")
        where = [dims] if isinstance(dims, int) else list(dims or ())
        if not is_call(difference, "sub") or len(where) != 1:
            return None
        left, right = difference.args[:2]
        if arguments(difference).get("alpha", 1) != 1 or not (is_tensor(left) and is_tensor(right)):
            return None
        if not _outer(left, right) or value_of(left).dtype != value_of(right).dtype:
            return None
        keep = bool(arguments(node).get("keepdim"))
        parts = [(left, left), (right, right), (left, right)]
        sums = [
            build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, *p), where, keep)
            for p in parts
        ]
        return _expanded(build, *sums)


@dataclass(frozen=True)
class SquaredDistance(Canonicalization):
    """``cdist(a, b) ** 2`` of the Euclidean distance."""

    name: ClassVar[str] = "squared-distance"
    targets: ClassVar[frozenset[str]] = frozenset({"pow", "square", "mul"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite a square of ``cdist`` with p = 2."""
        distance = _squared(node)
        if not is_call(distance, "cdist"):
            return None
        named = arguments(distance)
        a, b = named["x1"], named["x2"]
        if named["p"] != 2 or not (is_tensor(a) and is_tensor(b)):
            return None
        rows, columns = (
            build.call(aten.sum.dim_IntList, build.call(aten.mul.Tensor, x, x), [-1], True)
            for x in (a, b)
        )
        columns = build.call(aten.transpose.int, columns, -1, -2)
        dots = build.call(aten.matmul.default, a, build.call(aten.transpose.int, b, -1, -2))
        return _expanded(build, rows, columns, dots)


def _expanded(build: GraphBuilder, left: Any, right: Any, dots: Any) -> fx.Node:
    squares = build.call(aten.add.Tensor, left, right)
    return build.call(aten.sub.Tensor, squares, build.call(aten.mul.Tensor, dots, 2.0))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CosineSimilarity(Canonicalization):
    """The product of two tensors of unit length."""

    name: ClassVar[str] = "cosine-similarity"
    targets: ClassVar[frozenset[str]] = frozenset({"cosine_similarity"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite pairs of rows; one row against one row is no score."""
        named = arguments(node)
        left, right = named["x1"], named["x2"]
        if not _outer(left, right):
            return None
        unit = []
        for x in (left, right):
            length = build.call(aten.linalg_vector_norm.default, x, 2, [named["dim"]], True)
            length = build.call(aten.clamp_min.default, length, named["eps"])
            unit.append(build.call(aten.div.Tensor, x, length))
        product = build.call(aten.mul.Tensor, *unit)
        return build.call(aten.sum.dim_IntList, product, [named["dim"]])  # type: ignore[no-any-return]
