"""Pieces of a fused cascade as cascades of their own, and the clean-up after emission."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attn_rewrite.cascade.expr import Expr, Extent, Rank, Read, substitute, walk
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, Statement, TensorDecl
from attn_rewrite.cascade.unroll import accesses
from attn_rewrite.passes.cascade.flow import Flow, pruned


def finish_cascade(flow: Flow, states: tuple[str, ...], body: tuple[Einsum, ...]) -> Cascade:
    """The outputs of the cascade from complete states, which become inputs."""
    made = [flow.producer[s] for s in states]
    inputs = tuple(state_decl(flow, e, e.out.tensor) for e in made)
    rest = tuple(t for t in flow.cascade.tensors if t.name not in states)
    new = replace(
        flow.cascade,
        name=f"{flow.cascade.name}-finish",
        inputs=(*flow.cascade.inputs, *inputs),
        tensors=rest,
        body=body,
    )
    return used_inputs(pruned(new))


def state_decl(flow: Flow, e: Einsum, name: str) -> TensorDecl:
    """The declaration of a complete state under ``name``."""
    ranks = tuple(i.name for i in e.out.index if isinstance(i, Rank))
    return TensorDecl(name, ranks, flow.default(e.out.tensor))


def used_inputs(cascade: Cascade) -> Cascade:
    """The cascade without inputs that nothing reads, and without ranks that nothing has."""
    reads = {r.tensor for e in cascade.einsums() for r in accesses(e)} | set(cascade.outputs)
    written = {e.out.tensor for e in cascade.einsums()}
    inputs = tuple(t for t in cascade.inputs if t.name in reads and t.name not in written)
    return replace(cascade, inputs=inputs)


def without_ranks(cascade: Cascade, names: frozenset[str]) -> Cascade:
    """The cascade without those declarations of ``names`` that nothing uses any more."""
    tensors = (*cascade.inputs, *cascade.tensors)
    used = {r for t in tensors for r in t.ranks} | {p for r in cascade.ranks for p in r.parts}
    for e in cascade.einsums():
        nodes = [n for part in (e.out, e.expr, e.guard) for n in walk(part)]
        used |= {n.name for n in nodes if isinstance(n, Rank)}
        used |= {n.rank for n in nodes if isinstance(n, Extent)}
    ranks = tuple(r for r in cascade.ranks if r.name in used or r.name not in names)
    return replace(cascade, ranks=ranks)


def forwarded(cascade: Cascade, end: Expr) -> Cascade:
    """Reads of plain copies replaced by what they copy; copies that are outputs stay.

    A copy takes the state at ``end``, the last coordinate of the loop.
    """
    copies: dict[str, Einsum] = {}
    body: list[Statement] = []
    for s in cascade.body:
        if isinstance(s, Loop):
            body.append(s)
            continue
        e = replace(s, expr=_looked_up(s.expr, copies), guard=_looked_up(s.guard, copies))
        if isinstance(e.expr, Read) and end in e.expr.index:
            copies[e.out.tensor] = e
            if e.out.tensor not in cascade.outputs:
                continue
        body.append(e)
    return pruned(replace(cascade, body=tuple(body)))


def _looked_up(expr: Expr, copies: Mapping[str, Einsum]) -> Expr:
    found: dict[Expr, Expr] = {}
    for r in walk(expr):
        if isinstance(r, Read) and r.tensor in copies:
            made = copies[r.tensor]
            at: dict[Expr, Expr] = dict(zip(made.out.index, r.index, strict=True))
            found[r] = substitute(made.expr, at)
    return substitute(expr, found)
