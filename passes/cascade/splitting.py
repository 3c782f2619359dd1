"""Linearity: a sum over terms is taken term by term, where the terms fold different ranks."""

from __future__ import annotations

from dataclasses import replace

from attn_rewrite.cascade.expr import Call, Const, Expr, Read, call
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.deferral import Deferred, Part, joined, parts_of
from attn_rewrite.passes.cascade.flow import Flow, inlined
from attn_rewrite.passes.cascade.proof import Proof


def split_sum(flow: Flow, e: Einsum) -> Deferred | None:
    """``sum (X + Y) * Z`` as ``sum X * Z + sum Y * Z``; None where the body is no such product.

    For a term that folds a rank of its own (heads that a linear map mixes) beside one that does
    not: neither can be inlined into the whole body, each can into its own sum.
    """
    if flow.operation(e) != "add" or set(dict(e.reduce).values()) > {"add"}:
        return None
    found = _opened(flow, e)
    if found is None:
        return None
    whole, at, terms = found
    parts = parts_of(whole.expr, "add")
    reduce = tuple((r, "add") for r in sorted({flow.rank, *flow.others_reduced(whole)}))
    partials: list[Einsum] = []
    taken = flow
    for term in terms:
        body = joined([Part(term) if p is parts[at] else p for p in parts], "add")
        out = Read(taken.fresh(f"{e.out.tensor}N"), e.out.index)
        partials.append(replace(whole, out=out, expr=body, reduce=reduce))
        taken = taken.with_einsums([*taken.einsums, partials[-1]])
    left, right = (p.out for p in partials)
    last = Einsum(e.out, left + right)
    conditions = (f"body = {partials[0].expr} + {partials[1].expr}",)
    proof = Proof(
        "linearity", e.out.tensor, flow.rank, (), whole.expr, Const(1.0),
        side_conditions=conditions,
    )  # fmt: skip
    return Deferred((*partials, last), (), proof)


def _opened(flow: Flow, e: Einsum) -> tuple[Einsum, int, tuple[Expr, Expr]] | None:
    """``e`` with producers inlined until one factor is a sum: the Einsum, the factor, its terms."""
    while True:
        parts = parts_of(e.expr, "add")
        for at, part in enumerate(parts):
            terms = None if part.inverse else _terms(part.expr)
            if terms is not None:
                return e, at, terms
        reads = [
            p.expr
            for p in parts
            if isinstance(p.expr, Read) and p.expr.tensor in flow.dependent and not p.inverse
        ]
        opened = (inlined(flow, e, r) for r in reads)
        found = next((o for o in opened if o is not None), None)
        if found is None:
            return None
        e = found


def _terms(expr: Expr) -> tuple[Expr, Expr] | None:
    match expr:
        case Call("add", (a, b)):
            return a, b
        case Call("sub", (a, b)):
            return a, call("neg", b)
    return None
