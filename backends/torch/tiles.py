"""Block-sparse softmax attention composed of torch operators that skip what the guard leaves out.

The kernel follows a `Schedule`: for each row of blocks it computes one score tile of a few MB (as
many heads, batch entries or equal rows as fit), evaluates the guard only in columns of partial
blocks, and multiplies by the values.  Keys are slices of K and V where a row sees one range of
keys, and are gathered otherwise.  Softmax statistics are float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.form import depends_only_on_distance, linear_score
from attn_rewrite.backends.torch.schedule import (
    TILE_ELEMENTS,
    Row,
    Schedule,
    Span,
    block_tables,
    make_schedule,
)
from attn_rewrite.backends.torch.space import TileSpace, take
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import Expr
from attn_rewrite.graph import EagerBuilder

_EAGER = EagerBuilder()
_MIN_HEIGHT = 16  # queries of a tile that is cut because its rows are very wide


@dataclass(frozen=True)
class Job:
    """One score tile: batch entries and heads that share a row, or ``stack`` of (batch, head, row).

    Heads are those of `Schedule`: query heads if it is per head, else key heads.
    """

    batch: Span
    heads: Span
    row: Row
    stack: tuple[tuple[int, int, Row], ...] = ()

    @property
    def items(self) -> int:
        """Matrices of the batched product."""
        if self.stack:
            return len(self.stack)
        return (self.batch[1] - self.batch[0]) * (self.heads[1] - self.heads[0])


@dataclass(frozen=True, eq=False)
class Problem:
    """The operands of one call, in the working type, and the attention they enter."""

    form: SoftmaxAttention
    q: Tensor
    k: Tensor
    v: Tensor
    reads: Mapping[str, Tensor]
    schedule: Schedule

    @property
    def group(self) -> int:
        """Query heads that one head of the schedule stands for."""
        return 1 if self.schedule.per_head else self.form.group

    def extents(self) -> dict[str, int]:
        """Extents of the ranks of the attention and of the tensors it reads."""
        found = {
            r: n
            for decl in self.form.reads
            for r, n in zip(decl.ranks, self.reads[decl.name].shape, strict=True)
            if n != 1
        }
        b, h, q_len, d = self.q.shape
        own = {"b": b, "h": h, "hkv": self.k.shape[1], "q": q_len, "kv": self.k.shape[2], "d": d}
        return {**found, **own, "f": self.v.shape[3]}

    def space(self, job: Job) -> TileSpace:
        """Where the expressions of ``job`` are evaluated."""
        first, last = (h * self.group for h in job.heads)
        space = TileSpace(
            self.q.device, self.q.dtype, self.extents(), self.reads, self.group,
            job.batch, (first, last), job.row,
        )  # fmt: skip
        if not job.stack:
            return space
        return replace(space, row=None, coordinates=self._coordinates(job))

    def _coordinates(self, job: Job) -> dict[str, Tensor]:
        def tensor(rows: Sequence[Any]) -> Tensor:
            return torch.from_numpy(np.asarray(rows, np.int64)).to(self.q.device)

        height, width = job.row.height, job.row.width
        keys = [np.concatenate([np.arange(*s) for s in r.keys]) for _, _, r in job.stack]
        heads = tensor([[h * self.group + g for g in range(self.group)] for _, h, _ in job.stack])
        return {
            "b": tensor([b for b, _, _ in job.stack]).view(-1, 1, 1, 1),
            "h": heads.view(-1, self.group, 1, 1),
            "q": tensor([np.arange(*r.queries) for _, _, r in job.stack]).view(-1, 1, height, 1),
            "kv": tensor(keys).view(-1, 1, 1, width),
        }


def prepare(
    form: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], block: int
) -> Problem:
    """Bring the operands to the working type and make the schedule."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    named = {
        decl.name: t.to(dtype) if t.is_floating_point() else t
        for decl, t in zip(form.reads, reads, strict=True)
    }
    tables = {n: named[n].cpu().numpy() for n in block_tables(form.guard)}
    schedule = make_schedule(
        form.guard, q_len=q.shape[2], kv_len=k.shape[2], block=block,
        heads=q.shape[1], group=form.group, tables=tables,
    )  # fmt: skip
    return Problem(form, q.to(dtype), k.to(dtype), v.to(dtype), named, schedule)


# Jobs


