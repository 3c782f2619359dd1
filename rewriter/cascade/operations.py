"""Operations and bytes of every Einsum of a cascade, as sympy expressions in the rank extents.

The counting rules are those of the FuseMax evaluation (Nayak et al., MICRO 2024): a product that is
summed is a MAC, ``exp(a - b)`` is one operation, a reduction costs one operation per point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Read, ranks_of
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl

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
    return tuple(_einsum_cost(e, declared) for e in cascade.einsums())


def total_operations(costs: tuple[EinsumCost, ...]) -> dict[str, sympy.Expr]:
    """Operations of the whole cascade by kind."""
    return {k: sympy.expand(sum(c.operations[k] for c in costs)) for k in OPERATION_KINDS}


def _volume(ranks: frozenset[str]) -> sympy.Expr:
    return sympy.Mul(*(rank_symbol(r) for r in sorted(ranks)))


def _einsum_cost(einsum: Einsum, declared: Mapping[str, TensorDecl]) -> EinsumCost:
    operations: dict[str, sympy.Expr] = dict.fromkeys(OPERATION_KINDS, sympy.Integer(0))
    written = frozenset[str]().union(*(ranks_of(i) for i in einsum.out.index))
    space = ranks_of(einsum.expr) | written | {rank for rank, _ in einsum.reduce}
    reduced = space - written
    _count(einsum.expr, operations)
    if reduced:
        _count_reduction(einsum, reduced, space, operations)
    reads = {r.tensor: r for r in einsum.reads()}
    return EinsumCost(
        einsum.out.tensor,
        operations,
        sympy.Add(*(_read_bytes(r, declared.get(t)) for t, r in reads.items())),
        _volume(written) * _width(declared.get(einsum.out.tensor)),
    )


def _count(expr: Expr, into: dict[str, sympy.Expr]) -> None:
    """Each operator runs once per point of the ranks that its own operands carry."""
    for child in expr.children if isinstance(expr, Call) else ():
        _count(child, into)
    if not isinstance(expr, Call) or expr.op in _FREE or not _on_data(expr):
        return
    if expr.op in ("exp", "exp2") and isinstance(expr.args[0], Call) and expr.args[0].op == "sub":
        into["add"] -= _volume(ranks_of(expr.args[0]))  # sub-then-exp is one operation
    into[_KIND.get(expr.op, "other")] += _volume(ranks_of(expr))


def _on_data(expr: Expr) -> bool:
    """Arithmetic on coordinates and literals alone is addressing."""
    return any(isinstance(c, Read) or (isinstance(c, Call) and _on_data(c)) for c in expr.children)


def _count_reduction(
    einsum: Einsum, reduced: frozenset[str], space: frozenset[str], into: dict[str, sympy.Expr]
) -> None:
    how = dict(einsum.reduce)
    for op in {how.get(r, "add") for r in reduced}:
        points = _volume(space)
        if op == "add" and isinstance(einsum.expr, Call) and einsum.expr.op == "mul":
            into["mac"] += points
            into["mul"] -= _volume(ranks_of(einsum.expr))
        else:
            into[_KIND.get(op, "other")] += points


def _read_bytes(read: Read, decl: TensorDecl | None) -> sympy.Expr:
    if decl is None or len(decl.ranks) != len(read.index):
        return _volume(frozenset[str]().union(*(ranks_of(i) for i in read.index))) * _width(decl)
    moving = (
        r for r, i in zip(decl.ranks, read.index, strict=True) if not isinstance(i, Const | Extent)
    )
    return sympy.Mul(*(rank_symbol(r) for r in moving)) * _width(decl)


def _width(decl: TensorDecl | None) -> sympy.Expr:
    if decl is None or decl.dtype == "float":
        return WORD
    return sympy.sympify(_WIDTH.get(decl.dtype, 4))
