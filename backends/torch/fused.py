"""Rows of blocks on PyTorch's fused CPU attention, which gives the log-sum-exp of its rows.

A row whose keys are one range is one call for all heads, on views of K and V; where the guard cuts
through its blocks the call gets a mask.  Rows that see a few ranges run in pieces, long ones on
views; rows that see scattered keys gather them, and what is too wide for the scratch memory runs in
parts.  Pieces are weighted by their sums: the split of Flash-Decoding (Dao et al., 2023),
reassociated and otherwise exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attn_rewrite.backends.torch.form import linear_score
from attn_rewrite.backends.torch.patterns import SIDE, Guard
from attn_rewrite.backends.torch.schedule import Row, Span, clipped
from attn_rewrite.backends.torch.tiles import MAX_PARTS, Problem
from attn_rewrite.cascade.expr import ranks_of

# Elements of the mask and the gathered keys and values of one piece, in every lane: 1 MB of
# float32.  With half of it lists of scattered blocks take a third longer.
SCRATCH = 1 << 18
# Elements of the output of one call: more heads and batch entries run one after the other.
OUTPUTS = 1 << 17
# Keys of a range that is worth a call of its own: merging its output costs less than a copy.
WORTH_CALL = 3 * SIDE
# Scores a row has on average before one call for it pays; smaller ones run as stacks of tiles.
WORTH_ROW = 1 << 14
# Scores a call has on average before PyTorch's threads share it; smaller ones run side by side.
WORTH_SHARING = 1 << 19
# Queries of a short row that PyTorch's kernel gives to one thread.
_SLICE = 32

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Unit:
    """One row of blocks, and the batch entries and query heads it runs for."""

    batch: Span
    heads: Span
    row: Row

    @property
    def slices(self) -> int:
        """Parts that PyTorch's kernel can share among threads."""
        count = (self.batch[1] - self.batch[0]) * (self.heads[1] - self.heads[0])
        return count * -(-self.row.height // _SLICE)


@dataclass(frozen=True, eq=False)
class _Mask:
    """What is added to the scores of a piece, [1, 1, queries, keys], and queries without keys."""

    added: Tensor | None = None
    blank: Tensor | None = None


def fits(problem: Problem) -> bool:
    """Whether the fused kernel computes this problem: scores are a multiple of QK, rows are long.

    Heads of K and V must be equally wide, and every operand contiguous along them.
    """
    form, operands = problem.form, (problem.q, problem.k, problem.v)
    linear = linear_score(form.score)
    plain = linear is not None and linear.bias is None and form.sink is None and form.weight is None
    if not plain or problem.k.shape[3] != problem.v.shape[3]:
        return False
    if any(t.device.type != "cpu" or t.stride(3) != 1 for t in operands):
        return False
    areas = [r.height * r.width for part in problem.schedule.parts for r in part.rows]
    return sum(areas) >= WORTH_ROW * max(len(areas), 1)


def units(problem: Problem) -> list[Unit]:
    """Rows for all heads at once where they are the same and the output of a call is small.

    Rows that gather their keys and need no mask come last, head by head: the keys and values of one
    head stay in the cache for all of them.
    """
    found: list[Unit] = []
    gathering: list[Unit] = []
    for part in problem.schedule.parts:
        for row in part.rows:
            made = list(_units(problem, part.heads, row))
            alone = not row.masked and len(row.keys) > 1
            (gathering if alone else found).extend(made)
    gathering.sort(key=lambda unit: (unit.batch, unit.heads))
    return found + gathering


def shared(planned: Sequence[Unit], threads: int) -> bool:
    """Whether every call is worth the threads of PyTorch, so that one memory is enough.

    Rows that gather their keys have a call for each head.
    """
    if not planned or any(len(unit.row.keys) > MAX_PARTS for unit in planned):
        return False
    scores = [unit.slices * _SLICE * unit.row.width for unit in planned]
    slices = min(unit.slices for unit in planned)
    return slices >= 2 * threads and sum(scores) >= WORTH_SHARING * len(scores)


def _units(problem: Problem, heads: Span, row: Row) -> Iterator[Unit]:
    """One row for the given heads of the schedule."""
    ranks, g = ranks_of(problem.form.guard) if row.masked else frozenset(), problem.group
    first, last = heads[0] * g, heads[1] * g
    fit = max(OUTPUTS // (row.height * problem.v.shape[3]), 1)
    if "h" in ranks:
        step = 1
    elif row.masked or len(row.keys) == 1:
        step = max(fit // g, 1) * g
    else:
        step = g
    entries = 1 if "b" in ranks else max(fit // min(step, last - first), 1)
    for batch in _each((0, problem.q.shape[0]), entries):
        for some in _each((first, last), step):
            yield Unit(batch, some, row)


def _each(span: Span, step: int) -> list[Span]:
    return [(at, min(at + step, span[1])) for at in range(*span, step)]


def pieces(row: Row, depth: int, room: int) -> list[Row]:
    """The row as rows of fewer keys whose masks and gathered keys fit ``room`` elements.

    Of a few ranges each that has at least `WORTH_CALL` keys has pieces of its own, the others are
    taken together.  Keys of one range that need no mask are never cut.
    """
    if len(row.keys) > MAX_PARTS:
        return _cut(row, depth, room)
    columns: list[Span] = []
    for low, high in row.keys:
        start = columns[-1][1] if columns else 0
        columns.append((start, start + high - low))
    long = [[c] for c in columns if c[1] - c[0] >= WORTH_CALL]
    short = [c for c in columns if c[1] - c[0] < WORTH_CALL]
    found = [_part(row, group) for group in (*long, short) if group]
    return [piece for part in found for piece in _cut(part, depth, room)]


def _cut(row: Row, depth: int, room: int) -> list[Row]:
    each = row.height * bool(row.masked) + 2 * depth * (len(row.keys) > 1)
    most = room // each if each else row.width
    if row.width <= most:
        return [row]
    most = max(most // SIDE, 1) * SIDE
    step = -(-row.width // -(-row.width // most))
    step = min(-(-step // SIDE) * SIDE, most)
    return [_part(row, [span]) for span in _each((0, row.width), step)]


def _part(row: Row, columns: Sequence[Span]) -> Row:
    """Some of the columns of a row."""
    keys: list[Span] = []
    masked: list[Span] = []
    at = 0
    for start, stop in columns:
        keys += clipped(row.keys, start, stop)
        for low, high in row.masked:
            first, last = max(low, start) - start, min(high, stop) - start
            if first < last:
                masked.append((at + first, at + last))
        at += stop - start
    certain = sum(high - low for low, high in masked) < at
    return replace(row, keys=tuple(keys), masked=tuple(masked), certain=certain)


class FusedKernel:
    """Runs rows one after the other in the same memory."""

    def __init__(self, problem: Problem, planned: Sequence[Unit], room: int) -> None:
        self.problem, self.guard = problem, Guard(problem)
        linear = linear_score(problem.form.score)
        assert linear is not None
        self.scale = linear.scale
        self.room, depth = room, problem.k.shape[3]
        rows = {id(u.row): u.row for u in planned}.values()
        # What the largest piece may need; pieces are made when they run, as rows may be many.
        masked = [r.height * min(r.width, max(room // r.height, SIDE)) for r in rows if r.masked]
        self._memory = problem.q.new_empty(max(masked, default=0))
        self._made: tuple[object, _Mask] | None = None
        gathered = [min(r.width, max(room // (2 * depth), SIDE)) for r in rows if len(r.keys) > 1]
        size = depth * max(gathered, default=0)
        self._keys, self._values = problem.k.new_empty(size), problem.v.new_empty(size)

    def run(self, unit: Unit, out: Tensor) -> None:
        """The output of a row into ``out`` [b, h, q, f] of all rows."""
        place = out[slice(*unit.batch), slice(*unit.heads), slice(*unit.row.queries)]
        parts = pieces(unit.row, self.problem.k.shape[3], self.room)
        like = self.problem.q
        total = place if place.dtype == like.dtype else like.new_empty(place.shape)
        sums = like.new_empty(place.shape[:-1] if len(parts) > 1 else 0)
        for n, piece in enumerate(parts):
            for where, o, lse in self._calls(unit, piece):
                if n:
                    merge(total[where], sums[where], o, lse)
                    continue
                total[where].copy_(o)
                if len(parts) > 1:
                    sums[where].copy_(lse)
        if total is not place:
            place.copy_(total)

    def _calls(
        self, unit: Unit, piece: Row
    ) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Batch entries and heads of the unit, their outputs, and log-sum-exps [b, h, q]."""
        mask = self._mask(unit, piece)
        index = _index(piece.keys) if len(piece.keys) > 1 else None
        for batch, heads, shared in self._groups(unit, piece):
            q = self.problem.q[slice(*batch), slice(*heads), slice(*piece.queries)]
            k = _rows_of(self.problem.k[slice(*batch), slice(*shared)], piece, index, self._keys)
            v = _rows_of(self.problem.v[slice(*batch), slice(*shared)], piece, index, self._values)
            if k.shape[1] != q.shape[1]:
                k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
            o, lse = _attend(q, k, v, 0.0, False, attn_mask=mask.added, scale=self.scale)
            if mask.blank is not None:
                o.masked_fill_(mask.blank, 0.0)
                lse.masked_fill_(mask.blank[..., 0], -math.inf)
            yield (_from(batch, unit.batch[0]), _from(heads, unit.heads[0])), o, lse

    def _groups(self, unit: Unit, piece: Row) -> Iterator[tuple[Span, Span, Span]]:
        """Batch entries, query heads and key heads of each call: what fits the scratch memory."""
        group, gathers = self.problem.form.group, len(piece.keys) > 1
        fit = max(1, len(self._keys) // (piece.width * self.problem.k.shape[3]))
        for batch in _each(unit.batch, 1 if gathers else unit.batch[1]):
            if group == 1:
                for heads in _each(unit.heads, fit if gathers else unit.heads[1]):
                    yield batch, heads, heads
                continue
            for key in range(unit.heads[0] // group, -(-unit.heads[1] // group)):
                first, last = max(key * group, unit.heads[0]), min((key + 1) * group, unit.heads[1])
                yield batch, (first, last), (key, key + 1)

    def _mask(self, unit: Unit, piece: Row) -> _Mask:
        """The guard over a piece; kept for as long as the next piece has the same."""
        if not piece.masked:
            return _Mask()
        # One head and batch entry stand for all, as `units` keeps apart those that differ.
        kept = self.guard.parts(unit.batch[0], unit.heads[0] // self.problem.group, piece)
        # Parts that are equal are one tensor, which lives as long as this mask does.
        key = (piece.height, piece.width, [(at, id(keep)) for at, keep in kept])
        if self._made is not None and self._made[0] == key:
            return self._made[1]
        added = self._memory[: piece.height * piece.width].view(1, 1, piece.height, -1)
        if sum(high - low for low, high in piece.masked) < piece.width:
            added.zero_()
        minus = added.new_full((), -math.inf)
        for at, keep in kept:
            columns = added[..., at : at + keep.shape[-1]]
            torch.where(keep, minus.new_zeros(()), minus, out=columns)
        blank = None if piece.certain else added.amax(-1, keepdim=True) == -math.inf
        self._made = (key, _Mask(added, blank))
        self._kept = kept
        return self._made[1]


def merge(total: Tensor, sums: Tensor, result: Tensor, lse: Tensor) -> None:
    """Add attention over further keys to ``total`` [b, h, q, f] and ``sums`` [b, h, q], in place.

    ``sums`` and ``lse`` are log-sum-exps, -inf for a query without keys, whose result is 0.  The
    two weights of a query are one number and what it lacks to 1, whatever their rounding.
    """
    share = torch.sigmoid(lse - sums).masked_fill_(lse == -math.inf, 0.0)
    total.lerp_(result, share.unsqueeze(-1))
    torch.logaddexp(sums, lse, out=sums)


def _index(keys: Sequence[Span]) -> Tensor:
    """The positions of several ranges of keys."""
    low, high = np.asarray(keys, np.int64).T
    ends = np.cumsum(high - low)
    return torch.from_numpy(np.arange(ends[-1]) + np.repeat(high - ends, high - low))


def _rows_of(tensor: Tensor, piece: Row, index: Tensor | None, memory: Tensor) -> Tensor:
    """Rows of K or V [b, h, n, d] of a piece: a view, or gathered into ``memory``."""
    if index is None:
        return tensor[:, :, slice(*piece.keys[0])]
    shape = (*tensor.shape[:2], piece.width, tensor.shape[3])
    out = memory[: math.prod(shape)].view(shape)
    for b, h in itertools.product(range(shape[0]), range(shape[1])):
        torch.index_select(tensor[b, h], 0, index, out=out[b, h])
    return out


def _from(span: Span, start: int) -> slice:
    return slice(span[0] - start, span[1] - start)
