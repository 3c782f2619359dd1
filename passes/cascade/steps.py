"""A reduction in the one-pass loop, and how what it has accumulated moves to new states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from attn_rewrite.cascade.expr import Expr, Read, call, eq, substitute, walk, where
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.flow import IDENTITY, Flow
from attn_rewrite.passes.cascade.separability import new_state
from attn_rewrite.passes.cascade.stability import starts_at


@dataclass(frozen=True)
class Step:
    """A reduction that runs in the loop.

    ``correction`` (None for a reduction without states) re-bases its past; ``bounded`` says that
    its terms vanish while the state is still infinite, so that the correction of that prefix may
    be 0.
    """

    einsum: Einsum
    correction: Expr | None = None
    action: str = "mul"
    bounded: bool = True


def safe(value: Expr, start: float | None) -> Expr:
    """``value``, or 0 while it is still the infinite value it starts from."""
    if start is None:
        return value
    untouched = call("isneginf", value) if start < 0 else eq(value, math.inf)
    return where(untouched, 0.0, value)


def corrected(
    flow: Flow, step: Step, old: Callable[[Read], Expr], new: Callable[[Read], Expr]
) -> Expr:
    """The correction of ``step`` with the old and new values of its states filled in."""
    assert step.correction is not None
    values: dict[Expr, Expr] = {}
    for n in walk(step.correction):
        if not isinstance(n, Read):
            continue
        if n.tensor in flow.complete:
            before = old(n)
            values[n] = before if step.bounded else safe(before, starts_at(flow, n))
            values[new_state(n)] = new(n)
    return substitute(step.correction, values)


def rebased(value: Expr, factor: Expr, step: Step, op: str) -> Expr:
    """``value`` moved to new states; nothing accumulated stays nothing."""
    moved = value + factor if step.action == "add" else value * factor
    if step.bounded and op == "add":
        return moved
    return where(eq(value, IDENTITY[op]), IDENTITY[op], moved)
