"""Longformer: a symmetric window and global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Longformer(SparsePattern):
    """Keep ``window // 2`` keys on each side, and rows and columns of the first tokens."""

    name: ClassVar[str] = "longformer"
    source: ClassVar[str] = "Beltagy et al. 2020 (Longformer, 2004.05150), section 3.1"

    window: Annotated[int, Option("keys seen around the query, half on each side", minimum=2)]
    global_tokens: Annotated[int, Option("first tokens, which see all and are seen", minimum=0)] = 1

    def mask(self, site: Site) -> Expr | Refusal:
        """Near, or global on either side."""
        at, reach = position(site), self.window // 2
        near = (at - KV <= reach) & (KV - at <= reach)
        if not self.global_tokens:
            return near
        return near | (self.global_tokens > KV) | (at < self.global_tokens)
