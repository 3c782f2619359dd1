"""The Einsums of a cascade in program order, solver loops of known extent written out."""

from __future__ import annotations

from collections.abc import Iterator

from attn_rewrite.cascade.expr import (
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    ranks_of,
    substitute,
    walk,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop


def accesses(einsum: Einsum) -> tuple[Read, ...]:
    """Tensor reads of the expression, the guard and of index tables, in order."""
    nodes = [*walk(einsum.expr), *walk(einsum.guard)]
    nodes += [n for i in einsum.out.index for n in walk(i)]
    return tuple(n for n in nodes if isinstance(n, Read))


def unrolled(cascade: Cascade, levels: frozenset[str]) -> Iterator[tuple[Einsum, Loop | None]]:
    """Einsums in order with the loop they stand in; loops over ranks of ``levels`` stay loops.

    A solver that iterates over its own rank (Newton steps of entmax) traverses the keys once a
    step, so its passes can only be told apart by step: each gets its own tensors (``TAU@3``).
    A loop of unknown extent stays as it is.
    """
    sizes = {
        s.rank: size
        for s in cascade.body
        if isinstance(s, Loop)
        and s.rank not in levels
        and (size := next((r.size for r in cascade.ranks if r.name == s.rank), None)) is not None
    }
    dims = {
        (r.tensor, d)
        for e in cascade.einsums()
        for r in (e.out, *accesses(e))
        for d, i in enumerate(r.index)
        if ranks_of(i) & sizes.keys()
    }
    extents: dict[Expr, Expr] = {Extent(r): Const(n) for r, n in sizes.items()}
    for statement in cascade.body:
        if isinstance(statement, Einsum):
            yield _named(statement, extents, dims), None
            continue
        size = sizes.get(statement.rank)
        yield from ((_named(e, extents, dims), None) for e in statement.init)
        if size is None:
            yield from ((_named(e, extents, dims), statement) for e in statement.body)
            continue
        for step in reversed(range(size)) if statement.descending else range(size):
            at = {**extents, Rank(statement.rank): Const(step)}
            yield from ((_named(e, at, dims), None) for e in statement.body)


def _named(e: Einsum, at: dict[Expr, Expr], dims: set[tuple[str, int]]) -> Einsum:
    """``e`` at fixed coordinates; dimensions of unrolled ranks move into the tensor names."""
    if not dims:
        return e

    def access(r: Read) -> Read:
        index = tuple(_folded(substitute(i, at)) for i in r.index)
        fixed = [str(i) for d, i in enumerate(index) if (r.tensor, d) in dims]
        kept = tuple(i for d, i in enumerate(index) if (r.tensor, d) not in dims)
        return Read(f"{r.tensor}@{','.join(fixed)}" if fixed else r.tensor, kept)

    def reads(expr: Expr) -> Expr:
        found: dict[Expr, Expr] = {n: access(n) for n in walk(expr) if isinstance(n, Read)}
        return substitute(substitute(expr, found), at)

    return Einsum(access(e.out), reads(e.expr), e.reduce, reads(e.guard))


def _folded(index: Expr) -> Expr:
    match index:
        case Call("add", (Const(int(a)), Const(int(b)))):
            return Const(a + b)
        case Call("sub", (Const(int(a)), Const(int(b)))):
            return Const(a - b)
    return index
