"""Backward passes of softmax attention, as cascades for the same emitter.

With ``P = exp(S - LSE)`` recomputed from the saved log-sum-exp, ``DELTA = sum_f DO * AV`` and
``DS = P * (weight * DO V^T - DELTA)``, every gradient is a cascade of one pass: the one of the
queries traverses keys, those of keys and values traverse queries.  The derivative of the score with
respect to the product and to the tensors it reads is symbolic.

Source: Dao et al., FlashAttention, NeurIPS 2022, appendix B.2, for the recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_rewrite.backends.triton.derivative import derivative
from attn_rewrite.cascade.attention import POINT, QK, SoftmaxAttention
from attn_rewrite.cascade.expr import (
    KV,
    B,
    D,
    Expr,
    F,
    H,
    Q,
    Rank,
    Read,
    call,
    walk,
    where,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, RankDecl, TensorDecl
from attn_rewrite.site import Refusal

ROW = (B, H, Q)
_LSE, _DELTA = Read("LSE", ROW), Read("DELTA", ROW)
_S, _P, _DP, _DA, _DS, _DQK = (Read(n, POINT) for n in ("S", "P", "DP", "DA", "DS", "DQK"))


@dataclass(frozen=True)
class Backward:
    """The cascades of a backward pass.

    ``queries`` gives DQ [b, h, q, d] and traverses keys; ``keys`` gives DK [b, h, kv, d] and
    DV [b, h, kv, f], one per *query* head, and traverses queries; ``reads`` gives, for each tensor
    asked for, its gradient over all points [b, h, q, kv].  Their inputs are those of the forward
    cascade and DO, LSE, DELTA.
    """

    queries: Cascade
    keys: Cascade
    reads: Cascade | None


def backward_of(form: SoftmaxAttention, wanted: tuple[str, ...] = ()) -> Backward | Refusal:
    """The backward cascades of ``form``, with gradients of the ``wanted`` reads.

    Refused where an expression has no derivative, or a wanted tensor is read at computed
    coordinates (its gradient is a scatter).
    """
    slope = derivative(form.score, QK)
    if isinstance(slope, Refusal):
        return slope
    common = _common(form, slope)
    row_tensors = (TensorDecl("LSE", ("b", "h", "q")), TensorDecl("DELTA", ("b", "h", "q")))
    head = "h" if form.group == 1 else "hkv"
    inputs = (
        TensorDecl("Q", ("b", "h", "q", "d")),
        TensorDecl("K", ("b", head, "kv", "d")),
        TensorDecl("V", ("b", head, "kv", "f")),
        *form.reads,
        TensorDecl("DO", ("b", "h", "q", "f")),
        *row_tensors,
    )
    guard, weight = form.guard, form.weight
    weighted = _P if weight is None else _P * weight
    k, q, do = Read("K", _kv(form, D)), Read("Q", (B, H, Q, D)), Read("DO", (B, H, Q, F))
    dq = Einsum(Read("DQ", (B, H, Q, D)), _DQK * k, (("kv", "add"),), guard)
    dk = Einsum(Read("DK", (B, H, KV, D)), _DQK * q, (("q", "add"),), guard)
    dv = Einsum(Read("DV", (B, H, KV, F)), weighted * do, (("q", "add"),), guard)
    found = _of_reads(form, wanted)
    if isinstance(found, Refusal):
        return found
    names = tuple(f"D_{n}" for n in wanted)
    return Backward(
        _cascade("backward-queries", inputs, (*common, dq), ("DQ",)),
        _cascade("backward-keys", inputs, (*common, dk, dv), ("DK", "DV")),
        _cascade("backward-reads", inputs, (*common, *found), names) if wanted else None,
    )


def _kv(form: SoftmaxAttention, lane: Expr) -> tuple[Expr, ...]:
    head = H if form.group == 1 else call("floordiv", H, form.group)
    return (B, head, KV, lane)


def _common(form: SoftmaxAttention, slope: Expr) -> tuple[Einsum, ...]:
    """From the operands to the gradient of the raw product."""
    g = form.guard
    q, k = Read("Q", (B, H, Q, D)), Read("K", _kv(form, D))
    do, v = Read("DO", (B, H, Q, F)), Read("V", _kv(form, F))
    reference = where(call("isneginf", _LSE), 0.0, _LSE)  # a row without keys
    through = _DP if form.weight is None else _DP * form.weight
    return (
        Einsum(QK, q * k, (("d", "add"),)),
        Einsum(_S, form.score, (), g),
        Einsum(_P, call("exp", _S - reference), (), g),
        Einsum(_DP, do * v, (("f", "add"),)),
        Einsum(_DA, through - _DELTA, ()),
        Einsum(_DS, _P * _DA, (), g),
        Einsum(_DQK, _DS * slope, (), g),
    )


def _of_reads(form: SoftmaxAttention, wanted: tuple[str, ...]) -> tuple[Einsum, ...] | Refusal:
    """The gradient of each wanted tensor at every point."""
    found = []
    for name in wanted:
        total: Expr | None = None
        for expr, factor in ((form.score, _DS), (form.weight, _P * _DP)):
            for read in _reads(expr, name):
                part = _part(expr, read, factor)
                if isinstance(part, Refusal):
                    return part
                total = part if total is None else total + part
        if total is None:
            return Refusal("no-gradient", f"neither score nor weight reads {name}")
        found.append(Einsum(Read(f"D_{name}", POINT), total, (), form.guard))
    return tuple(found)


def _reads(expr: Expr | None, name: str) -> list[Read]:
    if expr is None:
        return []
    nodes = (n for n in walk(expr) if isinstance(n, Read) and n.tensor == name)
    return list(dict.fromkeys(nodes))


def plain_index(form: SoftmaxAttention, name: str) -> tuple[str, ...]:
    """The ranks a tensor is read at, in the order of its dimensions."""
    read = next(r for e in (form.score, form.weight, form.sink) for r in _reads(e, name))
    return tuple(i.name for i in read.index if isinstance(i, Rank))


def _part(expr: Expr | None, read: Read, factor: Expr) -> Expr | Refusal:
    assert expr is not None
    if not all(isinstance(i, Rank) for i in read.index):
        return Refusal("scattered-gradient", f"{read} is read at computed coordinates")
    slope = derivative(expr, read)
    return slope if isinstance(slope, Refusal) else factor * slope


def _cascade(
    name: str, inputs: tuple[TensorDecl, ...], body: tuple[Einsum, ...], outputs: tuple[str, ...]
) -> Cascade:
    ranks = ["b", "h", "hkv", "q", "kv", "d", "f", *(r for t in inputs for r in t.ranks)]
    used = {r for t in inputs for r in t.ranks}
    declared = tuple(RankDecl(r) for r in dict.fromkeys(ranks) if r in used)
    tensors = (TensorDecl("S", ("b", "h", "q", "kv"), float("-inf")),)
    return Cascade(name, declared, inputs, body, outputs, tensors)
