"""Block cover of a mask: which (query block, key block) tiles are empty, partial or full.

A mask is an expression over ``b, h, q, kv`` (True = keep).  Where it factors over digits of the
positions (windows, grids, blocks), the kept pairs of every block are counted (`counting`).  Every
other mask is decided by interval arithmetic over the box of a block, with sums normalised to affine
forms first so that ``q - kv`` is one interval and not two.  Blocks that intervals leave open are
settled by evaluation at points (a kept and a dropped point prove PARTIAL) and by splitting the box,
so the answer is exact for every mask of positions; what stays open when the budget of boxes is
spent, or depends on data, is PARTIAL.  EMPTY and FULL are always proven.

No token-level matrix is built: the cost follows the number of blocks and the length of the borders
between kept and dropped regions.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.counting import block_pairs
from attn_rewrite.cascade.expr import Const, Expr, Extent, Rank, Read, ranks_of, substitute, walk
from attn_rewrite.cascade.interval import Interval, truth

Bools = npt.NDArray[np.bool_]
Cells = npt.NDArray[np.int8]
Ints = npt.NDArray[np.int64]
Table = npt.NDArray[np.generic]

# Boxes evaluated beyond one per block before open blocks are left PARTIAL.
REFINE_BUDGET = 4_000_000
# Boxes followed to count kept pairs.
COUNT_BUDGET = 2_500_000
_CHUNK = 1 << 16  # boxes evaluated at a time; bounds memory, and intermediates stay in the cache


class Cover(enum.IntEnum):
    """What a mask keeps of a block."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True)
class BlockCounts:
    """Blocks of one head: ``kept`` of ``total``, ``full`` of the kept; ``elements`` kept pairs.

    ``elements`` is None where the borders are too long to follow, or depend on data.
    """

    kept: int
    total: int
    full: int
    elements: int | None
    pairs: int

    @property
    def block_density(self) -> float:
        """Kept blocks over all blocks."""
        return self.kept / self.total if self.total else 0.0

    @property
    def element_density(self) -> float | None:
        """Kept pairs over all pairs, where counted."""
        if self.elements is None:
            return None
        return self.elements / self.pairs if self.pairs else 0.0


def heads_differ(mask: Expr) -> bool:
    """True if the mask mentions the head, so that heads need covers of their own."""
    return "h" in ranks_of(mask)


def depends_on_data(mask: Expr) -> bool:
    """True if the mask reads a tensor."""
    return any(isinstance(node, Read) for node in walk(mask))


@dataclass(frozen=True)
class _Question:
    """A mask with everything fixed but q and kv: extents as literals, the range of b and h."""

    mask: Expr
    ranks: Mapping[str, Interval]
    tables: Mapping[str, Table] = field(default_factory=dict)

    def ask(self, q: tuple[Ints, Ints], kv: tuple[Ints, Ints]) -> Interval:
        """Truth over boxes of inclusive bounds: [1, 1] kept, [0, 0] dropped, [0, 1] open."""
        ranks = {**self.ranks, "q": Interval(*q), "kv": Interval(*kv)}
        return truth(self.mask, ranks, self.tables)


