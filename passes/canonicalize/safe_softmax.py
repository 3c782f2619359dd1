"""``where(all(x == -inf), 0, softmax(x))`` -> ``_safe_softmax(x)``: the guard for empty rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.canonicalize.masked_exponential import is_zero


@dataclass(frozen=True)
class SafeSoftmax(Canonicalization):
    """The guard that PyTorch's own decomposition puts around a softmax."""

    name: ClassVar[str] = "safe-softmax"
    targets: ClassVar[frozenset[str]] = frozenset({"where"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the condition tests that a whole row of the scores is -inf."""
        named = arguments(node)
        if "self" not in named or "other" not in named:
            return None
        empty, zeros, softmax = named["condition"], named["self"], named["other"]
        if not is_call(softmax, "softmax", "_softmax") or not is_zero(zeros):
            return None
        scores = arguments(softmax)
        if not _tests_empty_rows(empty, scores["self"]):
            return None
        return build.call(aten._safe_softmax.default, scores["self"], scores["dim"])  # type: ignore[no-any-return]


def _tests_empty_rows(condition: Any, scores: Any) -> bool:
    """``logical_not(any(logical_not(eq(x, -inf))))`` or ``all(eq(x, -inf))``."""
    negated = is_call(condition, "logical_not", "bitwise_not")
    inner = condition.args[0] if negated else condition
    if not is_call(inner, "any" if negated else "all"):
        return False
    test = inner.args[0]
    if negated:
        if is_call(test, "ne"):
            return test.args[0] is scores and test.args[1] == -float("inf")
        if not is_call(test, "logical_not", "bitwise_not"):
            return False
        test = test.args[0]
    return is_call(test, "eq") and test.args[0] is scores and test.args[1] == -float("inf")
