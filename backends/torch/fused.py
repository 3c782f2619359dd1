"""Rows of blocks on PyTorch's fused CPU attention, which gives the log-sum-exp of its rows.

A row whose keys are one range is one call for all heads, on views of K and V; where the guard cuts
through its blocks the call gets a mask.  Rows that see more ranges, or whose masks and copies are
too wide for the scratch memory, run in pieces, which are weighted by their sums: the split of
Flash-Decoding (Dao et al., 2023), reassociated and otherwise exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_rewrite.backends.torch.form import linear_score
from attn_rewrite.backends.torch.patterns import Guard
from attn_rewrite.backends.torch.pieces import SCRATCH, Copied, Piece, Plan, copies, plan_of
from attn_rewrite.backends.torch.schedule import Row, Span
from attn_rewrite.backends.torch.tiles import Problem
from attn_rewrite.cascade.expr import ranks_of

# Elements of the output of one call: more heads and batch entries run one after the other.
OUTPUTS = 1 << 16
# Scores a row has on average before one call for it pays; smaller ones run as stacks of tiles.
WORTH_ROW = 1 << 14
# Tasks that each lane has on average, so that none waits long for the last.
_TASKS = 4

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, eq=False)
class Unit:
    """One row of blocks in pieces, and the batch entries and query heads it runs for."""

    batch: Span
    heads: Span
    queries: Span
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class _Mask:
    """What is added to the scores of a piece, [1, 1, queries, keys], and queries without keys."""

    added: Tensor | None = None
    blank: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """Batch entries, query heads and the key heads that they read, of one call."""

    batch: Span
    heads: Span
    keys: Span


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


def units(problem: Problem, lanes: int) -> list[Unit]:
    """Rows for all heads at once where they are the same and the output of a call is small.

    Rows that copy their keys and need no mask come last, head by head: the keys and values of one
    head stay in the cache for all of them.
    """
    found: list[Unit] = []
    copying: list[Unit] = []
    parts, plan = problem.schedule.parts, _plan(problem)
    rows = sum((p.heads[1] - p.heads[0]) * len(p.rows) for p in parts) * problem.group
    most = -(-rows * problem.q.shape[0] // (_TASKS * lanes))
    for part, cuts in zip(parts, plan.parts, strict=True):
        for row, cut in zip(part.rows, cuts, strict=True):
            into = copying if copies(row) else found
            for batch, heads in _shares(problem, part.heads, row, most):
                into.append(Unit(batch, heads, row.queries, cut))
    copying.sort(key=lambda unit: (unit.batch, unit.heads))
    return found + copying


def _plan(problem: Problem) -> Plan:
    return plan_of(problem.schedule, problem.k.shape[3], SCRATCH)


def _shares(problem: Problem, heads: Span, row: Row, most: int) -> Iterator[tuple[Span, Span]]:
    """Batch entries and query heads that one row runs for, together at most ``most`` heads."""
    ranks, g = ranks_of(problem.form.guard) if row.masked else frozenset(), problem.group
    first, last = heads[0] * g, heads[1] * g
    fit = max(min(OUTPUTS // (row.height * problem.v.shape[3]), most), 1)
    if "h" in ranks:
        step = 1
    elif copies(row):
        step = g
    else:
        step = max(fit // g, 1) * g
    entries = 1 if "b" in ranks else max(fit // min(step, last - first), 1)
    for batch in _each((0, problem.q.shape[0]), entries):
        for some in _each((first, last), step):
            yield batch, some


def _each(span: Span, step: int) -> list[Span]:
    return [(at, min(at + step, span[1])) for at in range(*span, step)]


class FusedKernel:
    """Runs rows one after the other in the same memory."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.guard, self.plan = problem, Guard(problem), _plan(problem)
        linear = linear_score(problem.form.score)
        assert linear is not None
        self.scale = linear.scale
        self._memory = problem.q.new_empty(self.plan.largest_mask)
        # The last mask, what it was made of by identity, and that itself, so that it stays.
        self._made: tuple[object, _Mask] | None = None
        self._squares: tuple[Tensor, ...] = ()
        most = self.plan.most_copied
        self._keys, self._values = _Copies(problem.k, most), _Copies(problem.v, most)

    def run(self, unit: Unit, out: Tensor, lse: Tensor | None = None) -> None:
        """The output of a row into ``out`` [b, h, q, f] of all rows, and its log-sum-exps into
        ``lse`` [b, h, q] if given."""
        where = slice(*unit.batch), slice(*unit.heads), slice(*unit.queries)
        place, kept = out[where], None if lse is None else lse[where]
        first, *others = unit.pieces
        if not others:
            self._one(unit, first, place, kept)
            return
        like = self.problem.q
        total = place if place.dtype == like.dtype else like.new_empty(place.shape)
        sums = like.new_empty(place.shape[:-1]) if kept is None else kept
        self._one(unit, first, total, sums)
        further: tuple[Tensor, Tensor] | None = None
        for piece in others:
            calls = self._calls(unit, piece)
            if len(calls) == 1:
                merge(total, sums, *self._attend(unit, piece, calls[0], self._mask(unit, piece)))
                continue
            if further is None:
                further = torch.empty_like(total), torch.empty_like(sums)
            self._one(unit, piece, *further)
            merge(total, sums, *further)
        if total is not place:
            place.copy_(total)

    def _one(self, unit: Unit, piece: Piece, out: Tensor, sums: Tensor | None) -> None:
        """Attention over the keys of one piece into ``out`` [b, h, q, f] and ``sums`` [b, h, q]."""
        mask = self._mask(unit, piece)
        for call in self._calls(unit, piece):
            where = _from(call.batch, unit.batch[0]), _from(call.heads, unit.heads[0])
            o, lse = self._attend(unit, piece, call, mask)
            out[where].copy_(o)
            if sums is not None:
                sums[where].copy_(lse)

    def _calls(self, unit: Unit, piece: Piece) -> list[_Call]:
        """What runs in one call: one key head if it is shared by queries, or copied."""
        group, copied = self.problem.form.group, isinstance(piece.keys, Copied)
        if group == 1 and not copied:
            return [_Call(unit.batch, unit.heads, unit.heads)]
        first, last = unit.heads
        shared = range(first // group, -(-last // group))
        spans = [(max(k * group, first), min((k + 1) * group, last)) for k in shared]
        return [
            _Call(batch, heads, (key, key + 1))
            for batch in _each(unit.batch, 1 if copied else unit.batch[1])
            for key, heads in zip(shared, spans, strict=True)
        ]

    def _attend(self, unit: Unit, piece: Piece, call: _Call, mask: _Mask) -> tuple[Tensor, Tensor]:
        """The output [b, h, q, f] of a call and its log-sum-exps [b, h, q]."""
        q = self.problem.q[slice(*call.batch), slice(*call.heads), slice(*unit.queries)]
        if isinstance(piece.keys, Copied):
            index = self.plan.index[slice(*piece.keys.blocks)]
            at = piece.keys.unit, call.batch[0], call.keys[0]
            k, v = self._keys.copy(index, *at), self._values.copy(index, *at)
        else:
            some = slice(*call.batch), slice(*call.keys), slice(*piece.keys)
            k, v = self.problem.k[some], self.problem.v[some]
        if k.shape[1] != q.shape[1]:
            k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
        o, lse = _attend(q, k, v, 0.0, False, attn_mask=mask.added, scale=self.scale)
        if mask.blank is not None:
            o.masked_fill_(mask.blank, 0.0)
            lse.masked_fill_(mask.blank[..., 0], -math.inf)
        return o, lse

    def _mask(self, unit: Unit, piece: Piece) -> _Mask:
        """The guard over a piece; kept for as long as the next piece has the same."""
        row = piece.row
        if row is None:
            return _Mask()
        # One head and batch entry stand for all, as `units` keeps apart those that differ.
        squares = self.guard.squares(unit.batch[0], unit.heads[0] // self.problem.group, row)
        # Squares that are equal are one tensor, which lives as long as this mask does.
        key = (row.height, row.width, row.masked, [id(square) for square in squares])
        if self._made is not None and self._made[0] == key:
            return self._made[1]
        added = self._memory[: row.height * row.width].view(1, 1, row.height, -1)
        if sum(high - low for low, high in row.masked) < row.width:
            added.zero_()
        minus, zero = added.new_full((), -math.inf), added.new_zeros(())
        following = iter(squares)
        for at, stop in row.masked:
            while at < stop:
                keep = next(following)
                columns = added[..., at : at + keep.shape[-1]]
                torch.where(keep, zero, minus, out=columns)
                at += keep.shape[-1]
        blank = None if row.certain else added.amax(-1, keepdim=True) == -math.inf
        self._made = (key, _Mask(added, blank))
        self._squares = squares
        return self._made[1]


def merge(total: Tensor, sums: Tensor, result: Tensor, lse: Tensor) -> None:
    """Add attention over further keys to ``total`` [b, h, q, f] and ``sums`` [b, h, q], in place.

    ``sums`` and ``lse`` are log-sum-exps, -inf for a query without keys, whose result is 0.  The
    two weights of a query are one number and what it lacks to 1, whatever their rounding.
    """
    share = torch.sigmoid(lse - sums).masked_fill_(lse == -math.inf, 0.0)
    total.lerp_(result, share.unsqueeze(-1))
    torch.logaddexp(sums, lse, out=sums)


class _Copies:
    """Memory for blocks of K or V [b, h, n, d], one batch entry and head at a time."""

    def __init__(self, tensor: Tensor, most: int) -> None:
        self._tensor = tensor
        self._memory = tensor.new_empty(most * tensor.shape[3])
        # Views that many calls share: making them would take as long as small copies do.
        self._blocks: dict[tuple[int, int, int], Tensor] = {}
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def copy(self, index: Tensor, unit: int, batch: int, head: int) -> Tensor:
        """Blocks of ``unit`` keys by ``index``, [1, 1, keys, d]; valid until the next call."""
        source, size, depth = (unit, batch, head), (unit, len(index)), self._tensor.shape[3]
        if source not in self._blocks:
            rows = self._tensor[batch, head]
            count = len(rows) // unit
            self._blocks[source] = rows[: count * unit].view(count, unit, depth)
        if size not in self._places:
            blocks = self._memory[: unit * len(index) * depth].view(-1, unit, depth)
            self._places[size] = blocks, blocks.view(1, 1, -1, depth)
        blocks, rows = self._places[size]
        torch.index_select(self._blocks[source], 0, index, out=blocks)
        return rows


def _from(span: Span, start: int) -> slice:
    return slice(span[0] - start, span[1] - start)
