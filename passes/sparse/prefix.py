"""Prefix: every query sees the first keys, and its own past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Prefix(SparsePattern):
    """Keep the first ``size`` keys for every query, and beyond them the keys up to its own.

    On a causal Site this takes nothing away.
    """

    name: ClassVar[str] = "prefix"
    source: ClassVar[str] = "Raffel et al. 2020 (T5, 1910.10683), section 3.2.1"

    size: Annotated[int, Option("keys that every query sees", minimum=0)]

    def mask(self, site: Site) -> Expr | Refusal:
        """``kv < size`` or ``kv <= pos``."""
        return (self.size > KV) | (position(site) >= KV)
