"""Exact simplification of expressions: one normal form per mask.

Comparisons of affine integer expressions become ``negative terms <= positive terms`` with the
constant on the right (``kv <= q``, ``q <= kv + 255``); negation is pushed to the leaves; constants
fold; an operator on a choice between constants moves into the choice.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from attn_rewrite.cascade.expr import (
    FALSE,
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjuncts,
    transform,
)

_FOLD: dict[str, Callable[..., int | float | bool]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg,
    "div": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod,
    "pow": operator.pow,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne, "not": operator.not_, "abs": abs,
    "and": lambda a, b: bool(a) and bool(b), "or": lambda a, b: bool(a) or bool(b),
    "max": max, "min": min, "exp": math.exp, "sqrt": math.sqrt, "tanh": math.tanh,
    "cast_bool": bool, "cast_i64": int, "cast_i32": int,
    "cast_f32": float, "cast_f64": float, "cast_f16": float, "cast_bf16": float,
    "log": lambda a: math.log(a) if a else -math.inf,
    "rsqrt": lambda a: 1 / math.sqrt(a), "reciprocal": lambda a: 1 / a,
    "clip": lambda a, low, high: min(max(a, low), high), "relu": lambda a: max(a, type(a)(0)),
    "sign": lambda a: type(a)((a > 0) - (a < 0)),
}  # fmt: skip
_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_COMPARISONS = frozenset(_NEGATED)
_SWAPPED = {"gt": "lt", "ge": "le"}

# Affine form: integer coefficients of terms, and a constant under the key None.
Affine = dict[Expr | None, int]


def simplify(expr: Expr) -> Expr:
    """The normal form; equal objects come back as they were."""
    return transform(expr, _rule)


def _rule(node: Expr) -> Expr | None:
    if not isinstance(node, Call):
        return None
    for rule in (_fold, _casts, _neutral, _identities, _booleans, _choices, _comparison):
        result = rule(node)
        if result is not None:
            return result
    return None


def _fold(node: Call) -> Expr | None:
    values = [a.value for a in node.args if isinstance(a, Const)]
    if len(values) != len(node.args) or node.op not in _FOLD:
        return None
    try:
        return Const(_FOLD[node.op](*values))
    except (OverflowError, ValueError, ZeroDivisionError):
        return None


def is_boolean(expr: Expr) -> bool:
    """True for comparisons, logic and truth literals."""
    from attn_rewrite.cascade.expr import OPERATORS

    if isinstance(expr, Const):
        return isinstance(expr.value, bool)
    return isinstance(expr, Call) and OPERATORS[expr.op].boolean


def _casts(node: Call) -> Expr | None:
    if not node.op.startswith("cast_"):
        return None
    (arg,) = node.args
    if node.op == "cast_bool":
        return arg if is_boolean(arg) else None
    if is_boolean(arg):  # a truth value as a number
        one = 1 if node.op.startswith("cast_i") else 1.0
        return simplify(call("where", arg, one, type(one)(0)))
    return None


def _number(expr: Expr, value: float) -> bool:
    return isinstance(expr, Const) and not isinstance(expr.value, bool) and expr.value == value


def _neutral(node: Call) -> Expr | None:
    """Neutral elements and choices that are none."""
    args = node.args
    match node.op:
        case "add" if _number(args[0], 0):
            return args[1]
        case "add" | "sub" if _number(args[1], 0):
            return args[0]
        case "mul" if _number(args[0], 1):
            return args[1]
        case "mul" | "div" if _number(args[1], 1):
            return args[0]
        case "where" if isinstance(args[0], Const):
            return args[1] if args[0].value else args[2]
        case "where" if args[1] == args[2]:
            return args[1]
    return None


def _identities(node: Call) -> Expr | None:
    """Constant factors to the right, merged."""
    args = node.args
    match node.op:
        case "div" if isinstance(args[1], Const) and isinstance(args[1].value, float):
            return simplify(args[0] * (1.0 / args[1].value)) if args[1].value else None
        case "neg" if isinstance(args[0], Call) and args[0].op == "neg":
            return args[0].args[0]
        case "neg" if isinstance(args[0], Call) and args[0].op == "mul":
            inner = args[0].args[1]
            if isinstance(inner, Const) and isinstance(inner.value, float):
                return call("mul", args[0].args[0], -inner.value)
        case "mul" if isinstance(args[0], Call) and args[0].op == "neg":
            if isinstance(args[1], Const) and isinstance(args[1].value, float):
                return call("mul", args[0].args[0], -args[1].value)
        case "mul" if isinstance(args[0], Const):
            return simplify(call("mul", args[1], args[0]))
        case "mul" if isinstance(args[1], Const) and isinstance(args[0], Call):
            inner = args[0]
            if inner.op == "mul" and isinstance(inner.args[1], Const):
                return call("mul", inner.args[0], inner.args[1].value * args[1].value)
    return None


def _booleans(node: Call) -> Expr | None:
    args = node.args
    match node.op:
        case "and" | "or":
            neutral, absorbing = (TRUE, FALSE) if node.op == "and" else (FALSE, TRUE)
            if absorbing in args:
                return absorbing
            if args[0] == neutral or args[0] == args[1]:
                return args[1]
            return args[0] if args[1] == neutral else None
        case "not":
            return _negate(args[0])
    return None


def _negate(expr: Expr) -> Expr | None:
    if not isinstance(expr, Call):
        return None
    if expr.op == "not":
        return expr.args[0]
    if expr.op in _NEGATED and _is_integer(expr.args[0]) and _is_integer(expr.args[1]):
        return simplify(Call(_NEGATED[expr.op], expr.args))
    if expr.op in ("and", "or"):
        other = "or" if expr.op == "and" else "and"
        return simplify(call(other, call("not", expr.args[0]), call("not", expr.args[1])))
    return None


def _constant_choice(expr: Expr) -> bool:
    """A choice whose branches are constants (or such choices again)."""
    return (
        isinstance(expr, Call)
        and expr.op == "where"
        and all(isinstance(b, Const) or _constant_choice(b) for b in expr.args[1:])
    )


def _half_constant(expr: Expr) -> bool:
    """A choice with one constant branch: what `masked_fill` makes."""
    return (
        isinstance(expr, Call)
        and expr.op == "where"
        and any(isinstance(b, Const) for b in expr.args[1:])
    )


def _choices(node: Call) -> Expr | None:
    """``op(where(c, 1, 0), k)`` -> ``where(c, op(1, k), op(0, k))``; choices of truth values."""
    if node.op == "where":
        return _boolean_choice(node)
    if node.op == "mul" and isinstance(node.args[1], Const) and _half_constant(node.args[0]):
        condition, yes, no = node.args[0].children
        return simplify(call("where", condition, yes * node.args[1], no * node.args[1]))
    spots = [i for i, a in enumerate(node.args) if _constant_choice(a)]
    if len(spots) != 1 or not all(
        isinstance(a, Const) for i, a in enumerate(node.args) if i not in spots
    ):
        return None
    choice = node.args[spots[0]]

    def branch(value: Expr) -> Expr:
        args = list(node.args)
        args[spots[0]] = value
        return simplify(Call(node.op, tuple(args)))

    return simplify(call("where", choice.children[0], *map(branch, choice.children[1:])))


def _boolean_choice(node: Call) -> Expr | None:
    condition, yes, no = node.args
    if isinstance(condition, Call) and condition.op == "not":
        return call("where", condition.args[0], no, yes)
    if not (is_boolean(yes) and is_boolean(no)):
        return None
    if yes == TRUE:
        return simplify(call("or", condition, no))
    if no == FALSE:
        return simplify(call("and", condition, yes))
    if yes == FALSE:
        return simplify(call("and", call("not", condition), no))
    if no == TRUE:
        return simplify(call("or", call("not", condition), yes))
    return None


def _is_integer(expr: Expr) -> bool:
    match expr:
        case Rank() | Extent():
            return True
        case Const(value):
            return float(value).is_integer() if math.isfinite(value) else False
        case Call(op, args):
            return op in _INTEGER_OPS and all(map(_is_integer, args))
    return False


_INTEGER_OPS = frozenset({"add", "sub", "mul", "floordiv", "mod", "neg", "max", "min", "abs",
                          "cast_i64", "cast_i32", "cast_f32", "cast_f64"})  # fmt: skip


def affine(expr: Expr) -> Affine | None:
    """``expr`` as integer multiples of ranks, extents and other integer terms; None if it is
    not."""
    if not _is_integer(expr):
        return None
    match expr:
        case Const(value):
            return {None: int(value)}
        case Call("add" | "sub", (a, b)):
            return _combine(affine(a), affine(b), 1 if expr.op == "add" else -1)
        case Call("neg", (a,)):
            return _combine({}, affine(a), -1)
        case Call("mul", (a, Const(k))) | Call("mul", (Const(k), a)):
            return _combine({}, affine(a), int(k))
        case Call(op, (a,)) if op.startswith("cast_"):
            return affine(a)
    return {expr: 1}


def _combine(left: Affine | None, right: Affine | None, factor: int) -> Affine | None:
    if left is None or right is None:
        return None
    out = dict(left)
    for term, coefficient in right.items():
        out[term] = out.get(term, 0) + factor * coefficient
    return {t: c for t, c in out.items() if c != 0}


def _comparison(node: Call) -> Expr | None:
    if node.op not in _COMPARISONS:
        return None
    left, right = node.args
    truth = _truth_test(node)
    if truth is not None:
        return truth
    if node.op in _SWAPPED:
        left, right = right, left
    op = _SWAPPED.get(node.op, node.op)
    difference = _combine(affine(right), affine(left), -1)  # right - left >= 0 (le), >= 1 (lt)
    if difference is None:
        return None
    if op == "lt":
        difference = _combine(difference, {None: 1}, -1)
        op = "le"
    assert difference is not None
    constant = difference.pop(None, 0)
    if not difference:
        return Const(constant >= 0 if op == "le" else (constant == 0) == (op == "eq"))
    if op == "le" and _never_negative(difference, constant):
        return TRUE
    if op != "le" and min(difference.items(), key=_term_order)[1] < 0:
        difference = {t: -c for t, c in difference.items()}
        constant = -constant
    bare = all(c > 0 for c in difference.values())  # nothing on the left: put the constant there
    moved = constant if bare and constant < 0 else 0
    result = call(op, _sum(difference, -1, -moved), _sum(difference, 1, constant - moved))
    return None if result == node else result


def _never_negative(terms: Affine, constant: int) -> bool:
    """``terms + constant >= 0`` wherever coordinates lie within their ranks."""
    rest = dict(terms)
    for term in [t for t in rest if isinstance(t, Rank)]:
        room = rest.get(Extent(term.name), 0)
        if rest[term] == -1 and room >= 1:  # a coordinate is at most its extent less one
            rest[Extent(term.name)] = room - 1
            rest[term] = 0
            constant += 1
    return constant >= 0 and all(c >= 0 and isinstance(t, (Rank, Extent)) for t, c in rest.items())


def _term_order(item: tuple[Expr | None, int]) -> str:
    return str(item[0])


def _sum(terms: Affine, sign: int, constant: int) -> Expr:
    """Terms of one sign, in a fixed order, then the constant."""
    total: Expr | None = None
    for term, coefficient in sorted(terms.items(), key=_term_order):
        if coefficient * sign > 0:
            assert term is not None
            part = term if abs(coefficient) == 1 else call("mul", term, abs(coefficient))
            total = part if total is None else total + part
    if total is None:
        return Const(constant)
    if constant == 0:
        return total
    return total + constant if constant > 0 else total - (-constant)


def _truth_test(node: Call) -> Expr | None:
    """``c != 0`` and ``c == 1`` on truth values, and their opposites."""
    left, right = node.args
    if not is_boolean(left) or not isinstance(right, Const) or node.op not in ("eq", "ne"):
        return None
    if right.value not in (0, 1):
        return None
    same = bool(right.value) == (node.op == "eq")
    return left if same else simplify(call("not", left))


def mask_value(value: Expr) -> bool:
    """True for a constant that removes a score: -inf, or finite and as low as masks use."""
    return isinstance(value, Const) and not isinstance(value.value, bool) and value.value <= -1e3


def is_causal_term(term: Expr) -> Expr | None:
    """The offset of a term ``kv <= q + offset`` (an expression), or None."""
    difference = None
    if isinstance(term, Call) and term.op == "le":
        difference = _combine(affine(term.args[1]), affine(term.args[0]), -1)
    if (
        difference is None
        or difference.pop(Rank("q"), 0) != 1
        or difference.pop(Rank("kv"), 0) != -1
    ):
        return None
    if any(not isinstance(t, Extent) for t in difference if t is not None):
        return None
    constant = difference.pop(None, 0)
    offset = _sum(difference, 1, constant)
    negative = _sum(difference, -1, 0)
    return offset if negative == Const(0) else offset - negative


def rows_kept(mask: Expr) -> bool:
    """True if it is proved that the mask keeps a key in every query row.

    Proved where every conjunct keeps the diagonal ``kv == q``; a data-dependent conjunct proves
    nothing.
    """
    return all(_keeps_diagonal(t) for t in conjuncts(mask))


def _keeps_diagonal(term: Expr) -> bool:
    def on_diagonal(node: Expr) -> Expr | None:
        return Rank("q") if node == Rank("kv") else None

    if any(isinstance(n, Read) for n in _nodes(term)):
        return False
    return simplify(transform(term, on_diagonal)) == TRUE


def _nodes(expr: Expr) -> list[Expr]:
    from attn_rewrite.cascade.expr import walk

    return list(walk(expr))
