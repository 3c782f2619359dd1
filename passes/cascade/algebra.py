"""Expressions as sympy terms and back.

Rounding, casts to integers, comparisons and choices become *opaque* functions: sympy knows nothing
about them, so no identity can be proved through them.  Numerically they keep their meaning, so a
counterexample can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import sympy

from attn_rewrite.cascade.expr import OPERATORS, Call, Const, Expr, call

Term: TypeAlias = Any  # a sympy expression; sympy has no types
LN2 = sympy.Symbol("ln2", positive=True)  # a symbol: exp2 and exp then follow one set of laws

_TRANSPARENT: Mapping[str, Callable[..., Term]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "pow": lambda a, b: a**b, "neg": lambda a: -a,
    "reciprocal": lambda a: 1 / a, "exp": sympy.exp, "exp2": lambda a: sympy.exp(LN2 * a),
    "log": sympy.log, "log1p": lambda a: sympy.log(1 + a), "sqrt": sympy.sqrt,
    "rsqrt": lambda a: 1 / sympy.sqrt(a), "tanh": sympy.tanh, "abs": sympy.Abs,
    "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)), "relu": lambda a: sympy.Max(a, 0),
    "softplus": lambda a: sympy.log(1 + sympy.exp(a)), "silu": lambda a: a / (1 + sympy.exp(-a)),
    "max": sympy.Max, "min": sympy.Min, "sin": sympy.sin, "cos": sympy.cos, "erf": sympy.erf,
    "clip": lambda a, low, high: sympy.Min(sympy.Max(a, low), high),
    "cast_f64": lambda a: a,  # widening: exact
}  # fmt: skip
_NUMERIC: Mapping[str, Callable[..., float]] = {
    "floor": math.floor, "ceil": math.ceil, "round": round, "floordiv": lambda a, b: a // b,
    "sign": lambda a: math.copysign(1.0, a) if a else 0.0, "mod": lambda a, b: a % b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: bool(a) and bool(b), "or": lambda a, b: bool(a) or bool(b),
    "not": lambda a: not a, "isneginf": lambda a: a == -math.inf,
    "where": lambda c, a, b: a if c else b,
    "gelu": lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2))),
    "cast_i64": int, "cast_i32": int, "cast_i8": int, "cast_bool": bool,
    "cast_f32": float, "cast_f16": lambda a: _rounded(a, 11), "cast_bf16": lambda a: _rounded(a, 8),
    "cast_f8e4m3": lambda a: _rounded(a, 4), "cast_f8e5m2": lambda a: _rounded(a, 3),
}  # fmt: skip
# sympy's own classes, under the names of the language.
_NAMES = {sympy.log: "log", sympy.tanh: "tanh", sympy.Abs: "abs", sympy.sin: "sin",
          sympy.cos: "cos", sympy.erf: "erf", sympy.Max: "max", sympy.Min: "min"}  # fmt: skip


def _rounded(value: float, bits: int) -> float:
    """``value`` with a significand of ``bits`` bits: what a narrow float type keeps of it."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def opaque(op: str) -> sympy.Function:
    """The undefined (real) function that stands for an operator nothing is proved about."""
    return sympy.Function(f"op_{op}", real=True)


def symbols_for(
    leaves: Iterable[Expr], positive: frozenset[Expr] = frozenset()
) -> dict[Expr, sympy.Symbol]:
    """A real (or positive) symbol for each leaf."""
    return {
        leaf: sympy.Symbol(f"v{n}", real=True, **({"positive": True} if leaf in positive else {}))
        for n, leaf in enumerate(leaves)
    }


def to_sympy(expr: Expr, atoms: Mapping[Expr, sympy.Symbol]) -> Term:
    """``expr`` over symbols; every leaf that is not a literal must be in ``atoms``."""
    if expr in atoms:
        return atoms[expr]
    match expr:
        case Const(bool(value)):
            return sympy.Symbol(f"literal_{value}")
        case Const(int(value)):
            return sympy.Integer(value)
        case Const(value):
            return (
                sympy.Rational(value) if math.isfinite(value) else sympy.Symbol(f"literal_{value}")
            )
        case Call("where", (condition, value, Const(other))) if other == 0 and condition in atoms:
            return opaque("indicator")(atoms[condition]) * to_sympy(value, atoms)
        case Call(op, args):
            make = _TRANSPARENT.get(op) or opaque(op)
            return make(*(to_sympy(a, atoms) for a in args))
    raise ValueError(f"{expr} has no symbol: list it in atoms")


def from_sympy(term: Term, leaves: Mapping[sympy.Symbol, Expr]) -> Expr:
    """The expression of a term over the symbols of ``leaves``: `to_sympy` undone."""
    if term in leaves:
        return leaves[term]
    if isinstance(term, sympy.Symbol) and term.name.startswith("literal_"):
        text = term.name.removeprefix("literal_")
        return Const(text == "True") if text in ("True", "False") else Const(float(text))
    if term.is_Integer:
        return Const(int(term))
    if term.is_number and not term.args:
        return Const(float(term))
    if isinstance(term, sympy.Add):
        return _sum(term, leaves)
    if isinstance(term, sympy.Mul):
        return _product(term, leaves)
    if isinstance(term, sympy.exp):
        base2 = sympy.expand(term.exp / LN2)
        if LN2 in term.exp.free_symbols and LN2 not in base2.free_symbols:
            return call("exp2", from_sympy(base2, leaves))
        return call("exp", from_sympy(term.exp, leaves))
    if isinstance(term, sympy.Pow):
        return _power(term, leaves)
    return _function(term, leaves)


