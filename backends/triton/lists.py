"""Lists of tiles: for each block of rows the partial and the full tiles, ragged, as int32 tensors.

``tiles[b, h, block] = (begin, full, end)`` are places in ``columns``: tiles from ``begin`` to
``full`` are partial (their guard is evaluated), from ``full`` to ``end`` full.  A dimension of one
is shared by all batch entries or heads.  Both sides of a tile are those of the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.cascade.cover import Cells, Cover, block_cover
from attn_rewrite.cascade.expr import Expr, Read, ranks_of, walk
from attn_rewrite.cascade.interval import Interval, evaluate

Table = npt.NDArray[np.generic]
Int32 = npt.NDArray[np.int32]
_Frozen = tuple[tuple[str, tuple[int, ...], str, bytes], ...]


@dataclass(frozen=True, eq=False)
class TileLists:
    """``tiles`` int32 [b or 1, h or 1, blocks, 3] and ``columns`` int32 [kept tiles]."""

    tiles: Int32
    columns: Int32
    total: int

    @property
    def kept(self) -> int:
        """Tiles that run, over the batch entries and heads that have lists of their own."""
        return len(self.columns)

    @property
    def full(self) -> int:
        """Tiles that run without mask arithmetic."""
        return int((self.tiles[..., 2] - self.tiles[..., 1]).sum())


def list_schedule(schedule: Schedule) -> Schedule:
    """The schedule with lists; heads are packed only where blocks then hold whole positions."""
    packs = schedule.block_rows % schedule.pack == 0
    return schedule.with_(skipping="lists", pack=schedule.pack if packs else 1)


def make_lists(
    guard: Expr,
    schedule: Schedule,
    *,
    q_len: int,
    kv_len: int,
    heads: int,
    batch: int,
    rows: str = "q",
    tables: Mapping[str, Table] | None = None,
) -> TileLists:
    """The lists of ``guard`` for blocks of ``rows`` (``q``, or ``kv`` for gradients of keys).

    ``tables`` are values of tensors that the guard reads, in the dimensions of its reads; what
    depends on other tensors is partial.  Empty and full tiles are proven.
    """
    known = {n: np.asarray(t) for n, t in (tables or {}).items()}
    frozen = tuple((n, t.shape, t.dtype.str, t.tobytes()) for n, t in sorted(known.items()))
    return _lists(guard, schedule, q_len, kv_len, heads, batch, rows, frozen)


@lru_cache(maxsize=128)
def _lists(
    guard: Expr,
    schedule: Schedule,
    q_len: int,
    kv_len: int,
    heads: int,
    batch: int,
    rows: str,
    frozen: _Frozen,
) -> TileLists:
    tables = {n: np.frombuffer(raw, np.dtype(d)).reshape(s) for n, s, d, raw in frozen}
    return _assembled(
        covers(guard, schedule, q_len=q_len, kv_len=kv_len, heads=heads, batch=batch, rows=rows,
               tables=tables)
    )  # fmt: skip


def covers(
    guard: Expr,
    schedule: Schedule,
    *,
    q_len: int,
    kv_len: int,
    heads: int,
    batch: int,
    rows: str,
    tables: Mapping[str, Table] | None = None,
) -> list[list[Cells]]:
    """The cover of ``guard`` by tiles, for each batch entry and head that it tells apart.

    Rows of a cover are blocks of ``rows``; a full tile that reaches beyond the length is partial.
    """
    used = ranks_of(guard)
    entries: list[int | None] = list(range(batch)) if "b" in used else [None]
    each: list[int | None] = list(range(heads)) if "h" in used else [None]
    block_rows = schedule.block_rows // schedule.pack
    sides = (block_rows, schedule.block_along)
    block_q, block_kv = sides if rows == "q" else sides[::-1]

    def cells(entry: int | None, head: int | None) -> Cells:
        found = block_cover(
            guard, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv, head=head,
            batch=entry, extents={"h": heads, "b": batch}, tables=tables or {},
        )  # fmt: skip
        return found if rows == "q" else found.T

    short = (kv_len if rows == "q" else q_len) % schedule.block_along != 0
    return [[_short_last(cells(e, h), short=short) for h in each] for e in entries]


def _short_last(cells: Cells, *, short: bool) -> Cells:
    """A full tile that reaches beyond the length is a partial one."""
    if short and cells.shape[1]:
        cells = cells.copy()
        last = cells[:, -1]
        last[last == Cover.FULL] = Cover.PARTIAL
    return cells


def _assembled(covers: list[list[Cells]]) -> TileLists:
    """Lists from covers by batch entry and head."""
    blocks = covers[0][0].shape[0]
    tiles = np.zeros((len(covers), len(covers[0]), blocks, 3), np.int32)
    columns: list[npt.NDArray[np.int64]] = []
    place = 0
    for e, of_entry in enumerate(covers):
        for h, cells in enumerate(of_entry):
            for block, row in enumerate(cells):
                partial, full = (
                    np.flatnonzero(row == Cover.PARTIAL),
                    np.flatnonzero(row == Cover.FULL),
                )
                middle, end = place + len(partial), place + len(partial) + len(full)
                tiles[e, h, block] = (place, middle, end)
                columns += [partial, full]
                place = end
    flat = np.concatenate(columns) if columns else np.zeros(0, np.int64)
    total = sum(c.size for of_entry in covers for c in of_entry)
    return TileLists(tiles, flat.astype(np.int32), total)


def blockwise_tables(guard: Expr) -> frozenset[str]:
    """Tensors of a guard that hold one truth for whole blocks: worth reading before the launch."""
    reads = list(_reads(guard))
    fine = {r.tensor for r in reads if any(map(_is_position, r.index))}
    return frozenset(r.tensor for r in reads) - fine


def _reads(guard: Expr) -> Iterator[Read]:
    return (n for n in walk(guard) if isinstance(n, Read))


def _is_position(index: Expr) -> bool:
    """True if neighbouring positions have different indices."""
    for rank in ranks_of(index) & {"q", "kv"}:
        box = {r: Interval(np.asarray(0.0), np.asarray(0.0)) for r in ranks_of(index)}
        box[rank] = Interval(np.asarray(0.0), np.asarray(7.0))
        found = evaluate(index, box)
        if bool(found.lo != found.hi):
            return True
    return False
