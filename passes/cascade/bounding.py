"""Replace a running maximum by an a-priori bound of the scores: no recurrence is left.

Softmax is invariant to its reference: any finite value above the scores keeps the exponentials in
range.  A soft-cap, a normalisation of queries and keys or a sigmoid gives such a bound.  That the
outputs do not depend on the reference is proved before it is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from attn_rewrite.cascade.expr import Call, Const, Expr, Rank, Read, call, walk
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.passes.cascade.algebra import Term, symbols_for, to_sympy
from attn_rewrite.passes.cascade.deferral import deferred
from attn_rewrite.passes.cascade.flow import Flow, inlined_states, pruned
from attn_rewrite.passes.cascade.placement import body_of
from attn_rewrite.passes.cascade.proof import FusionRefusal, Proof
from attn_rewrite.passes.cascade.separability import Separation, moves_along, separate
from attn_rewrite.passes.cascade.stability import direction, starts_at

_RULE = "constant reference"


@dataclass(frozen=True)
class Bounded:
    """The cascade with the maximum replaced, and the proof that its outputs are the same."""

    cascade: Cascade
    proofs: tuple[Proof, ...]


def at_bound(flow: Flow, reference: Expr | float | str) -> Bounded | FusionRefusal:
    """Replace every maximum that items are compared with; ``"auto"`` derives the bound."""
    states = _references(flow)
    if not states:
        reason = f"{flow.cascade.name} has no maximum over {flow.rank} that its exponents subtract"
        return FusionRefusal("no-reference", reason, rule=_RULE)
    proofs: list[Proof] = []
    new = flow
    for name in states:
        bound = _bound(flow, name, reference)
        if isinstance(bound, FusionRefusal):
            return bound
        if not _invariant(flow, name):
            reason = f"the outputs of {flow.cascade.name} are not proved independent of {name}"
            return FusionRefusal("not-invariant", reason, rule=_RULE, tensor=name)
        made = flow.producer[name]
        body = [Einsum(e.out, bound) if e is made else e for e in new.einsums]
        new = new.with_einsums(body)
        proofs.append(_proof(flow, made, bound, derived=reference == "auto"))
    return Bounded(pruned(new.cascade), tuple(proofs))


def _proof(flow: Flow, made: Einsum, bound: Expr, *, derived: bool) -> Proof:
    origin = "is derived from the scores" if derived else "is the caller's promise"
    conditions = (
        f"{made.out} <= {bound} {origin}",
        f"the outputs do not change with {made.out.tensor}: its factors cancel",
        "terms far below the bound underflow to 0, as they would below the true maximum",
    )
    name = made.out.tensor
    return Proof(_RULE, name, flow.rank, (), made.expr, bound, side_conditions=conditions)


def _references(flow: Flow) -> tuple[str, ...]:
    """Rising states that start at -inf and that maps or reductions along the rank read."""
    found: dict[str, None] = {}
    for e in flow.einsums:
        if not flow.iterates(e):
            continue
        for state in flow.states(e.expr):
            if starts_at(flow, state) is not None and direction(flow, state) == "up":
                found[state.tensor] = None
    return tuple(found)


def _bound(flow: Flow, name: str, reference: Expr | float | str) -> Expr | FusionRefusal:
    if isinstance(reference, Expr):
        return reference
    if not isinstance(reference, str):
        return Const(float(reference))
    if reference != "auto":
        from attn_rewrite.cascade.text import parse_expr

        return parse_expr(reference)
    found = _upper(flow, flow.producer[name])
    if found is None:
        reason = f"no bound of {flow.producer[name].expr} follows from its form; give one"
        return FusionRefusal("no-bound", reason, rule=_RULE, tensor=name)
    return found


def _upper(flow: Flow, made: Einsum) -> Expr | None:
    """An upper bound of a maximum, or of the larger of a maximum and a constant."""
    if flow.is_reduction(made):
        return magnitude(flow, _scores(flow, made.expr))
    if not isinstance(made.expr, Call) or made.expr.op != "max":
        return None
    parts: list[Expr] = []
    for arg in made.expr.args:
        inner: Expr | None = arg
        if isinstance(arg, Read) and arg.tensor in flow.complete:
            inner = _upper(flow, flow.producer[arg.tensor])
        if inner is None:
            return None
        parts.append(inner)
    return call("max", *parts)


def _scores(flow: Flow, expr: Expr) -> Expr:
    """Pointwise maps opened, so that the form of the scores is seen."""
    while isinstance(expr, Read) and expr.tensor in flow.producer:
        made = flow.producer[expr.tensor]
        plain = [i.name for i in made.out.index if isinstance(i, Rank)]
        used = {n.name for n in walk(made.expr) if isinstance(n, Rank)}
        if made.out.index != expr.index or not used <= set(plain):
            return expr
        expr = made.expr
    return expr


_BELOW_ONE = {"tanh", "sigmoid", "sin", "cos", "erf", "sign"}


def magnitude(flow: Flow, expr: Expr) -> Expr | None:
    """A bound of ``|expr|`` that is constant along the rank; None if its form gives none."""
    if not moves_along(expr, flow.rank):
        return Const(abs(float(expr.value))) if isinstance(expr, Const) else call("abs", expr)
    if not isinstance(expr, Call):
        return None
    if expr.op in _BELOW_ONE:
        return Const(1.0)
    if expr.op == "clip":
        low, high = (magnitude(flow, a) for a in expr.args[1:])
        return None if low is None or high is None else call("max", low, high)
    parts = [magnitude(flow, a) for a in expr.args]
    if any(p is None for p in parts):
        return None
    bounds = [p for p in parts if p is not None]
    if expr.op in ("add", "sub"):
        return bounds[0] + bounds[1]
    if expr.op == "mul":
        return bounds[1] if bounds[0] == Const(1.0) else _times(bounds[0], bounds[1])
    if expr.op == "div" and not moves_along(expr.args[1], flow.rank):
        return bounds[0] / bounds[1]
    return bounds[0] if expr.op == "neg" else None


def _times(a: Expr, b: Expr) -> Expr:
    return a if b == Const(1.0) else a * b


def _invariant(flow: Flow, name: str) -> bool:
    """Do the factors of the reference cancel in every output, after deferral?"""
    flow, _ = deferred(flow)
    reference = sympy.Symbol("reference", real=True)
    known: dict[str, Term] = {name: reference}
    for e in flow.einsums:
        tensor = e.out.tensor
        if tensor == name or tensor not in flow.complete:
            continue
        value = _value(flow, e, known)
        if value is None:
            return False
        known[tensor] = value
    outputs = [known.get(o) for o in flow.cascade.outputs]
    return all(o is not None and _independent(o, reference) for o in outputs)


def _independent(value: Term, reference: sympy.Symbol) -> bool:
    if reference not in value.free_symbols:
        return True
    slope = sympy.diff(value, reference)
    return bool(sympy.simplify(sympy.expand_log(slope, force=True)) == 0)


def _value(flow: Flow, e: Einsum, known: Mapping[str, Term]) -> Term | None:
    """A complete value as a term in the reference; sums become positive symbols times factors."""
    if not flow.is_reduction(e):
        return _filled(flow, e.expr, known)
    whole = inlined_states(flow, e)
    if isinstance(whole, FusionRefusal) or flow.states(whole.guard):
        return None
    total = sympy.Symbol(f"sum_{e.out.tensor}", positive=True)
    if not flow.states(whole.expr):
        return total
    found = separate(body_of(flow, whole.expr), "mul")
    if not isinstance(found, Separation) or flow.operation(e) != "add":
        return None
    factor = _filled(flow, found.H, known)
    return None if factor is None else total * factor


def _filled(flow: Flow, expr: Expr, known: Mapping[str, Term]) -> Term | None:
    reads = tuple(dict.fromkeys(n for n in walk(expr) if isinstance(n, Read)))
    ranks = tuple(n for n in walk(expr) if not n.children and not isinstance(n, Const | Read))
    symbols = symbols_for((*reads, *ranks), frozenset())
    values = {}
    for read in reads:
        if read.tensor not in flow.complete:
            continue
        if read.tensor not in known:
            return None
        values[symbols[read]] = known[read.tensor]
    return to_sympy(expr, symbols).xreplace(values)
