"""Chunks: each query sees the keys of its own chunk of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr, eq
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Chunked(SparsePattern):
    """Keep the keys of the query's own chunk of ``size`` positions."""

    name: ClassVar[str] = "chunked"
    source: ClassVar[str] = "Qiu et al. 2020 (Blockwise Self-Attention, 1911.02972), section 3"

    size: Annotated[int, Option("positions of a chunk", minimum=1)]

    def mask(self, site: Site) -> Expr | Refusal:
        """Same chunk."""
        return eq(position(site) // self.size, KV // self.size)
