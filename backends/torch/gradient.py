"""Gradients of tiled attention by recomputation, one tile at a time.

Each tile is computed again with autograd from detached slices, so memory holds the scores of one
tile, and every score expression that torch can differentiate has its gradient, without a formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.schedule import Span
from attn_rewrite.backends.torch.space import take
from attn_rewrite.backends.torch.tiles import Job, Problem, jobs, key_heads, shared_heads
from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import TRUE
from attn_rewrite.graph import EagerBuilder


@contextmanager
def recording() -> Iterator[None]:
    """Autograd recording, also below a dispatch mode (a FLOP counter, a profiler).

    Such a mode runs operators with autograd switched off for the thread, which `enable_grad` does
    not undo.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    off = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, off)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Sums so far, in the working type; ``reads`` by tensor name."""

    q: Tensor
    k: Tensor
    v: Tensor
    reads: dict[str, Tensor]


def gradients(
    problem: Problem, grad: Tensor, wanted: Sequence[str], sums: Tensor | None = None
) -> Gradients:
    """Gradients of Q, K, V and of the ``wanted`` reads for the output gradient [b, h, q, f] and
    that of the log-sum-exp [b, h, q], ``sums``."""
    operands = (problem.q, problem.k, problem.v)
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in operands)
    total = Gradients(dq, dk, dv, {n: torch.zeros_like(problem.reads[n]) for n in wanted})
    given = [g.to(problem.q.dtype) for g in (grad, sums) if g is not None]
    if grad.numel() and problem.k.shape[2]:
        for job in jobs(problem, stacked=False):
            _add_tile(problem, job, given, total)
    return total


def keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the arguments (q, k, v, reads, cascade, block) of an attention operator in ``ctx``."""
    q, k, v, reads, cascade, block = inputs
    ctx.save_for_backward(q, k, v, *reads)
    ctx.wanted = [i for i, t in enumerate(reads) if t.requires_grad]
    ctx.cascade, ctx.block = cascade, block


def by_argument(ctx: Any, found: Sequence[Tensor]) -> tuple[Any, ...]:
    """Gradients of q, k, v and of the wanted reads, as those of the operator's arguments."""
    by_read: list[Tensor | None] = [None] * (len(ctx.saved_tensors) - 3)
    for i, part in zip(ctx.wanted, found[3:], strict=True):
        by_read[i] = part
    return found[0], found[1], found[2], by_read, None, None


def _add_tile(problem: Problem, job: Job, given: Sequence[Tensor], total: Gradients) -> None:
    share = problem.form.group if problem.schedule.per_head else 1
    batch, key_part = slice(*job.batch), key_heads(job.heads, share)
    query_part = slice(job.heads[0] * problem.group, job.heads[1] * problem.group)
    rows = slice(*job.row.queries)
    q = problem.q[batch, query_part, rows]
    k, v = (take(t[batch, key_part], 2, job.row.keys) for t in (problem.k, problem.v))
    with recording():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        reads = {n: problem.reads[n].detach().requires_grad_() for n in total.reads}
        inside = replace(problem, reads={**problem.reads, **reads})
        results = _tile(inside, job, share, *leaves)[: len(given)]
        found = torch.autograd.grad(
            results,
            [*leaves, *reads.values()],
            [g[batch, query_part, rows] for g in given],
            allow_unused=True,
        )
    dq, dk, dv, *others = found
    if dq is not None:
        total.q[batch, query_part, rows] += dq
    for whole, part in ((total.k, dk), (total.v, dv)):
        if part is not None:
            _scatter(whole[batch, key_part], part, job.row.keys)
    for name, part in zip(reads, others, strict=True):
        if part is not None:
            total.reads[name] += part


def _scatter(whole: Tensor, part: Tensor, spans: Sequence[Span]) -> None:
    """Add the gradient of gathered keys back to where they came from."""
    at = 0
    for low, high in spans:
        whole[:, :, low:high] += part[:, :, at : at + high - low]
        at += high - low


def _tile(
    problem: Problem, job: Job, share: int, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """One tile as a differentiable function of its queries [b, h, q, d], keys and values: the
    output and its log-sum-exps."""
    form, g, height = problem.form, problem.group, job.row.height
    keys, values = (shared_heads(t, job, share).flatten(0, 1) for t in (k, v))
    queries = q.reshape(job.items, g * height, q.shape[3])
    product = torch.bmm(queries, keys.mT).view(job.items, g, height, -1)
    known: dict[Any, Any] = {QK: product}
    emitter = Emitter(EagerBuilder(), problem.space(job), known)
    scores = emitter.tensor(form.score, q.dtype).expand_as(product)
    if form.guard != TRUE and job.row.masked:
        scores = scores.masked_fill(~emitter.truth(form.guard), -math.inf)
    sink = None if form.sink is None else emitter.tensor(form.sink, q.dtype)
    p, sums = _probabilities(scores, sink)
    if form.weight is not None:
        p = p * emitter.tensor(form.weight)
    out = torch.bmm(p.reshape(job.items, g * height, -1), values)
    return out.view(*q.shape[:3], v.shape[3]), sums.view(q.shape[:3])


def _probabilities(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax with an optional sink, and the log-sum-exp; rows without a finite score are 0 and
    -inf, with gradient 0."""
    top = scores.detach().amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -math.inf, 0.0)
    numerator = (scores - top).exp()
    total = numerator.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return numerator / total, (top + total.log()).masked_fill(empty, -math.inf)
