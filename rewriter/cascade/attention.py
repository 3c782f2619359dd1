"""Softmax attention as a cascade: built from a score expression, and seen again in any cascade.

`softmax_cascade` writes the three-pass form with fixed tensor names; `as_softmax` reads a cascade
of that shape back, so that kernels that know softmax attention can take it.  Transforms edit
cascades through `restrict` and `edit_score`.

Shapes: Q[b, h, q, d], K[b, hkv, kv, d], V[b, hkv, kv, f] -> AV[b, h, q, f]; K and V are read at
head ``h // group`` when query heads share key heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    B,
    Call,
    Const,
    D,
    Expr,
    Extent,
    F,
    H,
    Q,
    Rank,
    Read,
    call,
    conjunction,
    conjuncts,
    disjuncts,
    substitute,
    walk,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, RankDecl, TensorDecl
from attn_rewrite.cascade.simplify import simplify

POINT = (B, H, Q, KV)
QK = Read("QK", POINT)
S = Read("S", POINT)
MINUS_INF = -math.inf


@dataclass(frozen=True)
class SoftmaxAttention:
    """The parts of a softmax attention cascade.

    ``score`` is an expression over `QK` (the raw product), ranks and tensor reads; ``guard`` the
    kept pairs; ``weight`` multiplies the normalised probabilities (post-softmax factors); ``sink``
    is a logit that joins the denominator only; ``group`` the number of query heads per key head;
    ``reads`` declares every further input.
    """

    score: Expr = QK
    guard: Expr = TRUE
    weight: Expr | None = None
    sink: Expr | None = None
    group: int = 1
    reads: tuple[TensorDecl, ...] = ()


def softmax_cascade(form: SoftmaxAttention, name: str = "attention") -> Cascade:
    """The three-pass cascade of ``form`` (max, exp and sum, divide and contract)."""
    kv_head = H if form.group == 1 else call("floordiv", H, form.group)
    head = "h" if form.group == 1 else "hkv"
    row = (B, H, Q)
    sn, a = Read("SN", POINT), Read("A", POINT)
    gm, sd = Read("GM", row), Read("SD", row)
    q, k, v = (
        Read("Q", (B, H, Q, D)),
        Read("K", (B, kv_head, KV, D)),
        Read("V", (B, kv_head, KV, F)),
    )
    g = form.guard
    top: tuple[Einsum, ...] = (Einsum(gm, S, (("kv", "max"),), g),)
    bottom: tuple[Einsum, ...] = (Einsum(sd, sn, (("kv", "add"),), g),)
    if form.sink is not None:
        lm, ls = Read("LM", row), Read("LS", row)
        top = (replace(top[0], out=lm), Einsum(gm, call("max", lm, form.sink)))
        bottom = (replace(bottom[0], out=ls), Einsum(sd, ls + call("exp", form.sink - gm)))
    weighted = a if form.weight is None else a * form.weight
    body = (
        Einsum(QK, q * k, (("d", "add"),)),
        Einsum(S, form.score, (), g),
        *top,
        Einsum(sn, call("exp", S - gm), (), g),
        *bottom,
        Einsum(a, sn / sd, (), g),
        Einsum(Read("AV", (*row, F)), weighted * v, (("kv", "add"),), g),
    )
    inputs = (
        TensorDecl("Q", ("b", "h", "q", "d")),
        TensorDecl("K", ("b", head, "kv", "d")),
        TensorDecl("V", ("b", head, "kv", "f")),
        *form.reads,
    )
    names = ["b", "h", *([head] if head != "h" else []), "q", "kv", "d", "f"]
    names += [r for t in form.reads for r in t.ranks if r not in names]
    ranks = tuple(RankDecl(n) for n in dict.fromkeys(names))
    maxima = tuple(TensorDecl(e.out.tensor, ("b", "h", "q"), MINUS_INF) for e in top)
    tensors = (TensorDecl("S", ("b", "h", "q", "kv"), MINUS_INF), *maxima)
    return Cascade(name, ranks, inputs, body, ("AV",), tensors)


def as_softmax(cascade: Cascade) -> SoftmaxAttention | None:
    """The parts of ``cascade`` if it is exactly what `softmax_cascade` writes, else None."""
    score, last, keys = (cascade.producer(t) for t in ("S", "AV", "QK"))
    if score is None or last is None or keys is None:
        return None
    a = Read("A", POINT)
    k = next((r for r in keys.reads() if r.tensor == "K"), None)
    v = next((r for r in last.reads() if r.tensor == "V"), None)
    if k is None or v is None or len(k.index) != 4:
        return None
    group = 1
    match k.index[1]:
        case Rank("h"):
            pass
        case other if getattr(other, "op", "") == "floordiv" and isinstance(
            c := other.children[1], Const
        ):
            group = int(c.value)
        case _:
            return None
    form = SoftmaxAttention(
        score=score.expr,
        guard=score.guard,
        weight=_weight(last.expr, a, v),
        sink=_sink(cascade),
        group=group,
        reads=cascade.inputs[3:],
    )
    return form if softmax_cascade(form, cascade.name) == cascade else None


def _weight(expr: Expr, a: Read, v: Read) -> Expr | None:
    if expr == a * v:
        return None
    product = expr.children[0] if expr.children else expr
    return product.children[1] if len(product.children) == 2 else None


def _sink(cascade: Cascade) -> Expr | None:
    top = cascade.producer("GM")
    if top is None or cascade.producer("LM") is None or len(top.expr.children) != 2:
        return None
    return top.expr.children[1]


def news(terms: tuple[Expr, ...], have: Iterable[Expr]) -> tuple[Expr, ...]:
    """The ``terms`` of a conjunction that neither ``have`` nor one another imply: ``a | b`` says
    nothing beside ``a``."""
    known = {*have}
    every = known | {*terms}
    return tuple(
        t for t in terms if t not in known and not any(d in every - {t} for d in disjuncts(t))
    )


def restrict(cascade: Cascade, mask: Expr) -> Cascade:
    """Keep only the pairs of ``mask``: every Einsum that iterates q and kv gets it as a guard.

    The mask is brought to normal form; terms already present are not repeated, nor those that
    present ones imply, so the same object comes back when nothing changes.
    """
    wanted = conjuncts(simplify(mask))

    def guarded(e: Einsum) -> Einsum:
        iterates_pairs = e.out.tensor != "QK" and any(
            Rank("kv") in r.index and Rank("q") in r.index for r in (*e.reads(), e.out)
        )
        if not iterates_pairs:
            return e
        have = conjuncts(e.guard)
        new = news(wanted, have)
        return replace(e, guard=conjunction(have + new)) if new else e

    body = tuple(guarded(s) if isinstance(s, Einsum) else s for s in cascade.body)
    return cascade.with_body(*body)


def score_of(cascade: Cascade) -> Expr:
    """The score expression (the argument of the softmax) over ranks, reads and the product `QK`."""
    score = cascade.producer("S")
    if score is None:
        raise ValueError(f"cascade {cascade.name} has no score tensor S")
    return score.expr


def edit_score(cascade: Cascade, score: Expr) -> Cascade:
    """The cascade with another score expression."""
    old = cascade.producer("S")
    assert old is not None
    body = tuple(replace(s, expr=score) if s is old else s for s in cascade.body)
    return cascade.with_body(*body)


def inline_scores(expr: Expr, value: Expr) -> Expr:
    """Replace the raw product `QK` in ``expr``."""
    return substitute(expr, {QK: value})


def usual_length(guard: Expr) -> int | None:
    """The number of keys that a guard is about, where it keeps everything at any other."""
    for node in walk(guard):
        match node:
            case Call("ne", (Extent("kv"), Const(int(length)))):
                return length
            case Call("ne", (Const(int(length)), Extent("kv"))):  # as simplification writes it
                return length
    return None