def block_cover(
    mask: Expr,
    *,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    head: int | None = None,
    batch: int | None = None,
    extents: Mapping[str, int] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> Cells:
    """Decide every block of ``mask``; the last block of a rank may be short.

    ``head`` / ``batch`` fix one coordinate; None means *for every* head / batch (EMPTY: empty for
    all of them).  ``extents`` gives further extents (``h``, ``b``, ranks of tables); ``tables`` the
    values of tensors known now, in the ranks of their reads.  Other reads are unknown: only what
    holds whatever they hold is decided.

    Returns int8 of shape [ceil(q_len / block_q), ceil(kv_len / block_kv)] of `Cover`.
    """
    sizes = {**(extents or {}), "q": q_len, "kv": kv_len}
    question = _question(mask, head, batch, sizes, tables or {})
    q, kv = _bounds(q_len, block_q), _bounds(kv_len, block_kv)
    pairs = _pairs(question.mask, sizes, (block_q, block_kv))
    if pairs is not None:
        return _cells(pairs, _areas(q, kv))
    out = np.empty((len(q[0]), len(kv[0])), np.int8)
    rows = max(1, _CHUNK // max(1, len(kv[0])))
    budget = REFINE_BUDGET
    for start in range(0, len(q[0]), rows):
        part = slice(start, start + rows)
        held = question.ask((q[0][part, None], q[1][part, None]), (kv[0][None], kv[1][None]))
        cells = out[part]
        cells[...] = np.broadcast_to(held.lo + held.hi, cells.shape)
        open_q, open_kv = np.nonzero(cells == Cover.PARTIAL)
        boxes = _Boxes(
            np.arange(len(open_q)),
            q[0][part][open_q], q[1][part][open_q], kv[0][open_kv], kv[1][open_kv],
        )  # fmt: skip
        cells[open_q, open_kv], used = _settle(question, boxes, budget)
        budget -= used
    return out


def _question(
    mask: Expr,
    head: int | None,
    batch: int | None,
    sizes: Mapping[str, int],
    tables: Mapping[str, Table],
) -> _Question:
    ranks: dict[str, Interval] = {}
    for name, index in (("h", head), ("b", batch)):
        last = index if index is not None else sizes.get(name, 0) - 1
        top = np.inf if last < 0 else float(last)
        ranks[name] = Interval(np.asarray(float(index or 0)), np.asarray(top))
    literals: dict[Expr, Expr] = {Extent(name): Const(size) for name, size in sizes.items()}
    fixed = (("h", head), ("b", batch))
    literals |= {Rank(name): Const(index) for name, index in fixed if index is not None}
    return _Question(substitute(mask, literals), ranks, tables)


def _pairs(mask: Expr, sizes: Mapping[str, int], block: tuple[int, int]) -> Ints | None:
    """Kept pairs of every block where they have a closed form."""
    return block_pairs(
        mask, q_len=sizes["q"], kv_len=sizes["kv"], block_q=block[0], block_kv=block[1]
    )


def _areas(q: tuple[Ints, Ints], kv: tuple[Ints, Ints]) -> Ints:
    return np.asarray((q[1] - q[0] + 1)[:, None] * (kv[1] - kv[0] + 1)[None])


def _cells(pairs: Ints, areas: Ints) -> Cells:
    """`Cover` of blocks whose kept pairs are known."""
    cells: Cells = ((pairs > 0).astype(np.int8) + (pairs == areas)).astype(np.int8)
    return cells


def _bounds(length: int, block: int) -> tuple[Ints, Ints]:
    """First and last coordinate of every block of a rank."""
    low = np.arange(0, length, block, dtype=np.int64)
    return low, np.minimum(low + block, length) - 1


@dataclass(frozen=True)
class _Boxes:
    """Rectangles of coordinates (inclusive bounds), each part of the block ``owner``."""

    owner: Ints
    q_lo: Ints
    q_hi: Ints
    kv_lo: Ints
    kv_hi: Ints

    def __len__(self) -> int:
        return len(self.owner)

    def take(self, keep: Bools) -> _Boxes:
        """The boxes where ``keep`` holds."""
        names = ("owner", "q_lo", "q_hi", "kv_lo", "kv_hi")
        return _Boxes(*(getattr(self, n)[keep] for n in names))

    def area(self) -> Ints:
        """Pairs in each box."""
        return (self.q_hi - self.q_lo + 1) * (self.kv_hi - self.kv_lo + 1)

    def truth(self, question: _Question) -> Interval:
        """The mask over each box."""
        low, high = np.empty(len(self)), np.empty(len(self))
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            held = question.ask(
                (self.q_lo[part], self.q_hi[part]), (self.kv_lo[part], self.kv_hi[part])
            )
            low[part], high[part] = held.lo, held.hi
        return Interval(low, high)

    def quarters(self) -> _Boxes:
        """Halves of both sides; sides of length one stay whole."""
        q_mid, kv_mid = (self.q_lo + self.q_hi) // 2, (self.kv_lo + self.kv_hi) // 2
        parts = [
            _Boxes(self.owner, q_lo, q_hi, kv_lo, kv_hi)
            for q_lo, q_hi in ((self.q_lo, q_mid), (q_mid + 1, self.q_hi))
            for kv_lo, kv_hi in ((self.kv_lo, kv_mid), (kv_mid + 1, self.kv_hi))
        ]
        parts = [p.take((p.q_lo <= p.q_hi) & (p.kv_lo <= p.kv_hi)) for p in parts]
        names = ("owner", "q_lo", "q_hi", "kv_lo", "kv_hi")
        return _Boxes(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def _settle(question: _Question, boxes: _Boxes, budget: int) -> tuple[Cells, int]:
    """Decide blocks that intervals left open; `_Boxes.owner` numbers them.  Also boxes used."""
    count = len(boxes)
    kept, dropped, unknown = (np.zeros(count, np.bool_) for _ in range(3))
    used = 0

    def open_boxes(candidates: _Boxes) -> _Boxes:
        done = (kept & dropped) | unknown
        return candidates.take(~done[candidates.owner])

    while len(boxes) and used + 4 * len(boxes) <= budget:
        for place in _probes(boxes):
            points = open_boxes(place)
            held = points.truth(question)
            kept[points.owner[held.lo == 1]] = True
            dropped[points.owner[held.hi == 0]] = True
            unknown[points.owner[(held.lo != 1) & (held.hi != 0)]] = True
            used += len(points)
        boxes = open_boxes(boxes).quarters()
        held = boxes.truth(question)
        used += len(boxes)
        kept[boxes.owner[held.lo == 1]] = True
        dropped[boxes.owner[held.hi == 0]] = True
        boxes = open_boxes(boxes.take((held.lo != 1) & (held.hi != 0)))
    unknown[boxes.owner] = True
    cells = np.where(kept, Cover.FULL, Cover.EMPTY)
    return np.where((kept & dropped) | unknown, Cover.PARTIAL, cells).astype(np.int8), used


def _probes(boxes: _Boxes) -> tuple[_Boxes, ...]:
    """Points of each box: its corners and one inside, off the symmetric places."""
    q_in = boxes.q_lo + (boxes.q_hi - boxes.q_lo) * 3 // 7
    kv_in = boxes.kv_lo + (boxes.kv_hi - boxes.kv_lo) * 5 // 7
    places = [(q, kv) for q in (boxes.q_lo, boxes.q_hi) for kv in (boxes.kv_lo, boxes.kv_hi)]
    return tuple(_Boxes(boxes.owner, q, q, kv, kv) for q, kv in [*places, (q_in, kv_in)])


def block_counts(
    mask: Expr,
    *,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    head: int | None = None,
    batch: int | None = None,
    extents: Mapping[str, int] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> BlockCounts:
    """Count the blocks of `block_cover` (same arguments), and kept pairs where that is cheap."""
    sizes = {**(extents or {}), "q": q_len, "kv": kv_len}
    question = _question(mask, head, batch, sizes, tables or {})
    q, kv = _bounds(q_len, block_q), _bounds(kv_len, block_kv)
    areas = _areas(q, kv)
    pairs = _pairs(question.mask, sizes, (block_q, block_kv))
    elements: int | None
    if pairs is not None:
        cells, elements = _cells(pairs, areas), int(pairs.sum())
    else:
        cells = block_cover(
            mask, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv,
            head=head, batch=batch, extents=extents, tables=tables,
        )  # fmt: skip
        elements = _elements(question, cells, q, kv)
    return BlockCounts(
        kept=int((cells != Cover.EMPTY).sum()),
        total=cells.size,
        full=int((cells == Cover.FULL).sum()),
        elements=elements,
        pairs=q_len * kv_len,
    )


def _elements(
    question: _Question, cells: Cells, q: tuple[Ints, Ints], kv: tuple[Ints, Ints]
) -> int | None:
    """Kept pairs of decided blocks; None where the borders are too long, or depend on data."""
    at_q, at_kv = np.nonzero(cells == Cover.PARTIAL)
    boxes = _Boxes(
        np.zeros(len(at_q), np.int64), q[0][at_q], q[1][at_q], kv[0][at_kv], kv[1][at_kv]
    )
    inside = _area_kept(question, boxes)
    if inside is None:
        return None
    return inside + int(_areas(q, kv)[cells == Cover.FULL].sum())


def _area_kept(question: _Question, boxes: _Boxes) -> int | None:
    """Kept pairs inside ``boxes`` by splitting; None if a point is undecided or the budget ends."""
    total, used = 0, 0
    while len(boxes):
        used += len(boxes)
        if used > COUNT_BUDGET:
            return None
        held = boxes.truth(question)
        total += int(boxes.area()[held.lo == 1].sum())
        boxes = boxes.take((held.lo != 1) & (held.hi != 0))
        if (boxes.area() == 1).any():
            return None
        boxes = boxes.quarters()
    return total