def _sum(term: Term, leaves: Mapping[sympy.Symbol, Expr]) -> Expr:
    # Positive terms first, so that `a - b` does not print as `-b + a`.
    parts = sorted(term.as_ordered_terms(), key=lambda p: bool(p.could_extract_minus_sign()))
    total = from_sympy(parts[0], leaves)
    for part in parts[1:]:
        if part.could_extract_minus_sign():
            total = total - from_sympy(-part, leaves)
        else:
            total = total + from_sympy(part, leaves)
    return total


def _product(term: Term, leaves: Mapping[sympy.Symbol, Expr]) -> Expr:
    if term.could_extract_minus_sign():
        return call("neg", from_sympy(-term, leaves))
    above, below = sympy.fraction(term, exact=True)
    factors = [from_sympy(f, leaves) for f in sympy.Mul.make_args(above)]
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result if below == 1 else result / from_sympy(below, leaves)


def _power(term: Term, leaves: Mapping[sympy.Symbol, Expr]) -> Expr:
    base, exponent = term.as_base_exp()
    if exponent.could_extract_minus_sign() and exponent.is_number:
        return 1.0 / from_sympy(base**-exponent, leaves)
    if exponent == sympy.Rational(1, 2):
        return call("sqrt", from_sympy(base, leaves))
    return from_sympy(base, leaves) ** from_sympy(exponent, leaves)


def _function(term: Term, leaves: Mapping[sympy.Symbol, Expr]) -> Expr:
    args = [from_sympy(a, leaves) for a in term.args]
    name = _NAMES.get(term.func, "")
    if not name and getattr(term.func, "__name__", "").startswith("op_"):
        name = term.func.__name__.removeprefix("op_")
    if name == "indicator":
        return call("where", args[0], 1.0, 0.0)
    if name in ("max", "min"):
        result = args[0]
        for other in args[1:]:
            result = call(name, result, other)
        return result
    if name not in OPERATORS:
        raise ValueError(f"no operator of the language computes {term}")
    return call(name, *args)


def evaluate(expr: Expr, values: Mapping[Expr, float]) -> float:
    """The value of ``expr`` in float64, leaves from ``values``; NaN where it is not defined."""
    if expr in values:
        return values[expr]
    match expr:
        case Const(value):
            return float(value)
        case Call(op, args):
            operands = [evaluate(a, values) for a in args]
            try:
                return float(_scalar(op)(*operands))
            except (ValueError, ZeroDivisionError, OverflowError):
                return math.nan
    raise ValueError(f"{expr} has no value: list it in values")


_SCALAR: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "pow": lambda a, b: a**b, "neg": lambda a: -a,
    "reciprocal": lambda a: 1 / a, "exp": math.exp, "exp2": lambda a: 2.0**a, "log": math.log,
    "log1p": math.log1p, "sqrt": math.sqrt, "rsqrt": lambda a: 1 / math.sqrt(a),
    "tanh": math.tanh, "abs": abs, "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "relu": lambda a: max(a, 0.0), "softplus": lambda a: math.log1p(math.exp(a)),
    "silu": lambda a: a / (1 + math.exp(-a)), "max": max, "min": min, "sin": math.sin,
    "cos": math.cos, "erf": math.erf, "clip": lambda a, low, high: min(max(a, low), high),
    "cast_f64": float,
}  # fmt: skip


def _scalar(op: str) -> Callable[..., float]:
    return _SCALAR.get(op) or _NUMERIC[op]


def product_parts(expr: Expr, marked: Callable[[Expr], bool]) -> tuple[Expr | None, Expr | None]:
    """A product split into its marked and its other factors; None where there are none."""
    yes: list[tuple[Expr, bool]] = []
    no: list[tuple[Expr, bool]] = []
    for factor, inverse in _signed_factors(expr, False):
        if isinstance(factor, Const):
            continue
        (yes if marked(factor) else no).append((factor, inverse))
    return _multiplied(yes), _multiplied(no)


def _signed_factors(expr: Expr, inverse: bool) -> list[tuple[Expr, bool]]:
    match expr:
        case Call("mul", (a, b)):
            return [*_signed_factors(a, inverse), *_signed_factors(b, inverse)]
        case Call("div", (a, b)):
            return [*_signed_factors(a, inverse), *_signed_factors(b, not inverse)]
        case Call("neg", (a,)):
            return _signed_factors(a, inverse)
    return [(expr, inverse)]


def _multiplied(parts: list[tuple[Expr, bool]]) -> Expr | None:
    if not parts:
        return None
    result: Expr | None = None
    for factor, inverse in parts:
        if not inverse:
            result = factor if result is None else result * factor
    for factor, inverse in parts:
        if inverse:
            result = (Const(1.0) if result is None else result) / factor
    return result


def divided(
    expr: Expr, by: Expr, leaves: Iterable[Expr], positive: frozenset[Expr] = frozenset()
) -> Expr | None:
    """``expr / by`` simplified so that no leaf of ``by`` alone is left; None if one is."""
    symbols = symbols_for(leaves, positive)
    quotient = to_sympy(expr, symbols) / to_sympy(by, symbols)
    simple = sympy.powsimp(sympy.expand(quotient, power_exp=True), combine="exp")
    gone = to_sympy(by, symbols).free_symbols & simple.free_symbols
    try:
        return None if gone else from_sympy(simple, {s: leaf for leaf, s in symbols.items()})
    except ValueError:
        return None
