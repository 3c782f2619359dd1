"""What the tiled kernel will run: rows of blocks and the keys each one sees.

Pure numpy: a `Schedule` is made from the guard, the lengths and the block size before any tensor is
touched, and is all the kernel follows, so its counts are the counts of what runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.cover import Cells, Cover, block_cover, heads_differ
from attn_rewrite.cascade.expr import Expr, Read, ranks_of, tensors_of, walk
from attn_rewrite.cascade.interval import Interval, evaluate

Table = npt.NDArray[np.generic]
Span = tuple[int, int]  # half-open range

# Scores a tile may hold, in elements: 1 MB of float32 for each thread stays in its cache.
TILE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Row:
    """One block of queries and the keys it sees.

    ``queries`` is a range of query positions, ``keys`` ranges of key positions in the order of the
    columns of the score tile, ``masked`` ranges of columns where the guard must be evaluated,
    ``certain`` says that every query keeps a key.  ``kept``/``full`` count blocks.
    """

    queries: Span
    keys: tuple[Span, ...]
    masked: tuple[Span, ...]
    certain: bool
    kept: int
    full: int

    @property
    def width(self) -> int:
        """Columns of the score tile."""
        return sum(stop - start for start, stop in self.keys)

    @property
    def height(self) -> int:
        """Queries of the row."""
        return self.queries[1] - self.queries[0]


@dataclass(frozen=True)
class Heads:
    """Consecutive heads that see the same blocks, and their rows.

    ``heads`` are query heads if the guard depends on the head, else all key heads.
    """

    heads: Span
    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything the kernel runs for one batch entry; rows that see nothing are left out.

    Two are equal if they are one: `make_schedule` makes each once, and what is kept for one is
    found without a look at all its rows.

    ``per_head``: the guard depends on the head, and `Heads.heads` counts query heads.
    """

    parts: tuple[Heads, ...]
    per_head: bool
    total: int
    group: int

    def counts(self) -> TileCounts:
        """Blocks over all query heads."""
        each = [(h.heads[1] - h.heads[0], r) for h in self.parts for r in h.rows]
        times = 1 if self.per_head else self.group
        return TileCounts(
            executed=times * sum(n * r.kept for n, r in each),
            total=self.total,
            full=times * sum(n * r.full for n, r in each),
            pairs=times * sum(n * r.width * r.height for n, r in each),
        )


@dataclass(frozen=True)
class TileCounts:
    """Blocks executed, of a dense total, without mask arithmetic; and score elements computed."""

    executed: int
    total: int
    full: int
    pairs: int

    @property
    def density(self) -> float:
        """Executed blocks over all blocks."""
        return self.executed / self.total if self.total else 0.0


def make_schedule(
    guard: Expr,
    *,
    q_len: int,
    kv_len: int,
    block: int,
    heads: int,
    group: int = 1,
    tables: Mapping[str, Table] | None = None,
) -> Schedule:
    """The schedule of ``guard`` for ``heads`` query heads, ``group`` of them per key head.

    ``tables`` are values of tensors the guard reads; used where they decide whole blocks.
    """
    known = {n: t for n, t in (tables or {}).items() if n in tensors_of(guard)}
    frozen = tuple((n, t.shape, t.dtype.str, t.tobytes()) for n, t in sorted(known.items()))
    return _schedule(guard, q_len, kv_len, block, heads, group, frozen)


@lru_cache(maxsize=256)
def _schedule(
    guard: Expr,
    q_len: int,
    kv_len: int,
    block: int,
    heads: int,
    group: int,
    frozen: tuple[tuple[str, tuple[int, ...], str, bytes], ...],
) -> Schedule:
    tables = {n: np.frombuffer(raw, np.dtype(d)).reshape(s) for n, s, d, raw in frozen}
    extents = {"h": heads}
    per_head = heads_differ(guard)

    def cover(head: int | None) -> Cells:
        return block_cover(
            guard, q_len=q_len, kv_len=kv_len, block_q=block, block_kv=block,
            head=head, extents=extents, tables=tables,
        )  # fmt: skip

    if not per_head:
        cells = cover(None)
        every = Heads((0, heads // group), _rows(cells, q_len, kv_len, block))
        return Schedule((every,), False, cells.size * heads, group)
    covers = [cover(h) for h in range(heads)]
    starts = [h for h in range(heads) if h == 0 or (covers[h] != covers[h - 1]).any()]
    spans = list(zip(starts, [*starts[1:], heads], strict=True))
    parts = tuple(Heads(s, _rows(covers[s[0]], q_len, kv_len, block)) for s in spans)
    return Schedule(parts, True, sum(c.size for c in covers), group)


def _rows(cells: Cells, q_len: int, kv_len: int, block: int) -> tuple[Row, ...]:
    return tuple(
        _row(cells[i], (i * block, min((i + 1) * block, q_len)), kv_len, block)
        for i in range(len(cells))
        if (cells[i] != Cover.EMPTY).any()
    )


def _row(cells: npt.NDArray[np.int8], queries: Span, kv_len: int, block: int) -> Row:
    kept = np.flatnonzero(cells != Cover.EMPTY)
    if kept[-1] - kept[0] + 1 != len(kept):
        # Keys are gathered anyway: masked blocks first, so that equal rows can share a tile.
        kept = kept[np.argsort(cells[kept], kind="stable")]
    spans = [(int(j) * block, min((int(j) + 1) * block, kv_len)) for j in kept]
    ends = np.cumsum([stop - start for start, stop in spans]).tolist()
    columns = [
        (end - (stop - start), end)
        for (start, stop), end, j in zip(spans, ends, kept, strict=True)
        if cells[j] == Cover.PARTIAL
    ]
    full = int((cells == Cover.FULL).sum())
    return Row(queries, merged(spans), merged(columns), full > 0, len(kept), full)


def merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Ranges with neighbours that touch joined."""
    out: list[Span] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def clipped(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """The part of concatenated ranges that lies in columns ``start`` to ``stop``."""
    out, at = [], 0
    for low, high in spans:
        first, last = max(low, low + start - at), min(high, low + stop - at)
        if first < last:
            out.append((first, last))
        at += high - low
    return tuple(out)


def block_tables(guard: Expr) -> frozenset[str]:
    """Tensors of a guard that hold one truth per block or head: worth reading before the kernel.

    They are read at ``q // c`` and ``kv // c``, at the head, or at literals, never at a position.
    """
    reads = [n for n in walk(guard) if isinstance(n, Read)]
    plain = {r.tensor for r in reads if any(_is_position(i) for i in r.index)}
    return frozenset(r.tensor for r in reads) - plain


def _is_position(index: Expr) -> bool:
    """True if neighbouring positions have different indices, or the batch decides."""
    if "b" in ranks_of(index):
        return True
    for rank in ranks_of(index) & {"q", "kv"}:
        box = {r: Interval(np.asarray(0.0), np.asarray(0.0)) for r in ranks_of(index)}
        box[rank] = Interval(np.asarray(0.0), np.asarray(7.0))
        found = evaluate(index, box)
        if bool(found.lo != found.hi):
            return True
    return False
