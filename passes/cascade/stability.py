"""Directions of running values: is a correction bounded by 1, is an exponent in range?

A running value that only rises (a maximum, a sum of non-negative terms) is replaced by the old
value plus a non-negative step; the correction of the past must then be at most 1, so that
accumulated values never grow by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank, Read, substitute, walk
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.algebra import Term, symbols_for, to_sympy
from attn_rewrite.passes.cascade.flow import Flow, inlined_states, iteration_ranks
from attn_rewrite.passes.cascade.proof import FusionRefusal
from attn_rewrite.passes.cascade.separability import Body, Separation, new_state
from attn_rewrite.passes.cascade.signs import sign

_RISING = {
    "exp", "exp2", "log", "log1p", "sqrt", "tanh", "sigmoid", "relu", "softplus", "erf", "floor",
    "ceil", "round", "cast_f64", "cast_f32", "cast_f16", "cast_bf16", "cast_f8e4m3",
    "cast_f8e5m2",
}  # fmt: skip


def direction(flow: Flow, expr: Expr, known: Mapping[Expr, str] | None = None) -> str | None:
    """How the running value of ``expr`` moves: ``"up"``, ``"down"``, ``"const"``, None (unknown).

    ``known`` gives directions of leaves; states are followed to their reductions otherwise.
    """
    known = known or {}
    if expr in known:
        return known[expr]
    if isinstance(expr, Read) and expr.tensor in flow.complete:
        return _tensor_direction(flow, expr.tensor)
    if not isinstance(expr, Call):
        return "const"
    if expr.op in ("mul", "div"):
        return _scaled(flow, expr.op, expr.args[0], expr.args[1], known)
    ways = [direction(flow, a, known) for a in expr.args]
    if all(way == "const" for way in ways):
        return "const"
    return _moved(expr.op, ways)


def _moved(op: str, ways: list[str | None]) -> str | None:
    """The direction of an operator whose arguments do not all stand still."""
    if op in ("add", "max", "min"):
        return _join(ways[0], ways[1])
    if op == "sub":
        return _join(ways[0], _flip(ways[1]))
    if op == "neg":
        return _flip(ways[0])
    if op == "clip":
        return ways[0] if ways[1:] == ["const", "const"] else None
    return ways[0] if op in _RISING else None


def _scaled(flow: Flow, op: str, a: Expr, b: Expr, known: Mapping[Expr, str]) -> str | None:
    first, second = direction(flow, a, known), direction(flow, b, known)
    if first == second == "const":
        return "const"
    if op == "mul" and first == "const":
        a, b, first, second = b, a, second, first
    if second != "const":
        return None
    if sign(flow, b) == "positive":
        return first
    negative = isinstance(b, Const) and b.value < 0
    return _flip(first) if negative else None


def _join(a: str | None, b: str | None) -> str | None:
    if a == "const":
        return b
    return a if b in ("const", a) else None


def _flip(a: str | None) -> str | None:
    return {"up": "down", "down": "up", "const": "const"}.get(a or "")


def _tensor_direction(flow: Flow, tensor: str) -> str | None:
    made = flow.producer[tensor]
    if not flow.is_reduction(made):
        folded = iteration_ranks(made) - {i.name for i in made.out.index if isinstance(i, Rank)}
        if any(dict(made.reduce).get(r, "add") not in ("add", "max", "min") for r in folded):
            return None
        return direction(flow, made.expr)
    whole = inlined_states(flow, made)
    if isinstance(whole, FusionRefusal) or flow.states(whole.expr) or flow.states(whole.guard):
        return None  # its past is rescaled, so nothing is known about its steps
    op = flow.operation(made)
    if op in ("max", "or"):
        return "up"
    if op in ("min", "and"):
        return "down"
    return "up" if op == "add" and sign(flow, whole.expr) != "any" else None


def starts_at(flow: Flow, read: Read) -> float | None:
    """The infinite value that a state has before anything was seen; None if it starts finite."""
    if not _folds_extremum(flow, read.tensor):
        return None
    return {"up": float("-inf"), "down": float("inf")}.get(direction(flow, read) or "")


def _folds_extremum(flow: Flow, tensor: str) -> bool:
    made = flow.producer[tensor]
    if flow.is_reduction(made):
        return flow.operation(made) in ("max", "min")
    return any(_folds_extremum(flow, s.tensor) for s in flow.states(made.expr))


def unstable(flow: Flow, body: Body, found: Separation) -> str | None:
    """Why the correction may grow what was accumulated, or divide by a state that vanishes."""
    old: dict[Expr, Term] = dict(symbols_for(body.leaves, body.positive))
    values = dict(old)
    for leaf in body.state:
        moves = direction(flow, leaf)
        if moves not in ("up", "down", "const"):
            return (
                f"{leaf} is not monotone along {flow.rank}, so the correction is not bounded by 1"
            )
        step = sympy.Dummy("step", nonnegative=True)
        values[new_state(leaf)] = old[leaf] + {"up": step, "down": -step, "const": 0}[moves]
    correction = _substituted(found.correction, values)
    if found.action == "add":
        return None  # a shift does not amplify
    for factor in sympy.Mul.make_args(sympy.powsimp(sympy.simplify(correction))):
        if _at_most_one(factor):
            continue
        return f"the correction {found.correction} is not proved to be at most 1"
    return None


def _substituted(expr: Expr, values: Mapping[Expr, Term]) -> Term:
    names = symbols_for(values, frozenset())
    term = to_sympy(expr, names)
    return term.xreplace({names[k]: v for k, v in values.items()})


def _at_most_one(factor: Term) -> bool:
    if isinstance(factor, sympy.exp):
        return bool(sympy.expand(factor.exp).is_nonpositive)
    return bool(sympy.simplify(1 - factor).is_nonnegative)


def range_condition(flow: Flow, whole: Einsum) -> bool:
    """Is every exponent proved to be at most 0 at every running state?

    It is when the state is a maximum of what the exponent subtracts it from.  Otherwise the values
    are right too, but overflow is not excluded.
    """
    exponents = [n.args[0] for n in _calls(whole.expr) if n.op in ("exp", "exp2")]
    exponents = [x for x in exponents if flow.states(x)]
    return bool(exponents) and all(_bounded(flow, x) for x in exponents)


def _calls(expr: Expr) -> list[Call]:
    return [n for n in walk(expr) if isinstance(n, Call)]


def _bounded(flow: Flow, exponent: Expr) -> bool:
    """Is the exponent at most 0 when every state is its own item (a maximum) plus a step?"""
    replaced: dict[Expr, Expr] = {}
    steps: dict[Expr, Term] = {}
    for n, state in enumerate(flow.states(exponent)):
        item = _lower_bound(flow, state)
        if item is None:
            return False
        step = Read(f"step{n}")
        steps[step] = sympy.Dummy("step", nonnegative=True)
        replaced[state] = item + step
    expr = substitute(exponent, replaced)
    leaves = symbols_for(_leaves(expr))
    term = to_sympy(expr, leaves).xreplace({leaves[k]: v for k, v in steps.items() if k in leaves})
    return bool(sympy.expand(term).is_nonpositive)


def _leaves(expr: Expr) -> list[Expr]:
    return [n for n in walk(expr) if isinstance(n, Read | Rank | Extent)]


def _lower_bound(flow: Flow, state: Read) -> Expr | None:
    """An item that the state is never below: what its maximum folds, through ``max(., c)``."""
    made = flow.producer[state.tensor]
    at: dict[Expr, Expr] = dict(zip(made.out.index, state.index, strict=True))
    if flow.is_reduction(made):
        whole = inlined_states(flow, made)
        if isinstance(whole, FusionRefusal) or flow.operation(made) != "max":
            return None
        return substitute(whole.expr, at)
    if isinstance(made.expr, Call) and made.expr.op == "max":
        for arg in made.expr.args:
            if isinstance(arg, Read) and arg.tensor in flow.complete:
                inner = substitute(arg, at)
                assert isinstance(inner, Read)
                return _lower_bound(flow, inner)
    return None
