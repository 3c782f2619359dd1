"""Attention with linear biases: a penalty on the distance, with a slope of each head's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attn_rewrite.cascade.expr import KV, Expr, H, call, where
from attn_rewrite.passes.transform import ScoreEdit, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Alibi(ScoreEdit):
    """Subtract slope[h] * |position of the query - position of the key| from the score.

    The n heads have the slopes 2^(-8/n), 2^(-16/n) ... 2^-8; where n is no power of two, those of
    the power of two below it come first, then every other one of twice as many, as in the authors'
    released code.
    """

    name: ClassVar[str] = "alibi"
    source: ClassVar[str] = "Press, Smith, Lewis 2022 (ALiBi, 2108.12409), section 3"

    def score(self, s: Expr, site: Site) -> Expr | Refusal:
        """The score less the penalty."""
        first = 2 ** int(math.log2(site.hq))
        slope = call("exp2", (H + 1) * (-8 / first))
        if first < site.hq:
            slope = where(first > H, slope, call("exp2", (2 * (H - first) + 1) * (-4 / first)))
        return s - slope * abs(position(site) - KV)
