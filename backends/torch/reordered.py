"""Tokens in another order on torch: gathers by row before a kernel, and one after it.

Where all heads share an order a gather is one ``index_select`` of the token axis; where they do not
it is one ``index_select`` of the axes of heads and tokens together, whatever the mix of orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attn_rewrite.backends.torch.dense import DenseSpace, size
from attn_rewrite.backends.torch.emit import Emitter, value_of
from attn_rewrite.cascade.expr import Expr, Rank, ranks_of
from attn_rewrite.cascade.reordered import Reordered
from attn_rewrite.graph import Builder, aten
from attn_rewrite.passes.reorder.settle import ROLE
from attn_rewrite.sizes import as_size


def emit_in_order(
    kernel: Callable[[Builder, Sequence[Any]], Any],
    found: Reordered,
    build: Builder,
    inputs: Sequence[Any],
) -> Any:
    """AV of ``kernel`` on reordered operands, its rows put back, and those of LSE with it."""
    q, k, v, *reads = inputs
    head = found.inner.inputs[1].ranks[1]
    moved = [
        gather_tokens(build, q, found.q, ("h", "q"), "into"),
        *(gather_tokens(build, t, found.kv, (head, "kv"), "into") for t in (k, v)),
    ]
    result = kernel(build, [*moved, *reads])
    if not isinstance(result, tuple):
        return gather_tokens(build, result, found.place, ("h", "q"), "back")
    out, lse = result
    wide = build.call(aten.unsqueeze.default, lse, -1)
    back = (gather_tokens(build, x, found.place, ("h", "q"), "back") for x in (out, wide))
    out, wide = back
    return out, build.call(aten.squeeze.dim, wide, -1)


def gather_tokens(build: Builder, tensor: Any, at: Expr, ranks: tuple[str, str], role: str) -> Any:
    """Rows of [b, heads, n, d] at token ``at`` (over the head and token ranks), in that order.

    Lengths are fixed; the batch may be dynamic.
    """
    # A length that tables fixed while the graph was made is still written as a symbol.
    heads, length = (as_size(value_of(tensor).shape[d]) for d in (1, 2))
    extents = {ranks[0]: heads, ranks[1]: length}
    frame = (ranks[1],) if ranks[0] not in ranks_of(at) else ranks
    device = value_of(tensor).device
    space = DenseSpace(build, device, torch.float32, frame, extents, {})
    flat = at if len(frame) == 1 else Rank(ranks[0]) * length + at
    index = Emitter(build, space).tensor(flat, torch.int64)
    if len(frame) == 1:
        return _marked(build.call(aten.index_select.default, tensor, 2, index), role)
    b, depth = size(build, tensor, 0), size(build, tensor, 3)
    rows = build.call(aten.reshape.default, tensor, [b, heads * length, depth])
    index = build.call(aten.reshape.default, index, [-1])
    rows = _marked(build.call(aten.index_select.default, rows, 1, index), "heads")
    return build.call(aten.reshape.default, rows, [b, heads, length, depth])


def _marked(gather: Any, role: str) -> Any:
    if isinstance(gather, fx.Node):
        gather.meta[ROLE] = role
    return gather
