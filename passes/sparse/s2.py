"""S2-Attention: local blocks and vertical stripes of blocks, another shard for every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.expr import KV, Const, Expr, H, call, eq
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class S2(SparsePattern):
    """Keep ``local`` blocks up to the query's own and, for each head, every ``vertical``-th block.

    Head h keeps block n where ``(n + h * step + offset) % vertical == 0`` with
    ``step = max(1, vertical // heads)``.  Heads are key heads: query heads that share one share its
    pattern.  ``offset`` is 1 in Phi-3-small, vLLM and ONNX Runtime, and 0 in the authors' kernels.
    For causal Sites.

    ``relative`` stripes are counted from the query's own block instead: block n is kept by block m
    where what lies beyond ``local`` between them, ``max(0, |m - n| - local + 1)``, is a multiple of
    ``vertical``.  All heads agree, and attention may look ahead.
    """

    name: ClassVar[str] = "s2"
    source: ClassVar[str] = "Lin et al. 2024 (S2-Attention, 2407.17678), section 3"

    local: Annotated[int, Option("blocks seen up to the query's own", minimum=1)] = 16
    vertical: Annotated[int, Option("distance of the stripes, in blocks", minimum=1)] = 8
    block: Annotated[int, Option("positions of a block", minimum=1)] = 64
    offset: Annotated[int, Option("where stripes start: 1 as in Phi-3-small, 0 as in dkernel")] = 1
    shards: Annotated[bool, Option("false: every head has the stripes of head 0")] = True
    dense_heads: Annotated[int, Option("last key heads that see everything", minimum=0)] = 0
    mode: Annotated[
        Literal["absolute", "relative"], Option("stripes at fixed places, or by distance")
    ] = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "relative" and (self.offset != 1 or not self.shards):
            raise ValueError(
                "s2: offset and shards say where stripes start, which relative ones do not"
            )

    def mask(self, site: Site) -> Expr | Refusal:
        """Local or vertical blocks; absolute ones up to the query's own position."""
        if self.mode == "relative":
            return self._relative(site)
        if not site.causal:
            reason = "s2 is defined for causal attention, and this one is not"
            return self.refuse(site, "s2-not-causal", reason)
        head = _key_head(site)
        at = position(site)
        m, n = at // self.block, KV // self.block
        step = max(1, self.vertical // site.hkv)
        shift: Expr = head * step + self.offset if self.shards else Const(self.offset)
        kept = (m - n < self.local) | eq((n + shift) % self.vertical, 0)
        return (at >= KV) & self._dense(kept, head, site)

    def _relative(self, site: Site) -> Expr:
        at = position(site)
        m, n = at // self.block, KV // self.block
        beyond = call("max", call("abs", m - n) - (self.local - 1), 0)
        kept = self._dense(eq(beyond % self.vertical, 0), _key_head(site), site)
        return (at >= KV) & kept if site.causal else kept

    def _dense(self, kept: Expr, head: Expr, site: Site) -> Expr:
        return kept | (head >= site.hkv - self.dense_heads) if self.dense_heads else kept


def _key_head(site: Site) -> Expr:
    return H if site.hq == site.hkv else H // (site.hq // site.hkv)
