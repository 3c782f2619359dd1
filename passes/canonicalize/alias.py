"""Other names of one operator -> the name the finder knows: ``divide``, ``movedim``, ``narrow``,
``tile``, ``max`` of two tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_tensor, op_name, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.transform import Exactness

# Operators that PyTorch defines as another name of the same operator, overload by overload.
_ALIASES: Mapping[str, str] = {
    "divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "clip": "clamp", "absolute": "abs", "special_expit": "sigmoid", "linalg_matmul": "matmul",
    "special_logsumexp": "logsumexp", "concat": "cat", "concatenate": "cat",
}  # fmt: skip

# ``torch.max(a, b)`` shares its name with the maximum over an axis.
_OF_TWO: Mapping[str, Any] = {"max": aten.maximum.default, "min": aten.minimum.default}


@dataclass(frozen=True)
class Alias(Canonicalization):
    """The same operator under its first name."""

    name: ClassVar[str] = "alias"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset(_ALIASES)

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the other operator has the same overload."""
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        packet = getattr(aten, _ALIASES[op_name(node)])
        same = getattr(packet, target._overloadname, None)
        return None if same is None else build.call(same, *node.args, **node.kwargs)


@dataclass(frozen=True)
class OfTwo(Canonicalization):
    """``max`` and ``min`` of two tensors are ``maximum`` and ``minimum``."""

    name: ClassVar[str] = "of-two"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset(_OF_TWO)

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite the overload with a second tensor."""
        named = arguments(node)
        if not is_tensor(named.get("other")):
            return None
        return build.call(_OF_TWO[op_name(node)], named["self"], named["other"])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Repeat(Canonicalization):
    """``tile``, and the concatenation of one tensor with itself, are repeats."""

    name: ClassVar[str] = "repeat"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({"tile", "cat", "stack"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where every part is the same node; a ``stack`` gets a new axis first."""
        named = arguments(node)
        if op_name(node) == "tile":
            times, source = list(named["dims"]), named["self"]
            times = [1] * (len(shape_of(source)) - len(times)) + times
            return build.call(aten.repeat.default, source, times)  # type: ignore[no-any-return]
        parts = named["tensors"]
        if len(parts) < 2 or any(part is not parts[0] for part in parts):
            return None
        rank, place = len(shape_of(node)), named["dim"] % len(shape_of(node))
        source = parts[0]
        if op_name(node) == "stack":
            source = build.call(aten.unsqueeze.default, source, place)
        times = [len(parts) if i == place else 1 for i in range(rank)]
        return build.call(aten.repeat.default, source, times)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MoveAxes(Canonicalization):
    """``movedim`` and ``moveaxis`` are permutes; ``narrow`` is a slice."""

    name: ClassVar[str] = "move-axes"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({"movedim", "moveaxis", "narrow"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the start of a ``narrow`` is a number."""
        named = arguments(node)
        rank = len(shape_of(node))
        if op_name(node) == "narrow":
            start, length = named["start"], named["length"]
            if not isinstance(start, int) or start < 0:
                return None
            end = length if start == 0 else build.call(operator.add, length, start)
            args = (named["self"], named["dim"], start, end)
            return build.call(aten.slice.Tensor, *args)  # type: ignore[no-any-return]
        source, target = (_axes(named[n], rank) for n in ("source", "destination"))
        rest = iter(d for d in range(rank) if d not in source)
        moved = dict(zip(target, source, strict=True))
        order = [moved[d] if d in moved else next(rest) for d in range(rank)]
        return build.call(aten.permute.default, named["self"], order)  # type: ignore[no-any-return]


def _axes(value: Any, rank: int) -> list[int]:
    return [int(v) % rank for v in (value if isinstance(value, (list, tuple)) else [value])]
