"""Loop bounds in closed form: which keys a block of queries can keep, from the guard alone.

A guard is a union of at most two intersections of terms that bound the traversed coordinate by a
monotone function of the row: causal and cached causal, windows with and without sinks, chunks,
neighbourhoods clipped at the borders, lengths per batch entry.  Terms of another kind are left to
the mask: then tiles inside the bounds are skipped no more, and none is full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from attn_rewrite.cascade.expr import (
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjuncts,
    ranks_of,
    substitute,
)
from attn_rewrite.cascade.interval import Affine, affine

_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
MAX_UNION = 2
_INTEGER = frozenset("add sub mul neg floordiv mod min max abs clip".split())


@dataclass(frozen=True)
class Side:
    """A bound ``coordinate >= value`` (or ``<=``); ``rising`` is the sign of its slope in the row.

    0: it does not depend on the row.
    """

    value: Expr
    rising: int

    def at(self, row: str, first: Expr, last: Expr, *, smallest: bool) -> Expr:
        """The smallest (else largest) value over rows from ``first`` to ``last``."""
        if self.rising == 0:
            return self.value
        end = first if (self.rising > 0) == smallest else last
        return substitute(self.value, {Rank(row): end})


@dataclass(frozen=True)
class Range:
    """Kept coordinates: at least every one of ``low`` and at most every one of ``high``.

    ``exact``: the bounds are the whole guard, so a tile inside them is full.
    """

    low: tuple[Side, ...]
    high: tuple[Side, ...]
    exact: bool


def loop_ranges(
    guard: Expr, row: str, along: str, integers: frozenset[str] = frozenset()
) -> tuple[Range, ...]:
    """The ranges whose union covers ``guard``; empty where it bounds nothing.

    ``integers`` names tensors that hold integers.  Of two ranges the first starts at 0.
    """
    reader = _Reader(row, along, integers)
    ranges = [reader.range(term) for term in _disjunction(guard)]
    if not 0 < len(ranges) <= MAX_UNION or any(not (r.low or r.high) for r in ranges):
        return ()
    if len(ranges) == MAX_UNION:
        ranges.sort(key=lambda r: len(r.low))
        if ranges[0].low:
            return ()
    return tuple(ranges)


def _disjunction(guard: Expr) -> list[tuple[Expr, ...]]:
    """The guard as a union of intersections."""
    terms: list[tuple[Expr, ...]] = [()]
    for term in conjuncts(guard):
        choices = _alternatives(term)
        terms = [(*have, *conjuncts(more)) for have in terms for more in choices]
        if len(terms) > MAX_UNION:
            return []
    return terms


def _alternatives(term: Expr) -> list[Expr]:
    if isinstance(term, Call) and term.op == "or":
        return _alternatives(term.args[0]) + _alternatives(term.args[1])
    return [term]


@dataclass(frozen=True)
class _Reader:
    row: str
    along: str
    integers: frozenset[str]

    def range(self, terms: Iterable[Expr]) -> Range:
        low: list[Side] = []
        high: list[Side] = []
        exact = True
        for term in terms:
            found = self._sides(term)
            if found is None:
                exact = exact and term == TRUE
                continue
            low += found[0]
            high += found[1]
        return Range(tuple(low), tuple(high), exact)

    def _sides(self, term: Expr) -> tuple[list[Side], list[Side]] | None:
        """Lower and upper bounds that together are the term; None where it is of another kind."""
        match term:
            case Call("not", (Call(op, (left, right)),)) if op in _NEGATED:
                return self._sides(Call(_NEGATED[op], (left, right)))
            case Call("lt" | "le", (Call("abs", (inner,)), limit)):
                both = (Call(term.op, (inner, limit)), Call(term.op, (-inner, limit)))
                return self._both(*both)
            case Call("eq", (left, right)):
                return self._both(Call("ge", (left, right)), Call("le", (left, right)))
            case Call("ge" | "gt" | "le" | "lt" as op, (left, right)):
                return self._comparison(op, left, right)
        return None

    def _both(self, first: Expr, second: Expr) -> tuple[list[Side], list[Side]] | None:
        a, b = self._sides(first), self._sides(second)
        return None if a is None or b is None else (a[0] + b[0], a[1] + b[1])

    def _comparison(self, op: str, left: Expr, right: Expr) -> tuple[list[Side], list[Side]] | None:
        form = affine(left).plus(affine(right), -1.0)
        if op in ("lt", "le"):
            form, op = form.times(-1.0), _MIRRORED[op]
        # Now: form >= 0, or form > 0, over integers: form >= 1.
        if op == "gt":
            form = Affine(form.terms, form.constant - 1.0)
        return self._solved(form)

    def _solved(self, form: Affine) -> tuple[list[Side], list[Side]] | None:
        terms = dict(form.terms)
        mine = [t for t in terms if self.along in ranks_of(t)]
        if len(mine) != 1 or not all(map(self._whole, terms)):
            return None
        (term,) = mine
        factor = terms.pop(term)
        if abs(factor) != 1 or any(c != int(c) for c in terms.values()):
            return None
        if form.constant != int(form.constant):
            return None
        # factor * term + rest >= 0: the term is at least -rest, or at most rest.
        rest = _sum(terms, form.constant, -1 if factor > 0 else 1)
        return self._bound(term, rest, lower=factor > 0)

    def _bound(
        self, term: Expr, rest: Expr, *, lower: bool
    ) -> tuple[list[Side], list[Side]] | None:
        match term:
            case Rank(name) if name == self.along:
                pass
            case Call("floordiv", (Rank(name), Const(c))) if name == self.along and c > 0:
                rest = rest * c if lower else rest * c + (int(c) - 1)
            case _:
                return None
        slope = self._slope(rest)
        if slope is None:
            return None
        side = Side(rest, slope)
        return ([side], []) if lower else ([], [side])

    def _whole(self, expr: Expr) -> bool:
        """Integer whatever the lengths are; reads by declaration, without coordinates of a tile."""
        match expr:
            case Const(value):
                return value == int(value) if math.isfinite(value) else False
            case Rank() | Extent():
                return True
            case Read(tensor):
                return tensor in self.integers and not {self.row, self.along} & ranks_of(expr)
            case Call(op, args) if op in _INTEGER:
                return all(map(self._whole, args))
        return False

    def _slope(self, expr: Expr) -> int | None:
        """The sign of the slope in the row: 0 constant, None not monotone."""
        if self.row not in ranks_of(expr):
            return 0
        form = affine(expr)
        if form.terms != {expr: 1.0}:
            slopes = [(self._slope(t), c) for t, c in form.terms.items()]
            return _common([None if s is None else s * (1 if c > 0 else -1) for s, c in slopes])
        match expr:
            case Rank():
                return 1
            case Call("max" | "min", args):
                return _common([self._slope(a) for a in args])
            case Call("clip", args):
                return _common([self._slope(a) for a in args])
            case Call("floordiv", (inner, Const(c))) if c > 0:
                return self._slope(inner)
        return None


def _common(slopes: list[int | None]) -> int | None:
    if None in slopes:
        return None
    signs = {s for s in slopes if s}
    return None if len(signs) > 1 else next(iter(signs), 0)


def _sum(terms: dict[Expr, float], constant: float, sign: int) -> Expr:
    """The sum as an expression with integer literals, positive terms first."""
    total: Expr | None = None
    for term, c in sorted(terms.items(), key=lambda item: -sign * item[1]):
        factor = int(c) * sign
        part = term if abs(factor) == 1 else term * abs(factor)
        if total is None:
            total = part if factor > 0 else -part
        else:
            total = total + part if factor > 0 else total - part
    shift = int(constant) * sign
    if total is None:
        return Const(shift)
    if shift == 0 or math.isnan(shift):
        return total
    return call("add", total, shift) if shift > 0 else call("sub", total, -shift)
