"""Interval arithmetic over expressions, vectorised: bounds over many boxes at once.

Every value is an `Interval` of float64 arrays that broadcast against each other; truth values are 0
and 1.  Bounds are never too tight.  They are exact for affine forms of integer ranks (sums are
collected first, so ``q - kv + c`` loses nothing to repeated coordinates), for monotone functions
of them, and for ``//`` and ``%`` by a positive literal.  Results of rounding operators are widened,
as a kernel may round them differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.expr import Call, Const, Expr, Rank, Read

Array = npt.NDArray[Any]  # float64, or int64 where coordinates come in
Table = npt.NDArray[np.generic]

# Relative slack for operators whose result a kernel rounds (float32 or better).
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Interval:
    """All values between two arrays of bounds, both included."""

    lo: Array
    hi: Array


UNKNOWN = Interval(np.asarray(-np.inf), np.asarray(np.inf))


@dataclass(frozen=True)
class Affine:
    """``sum(coefficient * term) + constant`` over terms that are not sums themselves."""

    terms: Mapping[Expr, float]
    constant: float

    def plus(self, other: Affine, sign: float = 1.0) -> Affine:
        """This form plus ``sign`` times the other; cancelled terms disappear."""
        terms = dict(self.terms)
        for term, value in other.terms.items():
            terms[term] = terms.get(term, 0.0) + sign * value
        return Affine({t: v for t, v in terms.items() if v}, self.constant + sign * other.constant)

    def times(self, factor: float) -> Affine:
        """Every coefficient times ``factor``."""
        terms = {t: v * factor for t, v in self.terms.items() if v * factor}
        return Affine(terms, self.constant * factor)


def affine(expr: Expr) -> Affine:
    """Collect sums, differences and multiples by literals into one affine form."""
    match expr:
        case Const(value) if math.isfinite(value):
            return Affine({}, float(value))
        case Call("add", (left, right)):
            return affine(left).plus(affine(right))
        case Call("sub", (left, right)):
            return affine(left).plus(affine(right), -1.0)
        case Call("neg", (inner,)):
            return affine(inner).times(-1.0)
        case Call("mul", (left, right)):
            first, second = affine(left), affine(right)
            if not first.terms:
                return second.times(first.constant)
            if not second.terms:
                return first.times(second.constant)
    return Affine({expr: 1.0}, 0.0)


def evaluate(
    expr: Expr, ranks: Mapping[str, Interval], tables: Mapping[str, Table] | None = None
) -> Interval:
    """Bounds of ``expr`` where each rank lies in its interval.

    ``tables`` holds the values of known tensors; every other read is unknown (0 or 1 if it is used
    as a truth value).
    """
    return _Evaluation(ranks, tables or {}).of(expr)


def truth(
    mask: Expr, ranks: Mapping[str, Interval], tables: Mapping[str, Table] | None = None
) -> Interval:
    """`evaluate` of a mask: [1, 1] certainly true, [0, 0] certainly false, [0, 1] open."""
    return _truth_value(evaluate(mask, ranks, tables))


class _Evaluation:
    """One pass over an expression; equal subexpressions are computed once."""

    def __init__(self, ranks: Mapping[str, Interval], tables: Mapping[str, Table]) -> None:
        self.ranks, self.tables = ranks, tables
        self.memo: dict[Expr, Interval] = {}

    def of(self, expr: Expr) -> Interval:
        """Bounds of any expression."""
        if expr not in self.memo:
            self.memo[expr] = self._of(expr)
        return self.memo[expr]

    def _of(self, expr: Expr) -> Interval:
        match expr:
            case Const(value):
                return Interval(np.asarray(float(value)), np.asarray(float(value)))
            case Rank(name):
                return self.ranks.get(name, UNKNOWN)
            case Read():
                return self._read(expr)
            case Call("add" | "sub" | "neg", _):
                return self._sum(affine(expr))
            case Call("lt" | "le" | "gt" | "ge" | "eq" | "ne" as op, (left, right)):
                return self._comparison(op, left, right)
            case Call("mul", (left, right)) if left == right:
                return _square(self.of(left))
            case Call("mod", (left, right)) if not (is_integer(left) and is_integer(right)):
                return _mod(self.of(left), self.of(right), whole=False)
            case Call(op, args) if op in _RULES:
                return _RULES[op](*(self.of(a) for a in args))
        return UNKNOWN

    def _sum(self, form: Affine) -> Interval:
        low: Array = np.asarray(form.constant)
        high: Array = np.asarray(form.constant)
        for term, factor in form.terms.items():
            value = self.of(term)
            first, second = (value.lo, value.hi) if factor > 0 else (value.hi, value.lo)
            low, high = low + factor * first, high + factor * second
        return _sound(low, high)

    def _comparison(self, op: str, left: Expr, right: Expr) -> Interval:
        first, second = affine(left), affine(right)
        form = first.plus(second, -1.0)
        difference = self._sum(form)
        if not _is_representable(form):
            difference = _widened(difference)
        if op in ("eq", "ne") and not _may_vanish(form):
            return _truth(op, difference.lo * 0 + 1, difference.hi * 0 + 1)
        return _truth(op, difference.lo, difference.hi)

    def _read(self, read: Read) -> Interval:
        table = self.tables.get(read.tensor)
        if table is None or table.ndim != len(read.index) or not table.size:
            return UNKNOWN
        index = [self.of(i) for i in read.index]
        # An extent of one broadcasts: whatever the coordinate, there is one element.
        fixed = [
            np.zeros((), bool) if n == 1 else i.lo != i.hi
            for i, n in zip(index, table.shape, strict=True)
        ]
        inside = [
            np.clip(np.nan_to_num(i.lo), 0, n - 1).astype(np.int64)
            for i, n in zip(index, table.shape, strict=True)
        ]
        value = table[tuple(inside)].astype(np.float64)
        spread = np.logical_or.reduce(np.broadcast_arrays(*fixed)) if fixed else np.asarray(False)
        low = np.where(spread, float(table.min()), value)
        return _sound(low, np.where(spread, float(table.max()), value))


def _may_vanish(form: Affine) -> bool:
    """False if no integers make the form zero: the greatest common divisor misses the constant."""
    values = [*form.terms.values(), form.constant]
    if not all(float(v).is_integer() for v in values) or not all(map(is_integer, form.terms)):
        return True
    divisor = math.gcd(*(int(v) for v in form.terms.values()))
    return int(form.constant) % divisor == 0 if divisor else True


def _is_representable(form: Affine) -> bool:
    """True if a kernel computes the form without rounding: small binary fractions throughout."""
    return all((v * 64).is_integer() for v in (*form.terms.values(), form.constant))


def is_integer(expr: Expr) -> bool:
    """True if the expression has integer values by its form."""
    match expr:
        case Const(value):
            return isinstance(value, int)
        case Rank():
            return True
        case Call("add" | "sub" | "mul" | "neg" | "floordiv" | "mod" | "min" | "max" | "abs", args):
            return all(map(is_integer, args))
        case Call("where", (_, yes, no)):
            return is_integer(yes) and is_integer(no)
    return False


def _sound(low: Array, high: Array) -> Interval:
    """Bounds with undefined ones (inf - inf) opened."""
    return Interval(np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high))


def _truth(op: str, low: Array, high: Array) -> Interval:
    """Truth of ``difference op 0``."""
    match op:
        case "lt":
            always, ever = high < 0, low < 0
        case "le":
            always, ever = high <= 0, low <= 0
        case "gt":
            always, ever = low > 0, high > 0
        case "ge":
            always, ever = low >= 0, high >= 0
        case "eq":
            always, ever = (low == 0) & (high == 0), (low <= 0) & (high >= 0)
        case _:
            always, ever = (low > 0) | (high < 0), (low != 0) | (high != 0)
    return Interval(always.astype(np.float64), ever.astype(np.float64))


def _truth_value(value: Interval) -> Interval:
    """A number as a truth value: zero is false."""
    some = (value.lo > 0) | (value.hi < 0)
    none = (value.lo == 0) & (value.hi == 0)
    return Interval(some.astype(np.float64), (~none).astype(np.float64))


def _square(value: Interval) -> Interval:
    ends = np.stack(np.broadcast_arrays(value.lo, value.hi)).astype(np.float64) ** 2
    crosses = (value.lo <= 0) & (value.hi >= 0)
    return _sound(np.where(crosses, 0.0, ends.min(0)), ends.max(0))


def _corners(first: Interval, second: Interval, op: Callable[..., Array]) -> Interval:
    """Bounds of an operator that is monotone in each argument: its values at the corners."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        pairs = [op(a, b) for a in (first.lo, first.hi) for b in (second.lo, second.hi)]
    ends = np.stack(np.broadcast_arrays(*pairs)).astype(np.float64)
    return _sound(ends.min(0), ends.max(0))


