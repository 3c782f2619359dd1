"""Attention computed plainly in low precision: the yardstick of a rewritten attention.

The error of the original computation says nothing about an attention that was rewritten: fewer keys
round more, and an edited score adds roundings of its own.  The reference is what eager PyTorch
would do (two matrix products and a softmax), with scores, factors and sinks from the float64
oracle: it shares no code with any kernel, so a kernel's bug does not widen its own bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attn_rewrite.cascade.attention import POINT
from attn_rewrite.cascade.expr import B, Call, Expr, H, Q, Read, tensors_of, where
from attn_rewrite.cascade.ir import Cascade, Einsum, RankDecl, TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.reordered import as_reordered, in_order
from attn_rewrite.cascade.staged import StagedAttention, as_staged
from attn_rewrite.chunked import LIMIT_BYTES, gathered, of_rows, restored, sliced, unstaged

_ROW = (B, H, Q)


def plain_attention(
    cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES
) -> Tensor | None:
    """AV[b, h, q, f] of a softmax attention in the dtype of Q; None for any other cascade.

    Stages (scales and codes) are those of the oracle: rounding to codes is part of the attention.
    Codes enter the product times their scales, rounded, as a simulated quantisation has them.
    None for mapped probabilities too: what rounds them has to be as exact as the oracle.  Softmax
    statistics are float32 for half types, as eager models keep them.
    """
    found = as_reordered(cascade)
    if found is not None:
        inner = plain_attention(found.inner, gathered(found, inputs), limit)
        return None if inner is None else restored(found, inner)
    staged = as_staged(cascade)
    if staged is None or staged.probability is not None:
        return None
    dtype = inputs["Q"].dtype
    cascade, inputs = unstaged(cascade, inputs)
    inputs = values_of_codes(staged, inputs, dtype)

    def evaluate(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return _eager(part, held, staged, dtype)

    return sliced(cascade, inputs, ("b", "q"), limit, evaluate)


def plain_lse(cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES) -> Tensor:
    """The log-sum-exp [b, h, q] of the same plain evaluation, for a cascade that has one."""
    staged = as_staged(in_order(cascade))
    assert staged is not None
    dtype = inputs["Q"].dtype

    def evaluate(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        _, total, top = _exponentials(part, held, _product(held, staged, dtype), _work(dtype))
        return (top + total.log())[..., 0]

    def each(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return sliced(part, values_of_codes(staged, held, dtype), ("b", "q"), limit, evaluate)

    return of_rows(cascade, inputs, each)


def _eager(
    cascade: Cascade, inputs: Mapping[str, Tensor], staged: StagedAttention, dtype: torch.dtype
) -> Tensor:
    product, work = _product(inputs, staged, dtype), _work(dtype)
    v = inputs[staged.v].to(dtype).repeat_interleave(staged.form.group, 1)
    p, total, _ = _exponentials(cascade, inputs, product, work)
    p = torch.where(total > 0, p / total, 0)
    factor = _factor(cascade)
    if factor is not None:
        one = Einsum(Read("S", POINT), factor)
        p = p * value_of(cascade, inputs, product, one).to(work)
    return p.to(dtype) @ v


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _product(inputs: Mapping[str, Tensor], staged: StagedAttention, dtype: torch.dtype) -> Tensor:
    """Q K^T [b, h, q, kv], heads of K repeated."""
    q, k = (_narrowed(inputs[n], dtype) for n in (staged.q, staged.k))
    q, k = q.to(torch.promote_types(q.dtype, k.dtype)), k.to(torch.promote_types(q.dtype, k.dtype))
    return q @ k.repeat_interleave(staged.form.group, 1).transpose(-1, -2)


def _exponentials(
    cascade: Cascade, inputs: Mapping[str, Tensor], product: Tensor, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials below the row maximum, their sums with the sink, and the maximum (0 if -inf)."""
    score = cascade.producer("S")
    assert score is not None
    s = value_of(cascade, inputs, product, score).to(work)
    top = s.amax(-1, keepdim=True)
    sink = sink_of(cascade, inputs, product)
    if sink is not None:
        top = torch.maximum(top, sink.to(work)[..., None])
    top = top.masked_fill(top == -torch.inf, 0)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink.to(work)[..., None] - top).exp()
    return p, total, top


def values_of_codes(
    staged: StagedAttention, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Q and K as numbers in the working type, their scales taken out of the score (set to 1)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    held = dict(inputs)
    for name in (staged.q, staged.k):
        made = next((e for e in staged.stages if e.out.tensor == name), None)
        scale = None if made is None else staged.declaration(name).scale
        if made is None or scale is None or scale not in inputs:
            continue
        factor: Expr = next(r for r in made.reads() if r.tensor == scale)
        if isinstance(made.expr, Call) and made.expr.op == "where":  # some heads have no codes
            factor = where(made.expr.args[0], 1.0, factor)
        value = Einsum(Read("value", made.out.index), Read(name, made.out.index) * factor)
        given = tuple(replace(staged.declaration(n), scale=None) for n in (name, scale))
        ranks = tuple(RankDecl(r) for r in dict.fromkeys(r for t in given for r in t.ranks))
        alone = Cascade("value", ranks, given, (value,), ("value",))
        found = interpret(alone, {n: inputs[n] for n in (name, scale)})["value"]
        held |= {name: found.to(work), scale: torch.ones_like(inputs[scale])}
    return held


def _narrowed(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand in the dtype of the model; codes and their values in one that holds them."""
    if operand.dtype == dtype or operand.dtype == torch.float32:
        return operand
    return operand.to(torch.float64 if dtype == torch.float64 else torch.float32)


def value_of(
    cascade: Cascade, inputs: Mapping[str, Tensor], product: Tensor, einsum: Einsum
) -> Tensor:
    """One Einsum of the cascade in float64, with the product QK as it was computed."""
    given = {TensorDecl("QK", ("b", "h", "q", "kv")): product}
    found = value_with(cascade, inputs, given, einsum)
    return found.expand(product.shape[: len(einsum.out.index)])


def value_with(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    given: Mapping[TensorDecl, Tensor],
    einsum: Einsum,
) -> Tensor:
    """One Einsum of the cascade in float64, with the values it reads of others ``given``."""
    wanted = {*tensors_of(einsum.expr), *tensors_of(einsum.guard)}
    reads = tuple(t for t in cascade.inputs if t.name in wanted)
    alone = replace(cascade, inputs=(*given, *reads), body=(einsum,), outputs=(einsum.out.tensor,))
    held = {**{t.name: x for t, x in given.items()}, **{t.name: inputs[t.name] for t in reads}}
    return interpret(alone, held)[einsum.out.tensor]


def sink_of(cascade: Cascade, inputs: Mapping[str, Tensor], product: Tensor) -> Tensor | None:
    """The logit [b, h, q] that joins each row, in float64, if there is one."""
    top = cascade.producer("GM")
    if top is None or cascade.producer("LM") is None:
        return None
    return value_of(cascade, inputs, product, Einsum(Read("GM", _ROW), top.expr.children[1]))


def _factor(cascade: Cascade) -> Expr | None:
    """What multiplies the probabilities before the value product, if anything."""
    last = cascade.producer("AV")
    assert last is not None
    weighted = last.expr.children[0]
    return None if isinstance(weighted, Read) else weighted.children[1]
