"""``baddbmm(c, a, b, beta, alpha)`` -> ``beta * c + alpha * bmm(a, b)`` (BLOOM, GPT-NeoX)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten
from attn_rewrite.passes.canonicalize.base import Canonicalization


@dataclass(frozen=True)
class Baddbmm(Canonicalization):
    """Split the fused product into product and sum; ``beta = 0`` drops the sum."""

    name: ClassVar[str] = "baddbmm"
    targets: ClassVar[frozenset[str]] = frozenset({"baddbmm", "baddbmm_"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where beta and alpha are numbers."""
        named = arguments(node)
        beta, alpha = named["beta"], named["alpha"]
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        result: Any = build.call(aten.bmm.default, named["batch1"], named["batch2"])
        if alpha != 1:
            result = build.call(aten.mul.Tensor, result, alpha)
        if beta == 0:
            return result  # type: ignore[no-any-return]
        added = named["self"] if beta == 1 else build.call(aten.mul.Tensor, named["self"], beta)
        return build.call(aten.add.Tensor, result, added)  # type: ignore[no-any-return]
