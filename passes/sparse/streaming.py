"""StreamingLLM's mask: the first tokens ("sinks") and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Streaming(SparsePattern):
    """Keep the first ``sinks`` keys and the last ``recent`` ones, the query's own included.

    For causal Sites.  Positions stay those of the text: the published cache renumbers the keys it
    holds, which is another model.
    """

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "Xiao et al. 2024 (StreamingLLM, 2309.17453), section 3.2"

    recent: Annotated[int, Option("last keys that are seen", minimum=1)]
    sinks: Annotated[int, Option("first keys that are seen by all", minimum=0)] = 4

    def mask(self, site: Site) -> Expr | Refusal:
        """``kv <= pos`` and either a sink or recent."""
        if not site.causal:
            reason = "streaming reads a text from left to right, but this attention is not causal"
            return self.refuse(site, "streaming-not-causal", reason)
        at = position(site)
        near = at - KV < self.recent
        return (at >= KV) & ((near | (self.sinks > KV)) if self.sinks else near)
