"""BigBird: blocks of a window, global blocks, and random blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr, Extent, eq
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site

# A prime above every count of blocks; products of the draw stay below 2**53.
_PRIME = 1_000_003


@dataclass(frozen=True)
class BigBird(SparsePattern):
    """Keep a window of blocks, global blocks and, for each block row, ``random`` drawn blocks.

    The draw is a hash of the row (quadratic, modulo a prime) whose coefficients come from ``seed``:
    the same for every length, machine and head.  Draws of one row may coincide.
    """

    name: ClassVar[str] = "bigbird"
    source: ClassVar[str] = "Zaheer et al. 2020 (Big Bird, 2007.14062), section 2"

    block: Annotated[int, Option("positions of a block", minimum=1)] = 64
    window: Annotated[int, Option("blocks seen around the query's own, odd", minimum=1)] = 3
    global_blocks: Annotated[int, Option("first blocks, which see all and are seen", minimum=0)] = 2
    random: Annotated[int, Option("drawn blocks per block row", minimum=0, maximum=64)] = 3
    seed: Annotated[int, Option("of the draw", minimum=0)] = 0

    def mask(self, site: Site) -> Expr | Refusal:
        """Near, global or drawn, all in blocks."""
        m, n = position(site) // self.block, KV // self.block
        reach = self.window // 2
        mask = (m - n <= reach) & (n - m <= reach)
        if self.global_blocks:
            mask = mask | (n < self.global_blocks) | (m < self.global_blocks)
        count = (Extent("kv") + (self.block - 1)) // self.block
        draw = random.Random(self.seed)
        for _ in range(self.random):
            a, b, c = (draw.randrange(1, 1 << 16) for _ in range(3))
            mask = mask | eq(n, ((m * m * a + m * b + c) % _PRIME) % count)
        return mask