def _product(first: Interval, second: Interval) -> Interval:
    def times(a: Array, b: Array) -> Array:
        # Coordinates are finite, so 0 * inf is 0 here.
        return np.where((a == 0) | (b == 0), 0.0, np.multiply(a, b))

    return _corners(first, second, times)


def _where_positive(divisor: Interval, value: Interval) -> Interval:
    """``value`` where the divisor is positive, unknown elsewhere."""
    good = divisor.lo > 0
    return _sound(np.where(good, value.lo, -np.inf), np.where(good, value.hi, np.inf))


def _floordiv(value: Interval, divisor: Interval) -> Interval:
    quotient = _corners(value, divisor, lambda a, b: np.floor_divide(a, np.where(b > 0, b, 1)))
    return _where_positive(divisor, quotient)


def _mod(value: Interval, divisor: Interval, *, whole: bool = True) -> Interval:
    top = divisor.hi - 1 if whole else divisor.hi  # the largest remainder, or just above it
    step = np.where(divisor.lo > 0, divisor.lo, 1.0)
    with np.errstate(invalid="ignore"):
        one_period = (np.floor_divide(value.lo, step) == np.floor_divide(value.hi, step)) & (
            divisor.lo == divisor.hi
        )
        low = np.where(one_period, np.mod(value.lo, step), 0.0)
        high = np.where(one_period, np.mod(value.hi, step), top)
    return _where_positive(divisor, _sound(low, high))


