"""Rows of blocks on PyTorch's fused CPU attention, which gives the log-sum-exp of its rows.

A row whose keys are one range is one call for all heads, on views of K and V; where the guard cuts
through its blocks the call gets a mask.  Rows that see scattered keys gather them, and rows too
wide for the scratch memory run in pieces, which are weighted by their sums: the split of
Flash-Decoding (Dao et al., 2023), reassociated and otherwise exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_rewrite.backends.torch.form import linear_score
from attn_rewrite.backends.torch.patterns import SIDE, Guard
from attn_rewrite.backends.torch.schedule import Row, Span, clipped
from attn_rewrite.backends.torch.tiles import Problem
from attn_rewrite.cascade.expr import ranks_of

# Elements of the mask and the gathered keys and values of one piece: 1.25 MB of float32 a thread.
SCRATCH = 5 << 16
# Elements of the outputs of pieces that wait to be merged.
_WAITING = 1 << 17
# Scores a row has on average before one call for it pays; smaller ones run as stacks of tiles.
WORTH_ROW = 1 << 14

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Unit:
    """One row of blocks, and the batch entries and query heads it runs for."""

    batch: Span
    heads: Span
    row: Row


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


def units(problem: Problem, lanes: int) -> list[Unit]:
    """Rows for all heads at once; for fewer where masks differ or rows are few."""
    ranks, g = ranks_of(problem.form.guard), problem.group
    few = lanes > 1 and sum(len(part.rows) for part in problem.schedule.parts) < 4 * lanes
    batch = (0, problem.q.shape[0])
    found = []
    for part in problem.schedule.parts:
        heads = (part.heads[0] * g, part.heads[1] * g)
        for row in part.rows:
            alone = bool(row.masked) and "b" in ranks
            entries = _each(batch, 1 if few or alone else batch[1])
            step = 1 if row.masked and "h" in ranks else g if few else heads[1] - heads[0]
            count = len(pieces(row, problem.k.shape[3]))
            if count > 1 and step > g:
                each = count * (entries[0][1] - entries[0][0]) * row.height * problem.v.shape[3]
                step = min(step, max(_WAITING // (each * g), 1) * g)
            found += [Unit(b, h, row) for b in entries for h in _each(heads, step)]
    return found


def _each(span: Span, step: int) -> list[Span]:
    return [(at, min(at + step, span[1])) for at in range(*span, step)]


def pieces(row: Row, depth: int) -> list[Row]:
    """The row as rows of fewer keys, one after the other, whose masks and keys fit `SCRATCH`.

    Keys of one range that need no mask are never cut.
    """
    each = _scratch(row, depth)
    most = SCRATCH // each if each else row.width
    if row.width <= most:
        return [row]
    most = max(most // SIDE, 1) * SIDE
    step = -(-row.width // -(-row.width // most))
    step = min(-(-step // SIDE) * SIDE, most)
    return [_part(row, at, min(at + step, row.width)) for at in range(0, row.width, step)]


def _scratch(row: Row, depth: int) -> int:
    """Elements of scratch memory for each key of a row."""
    return row.height * bool(row.masked) + 2 * depth * (len(row.keys) > 1)


def _part(row: Row, start: int, stop: int) -> Row:
    cut = [(max(low, start) - start, min(high, stop) - start) for low, high in row.masked]
    masked = tuple((low, high) for low, high in cut if low < high)
    certain = sum(high - low for low, high in masked) < stop - start
    return replace(row, keys=clipped(row.keys, start, stop), masked=masked, certain=certain)


class FusedKernel:
    """Runs rows one after the other in the same memory."""

    def __init__(self, problem: Problem, planned: Sequence[Unit]) -> None:
        self.problem, self.guard = problem, Guard(problem)
        linear = linear_score(problem.form.score)
        assert linear is not None
        self.scale = linear.scale
        depth = problem.k.shape[3]
        rows = {id(u.row): u.row for u in planned}.values()
        parts = [p for row in rows for p in pieces(row, depth)]
        masked = [p.height * p.width for p in parts if p.masked]
        self._memory = problem.q.new_empty(max(masked, default=0))
        self._made: tuple[object, _Mask] | None = None
        gathered = [p.width * depth for p in parts if len(p.keys) > 1]
        size = max(gathered, default=0)
        self._keys, self._values = problem.k.new_empty(size), problem.v.new_empty(size)

    def run(self, unit: Unit, out: Tensor) -> None:
        """The output of a row into ``out`` [b, h, q, f] of all rows."""
        place = out[slice(*unit.batch), slice(*unit.heads), slice(*unit.row.queries)]
        parts = pieces(unit.row, self.problem.k.shape[3])
        if len(parts) == 1:
            for where, o, _ in self._calls(unit, parts[0]):
                place[where].copy_(o)
            return
        shape, like = (len(parts), *place.shape), self.problem.q
        results, sums = like.new_empty(shape), like.new_empty(shape[:-1])
        for n, piece in enumerate(parts):
            for where, o, lse in self._calls(unit, piece):
                results[n][where].copy_(o)
                sums[n][where].copy_(lse)
        place.copy_(merged(results, sums))

    def _calls(
        self, unit: Unit, piece: Row
    ) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Batch entries and heads of the unit, their outputs, and log-sum-exps [b, h, q]."""
        mask = self._mask(unit, piece)
        for batch, heads, shared in self._groups(unit, piece):
            q = self.problem.q[slice(*batch), slice(*heads), slice(*piece.queries)]
            k = _rows_of(self.problem.k[slice(*batch), slice(*shared)], piece, self._keys)
            v = _rows_of(self.problem.v[slice(*batch), slice(*shared)], piece, self._values)
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


def merged(results: Tensor, sums: Tensor) -> Tensor:
    """Attention over the keys of all pieces: results [n, b, h, q, f], log-sum-exps [n, b, h, q].

    A query without keys has a log-sum-exp of -inf in every piece, and gives 0.  The weights are
    quotients of one sum, so they add up to 1 whatever the rounding of the log-sum-exps.
    """
    top = sums.amax(0)
    weights = (sums - top.masked_fill(top == -math.inf, 0.0)).exp_()
    total = weights.sum(0)
    weights.div_(total.masked_fill(total == 0, 1.0))
    return results.mul_(weights.unsqueeze(-1)).sum(0)


def _rows_of(tensor: Tensor, piece: Row, memory: Tensor) -> Tensor:
    """Rows of K or V [b, h, n, d] of a piece: a view, or gathered into ``memory``."""
    if len(piece.keys) == 1:
        return tensor[:, :, slice(*piece.keys[0])]
    shape = (*tensor.shape[:2], piece.width, tensor.shape[3])
    out = memory[: math.prod(shape)].view(shape)
    return torch.cat([tensor[:, :, low:high] for low, high in piece.keys], 2, out=out)


def _from(span: Span, start: int) -> slice:
    return slice(span[0] - start, span[1] - start)
