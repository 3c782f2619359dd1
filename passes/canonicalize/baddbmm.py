"""``baddbmm(c, a, b, beta, alpha)`` -> ``beta * c + alpha * bmm(a, b)`` (BLOOM, GPT-NeoX).

``addmm`` of activations alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_parameter, through
from attn_rewrite.passes.canonicalize.base import Canonicalization


@dataclass(frozen=True)
class Baddbmm(Canonicalization):
    """Split the fused product into product and sum; ``beta = 0`` drops the sum."""

    name: ClassVar[str] = "baddbmm"
    targets: ClassVar[frozenset[str]] = frozenset({"baddbmm", "baddbmm_", "addmm", "addmm_"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where beta and alpha are numbers and both factors are activations."""
        named = arguments(node)
        flat = is_call(node, "addmm", "addmm_")
        factors = [named[n] for n in (("mat1", "mat2") if flat else ("batch1", "batch2"))]
        if flat and any(is_parameter(through(f, "t", "transpose", "to")) for f in factors):
            return None
        beta, alpha = named["beta"], named["alpha"]
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        result: Any = build.call(aten.mm.default if flat else aten.bmm.default, *factors)
        if alpha != 1:
            result = build.call(aten.mul.Tensor, result, alpha)
        if beta == 0:
            return result  # type: ignore[no-any-return]
        added = named["self"] if beta == 1 else build.call(aten.mul.Tensor, named["self"], beta)
        return build.call(aten.add.Tensor, result, added)  # type: ignore[no-any-return]
