"""Signs and directions of running values: is a correction bounded by 1, may a state vanish?

A running value that only rises (a maximum, a sum of non-negative terms) is replaced by the old value
plus a non-negative step; the correction of the past must then be at most 1, so that accumulated
values never grow by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank, Read, substitute
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.algebra import Term, symbols_for, to_sympy
from attn_rewrite.passes.cascade.flow import Flow, inlined_states, iteration_ranks
from attn_rewrite.passes.cascade.proof import FusionRefusal
from attn_rewrite.passes.cascade.separability import Body, Separation, new_state

_RISING = {
    "exp", "exp2", "log", "log1p", "sqrt", "tanh", "sigmoid", "relu", "softplus", "erf", "floor",
    "ceil", "round", "cast_f64", "cast_f32", "cast_f16", "cast_bf16",
}  # fmt: skip
_POSITIVE = {"exp", "exp2", "sigmoid", "softplus"}
_NONNEGATIVE = {"abs", "relu", "sqrt"}
_ORDER = {"any": 0, "nonnegative": 1, "positive": 2}


def sign(flow: Flow, expr: Expr) -> str:
    """``"positive"``, ``"nonnegative"`` or ``"any"``: what is known of every value of ``expr``."""
    match expr:
        case Const(value):
            return "positive" if value > 0 else "nonnegative" if value == 0 else "any"
        case Rank():
            return "nonnegative"
        case Extent():
            return "positive"
        case Read(tensor, _):
            return _tensor_sign(flow, tensor)
        case Call("pow", (_, Const(value))) if isinstance(value, int) and value % 2 == 0:
            return "nonnegative"
        case Call("mul", (a, b)) if a == b:
            return max("nonnegative", sign(flow, a), key=_ORDER.__getitem__)
        case Call("add" | "mul" | "min" | "pow", (a, b)):
            both = min(sign(flow, a), sign(flow, b), key=_ORDER.__getitem__)
            lifted = expr.op == "add" and both == "nonnegative"
            return max(sign(flow, a), sign(flow, b), key=_ORDER.__getitem__) if lifted else both
        case Call("div", (a, b)):
            return sign(flow, a) if sign(flow, b) == "positive" else _quotient(flow, a, b)
        case Call("max", (a, b)):
            return max(sign(flow, a), sign(flow, b), key=_ORDER.__getitem__)
        case Call("where", (_, a, b)):
            return min(sign(flow, a), sign(flow, b), key=_ORDER.__getitem__)
        case Call(op, _):
            return _function_sign(op)
    return "any"


def _function_sign(op: str) -> str:
    return "positive" if op in _POSITIVE else "nonnegative" if op in _NONNEGATIVE else "any"


def _quotient(flow: Flow, above: Expr, below: Expr) -> str:
    both = min(sign(flow, above), sign(flow, below), key=_ORDER.__getitem__)
    return "any" if both == "any" else "nonnegative"


def _tensor_sign(flow: Flow, tensor: str) -> str:
    declared = flow.decls.get(tensor)
    if declared is not None and (declared.sign != "any" or declared.dtype == "bool"):
        return declared.sign if declared.sign != "any" else "nonnegative"
    made = flow.producer.get(tensor)
    if made is None:
        return "any"
    found = sign(flow, made.expr)
    if {o for _, o in made.reduce} & {"max", "min"}:
        return found if flow.default(tensor) in (0.0, float("-inf"), float("inf")) else "any"
    # A sum of positive terms is positive unless it is empty.
    return found


def direction(flow: Flow, expr: Expr, rising: Mapping[Expr, str] | None = None) -> str | None:
    """How the running value of ``expr`` moves: ``"up"``, ``"down"``, ``"const"`` or None (unknown).

    ``rising`` gives directions of leaves; states are followed to their reductions otherwise.
    """
    known = rising or {}
    if expr in known:
        return known[expr]
    match expr:
        case Const() | Rank() | Extent():
            return "const"
        case Read(tensor, _):
            return _tensor_direction(flow, tensor) if tensor in flow.complete else "const"
        case Call("add" | "max" | "min", (a, b)):
            return _join(direction(flow, a, known), direction(flow, b, known))
        case Call("sub", (a, b)):
            return _join(direction(flow, a, known), _flip(direction(flow, b, known)))
        case Call("neg", (a,)):
            return _flip(direction(flow, a, known))
        case Call("mul" | "div", (a, b)):
            return _scaled(flow, expr.op, a, b, known)
        case Call("clip", (a, low, high)):
            fixed = {direction(flow, b, known) for b in (low, high)} == {"const"}
            return direction(flow, a, known) if fixed else None
        case Call(op, (a,)):
            inner = direction(flow, a, known)
            return inner if op in _RISING or inner == "const" else None
        case Call(_, args):
            still = all(direction(flow, a, known) == "const" for a in args)
            return "const" if still else None
    return None


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


def range_condition(flow: Flow, whole: Einsum, body: Body) -> str:
    """Is the exponential evaluated at the running state in range: is its argument at most 0?

    Proved when the state is the maximum of what the exponent subtracts it from; otherwise the
    condition is stated as unproved (values are right, overflow is not excluded).
    """
    exponents = [n.args[0] for n in _calls(whole.expr) if n.op in ("exp", "exp2")]
    exponents = [x for x in exponents if flow.states(x)]
    if exponents and all(_bounded(flow, x, body) for x in exponents):
        return "in range: the exponent is at most 0 at every running state"
    return "range not proved: the exponent may exceed 0 at a running state"


def _calls(expr: Expr) -> list[Call]:
    from attn_rewrite.cascade.expr import walk

    return [n for n in walk(expr) if isinstance(n, Call)]


def _bounded(flow: Flow, exponent: Expr, body: Body) -> bool:
    """With every state replaced by its own item (maximum) plus a step, is the exponent at most 0?"""
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
    leaves = {leaf: s for leaf, s in symbols_for(_leaves(expr, body), body.positive).items()}
    term = to_sympy(expr, leaves).xreplace({leaves[k]: v for k, v in steps.items() if k in leaves})
    return bool(sympy.expand(term).is_nonpositive)


def _leaves(expr: Expr, body: Body) -> list[Expr]:
    from attn_rewrite.cascade.expr import walk

    return [n for n in walk(expr) if isinstance(n, Read | Rank | Extent)]


def _lower_bound(flow: Flow, state: Read) -> Expr | None:
    """An item that the state is never below: the body of its maximum, through posts ``max(., c)``."""
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
