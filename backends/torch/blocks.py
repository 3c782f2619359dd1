"""The tile side of the tiled kernel: small enough that a narrow guard saves what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from attn_rewrite.backends.torch.ops import tile_counts
from attn_rewrite.cascade.attention import usual_length
from attn_rewrite.cascade.expr import TRUE
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.staged import attention_form

SIDES = (128, 64, 32)
# A length at which guards of dynamic lengths are compared.
_TYPICAL_LENGTH = 1024
# A smaller tile costs more per element: it must save this share of the larger one's work.
_WORTH = 0.25


def choose_block(
    cascade: Cascade,
    extents: Mapping[str, int | None],
    tables: Mapping[str, npt.NDArray[Any]] | None = None,
) -> int:
    """The tile side for the guard of ``cascade``; ``extents`` may be None where dynamic.

    ``tables`` are values of block lists that the guard reads.
    """
    form = attention_form(cascade)
    if form is None or form.guard == TRUE:
        return SIDES[0]
    known = extents.get("kv") or usual_length(form.guard)
    kv_len = known or max(_TYPICAL_LENGTH, extents.get("q") or 0)
    q_len = extents.get("q") or kv_len
    heads = extents.get("h") or form.group
    best, work = SIDES[0], float("inf")
    for side in SIDES:
        area = tile_counts(cascade, q_len, kv_len, side, heads, tables).executed * side * side
        if area < (1 - _WORTH) * work:
            best, work = side, area
    return best
