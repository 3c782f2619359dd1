"""The score tiles of a tiled attention, and the operands of each.

A tile is as many heads, batch entries or rows of equal shape as fit into a few MB of scores.  Keys
are slices of K and V where a row sees few ranges of keys, and are gathered otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_rewrite.backends.torch.schedule import (
    TILE_ELEMENTS,
    Row,
    Schedule,
    Span,
    block_tables,
    make_schedule,
)
from attn_rewrite.backends.torch.space import TileSpace, take
from attn_rewrite.cascade.attention import SoftmaxAttention

# Ranges of keys that are multiplied one by one; rows that see more of them gather their keys.
MAX_PARTS = 3
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
            if stacked and len(row.keys) > MAX_PARTS and 2 * batch * heads * area <= TILE_ELEMENTS:
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
    area = problem.group * row.height * row.width
    together = TILE_ELEMENTS // (count * area) if _batch_collapses(problem, count) else 1
    for b in _steps((0, batch), max(1, together)):
        for h in _steps(heads, _even_step(count, max(1, TILE_ELEMENTS * 5 // (4 * area)))):
            for queries in _steps(row.queries, _height(problem.group, row)):
                yield Job(b, h, replace(row, queries=queries))


def _even_step(count: int, most: int) -> int:
    """Step that cuts ``count`` into equal parts of at most ``most``."""
    return -(-count // -(-count // most))


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


def keys_of(problem: Problem, tensor: Tensor, job: Job, memory: Tensor) -> tuple[Tensor, ...]:
    """Rows of K or V of a tile: parts [items, n, d] whose n add up to the width of the tile.

    Views where a row sees few ranges of keys; else one part, gathered into ``memory``.
    """
    share = problem.form.group if problem.schedule.per_head else 1
    shape = (job.items, job.row.width, tensor.shape[3])
    if job.stack:
        parts = [tensor[b, h // share, low:high] for b, h, r in job.stack for low, high in r.keys]
        flat = memory[: math.prod(shape)].view(-1, shape[2])
        return (torch.cat(parts, out=flat).view(shape),)
    part = tensor[slice(*job.batch), key_heads(job.heads, share)]
    if len(job.row.keys) <= MAX_PARTS:
        views = (take(part, 2, (span,)) for span in job.row.keys)
        return tuple(shared_heads(v, job, share).flatten(0, 1) for v in views)
    gathered = memory[: part.shape[0] * part.shape[1] * shape[1] * shape[2]]
    gathered = gathered.view(*part.shape[:2], *shape[1:])
    torch.cat([part[:, :, low:high] for low, high in job.row.keys], 2, out=gathered)
    return (shared_heads(gathered, job, share).flatten(0, 1),)


def gather_size(problem: Problem, job: Job) -> int:
    """Elements `keys_of` needs in its memory."""
    if not job.stack and len(job.row.keys) <= MAX_PARTS:
        return 0
    return job.items * job.row.width * max(problem.k.shape[3], problem.v.shape[3])


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
