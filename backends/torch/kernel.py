"""Block-sparse softmax attention composed of torch operators that skip what the guard leaves out.

The kernel computes one score tile after the other in the same memory, evaluates the guard only in
columns of partial blocks, and multiplies by the values.  Softmax statistics are float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.form import depends_only_on_distance, linear_score
from attn_rewrite.backends.torch.fused import FusedKernel, Unit, fits, units
from attn_rewrite.backends.torch.lanes import Task, run_in_lanes
from attn_rewrite.backends.torch.schedule import Span
from attn_rewrite.backends.torch.tiles import Job, Problem, gather_size, jobs, keys_of, queries_of
from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import Expr, ranks_of
from attn_rewrite.graph import EagerBuilder

_EAGER = EagerBuilder()
# Points a guard is evaluated at in one go: its int64 temporaries stay in the cache.
_GUARD_POINTS = 1 << 18
# Scores below which a call runs on the calling thread.
_WORTH_LANES = 1 << 22


def attend(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The attention output [b, h, q, f] in ``dtype``."""
    return _attend(problem, dtype, None)


def attend_with_lse(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output in ``dtype`` and the log-sum-exp [b, h, q] of the scores of its rows in the
    working type; for a form without a sink."""
    lse = problem.q.new_full(problem.q.shape[:3], -math.inf)  # rows that no tile holds
    return _attend(problem, dtype, lse), lse


def _attend(problem: Problem, dtype: torch.dtype, lse: Tensor | None) -> Tensor:
    b, h, q_len, _ = problem.q.shape
    shape = (b, h, q_len, problem.v.shape[3])
    out = torch.zeros(shape, dtype=dtype, device=problem.q.device)
    if 0 in (*shape, problem.k.shape[2]):
        return out
    lanes = _lanes(problem)
    if fits(problem):
        rows = units(problem, lanes)
        _work_off(rows, lambda: _run_rows(problem, out, lse), lanes, out.device)
    else:
        planned = list(jobs(problem))
        tiles = _by_row(planned, lanes)
        _work_off(tiles, lambda: _run_tiles(problem, planned, out, lse), lanes, out.device)
    return out


def _run_rows(problem: Problem, out: Tensor, lse: Tensor | None) -> Callable[[Unit], None]:
    kernel = FusedKernel(problem)
    return lambda unit: kernel.run(unit, out, lse)


def _run_tiles(
    problem: Problem, planned: Sequence[Job], out: Tensor, lse: Tensor | None
) -> Callable[[Sequence[Job]], None]:
    kernel = _Kernel(problem, planned, sums=lse is not None)

    def run(row: Sequence[Job]) -> None:
        for job in row:
            _store(problem, job, out, kernel)
            if lse is not None:
                _store_sums(problem, job, lse, kernel.sums)

    return run


def _work_off(
    tasks: Sequence[Task],
    make: Callable[[], Callable[[Task], None]],
    lanes: int,
    device: torch.device,
) -> None:
    """Run every task, in lanes where there are several; ``make`` gives each lane its own memory."""
    if lanes > 1:
        run_in_lanes(tasks, make, lanes)
        return
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        run = make()
        for task in tasks:
            run(task)


def _lanes(problem: Problem) -> int:
    """Threads to run tiles on: those torch may use, where the work is worth starting them."""
    if problem.q.device.type != "cpu":
        return 1
    pairs = problem.q.shape[0] * problem.schedule.counts().pairs
    return torch.get_num_threads() if pairs >= _WORTH_LANES else 1


def _by_row(planned: Sequence[Job], lanes: int) -> list[list[Job]]:
    """Tiles of one row together, as they share the bounds of its guard; alone if rows are few."""
    rows = [list(g) for _, g in groupby(planned, lambda j: (j.row.queries, j.row.keys))]
    return rows if len(rows) >= 4 * lanes else [[job] for job in planned]


def _store(problem: Problem, job: Job, out: Tensor, kernel: _Kernel) -> None:
    """Run a tile; write in place where the output has its layout, else copy."""
    g, height = problem.group, job.row.height
    if job.stack:
        result = kernel.run(job).view(job.items, g, height, out.shape[3])
        for (b, h, row), part in zip(job.stack, result, strict=True):
            out[b, h * g : (h + 1) * g, slice(*row.queries)] = part
        return
    heads = slice(job.heads[0] * g, job.heads[1] * g)
    place = out[slice(*job.batch), heads, slice(*job.row.queries)]
    if g == 1 and out.dtype == problem.q.dtype:
        kernel.run(job, place.flatten(0, 1))
    else:
        place.copy_(kernel.run(job).view(place.shape))


def _store_sums(problem: Problem, job: Job, lse: Tensor, sums: Tensor | None) -> None:
    """The log-sum-exps of a tile, [items, group, queries], into those of all rows."""
    assert sums is not None
    g = problem.group
    if job.stack:
        for (b, h, row), part in zip(job.stack, sums, strict=True):
            lse[b, h * g : (h + 1) * g, slice(*row.queries)] = part
        return
    heads = slice(job.heads[0] * g, job.heads[1] * g)
    place = lse[slice(*job.batch), heads, slice(*job.row.queries)]
    place.copy_(sums.view(place.shape))


class _Kernel:
    """Runs tiles one after the other in the same memory; ``sums`` keeps the log-sum-exps of the
    last one."""

    def __init__(self, problem: Problem, planned: Sequence[Job], *, sums: bool = False) -> None:
        self.sums: Tensor | None = None
        self._wanted = sums
        self.problem, self.form = problem, problem.form
        self.linear = linear_score(problem.form.score)
        plain = self.linear is not None and self.linear.bias is None and self.form.sink is None
        self.guard = _GuardBounds(problem, find_blank=plain)
        # Taken once, at the largest size: growing from tile to tile would fragment the heap.
        areas = [j.items * problem.group * j.row.height * j.row.width for j in planned]
        self._scores_memory = problem.q.new_empty(max(areas, default=0))
        gathered = [gather_size(problem, j) for j in planned]
        self._keys_memory = problem.q.new_empty(max(gathered, default=0))

    def run(self, job: Job, out: Tensor | None = None) -> Tensor:
        """The output of a tile, [items, group * queries, f], in ``out`` if given."""
        emitter = Emitter(_EAGER, self.problem.space(job))
        scores = self._scores(job, emitter)
        bounds = self.guard.of(job)
        for (start, stop), bound in bounds.pieces:
            part = _by_query(scores, job)[..., start:stop]
            torch.minimum(part, bound, out=part)
        if self._wanted:
            self.sums = torch.logsumexp(_by_query(scores, job), -1)
        if self.form.sink is not None:
            blank = None
            p = self._softmax_with_sink(job, scores, emitter.tensor(self.form.sink, scores.dtype))
        else:
            blank = bounds.blank if self.guard.find_blank else self._blank(job, scores)
            p = torch.softmax(scores, -1, out=scores)
        if self.form.weight is not None:
            _by_query(p, job).mul_(emitter.tensor(self.form.weight))
        result = self._times_values(job, p, out)
        if blank is not None:
            _by_query(result, job).masked_fill_(blank, 0.0)
        return result

    def _scores(self, job: Job, emitter: Emitter) -> Tensor:
        """Scores before the guard, [items, group * queries, width]."""
        q = queries_of(self.problem, job)
        shape = (job.items, q.shape[1], job.row.width)
        s = self._scores_memory[: math.prod(shape)].view(shape)
        scale = 1.0 if self.linear is None else self.linear.scale
        for (start, stop), k in self._parts(job, self.problem.k):
            columns = s[:, :, start:stop]
            torch.baddbmm(columns, q, k.mT, beta=0, alpha=scale, out=columns)
        by_query = _by_query(s, job)
        if self.linear is None:
            known: dict[Expr, Any] = {QK: by_query}
            score = Emitter(_EAGER, emitter.space, known).tensor(self.form.score, s.dtype)
            by_query.copy_(score)
        elif self.linear.bias is not None:
            by_query.add_(emitter.tensor(self.linear.bias))
        return s

    def _times_values(self, job: Job, p: Tensor, out: Tensor | None) -> Tensor:
        v = self.problem.v
        if out is None:
            out = p.new_empty(p.shape[0], p.shape[1], v.shape[3])
        for (start, stop), part in self._parts(job, v):
            torch.baddbmm(out, p[:, :, start:stop], part, beta=1 if start else 0, out=out)
        return out

    def _parts(self, job: Job, tensor: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Parts of K or V and the columns of the tile they belong to."""
        start = 0
        for part in keys_of(self.problem, tensor, job, self._keys_memory):
            yield (start, start + part.shape[1]), part
            start += part.shape[1]

    def _blank(self, job: Job, scores: Tensor) -> Tensor:
        """Queries without a finite score, [items, group, queries, 1]."""
        return _by_query(scores, job).amax(-1, keepdim=True) == -math.inf

    def _softmax_with_sink(self, job: Job, s: Tensor, sink: Tensor) -> Tensor:
        """Softmax with one more term in the denominator, in place; 0 where all terms are."""
        by_query = _by_query(s, job)
        top = torch.maximum(by_query.amax(-1, keepdim=True), sink)
        top = top.masked_fill_(top == -math.inf, 0.0)
        total = by_query.sub_(top).exp_().sum(-1, keepdim=True).add_((sink - top).exp())
        by_query.div_(total.masked_fill_(total == 0, 1.0))
        return s


@dataclass(frozen=True, eq=False)
class Bounds:
    """The guard of a tile, by masked columns, and the queries that it leaves no key.

    ``blank`` is [items or 1, group or 1, queries, 1]; None without such queries, or not asked for.
    """

    pieces: tuple[tuple[Span, Tensor], ...]
    blank: Tensor | None


class _GuardBounds:
    """The guard of each tile as bounds: +inf where it holds, -inf where not.

    The cheapest way to mask a score is the minimum with its bound.  Bounds are kept while they are
    the same: for tiles of one row where heads and batch entries agree, and along the diagonal
    where the guard is a function of the distance.
    """

    def __init__(self, problem: Problem, *, find_blank: bool) -> None:
        self.problem, self.guard = problem, problem.form.guard
        # Where the score is a multiple of QK the guard alone decides, and its bounds are small.
        self.find_blank = find_blank
        self.shared = not ranks_of(self.guard) & {"b", "h"}
        self.diagonal = depends_only_on_distance(self.guard)
        self._along: dict[tuple[int, int, int], Tensor] = {}
        self._last: tuple[Any, Bounds] | None = None

    def of(self, job: Job) -> Bounds:
        """Bounds of the masked columns of a tile, in pieces."""
        key = (job.row.queries, job.row.keys)
        if not self.shared or job.stack:
            return self._evaluate(job)
        if self._last is None or self._last[0] != key:
            self._last = None  # gives its memory back first
            self._last = (key, self._evaluate(job))
        return self._last[1]

    def _evaluate(self, job: Job) -> Bounds:
        points = job.row.height * (len(job.stack) or 1)
        step = max(1, _GUARD_POINTS // points)
        pieces = tuple(
            ((at, min(at + step, stop)), self._bound(job, at, min(at + step, stop)))
            for start, stop in job.row.masked
            for at in range(start, stop, step)
        )
        if not self.find_blank or job.row.certain:
            return Bounds(pieces, None)
        tops = [bound.amax(-1, keepdim=True) for _, bound in pieces]
        return Bounds(pieces, torch.stack(tops).amax(0) == -math.inf)

    def _bound(self, job: Job, start: int, stop: int) -> Tensor:
        row = job.row
        key = (row.queries[0] - row.keys[0][0] - start, row.height, stop - start)
        reusable = self.diagonal and len(row.keys) == 1 and not job.stack
        if reusable and key in self._along:
            return self._along[key]
        space = self.problem.space(job).columns(start, stop)
        keep = Emitter.once(_EAGER, space, self.guard).truth(self.guard)
        top = torch.full((), math.inf, dtype=self.problem.q.dtype, device=keep.device)
        bound = torch.where(keep, top, -top)
        if reusable:
            self._along[key] = bound
        return bound


def _by_query(s: Tensor, job: Job) -> Tensor:
    """[items, group * queries, n] as [items, group, queries, n], without a copy."""
    return s.view(s.shape[0], -1, job.row.height, s.shape[-1])
