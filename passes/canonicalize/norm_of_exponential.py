"""The 1-norm of an exponential -> its sum (``F.normalize(exp(x), p=1)``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call
from attn_rewrite.passes.canonicalize.base import Canonicalization


@dataclass(frozen=True)
class NormOfExponential(Canonicalization):
    """Exponentials are positive: the sum of their magnitudes is their sum."""

    name: ClassVar[str] = "norm-of-exponential"
    targets: ClassVar[frozenset[str]] = frozenset({"linalg_vector_norm", "norm"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite norms of order 1 over given axes."""
        named = arguments(node)
        order, dims = named.get("ord", named.get("p")), named.get("dim")
        if order != 1 or dims is None or not is_call(named["self"], "exp"):
            return None
        dims = [dims] if isinstance(dims, int) else list(dims)
        keep = bool(named.get("keepdim"))
        return build.call(aten.sum.dim_IntList, named["self"], dims, keep)  # type: ignore[no-any-return]