def jobs(problem: Problem, *, stacked: bool = True) -> Iterator[Job]:
    """The tiles of a problem, each of about `TILE_ELEMENTS` scores.

    ``stacked``: rows that gather their keys anyway share a tile with rows of the same shape.
    """
    batch = problem.q.shape[0]
    pool: dict[tuple[int, int, tuple[Span, ...]], list[tuple[int, int, Row]]] = {}
    for part in problem.schedule.parts:
        heads = part.heads[1] - part.heads[0]
        for row in part.rows:
            area = problem.group * row.height * row.width
            if stacked and len(row.keys) > 1 and 2 * batch * heads * area <= TILE_ELEMENTS:
                entries = pool.setdefault((row.height, row.width, row.masked), [])
                entries += [(b, h, row) for b in range(batch) for h in range(*part.heads)]
            else:
                yield from _shared(problem, part.heads, row)
    for (height, width, _), entries in pool.items():
        count = max(1, TILE_ELEMENTS // (problem.group * height * width))
        for start in range(0, len(entries), count):
            stack = tuple(entries[start : start + count])
            yield Job((0, 0), (0, 0), stack[0][2], stack)


def _shared(problem: Problem, heads: Span, row: Row) -> Iterator[Job]:
    """Tiles of one row over all batch entries and heads."""
    batch, count = problem.q.shape[0], heads[1] - heads[0]
    fits = max(1, TILE_ELEMENTS // (problem.group * row.height * row.width))
    together = fits // count if _batch_collapses(problem, count) else 1
    step_b, step_h = max(1, together), min(count, fits)
    for b in _steps((0, batch), step_b):
        for h in _steps(heads, step_h):
            for queries in _steps(row.queries, _height(problem.group, row)):
                yield Job(b, h, replace(row, queries=queries))


def _height(group: int, row: Row) -> int:
    """Queries per tile: the row's, or fewer where its width alone would overfill the tile."""
    if group * row.height * row.width <= 4 * TILE_ELEMENTS:
        return row.height
    return min(row.height, max(_MIN_HEIGHT, 2 * TILE_ELEMENTS // (group * row.width)))


def _steps(span: Span, step: int) -> Iterator[Span]:
    for start in range(*span, step):
        yield start, min(start + step, span[1])


def _batch_collapses(problem: Problem, heads: int) -> bool:
    """True if batch and head are one dimension of K, V and the output without a copy."""
    if problem.schedule.per_head and problem.form.group > 1:
        return False
    return heads == problem.k.shape[1] and all(
        t.stride(0) == t.shape[1] * t.stride(1) for t in (problem.k, problem.v)
    )


# Operands of a tile


def queries_of(problem: Problem, job: Job) -> Tensor:
    """Queries of a tile: [items, group * queries, d]."""
    q, g = problem.q, problem.group
    if job.stack:
        parts = [q[b, h * g : (h + 1) * g, slice(*r.queries)] for b, h, r in job.stack]
        return torch.stack(parts).flatten(1, 2)
    part = q[slice(*job.batch), job.heads[0] * g : job.heads[1] * g, slice(*job.row.queries)]
    return part.reshape(job.items, g * job.row.height, q.shape[3])


def keys_of(problem: Problem, tensor: Tensor, job: Job) -> Tensor:
    """Rows of K or V of a tile: [items, width, d]; a view where the row sees one range of keys."""
    share = problem.form.group if problem.schedule.per_head else 1
    if job.stack:
        parts = [tensor[b, h // share, low:high] for b, h, r in job.stack for low, high in r.keys]
        return torch.cat(parts).view(job.items, job.row.width, tensor.shape[3])
    part = take(tensor[slice(*job.batch), key_heads(job.heads, share)], 2, job.row.keys)
    return shared_heads(part, job, share).flatten(0, 1)


def key_heads(heads: Span, share: int) -> slice:
    """Key heads that the heads of a job read."""
    return slice(heads[0] // share, -(-heads[1] // share))


def shared_heads(part: Tensor, job: Job, share: int) -> Tensor:
    """One key head per head of the job: repeated where ``share`` heads read the same one."""
    if share == 1:
        return part
    first, last = job.heads
    if part.shape[1] == 1:
        return part.expand(-1, last - first, -1, -1)
    index = torch.arange(first, last, device=part.device) // share - first // share
    return part.index_select(1, index)


# The kernel


def attend(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The attention output [b, h, q, f] in ``dtype``."""
    b, h, q_len, _ = problem.q.shape
    shape = (b, h, q_len, problem.v.shape[3])
    out = torch.zeros(shape, dtype=dtype, device=problem.q.device)
    if 0 in (*shape, problem.k.shape[2]):
        return out
    kernel = _Kernel(problem)
    for job in jobs(problem):
        _store(problem, job, out, kernel)
    return out


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


class _Kernel:
    """Runs tiles one after the other in the same memory."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.form = problem, problem.form
        self.linear = linear_score(problem.form.score)
        self.shift_invariant = depends_only_on_distance(problem.form.guard)
        self._bounds: dict[tuple[int, int, int], Tensor] = {}
        self._memory = torch.empty(0, dtype=problem.q.dtype, device=problem.q.device)

    def run(self, job: Job, out: Tensor | None = None) -> Tensor:
        """The output of a tile, [items, group * queries, f], in ``out`` if given."""
        emitter = Emitter(_EAGER, self.problem.space(job))
        scores = self._scores(job, emitter)
        bounds = [self._bound(job, start, stop) for start, stop in job.row.masked]
        for (start, stop), bound in zip(job.row.masked, bounds, strict=True):
            part = _by_query(scores, job)[..., start:stop]
            torch.minimum(part, bound, out=part)
        if self.form.sink is not None:
            blank = None
            p = self._softmax_with_sink(job, scores, emitter.tensor(self.form.sink, scores.dtype))
        else:
            blank = self._blank(job, scores, bounds)
            p = torch.softmax(scores, -1, out=scores)
        if self.form.weight is not None:
            _by_query(p, job).mul_(emitter.tensor(self.form.weight))
        values = keys_of(self.problem, self.problem.v, job)
        result = torch.bmm(p, values) if out is None else torch.bmm(p, values, out=out)
        if blank is not None:
            _by_query(result, job).masked_fill_(blank, 0.0)
        return result

    def _blank(self, job: Job, scores: Tensor, bounds: Sequence[Tensor]) -> Tensor | None:
        """Queries without a finite score, [items, group, queries, 1] or less; None without any.

        Where the score is a multiple of QK the guard alone decides, and its bounds are small.
        """
        if self.linear is None or self.linear.bias is not None:
            return _by_query(scores, job).amax(-1, keepdim=True) == -math.inf
        if job.row.certain:
            return None
        tops = [b.amax(-1, keepdim=True) for b in bounds]
        return torch.stack(tops).amax(0) == -math.inf

    def _scores(self, job: Job, emitter: Emitter) -> Tensor:
        """Scores before the guard, [items, group * queries, width]."""
        q, k = queries_of(self.problem, job), keys_of(self.problem, self.problem.k, job)
        shape = (job.items, q.shape[1], k.shape[1])
        if self._memory.numel() < math.prod(shape):
            self._memory = self._memory.new_empty(math.prod(shape))
        s = self._memory[: math.prod(shape)].view(shape)
        if self.linear is None:
            torch.bmm(q, k.mT, out=s)
            known: dict[Expr, Any] = {QK: _by_query(s, job)}
            score: Tensor = Emitter(_EAGER, emitter.space, known).tensor(self.form.score, s.dtype)
            return score.expand_as(_by_query(s, job)).reshape(shape).contiguous()
        torch.baddbmm(s, q, k.mT, beta=0, alpha=self.linear.scale, out=s)
        if self.linear.bias is not None:
            _by_query(s, job).add_(emitter.tensor(self.linear.bias))
        return s

    def _bound(self, job: Job, start: int, stop: int) -> Tensor:
        """+inf where the guard holds and -inf elsewhere: the cheapest mask is a minimum."""
        row = job.row
        key = (row.queries[0] - row.keys[0][0] - start, row.height, stop - start)
        reusable = self.shift_invariant and len(row.keys) == 1 and not job.stack
        if reusable and key in self._bounds:
            return self._bounds[key]
        space = self.problem.space(job).columns(start, stop)
        keep = Emitter(_EAGER, space).truth(self.form.guard)
        top = torch.full((), math.inf, dtype=self.problem.q.dtype, device=keep.device)
        bound = torch.where(keep, top, -top)
        if reusable:
            self._bounds[key] = bound
        return bound

    def _softmax_with_sink(self, job: Job, s: Tensor, sink: Tensor) -> Tensor:
        """Softmax with one more term in the denominator, in place; 0 where all terms are."""
        by_query = _by_query(s, job)
        top = torch.maximum(by_query.amax(-1, keepdim=True), sink)
        top = top.masked_fill_(top == -math.inf, 0.0)
        total = by_query.sub_(top).exp_().sum(-1, keepdim=True).add_((sink - top).exp())
        by_query.div_(total.masked_fill_(total == 0, 1.0))
        return s


def _by_query(s: Tensor, job: Job) -> Tensor:
    """[items, group * queries, n] as [items, group, queries, n], without a copy."""
    return s.view(s.shape[0], -1, job.row.height, s.shape[-1])
