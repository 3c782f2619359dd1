"""Attention whose probabilities are mapped before they multiply V: rounded, clipped, log-coded.

``attn_rewrite::mapped_attention(q, k, v, reads, cascade, block)`` runs the staged attention that
the text ``cascade`` writes down, tile by tile, and skips blocks of keys that its guard leaves out.
Shapes are those of ``tiled_attention``.  Codes are multiplied as integers and everything else is
float64: a probability that rounds the other way would be an error of a whole step, so nothing here
may differ from the oracle by more than the order of sums.  It makes no speed on a CPU but by
what it skips.  A map without steps (clipping) has a gradient, by recomputing the attention with
plain operators; one that rounds has none, and a backward pass says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.torch.dense import DenseSpace
from attn_rewrite.backends.torch.einsums import emit_stages
from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.gradient import by_argument, keep_for_gradient, recording
from attn_rewrite.backends.torch.integers import integer_matmul
from attn_rewrite.backends.torch.schedule import make_schedule
from attn_rewrite.backends.torch.staged import Prepared, emit_mapped, prepared, rounds
from attn_rewrite.backends.torch.tiles import Job, Problem, gather_size, jobs, keys_of, queries_of
from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import TRUE, Expr, walk
from attn_rewrite.cascade.staged import PI, PV, SD, SN, A, StagedAttention, as_staged
from attn_rewrite.cascade.text import parse
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import EagerBuilder

NAME = "attn_rewrite::mapped_attention"
_EAGER = EagerBuilder()
_INTEGERS = ("i4", "i8")


@lru_cache(maxsize=256)
def mapped_form(text: str) -> tuple[StagedAttention, Prepared, tuple[str, ...]]:
    """The attention that ``text`` writes down, prepared, and the names of its inputs."""
    cascade = parse(text)
    staged = as_staged(cascade)
    if staged is None or staged.probability is None:
        raise LowerError(
            "mapped_attention takes the text of a softmax attention with mapped probabilities, not "
            f"this one; lower it with attn_rewrite.backends.torch.lower instead:\n{text}"
        )
    return staged, prepared(staged, fold=False), tuple(t.name for t in cascade.inputs)


@torch.library.custom_op(NAME, mutates_args=())
def mapped_attention(
    q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], cascade: str, block: int
) -> Tensor:
    """Softmax attention with mapped probabilities; see the module."""
    staged, held, names = mapped_form(cascade)
    given = dict(zip(names, (q, k, v, *reads), strict=True))
    return _Mapped(staged, held, given, block).run().to(q.dtype)


@mapped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], cascade: str, block: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


# The gradient is an operator too: recomputation needs autograd inside.
torch.library.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] reads, str cascade, int[] wanted) "
    "-> Tensor[]",
)


@torch.library.impl(f"{NAME}_backward", ["cpu", "cuda"])
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    cascade: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    staged, _, _ = mapped_form(cascade)
    with recording():
        given = [t.detach().requires_grad_() for t in (q, k, v)]
        held = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(reads)]
        out = emit_mapped(parse(cascade).inputs, staged, _EAGER, [*given, *held])
        leaves = [*given, *(held[i] for i in wanted)]
        found = torch.autograd.grad(out, leaves, grad.detach().to(out.dtype), allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g.to(t.dtype)
        for g, t in zip(found, leaves, strict=True)
    ]


@torch.library.register_fake(f"{NAME}_backward")  # type: ignore[untyped-decorator]
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    cascade: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, *(reads[i] for i in wanted))]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    staged, _, _ = mapped_form(ctx.cascade)
    assert staged.probability is not None
    if any(map(rounds, walk(staged.probability))):
        raise RuntimeError(
            "mapped_attention has no gradient where it rounds probabilities; train without that "
            "policy"
        )
    q, k, v, *reads = ctx.saved_tensors
    found = torch.ops.attn_rewrite.mapped_attention_backward(
        grad, q, k, v, reads, ctx.cascade, ctx.wanted
    )
    return by_argument(ctx, found)


mapped_attention.register_autograd(_differentiate, setup_context=keep_for_gradient)


@dataclass(frozen=True, eq=False)
class _Tile:
    """Exponentials below the row maximum [items, group, queries, keys], their sums, and where."""

    job: Job
    emitter: Emitter
    guard: Tensor | None
    exponentials: Tensor
    sums: Tensor


class _Mapped:
    """One call: operands, schedule and memory."""

    def __init__(
        self, staged: StagedAttention, held: Prepared, given: Mapping[str, Tensor], block: int
    ) -> None:
        self.staged, self.form = staged, held.form
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        stages = {t.name: wide[t.name] for t in held.stages.inputs}
        self.tensors = {**wide, **(emit_stages(_EAGER, held.stages, stages) if stages else {})}
        q, k, v = (self._operand(n) for n in (staged.q, staged.k, staged.v))
        reads = {t.name: self.tensors[t.name] for t in held.form.reads}
        schedule = make_schedule(
            held.form.guard, q_len=q.shape[2], kv_len=k.shape[2], block=block,
            heads=q.shape[1], group=held.form.group,
        )  # fmt: skip
        self.problem = Problem(held.form, q, k, v, reads, schedule)
        self.planned = list(jobs(self.problem)) if k.shape[2] and q.numel() else []
        size = max((gather_size(self.problem, j) for j in self.planned), default=0)
        self.memory = {t.dtype: t.new_empty(size) for t in (k, v)}

    def _operand(self, name: str) -> Tensor:
        """Integer codes as int8, other operands in float64."""
        tensor = self.tensors[name]
        if self.staged.declaration(name).dtype in _INTEGERS:
            codes: Tensor = tensor.to(torch.int8)
            return codes
        wide: Tensor = tensor.double()
        return wide

    def run(self) -> Tensor:
        """The output [b, h, q, f] in float64."""
        q, v = self.problem.q, self.problem.v
        shape = (q.shape[0], q.shape[1], q.shape[2])
        product = torch.zeros((*shape, v.shape[3]), dtype=torch.float64, device=q.device)
        sums = torch.zeros((*shape, 1), dtype=torch.float64, device=q.device)
        peak = self._whole_peak()
        for job in self.planned:
            tile = self._tile(job)
            self._store(job, product, self._values(tile, peak))
            self._store(job, sums, tile.sums)
        known: dict[Expr, Any] = {PV: product, SD: sums}
        frame = ("b", "h", "q", "f")
        extents = {**self.problem.extents(), "b": shape[0]}
        space = DenseSpace(_EAGER, q.device, torch.float64, frame, extents, self.tensors)
        assert self.staged.output is not None
        return Emitter(_EAGER, space, known).tensor(self.staged.output).expand_as(product)  # type: ignore[no-any-return]

    def _store(self, job: Job, whole: Tensor, part: Tensor) -> None:
        g, height = self.problem.group, job.row.height
        part = part.reshape(job.items, g, height, whole.shape[3])
        if job.stack:
            for (b, h, row), one in zip(job.stack, part, strict=True):
                whole[b, h * g : (h + 1) * g, slice(*row.queries)] = one
            return
        heads = slice(job.heads[0] * g, job.heads[1] * g)
        place = whole[slice(*job.batch), heads, slice(*job.row.queries)]
        place.copy_(part.view(place.shape))

    # One tile

    def _tile(self, job: Job) -> _Tile:
        """Exponentials and their sums; rows without a key are 0."""
        space = replace(self.problem.space(job), dtype=torch.float64)
        product = self._product(queries_of(self.problem, job), job)
        known: dict[Expr, Any] = {QK: product}
        emitter = Emitter(_EAGER, space, known)
        scores = emitter.tensor(self.form.score, torch.float64).expand_as(product)
        guard = None
        if self.form.guard != TRUE:
            guard = emitter.truth(self.form.guard)
            scores = scores.masked_fill(~guard, -math.inf)
        top = scores.amax(-1, keepdim=True)
        sink = None
        if self.form.sink is not None:
            sink = emitter.tensor(self.form.sink, torch.float64)
            top = torch.maximum(top, sink)
        top = top.masked_fill(top == -math.inf, 0.0)
        exponentials = (scores - top).exp()
        sums = exponentials.sum(-1, keepdim=True)
        if sink is not None:
            sums = sums + (sink - top).exp()
        emitter.know(SN, exponentials)
        emitter.know(SD, sums)
        if self.staged.normalised:
            emitter.know(A, exponentials / sums.masked_fill(sums == 0, 1.0))
        return _Tile(job, emitter, guard, exponentials, sums)

    def _product(self, queries: Tensor, job: Job) -> Tensor:
        """Products of queries and keys, [items, group, queries, keys]."""
        keys = self._keys(self.problem.k, job)
        both = keys.dtype == queries.dtype == torch.int8
        if both:
            found = integer_matmul(queries, keys)
        else:
            found = torch.bmm(queries.double(), keys.double().mT)
        return found.view(job.items, self.problem.group, job.row.height, -1)

    def _keys(self, tensor: Tensor, job: Job) -> Tensor:
        parts = keys_of(self.problem, tensor, job, self.memory[tensor.dtype])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _values(self, tile: _Tile, peak: Tensor | None) -> Tensor:
        """What the mapped probabilities give with the values: [items, group * queries, f]."""
        assert self.staged.probability is not None
        if self.staged.peak is not None:
            tile.emitter.know(self.staged.peak.out, self._row_peak(tile) if peak is None else peak)
        p = tile.emitter.tensor(self.staged.probability).expand_as(tile.exponentials)
        integers = self.problem.v.dtype == torch.int8 and self._integer_codes()
        if tile.guard is not None:
            p = p.masked_fill(~tile.guard, 0)
        if self.form.weight is not None:
            p = p * tile.emitter.tensor(self.form.weight)
        p = p.reshape(tile.job.items, -1, p.shape[-1])
        values = self._keys(self.problem.v, tile.job)
        if integers:
            return integer_matmul(p.to(torch.int8), values.mT.contiguous())
        return torch.bmm(p.double(), values.double())

    def _integer_codes(self) -> bool:
        return any(t.name == PI.tensor and t.dtype in _INTEGERS for t in self.staged.tensors)

    # Statistics of normalised probabilities

    def _row_peak(self, tile: _Tile) -> Tensor:
        """The largest probability of each row that the statistic counts."""
        assert self.staged.peak is not None
        counted = tile.emitter.truth(self.staged.peak.guard)
        value: Tensor = tile.emitter.tensor(self.staged.peak.expr).masked_fill(~counted, -math.inf)
        value = value.expand_as(tile.exponentials).amax(-1, keepdim=True)
        return value.masked_fill(value == -math.inf, 0.0)

    def _whole_peak(self) -> Tensor | None:
        """The largest probability of the whole call, where the statistic is one number."""
        if self.staged.peak is None or self.staged.peak.out.index:
            return None
        tops: Iterator[Tensor] = (self._row_peak(self._tile(job)).amax() for job in self.planned)
        return torch.stack([*tops]).amax().view(1, 1, 1, 1)


__all__ = ["mapped_attention"]
