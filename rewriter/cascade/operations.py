"""Operations and bytes of every Einsum of a cascade, as sympy expressions in the rank extents.

The counting rules are those of the FuseMax evaluation (Nayak et al., MICRO 2024): a product that is
summed is a MAC, ``exp(a - b)`` is one operation, a reduction costs one operation per point.

An Einsum in the body of an iterative rank runs once per step.  Where it is part of the recurrence
(a Newton step of entmax reads the keys again, because the threshold has changed) all its work
repeats; what depends on nothing the loop writes is done once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx
import sympy

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Read, ranks_of, walk
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, TensorDecl
from attn_rewrite.cascade.unroll import accesses

OPERATION_KINDS = ("mac", "max", "exp", "add", "mul", "div", "other")

_KIND = {
    "add": "add", "sub": "add", "mul": "mul", "div": "div", "reciprocal": "div",
    "max": "max", "min": "max", "exp": "exp", "exp2": "exp",
}  # fmt: skip
# Reading a coordinate, choosing a branch or a sign is addressing, not arithmetic on data.
_FREE = {"neg", "where", "isneginf", "not", "and", "or", "lt", "le", "gt", "ge", "eq", "ne"}
_WIDTH = {
    "f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i8": 1, "bool": 1,
    "f8e4m3": 1, "f8e5m2": 1, "i4": sympy.Rational(1, 2),
}  # fmt: skip
WORD = sympy.Symbol("word", positive=True, integer=True)  # bytes of the model's dtype


@dataclass(frozen=True)
class EinsumCost:
    """What one Einsum costs when it runs alone: operations by kind, compulsory bytes in and out.

    ``operations`` has every kind of `OPERATION_KINDS`; guards are not subtracted, so the counts are
    those of a dense iteration space.  Bytes use the symbol ``word`` for the model's dtype.
    """

    tensor: str
    operations: Mapping[str, sympy.Expr] = field(hash=False)
    bytes_read: sympy.Expr
    bytes_written: sympy.Expr


def rank_symbol(rank: str) -> sympy.Symbol:
    """The extent of ``rank`` as a positive integer symbol in the paper's notation (m1 -> M1)."""
    return sympy.Symbol(rank.upper(), positive=True, integer=True)


def operation_counts(cascade: Cascade) -> tuple[EinsumCost, ...]:
    """The cost of every Einsum, in program order; initial values of iterative ranks included."""
    declared = {t.name: t for t in (*cascade.tensors, *cascade.inputs)}
    found: list[EinsumCost] = []
    for statement in cascade.body:
        if isinstance(statement, Einsum):
            found.append(_einsum_cost(statement, declared, _ONCE))
            continue
        found += (_einsum_cost(e, declared, _ONCE) for e in statement.init)
        steps = _Steps(statement)
        found += (_einsum_cost(e, declared, steps) for e in statement.body)
    return tuple(found)


def total_operations(costs: tuple[EinsumCost, ...]) -> dict[str, sympy.Expr]:
    """Operations of the whole cascade by kind."""
    return {k: sympy.expand(sum(c.operations[k] for c in costs)) for k in OPERATION_KINDS}


class _Steps:
    """What repeats in a loop: tensors that its body writes, and the cycles among them."""

    def __init__(self, loop: Loop | None) -> None:
        self.rank = frozenset[str]() if loop is None else frozenset({loop.rank})
        body = () if loop is None else loop.body
        self.written = {e.out.tensor for e in body}
        flow = nx.DiGraph((r.tensor, e.out.tensor) for e in body for r in accesses(e))
        self.recurrent = {
            t for group in nx.strongly_connected_components(flow) for t in group
            if len(group) > 1 or flow.has_edge(t, t)
        }  # fmt: skip

    def ranks(self, expr: Expr) -> frozenset[str]:
        """Ranks along which the value of ``expr`` changes, the steps of the loop included."""
        own = ranks_of(expr)
        if any(isinstance(n, Read) and n.tensor in self.written for n in walk(expr)):
            return own | self.rank
        return own

    def reads_again(self, einsum: Einsum) -> frozenset[str]:
        """The loop rank if every step must read operands anew."""
        return self.rank if einsum.out.tensor in self.recurrent else frozenset()


_ONCE = _Steps(None)


def _volume(ranks: frozenset[str]) -> sympy.Expr:
    return sympy.Mul(*(rank_symbol(r) for r in sorted(ranks)))


def _einsum_cost(einsum: Einsum, declared: Mapping[str, TensorDecl], steps: _Steps) -> EinsumCost:
    operations: dict[str, sympy.Expr] = dict.fromkeys(OPERATION_KINDS, sympy.Integer(0))
    written = frozenset[str]().union(*(ranks_of(i) for i in einsum.out.index))
    space = steps.ranks(einsum.expr) | written | {rank for rank, _ in einsum.reduce}
    reduced = space - written - steps.rank
    _count(einsum.expr, operations, steps)
    if reduced:
        _count_reduction(einsum, reduced, space, operations, steps)
    again = steps.reads_again(einsum)
    reads = {r.tensor: r for r in einsum.reads()}
    return EinsumCost(
        einsum.out.tensor,
        operations,
        sympy.Add(*(_read_bytes(r, declared.get(t), again) for t, r in reads.items())),
        _volume(written | again) * _width(declared.get(einsum.out.tensor)),
    )


def _count(expr: Expr, into: dict[str, sympy.Expr], steps: _Steps) -> None:
    """Each operator runs once per point of the ranks that its own operands change along."""
    for child in expr.children if isinstance(expr, Call) else ():
        _count(child, into, steps)
    if not isinstance(expr, Call) or expr.op in _FREE or not _on_data(expr):
        return
    if expr.op in ("exp", "exp2") and isinstance(expr.args[0], Call) and expr.args[0].op == "sub":
        into["add"] -= _volume(steps.ranks(expr.args[0]))  # sub-then-exp is one operation
    into[_KIND.get(expr.op, "other")] += _volume(steps.ranks(expr))


def _on_data(expr: Expr) -> bool:
    """Arithmetic on coordinates and literals alone is addressing."""
    return any(isinstance(c, Read) or (isinstance(c, Call) and _on_data(c)) for c in expr.children)


def _count_reduction(
    einsum: Einsum,
    reduced: frozenset[str],
    space: frozenset[str],
    into: dict[str, sympy.Expr],
    steps: _Steps,
) -> None:
    how = dict(einsum.reduce)
    for op in {how.get(r, "add") for r in reduced}:
        points = _volume(space)
        if op == "add" and isinstance(einsum.expr, Call) and einsum.expr.op == "mul":
            into["mac"] += points
            into["mul"] -= _volume(steps.ranks(einsum.expr))
        else:
            into[_KIND.get(op, "other")] += points


def _read_bytes(read: Read, decl: TensorDecl | None, again: frozenset[str]) -> sympy.Expr:
    own = frozenset[str]().union(*(ranks_of(i) for i in read.index))
    steps = _volume(again - own)
    if decl is None or len(decl.ranks) != len(read.index):
        return _volume(own) * steps * _width(decl)
    moving = (
        r for r, i in zip(decl.ranks, read.index, strict=True) if not isinstance(i, Const | Extent)
    )
    return sympy.Mul(*(rank_symbol(r) for r in moving)) * steps * _width(decl)


def _width(decl: TensorDecl | None) -> sympy.Expr:
    if decl is None or decl.dtype == "float":
        return WORD
    return sympy.sympify(_WIDTH.get(decl.dtype, 4))
