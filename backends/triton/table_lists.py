"""Lists of tiles from a table of blocks, made where the table lies.

A table that lies on a GPU is not read back: what the other terms of the guard say of each tile is
decided on the host and kept (it depends on sizes alone), and a sort on the device joins both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attn_rewrite.backends.triton.lists import covers
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.cascade.cover import Cover
from attn_rewrite.cascade.expr import KV, TRUE, Call, Const, Expr, Q, Read, conjunction, conjuncts
from attn_rewrite.cascade.expr import B as BATCH
from attn_rewrite.cascade.expr import H as HEAD


@dataclass(frozen=True)
class TableGuard:
    """A guard that is a read of one truth per block, and ``rest``, which reads nothing.

    ``sides`` are those of the blocks of queries and keys; ``leading`` the ranks of the first
    dimensions of the table.
    """

    table: Read
    rest: Expr
    sides: tuple[int, int]

    @property
    def leading(self) -> tuple[Expr, ...]:
        """Coordinates of the dimensions before the blocks: batch entry and head."""
        return self.table.index[:-2]


@lru_cache(maxsize=128)
def table_guard(guard: Expr, schedule: Schedule, rows: str) -> TableGuard | None:
    """The guard as a table of blocks, if it is one and every tile lies within one block."""
    terms = conjuncts(guard)
    reads = [t for t in terms if isinstance(t, Read)]
    rest = conjunction(tuple(t for t in terms if not isinstance(t, Read)))
    if len(reads) != 1 or any(_reads(t) for t in terms if not isinstance(t, Read)):
        return None
    (table,) = reads
    if len(table.index) < 2 or any(i not in (BATCH, HEAD, Const(0)) for i in table.index[:-2]):
        return None
    sides = tuple(_side(i, rank) for i, rank in zip(table.index[-2:], (Q, KV), strict=True))
    own = (schedule.block_rows // schedule.pack, schedule.block_along)
    of_tile = own if rows == "q" else own[::-1]
    if any(s == 0 or s % t for s, t in zip(sides, of_tile, strict=True)):
        return None
    return TableGuard(table, rest, (sides[0], sides[1]))


def _reads(expr: Expr) -> bool:
    return isinstance(expr, Read) or any(_reads(c) for c in expr.children)


def _side(index: Expr, rank: Expr) -> int:
    match index:
        case Call("floordiv", (inner, Const(side))) if inner == rank:
            return int(side)
    return 0


def lists_of_table(
    guard: TableGuard, schedule: Schedule, sizes: Sequence[int], rows: str, table: Tensor
) -> tuple[Tensor, Tensor]:
    """``tiles`` int32 [b or 1, h or 1, blocks, 3] and ``columns`` int32, as `lists` describes them.

    ``sizes`` = [b, h, q, kv]; ``table`` bool (or 0 and 1), a dimension of one is shared.  The tiles
    of a block lie at the beginning of a place for all of them, so no shape depends on the table.
    """
    static = _static(guard.rest, schedule, tuple(sizes), rows, table.device)
    own = (schedule.block_rows // schedule.pack, schedule.block_along)
    of_tile = own if rows == "q" else own[::-1]
    kept = _leading(table != 0, guard, sizes)
    for dim, (side, tile, length) in enumerate(
        zip(guard.sides, of_tile, sizes[2:], strict=True), -2
    ):
        places = torch.arange(-(-length // tile), device=table.device) * tile // side
        kept = kept.index_select(dim, places)
    if rows != "q":
        kept = kept.mT
    cells = torch.where(kept, static, int(Cover.EMPTY))
    # Partial tiles first, then full ones, each in order; empty ones are beyond the end.
    order = torch.where(cells == int(Cover.EMPTY), 3, cells)
    columns = order.argsort(dim=-1, stable=True).to(torch.int32)
    partial = (cells == int(Cover.PARTIAL)).sum(-1)
    full = (cells == int(Cover.FULL)).sum(-1)
    begin = torch.arange(partial.numel(), device=table.device).view_as(partial) * cells.shape[-1]
    tiles = torch.stack([begin, begin + partial, begin + partial + full], -1)
    return tiles.to(torch.int32), columns.flatten()


def _leading(table: Tensor, guard: TableGuard, sizes: Sequence[int]) -> Tensor:
    """The table as [b or 1, h or 1, blocks, blocks], as many as the lists have."""
    extents = {BATCH: sizes[0], HEAD: sizes[1]}
    found = table
    for place, rank in enumerate(guard.leading):
        if rank == Const(0):
            found = found.narrow(place, 0, 1)
    order = [guard.leading.index(r) for r in (BATCH, HEAD) if r in guard.leading]
    blocks = [table.ndim - 2, table.ndim - 1]
    zero = [i for i, r in enumerate(guard.leading) if r == Const(0)]
    found = found.permute(*zero, *order, *blocks)
    shape = [extents[r] if r in guard.leading else 1 for r in (BATCH, HEAD)]
    own = [found.shape[len(zero) + order.index(guard.leading.index(r))] if r in guard.leading else 1
           for r in (BATCH, HEAD)]  # fmt: skip
    return found.reshape(*own, *found.shape[-2:]).expand(*shape, -1, -1)


@lru_cache(maxsize=64)
def _static(
    rest: Expr, schedule: Schedule, sizes: tuple[int, ...], rows: str, device: torch.device
) -> Tensor:
    """What the terms without reads say of each tile: int8 of `Cover`, [b or 1, h or 1, ., .]."""
    batch, heads, q_len, kv_len = sizes
    found = covers(
        rest if rest != TRUE else KV >= 0, schedule, q_len=q_len, kv_len=kv_len, heads=heads,
        batch=batch, rows=rows,
    )  # fmt: skip
    return torch.from_numpy(np.stack([np.stack(of_entry) for of_entry in found])).to(device)
