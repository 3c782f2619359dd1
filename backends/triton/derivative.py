"""Symbolic derivatives of score expressions, elementwise."""

from __future__ import annotations

import math
from collections.abc import Callable

from attn_rewrite.cascade.expr import Call, Const, Expr, call, where
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.site import Refusal

ZERO, ONE = Const(0.0), Const(1.0)


def derivative(expr: Expr, wrt: Expr) -> Expr | Refusal:
    """``d expr / d wrt`` where ``wrt`` is a read (a whole subtree), by the usual rules.

    At the kinks of extrema, clips and absolute values the derivative is that of the branch taken.
    Casts to narrower floats pass gradients on.  Refused for operators without a derivative.
    """
    try:
        found = _of(expr, wrt)
    except _NoDerivativeError as problem:
        return Refusal("no-derivative", str(problem))
    return simplify(found)


class _NoDerivativeError(Exception):
    pass


def _of(expr: Expr, wrt: Expr) -> Expr:
    if expr == wrt:
        return ONE
    if not isinstance(expr, Call) or not _mentions(expr, wrt):
        return ZERO
    if expr.op in _BINARY:
        a, b = expr.args
        return _BINARY[expr.op](a, b, _of(a, wrt), _of(b, wrt))
    if expr.op == "where":
        condition, yes, no = expr.args
        return where(condition, _of(yes, wrt), _of(no, wrt))
    if expr.op == "clip":
        x, low, high = expr.args
        return where((x >= low) & (x <= high), _of(x, wrt), 0.0)
    if expr.op in _UNARY:
        (x,) = expr.args
        return _times(_of(x, wrt), _UNARY[expr.op](x))
    raise _NoDerivativeError(f"{expr.op} has no derivative here, in {expr}")


def _mentions(expr: Expr, wrt: Expr) -> bool:
    return expr == wrt or any(_mentions(c, wrt) for c in expr.children)


def _times(a: Expr, b: Expr) -> Expr:
    if ZERO in (a, b):
        return ZERO
    if a == ONE:
        return b
    return a if b == ONE else a * b


def _plus(a: Expr, b: Expr) -> Expr:
    if a == ZERO:
        return b
    return a if b == ZERO else a + b


def _minus(a: Expr, b: Expr) -> Expr:
    if b == ZERO:
        return a
    return -b if a == ZERO else a - b


def _quotient(a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    first = ZERO if da == ZERO else (Const(1.0) / b if da == ONE else da / b)
    return _minus(first, ZERO if db == ZERO else a * db / (b * b))


def _power(a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    if db != ZERO:
        raise _NoDerivativeError(f"the exponent {b} of a power depends on the score")
    return _times(da, b * a ** (b - 1))


_BINARY: dict[str, Callable[[Expr, Expr, Expr, Expr], Expr]] = {
    "add": lambda a, b, da, db: _plus(da, db),
    "sub": lambda a, b, da, db: _minus(da, db),
    "mul": lambda a, b, da, db: _plus(_times(da, b), _times(a, db)),
    "div": _quotient,
    "pow": _power,
    "max": lambda a, b, da, db: where(a >= b, da, db),
    "min": lambda a, b, da, db: where(a <= b, da, db),
}

_UNARY: dict[str, Callable[[Expr], Expr]] = {
    "neg": lambda x: Const(-1.0),
    "exp": lambda x: call("exp", x),
    "exp2": lambda x: call("exp2", x) * math.log(2.0),
    "log": lambda x: Const(1.0) / x,
    "log1p": lambda x: Const(1.0) / (x + 1.0),
    "sqrt": lambda x: 0.5 * call("rsqrt", x),
    "rsqrt": lambda x: -0.5 * call("rsqrt", x) / x,
    "tanh": lambda x: 1.0 - call("tanh", x) * call("tanh", x),
    "sigmoid": lambda x: call("sigmoid", x) * (1.0 - call("sigmoid", x)),
    "silu": lambda x: call("sigmoid", x) * (1.0 + x * (1.0 - call("sigmoid", x))),
    "softplus": lambda x: call("sigmoid", x),
    "relu": lambda x: where(x > 0.0, 1.0, 0.0),
    "abs": lambda x: call("sign", x),
    "erf": lambda x: (2.0 / math.sqrt(math.pi)) * call("exp", -(x * x)),
    "sin": lambda x: call("cos", x),
    "cos": lambda x: -call("sin", x),
    "reciprocal": lambda x: Const(-1.0) / (x * x),
    **{f"cast_{d}": lambda x: ONE for d in ("f64", "f32", "f16", "bf16")},
}