def _div(value: Interval, divisor: Interval) -> Interval:
    quotient = _corners(value, divisor, lambda a, b: a / np.where(b > 0, b, 1))
    return _where_positive(divisor, _widened(quotient))


def _widened(value: Interval) -> Interval:
    slack = _ROUNDING * (1 + np.maximum(np.abs(value.lo), np.abs(value.hi)))
    slack = np.where(np.isfinite(slack), slack, 0.0)
    return _sound(value.lo - slack, value.hi + slack)


def _monotone(
    function: Callable[[Array], Array], *, rounds: bool
) -> Callable[[Interval], Interval]:
    def rule(value: Interval) -> Interval:
        with np.errstate(all="ignore"):
            found = _sound(
                function(np.asarray(value.lo, np.float64)),
                function(np.asarray(value.hi, np.float64)),
            )
        return _widened(found) if rounds else found

    return rule


def _abs(value: Interval) -> Interval:
    ends = np.abs(np.stack(np.broadcast_arrays(value.lo, value.hi)))
    crosses = (value.lo <= 0) & (value.hi >= 0)
    return _sound(np.where(crosses, 0.0, ends.min(0)), ends.max(0))


def _where(condition: Interval, yes: Interval, no: Interval) -> Interval:
    truth = _truth_value(condition)
    low = np.where(truth.lo == 1, yes.lo, np.where(truth.hi == 0, no.lo, np.minimum(yes.lo, no.lo)))
    high = np.where(
        truth.lo == 1, yes.hi, np.where(truth.hi == 0, no.hi, np.maximum(yes.hi, no.hi))
    )
    return _sound(low, high)


def _and(first: Interval, second: Interval) -> Interval:
    a, b = _truth_value(first), _truth_value(second)
    return Interval(np.minimum(a.lo, b.lo), np.minimum(a.hi, b.hi))


def _or(first: Interval, second: Interval) -> Interval:
    a, b = _truth_value(first), _truth_value(second)
    return Interval(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi))


def _not(value: Interval) -> Interval:
    truth = _truth_value(value)
    return Interval(1 - truth.hi, 1 - truth.lo)


def _isneginf(value: Interval) -> Interval:
    always, ever = value.hi == -np.inf, value.lo == -np.inf
    return Interval(always.astype(np.float64), ever.astype(np.float64))


def _power(value: Interval, exponent: Interval) -> Interval:
    n = np.asarray(exponent.lo)
    if n.ndim or exponent.hi != n or not float(n).is_integer() or n < 1:
        return UNKNOWN
    if int(n) % 2 == 0:
        value = _abs(value)
    return _sound(
        np.asarray(value.lo, np.float64) ** int(n), np.asarray(value.hi, np.float64) ** int(n)
    )


_RULES: dict[str, Callable[..., Interval]] = {
    "mul": _product,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _power,
    "max": lambda a, b: _sound(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi)),
    "min": lambda a, b: _sound(np.minimum(a.lo, b.lo), np.minimum(a.hi, b.hi)),
    "clip": lambda x, a, b: _sound(
        np.minimum(np.maximum(x.lo, a.lo), b.lo), np.minimum(np.maximum(x.hi, a.hi), b.hi)
    ),
    "abs": _abs,
    "floor": _monotone(np.floor, rounds=False),
    "ceil": _monotone(np.ceil, rounds=False),
    "relu": _monotone(lambda x: np.maximum(x, 0.0), rounds=False),
    "exp": _monotone(np.exp, rounds=True),
    "exp2": _monotone(np.exp2, rounds=True),
    "log": _monotone(np.log, rounds=True),
    "sqrt": _monotone(np.sqrt, rounds=True),
    "tanh": _monotone(np.tanh, rounds=True),
    "where": _where,
    "and": _and,
    "or": _or,
    "not": _not,
    "isneginf": _isneginf,
    "round": _monotone(np.round, rounds=False),
    "cast_bool": _truth_value,
    "cast_i64": _monotone(np.trunc, rounds=False),
    "cast_i32": _monotone(np.trunc, rounds=False),
    "cast_f64": lambda x: x,
    "cast_f32": lambda x: _widened(x),
}
