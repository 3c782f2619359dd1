"""From a cascade to the kernels that compute it, in order.

One kernel does unless a statistic is folded over the rows of another (softmax over queries, slot
attention): then a kernel with the roles of the two ranks exchanged makes the statistics first, and
they are inputs of the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attn_rewrite.backends.triton.program import Program, read_program
from attn_rewrite.cascade.expr import Call, Expr, Rank, Read, call, tensors_of, transform, where
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.site import Refusal


@dataclass(frozen=True)
class Stage:
    """One kernel: the cascade as written, and its fused program."""

    cascade: Cascade
    program: Program


def stages_of(cascade: Cascade, row: str = "q", along: str = "kv") -> tuple[Stage, ...] | Refusal:
    """The kernels of ``cascade``; the last makes its outputs but for statistics of an earlier one.

    Reassociated, by the proofs of `fuse_reductions`.  Refused where a kernel cannot be read.
    """
    row, along = cascade.rank(row), cascade.rank(along)
    statistics = [e for e in cascade.body if isinstance(e, Einsum) and _crosses(e, row, along)]
    if not statistics:
        return _staged([(cascade, row, along)])
    names = {e.out.tensor for e in statistics}
    made = tuple(_declared(cascade, e) for e in statistics)
    returned = names & set(cascade.outputs)
    second = _cut(cascade, cascade.name, set(cascade.outputs) - names, frozenset(names), made)
    read = set().union(*(tensors_of(e.expr) for e in second.einsums()))
    first = _cut(cascade, f"{cascade.name}-statistics", names & (read | returned), frozenset())
    parts = [(first, along, row), (second, row, along)]
    return _staged([part for part in parts if part[0].outputs])


def _staged(parts: Sequence[tuple[Cascade, str, str]]) -> tuple[Stage, ...] | Refusal:
    stages = []
    for cascade, row, along in parts:
        program = read_program(fused(cascade, along), row, along)
        if isinstance(program, Refusal):
            return program
        stages.append(Stage(cascade, program))
    return tuple(stages)


def fused(cascade: Cascade, along: str) -> Cascade:
    """The form with the fewest passes over ``along`` that can be derived; else the cascade."""
    from attn_rewrite.passes.cascade import fuse_reductions

    found = fuse_reductions(cascade, along)
    return finite(cascade) if isinstance(found, Refusal) else found.cascade


def finite(cascade: Cascade) -> Cascade:
    """``cascade`` with 0 in the place of a maximum that nothing entered, where it is subtracted.

    Exact: a kernel computes exponentials of masked scores too, and -inf less -inf is no number.
    The same object where nothing is subtracted.
    """
    empty = {t.name for t in cascade.tensors if t.default == -math.inf}

    def rule(node: Expr) -> Expr | None:
        match node:
            case Call("exp", (Call("sub", (x, Read(name) as top)),)) if name in empty:
                return call("exp", x - where(call("isneginf", top), 0.0, top))
        return None

    body = tuple(
        replace(e, expr=transform(e.expr, rule)) if isinstance(e, Einsum) else e
        for e in cascade.body
    )
    return cascade if body == cascade.body else replace(cascade, body=body)


def _crosses(e: Einsum, row: str, along: str) -> bool:
    """Does the Einsum fold the rows into a value per traversed coordinate?"""
    kept = {i.name for i in e.out.index if isinstance(i, Rank)}
    read = {i.name for r in e.reads() for i in r.index if isinstance(i, Rank)}
    return along in kept and row not in kept and row in read


def _declared(cascade: Cascade, e: Einsum) -> TensorDecl:
    known = next((t for t in cascade.tensors if t.name == e.out.tensor), None)
    ranks = tuple(i.name for i in e.out.index if isinstance(i, Rank))
    return known or TensorDecl(e.out.tensor, ranks)


def _cut(
    cascade: Cascade,
    name: str,
    outputs: set[str],
    given: frozenset[str],
    inputs: tuple[TensorDecl, ...] = (),
) -> Cascade:
    """The part of ``cascade`` that ``outputs`` need, with ``given`` tensors as inputs."""
    needed = set(outputs)
    body: list[Einsum] = []
    for statement in reversed(cascade.body):
        if not isinstance(statement, Einsum) or statement.out.tensor not in needed - given:
            continue
        body.insert(0, statement)
        needed |= {r.tensor for r in statement.reads()} | set(tensors_of(statement.guard))
    have = {e.out.tensor for e in body}
    order = [t for t in _order(cascade) if t in outputs]
    return Cascade(
        name,
        cascade.ranks,
        (
            *(t for t in cascade.inputs if t.name in needed),
            *(t for t in inputs if t.name in needed),
        ),
        tuple(body),
        tuple(order),
        tuple(t for t in cascade.tensors if t.name in have),
    )


def _order(cascade: Cascade) -> list[str]:
    made = [e.out.tensor for e in cascade.einsums()]
    return [*cascade.outputs, *(n for n in dict.fromkeys(made) if n not in cascade.outputs)]
