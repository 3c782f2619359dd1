"""Key ranges of a query block, derived from a mask expression with the extents left symbolic.

A mask such as ``(q - kv >= 0) & ((q - kv < 256) | (kv < 4))`` confines the keys of the query block
``[q0, q0 + rows)`` to a few contiguous ranges of fixed width, wherever the block lies and however
long the sequence is.  `segments` finds them, always as a superset of the kept pairs: the mask
itself is still evaluated inside the tile.  What is not affine in ``q`` and ``kv`` confines nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank

MAX_REGIONS = 32


@dataclass(frozen=True)
class Affine:
    """An integer that depends on extents: ``const + sum(coefficient * #rank)``."""

    const: int = 0
    extents: tuple[tuple[str, int], ...] = ()

    def minus(self, other: Affine) -> int | None:
        """The difference where it is a fixed number, else None."""
        return self.const - other.const if self.extents == other.extents else None

    def at(self, sizes: Mapping[str, int]) -> int:
        """The value for extents that are known."""
        return self.const + sum(c * sizes[rank] for rank, c in self.extents)

    def plus(self, number: int) -> Affine:
        """The same value moved by ``number``."""
        return Affine(self.const + number, self.extents)

    def __str__(self) -> str:
        terms = [f"{c} * #{r}" if c != 1 else f"#{r}" for r, c in self.extents]
        return " + ".join([*terms, str(self.const)] if self.const or not terms else terms)


@dataclass(frozen=True)
class Segment:
    """A contiguous key range of a query block starting at ``q0``: ``width`` keys from ``start``.

    ``start`` is counted from ``q0`` where ``relative``.  ``width`` None means every key.
    """

    start: Affine = field(default_factory=Affine)
    width: int | None = None
    relative: bool = False

    def __str__(self) -> str:
        if self.width is None:
            return "all keys"
        start = f"q0 + {self.start}" if self.relative else str(self.start)
        return f"{self.width} keys from {start.replace('+ -', '- ')}"


@dataclass(frozen=True)
class Reach:
    """Keys from ``q + low`` to ``q + high`` of any query q of the block; None: from or to the end.

    The width follows the place of the block, as under a causal mask.
    """

    low: Affine | None = None
    high: Affine | None = None

    def __str__(self) -> str:
        low = "0" if self.low is None else f"q + {self.low}"
        high = "the end" if self.high is None else f"q + {self.high}"
        return f"keys from {low} to {high}".replace(" + 0", "").replace("+ -", "- ")


EVERY_KEY = Segment()


@dataclass(frozen=True)
class _Linear:
    """``q * q + kv * kv + sum(extents) + [low, high]``; the interval holds what is not exact."""

    q: Fraction = Fraction(0)
    kv: Fraction = Fraction(0)
    extents: tuple[tuple[str, Fraction], ...] = ()
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(0)

    def plus(self, other: _Linear) -> _Linear:
        sums = dict(self.extents)
        for name, c in other.extents:
            sums[name] = sums.get(name, Fraction(0)) + c
        kept = tuple(sorted((n, c) for n, c in sums.items() if c))
        return _Linear(
            self.q + other.q, self.kv + other.kv, kept, self.low + other.low, self.high + other.high
        )

    def times(self, c: Fraction) -> _Linear:
        low, high = sorted((self.low * c, self.high * c))
        extents = tuple((n, x * c) for n, x in self.extents if c)
        return _Linear(self.q * c, self.kv * c, extents, low, high)

    def integral(self) -> bool:
        """True where every value is an integer (for integer coordinates)."""
        numbers = (self.q, self.kv, self.low, self.high, *(c for _, c in self.extents))
        return self.low == self.high and all(n.denominator == 1 for n in numbers)


@dataclass(frozen=True)
class _Region:
    """Bounds that hold together: on ``kv`` and on ``kv - q``; several of a kind may be known."""

    low: tuple[Affine, ...] = ()
    high: tuple[Affine, ...] = ()
    relative_low: tuple[Affine, ...] = ()
    relative_high: tuple[Affine, ...] = ()

    def meet(self, other: _Region) -> _Region:
        return _Region(
            self.low + other.low,
            self.high + other.high,
            self.relative_low + other.relative_low,
            self.relative_high + other.relative_high,
        )


_ANYWHERE = _Region()
_FIRST_KEY, _LAST_KEY = Affine(0), Affine(-1, (("kv", 1),))


def _number(linear: _Linear | None) -> Fraction | None:
    fixed = linear is not None and not (linear.q or linear.kv or linear.extents)
    return linear.low if linear is not None and fixed and linear.low == linear.high else None


def _linear(expr: Expr) -> _Linear | None:
    """``expr`` as an affine form with an interval, or None."""
    match expr:
        case Const(bool()):
            return None
        case Const(value) if value == value and abs(value) != float("inf"):
            return _Linear(low=Fraction(value), high=Fraction(value))
        case Rank("q"):
            return _Linear(q=Fraction(1))
        case Rank("kv"):
            return _Linear(kv=Fraction(1))
        case Extent(rank):
            return _Linear(extents=((rank, Fraction(1)),))
        case Call(op, args):
            return _linear_call(op, [_linear(a) for a in args])
    return None


def _linear_call(op: str, args: list[_Linear | None]) -> _Linear | None:
    known = [a for a in args if a is not None]
    if len(known) < len(args):
        return None
    match op, known:
        case ("add", [a, b]):
            return a.plus(b)
        case ("sub", [a, b]):
            return a.plus(b.times(Fraction(-1)))
        case ("neg", [a]):
            return a.times(Fraction(-1))
        case (("cast_i64" | "cast_i32" | "cast_f32" | "cast_f64"), [a]) if a.integral():
            return a
        case ("mul", [a, b]):
            return _scaled(a, _number(b)) or _scaled(b, _number(a))
        case (("floordiv" | "mod"), [a, b]):
            return _divided(op, a, _number(b))
    return None


def _scaled(linear: _Linear, by: Fraction | None) -> _Linear | None:
    return None if by is None else linear.times(by)


def _divided(op: str, linear: _Linear, by: Fraction | None) -> _Linear | None:
    """``floor(x / by)`` is ``x / by - r / by`` with ``0 <= r < by``; ``x mod by`` is that r."""
    if by is None or by <= 0:
        return None
    most = by - 1 if linear.integral() and by.denominator == 1 else by
    if op == "mod":
        return _Linear(low=Fraction(0), high=most)
    return linear.times(1 / by).plus(_Linear(low=-most / by, high=Fraction(0)))


def _at_most(linear: _Linear, bound: int, strict: bool) -> tuple[_Region, ...]:
    """The region of ``linear <= bound`` (``<`` where strict), as a superset."""
    if strict and linear.integral():
        bound -= 1
    rest = Fraction(bound) - linear.low
    if not linear.q and not linear.kv:
        holds = linear.extents or rest > 0 or (rest == 0 and not (strict and not linear.integral()))
        return (_ANYWHERE,) if holds else ()
    if not linear.kv or (linear.q and linear.q != -linear.kv):
        return (_ANYWHERE,)
    # linear.kv * (kv [- q]) <= rest - extents
    scale = linear.kv
    extents = tuple((n, -c / scale) for n, c in linear.extents)
    if any(c.denominator != 1 for _, c in extents):
        return (_ANYWHERE,)
    names = tuple((n, int(c)) for n, c in extents)
    limit = rest / scale
    value = Affine(limit.__floor__() if scale > 0 else limit.__ceil__(), names)
    kind = ("relative_" if linear.q else "") + ("high" if scale > 0 else "low")
    return (replace(_ANYWHERE, **{kind: (value,)}),)


def _comparison(op: str, a: Expr, b: Expr) -> tuple[_Region, ...]:
    match op, a, b:
        case (("lt" | "le"), Call("abs", (inner,)), _):
            return _product(_comparison(op, inner, b), _comparison(op, Call("neg", (inner,)), b))
        case (("gt" | "ge"), _, Call("abs", _)):
            return _comparison({"gt": "lt", "ge": "le"}[op], b, a)
    left, right = _linear(a), _linear(b)
    if left is None or right is None or op == "ne":
        return (_ANYWHERE,)
    below = left.plus(right.times(Fraction(-1)))
    above = below.times(Fraction(-1))
    match op:
        case "lt" | "le":
            return _at_most(below, 0, op == "lt")
        case "gt" | "ge":
            return _at_most(above, 0, op == "gt")
    return _product(_at_most(below, 0, False), _at_most(above, 0, False))


_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def _product(a: tuple[_Region, ...], b: tuple[_Region, ...]) -> tuple[_Region, ...]:
    if len(a) * len(b) > MAX_REGIONS:
        return a if len(a) <= len(b) else b  # either alone is a superset of both
    return tuple(x.meet(y) for x in a for y in b)


def _regions(mask: Expr, negate: bool = False) -> tuple[_Region, ...]:
    """A union of regions that covers the mask (its complement where ``negate``)."""
    match mask:
        case Const(bool(value)):
            return (_ANYWHERE,) if value != negate else ()
        case Call("not", (inner,)):
            return _regions(inner, not negate)
        case Call("and" | "or" as op, (a, b)):
            parts = _regions(a, negate), _regions(b, negate)
            return _product(*parts) if (op == "and") != negate else parts[0] + parts[1]
        case Call("where", (c, a, b)):
            yes = _product(_regions(c), _regions(a, negate))
            return yes + _product(_regions(c, True), _regions(b, negate))
        case Call(op, (a, b)) if op in _NEGATED:
            return _comparison(_NEGATED[op] if negate else op, a, b)
    return (_ANYWHERE,)


def _narrowest(low: tuple[Affine, ...], high: tuple[Affine, ...]) -> tuple[Affine, int] | None:
    """The start and width of the narrowest range of fixed width between the bounds."""
    widths = [(h.minus(lo), lo) for lo in low for h in high]
    fixed = [(w + 1, lo) for w, lo in widths if w is not None]
    if not fixed:
        return None
    width, start = min(fixed, key=lambda pair: pair[0])
    return start, width


def _segment(region: _Region, rows: int) -> Segment | None:
    """The key range of a region for ``rows`` queries; width 0 where it is empty."""
    ranges = []
    across = _narrowest((*region.low, _FIRST_KEY), (*region.high, _LAST_KEY))
    if across is not None:
        ranges.append(Segment(across[0], max(across[1], 0)))
    along = _narrowest(region.relative_low, region.relative_high)
    if along is not None:
        start, width = along
        ranges.append(Segment(start, width + rows - 1 if width > 0 else 0, relative=True))
    return min(ranges, key=lambda s: s.width or 0, default=None)


def _merged(found: list[Segment]) -> tuple[Segment, ...]:
    """Touching ranges joined; fixed ranges (sinks) before those that move with the block."""
    result: list[Segment] = []
    for new in sorted(found, key=lambda s: (s.relative, s.start.extents, s.start.const)):
        last = result[-1] if result else None
        gap = new.start.minus(last.start) if last and last.relative == new.relative else None
        if last is None or gap is None or gap > (last.width or 0):
            result.append(new)
        else:
            result[-1] = replace(last, width=max(last.width or 0, gap + (new.width or 0)))
    return tuple(result)


def _outermost(bounds: list[tuple[Affine, ...]], sign: int) -> Affine | None:
    """The bound that holds in every region (``sign`` 1: above), None where one has no such bound.

    Of several bounds of a region any will do; the tightest of those that compare is taken.
    """
    if not bounds or not all(bounds):
        return None
    extents = bounds[0][0].extents
    alike = [[b.const for b in region if b.extents == extents] for region in bounds]
    if not all(alike):
        return None
    return Affine(sign * max(min(sign * c for c in region) for region in alike), extents)


def _reach(regions: tuple[_Region, ...]) -> Segment | Reach:
    low = _outermost([r.relative_low for r in regions], -1)
    high = _outermost([r.relative_high for r in regions], 1)
    return EVERY_KEY if low is None and high is None else Reach(low, high)


def segments(mask: Expr, rows: int) -> tuple[Segment | Reach, ...]:
    """Key ranges that hold every kept pair of any ``rows`` consecutive queries.

    One `Reach` where the mask bounds the distance on a side only, ``(EVERY_KEY,)`` where it bounds
    nothing, ``()`` where it keeps nothing.
    """
    regions = _regions(mask)
    found = [_segment(region, rows) for region in regions]
    if any(s is None for s in found):
        return (_reach(regions),)
    return _merged([s for s in found if s is not None and s.width])
