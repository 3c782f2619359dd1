"""Attention tiles of Efficient-vDiT: each frame sees itself and a few reference frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import Expr, eq
from attn_rewrite.passes.sparse.laid_out import Grid, LaidOut
from attn_rewrite.passes.transform import Option
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.site import Site


@dataclass(frozen=True)
class Tile(LaidOut):
    """Keep pairs of one frame, and pairs where either frame is one of ``references`` frames.

    References are spread evenly from frame 0; the paper does not say which frames they are.
    """

    name: ClassVar[str] = "tile"
    source: ClassVar[str] = "Ding et al. 2025 (Efficient-vDiT, 2502.06155), Table 1"
    framed: ClassVar[bool] = True

    references: Annotated[int, Option("frames that see all and are seen by all", minimum=0)]

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """Same frame, or a reference frame on either side."""
        frames = grid.sizes()[0]
        if frames is None or len(grid.q) < 2 or self.references > frames:
            return self.misfit(site, f"{self.references} reference frames of {frames}")
        q, kv = grid.q[0], grid.kv[0]
        # Of the products i * k modulo F, exactly k are below k: one for each reference.
        mask = eq(q, kv)
        for frame in (q, kv) if self.references else ():
            mask = mask | ((frame * self.references) % frames < self.references)
        return mask
