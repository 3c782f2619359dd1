"""``exp2(x)``, ``2 ** x`` and ``e ** x`` -> ``exp(x * ln(base))``: one exponential."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_tensor, op_name
from attn_rewrite.passes.canonicalize.base import Canonicalization


@dataclass(frozen=True)
class Exponential(Canonicalization):
    """A power of a positive constant base."""

    name: ClassVar[str] = "exponential"
    targets: ClassVar[frozenset[str]] = frozenset({"exp2", "special_exp2", "exp2_", "pow"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the base is a number and the exponent a tensor."""
        named = arguments(node)
        base, exponent = named["self"], named.get("exponent")
        if op_name(node) != "pow":
            base, exponent = 2.0, named["self"]
        if not isinstance(base, (int, float)) or base <= 0 or not is_tensor(exponent):
            return None
        scaled = build.call(aten.mul.Tensor, exponent, math.log(base))
        return build.call(aten.exp.default, scaled)  # type: ignore[no-any-return]
