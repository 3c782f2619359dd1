"""LongLoRA's shifted groups: half of the heads see groups shifted by half a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr, H, eq
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class LongLora(SparsePattern):
    """Keep the keys of the query's own group; in the second half of the heads groups are shifted.

    The shift is half a group and does not wrap: the first and the last shifted group are short, so
    nothing leaks from the end to the beginning.  ``sinks`` first keys are seen besides (SinkLoRA);
    they are columns only, which keeps causal attention causal.
    """

    name: ClassVar[str] = "longlora"
    source: ClassVar[str] = (
        "Chen et al. 2024 (LongLoRA, 2309.12307), section 3.2; sinks: Zhang 2024 (SinkLoRA, "
        "2406.05678)"
    )

    size: Annotated[int, Option("positions of a group", minimum=2)]
    sinks: Annotated[int, Option("first keys seen by every query", minimum=0)] = 0

    def mask(self, site: Site) -> Expr | Refusal:
        """Same group, by the half the head belongs to."""
        at, half = position(site), site.hq // 2
        shift = self.size // 2
        plain = eq(at // self.size, KV // self.size)
        moved = eq((at + shift) // self.size, (KV + shift) // self.size)
        kept = ((half > H) & plain) | ((half <= H) & moved) if half else plain
        return kept | (self.sinks > KV) if self.sinks else kept
