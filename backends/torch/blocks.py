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

# Cost of a score in tiles of each side, relative to the largest: the mean over eight masks on a
# CPU (examples/benchmarks/torch_tiles.py --prices).
PRICES = {128: 1.0, 64: 1.1, 32: 1.7}
# A length at which guards of dynamic lengths are compared.
_TYPICAL_LENGTH = 1024


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
        return next(iter(PRICES))
    known = extents.get("kv") or usual_length(form.guard)
    kv_len = known or max(_TYPICAL_LENGTH, extents.get("q") or 0)
    q_len = extents.get("q") or kv_len
    heads = extents.get("h") or form.group

    def price(side: int) -> float:
        executed = tile_counts(cascade, q_len, kv_len, side, heads, tables).executed
        return executed * side * side * PRICES[side]

    return min(PRICES, key=price)
