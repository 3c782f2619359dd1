"""``log(exp(x).sum(dim))`` -> ``logsumexp(x, dim)``, with the shift by a maximum or without, the
axis kept or squeezed away;
``einsum("..k->..")`` -> a sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_tensor, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True)
class LogSumExp(Canonicalization):
    """The logarithm of a sum of exponentials over given axes."""

    name: ClassVar[str] = "log-sum-exp"
    targets: ClassVar[frozenset[str]] = frozenset({"log"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the sum runs over named axes."""
        total, squeezed = _without_squeeze(node.args[0])
        if not is_call(total, "sum") or not isinstance(total, fx.Node):
            return None
        named = arguments(total)
        dims = named.get("dim")
        if dims is None or not is_call(named["self"], "exp"):
            return None
        dims = [dims] if isinstance(dims, int) else list(dims)
        kept = bool(named.get("keepdim"))
        if squeezed is not None:
            rank = len(shape_of(named["self"]))
            if not kept or [d % rank for d in dims] != [squeezed % rank]:
                return None
            kept = False
        args = (named["self"].args[0], dims, kept)
        return build.call(aten.logsumexp.default, *args)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ShiftedLogSumExp(Canonicalization):
    """``m + logsumexp(x - m)`` is ``logsumexp(x)`` where m is constant along the axis."""

    name: ClassVar[str] = "shifted-log-sum-exp"
    targets: ClassVar[frozenset[str]] = frozenset({"add"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the same m, of length 1 along one kept axis, is taken off and added."""
        for total, shift in (node.args[:2], node.args[1::-1]):
            if not is_call(total, "logsumexp") or not is_tensor(shift) or node.kwargs:
                continue
            named = arguments(total)  # type: ignore[arg-type]
            shifted, dims = named["self"], list(named["dim"])
            whole, squeezed = _without_squeeze(shift)
            if not is_call(shifted, "sub") or shifted.args[1] is not whole or shifted.kwargs:
                continue
            rank, part, kept = len(shape_of(shifted)), shape_of(whole), bool(named["keepdim"])
            if len(dims) != 1 or len(part) != rank or kept != (squeezed is None):
                continue
            if squeezed is not None and squeezed % rank != dims[0] % rank:
                continue
            if same_size(as_size(part[dims[0]]), 1):
                return build.call(aten.logsumexp.default, shifted.args[0], dims, kept)  # type: ignore[no-any-return]
        return None


def _without_squeeze(node: Any) -> tuple[Any, int | None]:
    """What one axis was squeezed out of, and that axis; ``node`` itself and None otherwise."""
    if is_call(node, "squeeze"):
        dim = arguments(node).get("dim")
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        if len(dims) == 1:
            return node.args[0], dims[0]
    return node, None


@dataclass(frozen=True)
class EinsumOfOne(Canonicalization):
    """An einsum of one operand permutes it and sums what the output does not name."""

    name: ClassVar[str] = "einsum-of-one"
    targets: ClassVar[frozenset[str]] = frozenset({"einsum"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite equations without ellipsis and without a repeated letter."""
        named = arguments(node)
        tensors, equation = named["tensors"], named["equation"].replace(" ", "")
        letters, arrow, out = equation.partition("->")
        if len(tensors) != 1 or not arrow or "." in equation or len(set(letters)) != len(letters):
            return None
        if len(shape_of(tensors[0])) != len(letters):
            return None
        kept = [c for c in letters if c in out]
        result = tensors[0]
        if len(kept) < len(letters):
            summed = [i for i, c in enumerate(letters) if c not in out]
            result = build.call(aten.sum.dim_IntList, result, summed)
        order = [kept.index(c) for c in out]
        if order != list(range(len(order))):
            result = build.call(aten.permute.default, result, order)
        return None if result is tensors[0] else result
