"""Positions as digits of a mixed radix, and masks as signed sums of products over the digits.

A grid of F x H x W tokens has the digits (frame, row, column); blocks of 64 have (block, offset).
A mask whose atoms each speak of one digit is a sum of products of small relations.  Comparisons of
whole positions are lexicographic over the digits, and sums such as ``dy * dy + dx * dx < r * r``
are split by the values of one summand.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from attn_rewrite.cascade.expr import (
    FALSE,
    TRUE,
    Call,
    Const,
    Expr,
    Rank,
    eq,
    ranks_of,
    rebuild,
    walk,
)
from attn_rewrite.cascade.interval import Affine, Interval, affine, is_integer, truth
from attn_rewrite.cascade.points import values
from attn_rewrite.cascade.products import COMPARISONS, TERM_LIMIT, Expansion, Sum
from attn_rewrite.cascade.relation import TABLE_LIMIT, FactorError, Relation, relation

_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
RANKS = ("q", "kv")


@dataclass(frozen=True)
class Radix:
    """``strides`` of the digits, highest first, down to 1; ``origin`` of each rank.

    Digit l of position x is ``(x - origin) // strides[l]``, modulo the next higher stride.
    """

    strides: tuple[int, ...]
    origin: Mapping[str, int]

    def names(self, level: int) -> tuple[str, str]:
        """The ranks that stand for digit ``level`` of q and of kv."""
        return f"q{level}", f"kv{level}"

    def above(self, rank: str, divisor: int, modulus: int | None = None) -> Expr:
        """``(x - origin) // divisor``, modulo ``modulus`` where given."""
        total: Expr = Const(0)
        for level, stride in enumerate(self.strides):
            whole = None if modulus is None else divisor * modulus
            if stride >= divisor and (whole is None or stride < whole):
                total = total + Rank(f"{rank}{level}") * (stride // divisor)
        return total


def coordinate(expr: Expr) -> tuple[str, int, int, int | None] | None:
    """(rank, origin, divisor, modulus) of a digit expression over a position, or None."""
    match expr:
        case Call("mod", (Call("floordiv", (inner, Const(int(n)))), Const(int(m)))):
            found = _position(inner)
            return None if found is None else (*found, n, m)
        case Call("floordiv", (inner, Const(int(n)))):
            found = _position(inner)
            return None if found is None else (*found, n, None)
        case Call("mod", (inner, Const(int(m)))):
            found = _position(inner)
            return None if found is None else (*found, 1, m)
    return None


def _position(expr: Expr) -> tuple[str, int] | None:
    """(rank, origin) of ``rank - origin``."""
    form = affine(expr)
    if len(form.terms) != 1 or not float(form.constant).is_integer():
        return None
    ((term, factor),) = form.terms.items()
    if isinstance(term, Rank) and term.name in RANKS and factor == 1:
        return term.name, -int(form.constant)
    return None


def _coordinates(expr: Expr) -> list[tuple[str, int, int, int | None]]:
    """Every outermost digit expression of a mask."""
    found = coordinate(expr)
    if found is not None:
        return [found]
    return [c for child in expr.children for c in _coordinates(child)]


def radix_of(mask: Expr) -> Radix:
    """The radix the digit expressions of ``mask`` ask for; `FactorError` where they disagree."""
    found = _coordinates(mask)
    strides = {1} | {n for _, _, n, _ in found} | {n * m for _, _, n, m in found if m is not None}
    chain = sorted(strides, reverse=True)
    if any(high % low for high, low in itertools.pairwise(chain)):
        raise FactorError(f"strides {chain} do not divide each other")
    origin: dict[str, int] = {}
    for rank, start, _, _ in found:
        if origin.setdefault(rank, start) != start:
            raise FactorError(f"{rank} is counted from {origin[rank]} and from {start}")
    other = next(iter(origin.values()), 0)
    return Radix(tuple(chain), {r: origin.get(r, other) for r in RANKS})


def in_digits(expr: Expr, radix: Radix) -> Expr:
    """``expr`` over the digits instead of the positions."""
    found = coordinate(expr)
    if found is not None and len(radix.strides) > 1:
        rank, _, divisor, modulus = found
        return radix.above(rank, divisor, modulus)
    if isinstance(expr, Rank) and expr.name in RANKS:
        return radix.above(expr.name, 1) + radix.origin[expr.name]
    return rebuild(expr, tuple(in_digits(child, radix) for child in expr.children))


@dataclass(frozen=True)
class Digits:
    """A radix over ranks of given lengths (counted from the origin), and the relations seen."""

    radix: Radix
    lengths: Mapping[str, int]

    def extent(self, rank: str, level: int) -> int:
        """Values of one digit."""
        stride = self.radix.strides[level]
        if level == 0:
            return -(-self.lengths[rank] // stride)
        return min(self.radix.strides[level - 1], self.lengths[rank] + stride - 1) // stride

    def relation(self, level: int, atoms: frozenset[Expr]) -> Relation:
        """The conjunction of ``atoms`` on one digit."""
        q, kv = self.radix.names(level)
        ordered = sorted(atoms, key=str)
        return relation(ordered, q, kv, (self.extent("q", level), self.extent("kv", level)))


class DigitExpansion(Expansion):
    """A boolean expression over digits as a signed sum of products; relations are made once."""

    def __init__(self, digits: Digits) -> None:
        super().__init__(len(digits.radix.strides))
        self.digits = digits
        self.relations: dict[tuple[int, frozenset[Expr]], Relation] = {}

    def relation(self, level: int, atoms: frozenset[Expr]) -> Relation:
        """The relation of one factor."""
        key = (level, atoms)
        if key not in self.relations:
            self.relations[key] = self.digits.relation(level, atoms)
        return self.relations[key]

    def holds_nowhere(self, part: int, atoms: frozenset[Expr]) -> bool:
        """True if the relation has no pair."""
        ends = (np.asarray([self.digits.extent(r, part)], dtype=np.int64) for r in RANKS)
        return not self.relation(part, atoms).below(*ends)[0, 0]

    def only_part(self, mask: Expr) -> int | None:
        """The digit a mask is about, if it is one and short enough for a table."""
        levels = {level_of(name) for name in ranks_of(mask)}
        if len(levels) != 1 or not is_whole(mask):
            return None
        (level,) = levels
        pairs = self.digits.extent("q", level) * self.digits.extent("kv", level)
        return level if pairs <= TABLE_LIMIT else None

    def comparison(self, atom: Call) -> Sum:
        """A comparison over several digits."""
        left, right = atom.args
        form = affine(left).plus(affine(right), -1.0)
        if not all(map(is_integer, form.terms)):
            raise FactorError(f"{atom} may round")
        groups = _by_level(form)
        if not groups:
            return self.one() if bool(values(call_of(atom.op, form), {})) else {}
        if len(groups) == 1:
            ((level, _),) = groups.items()
            return self.one({level: call_of(atom.op, form)})
        if atom.op == "ne":
            return self.plus(self.one(), self.comparison(Call("eq", atom.args)), -1)
        return self._lexicographic(atom.op, form, groups) or self._separated(atom.op, form, groups)

    def _lexicographic(self, op: str, form: Affine, groups: Mapping[int, Affine]) -> Sum | None:
        """``sum(stride * (q - kv)) op constant``, digit by digit from the highest; None if it is
        not of that form."""
        levels = sorted(groups)
        strides = self.digits.radix.strides
        unit = groups[levels[-1]].terms.get(Rank(f"q{levels[-1]}"), 0.0)
        if not unit or levels != list(range(levels[0], levels[-1] + 1)):
            return None
        for level in levels:
            weight = unit * (strides[level] // strides[levels[-1]])
            q, kv = map(Rank, self.digits.radix.names(level))
            if groups[level].terms != {q: weight, kv: -weight}:
                return None
        offset = form.constant / abs(unit)  # sign * D + offset op 0, D the difference in digits
        wanted = _against_zero(op, offset)
        if wanted is None:
            return None
        return self._ordered(levels, unit > 0, *wanted)

    def _ordered(self, levels: list[int], rising: bool, strict: str | None, equal: bool) -> Sum:
        """Pairs that differ first at each of ``levels`` in turn, and equal ones."""
        total: Sum = {}
        same: dict[int, Expr] = {}
        for level in levels:
            q, kv = map(Rank, self.digits.radix.names(level))
            if strict is not None:
                first, second = (q, kv) if rising else (kv, q)
                atom = first < second if strict == "lt" else first > second
                total = self.plus(total, self.one({**same, level: atom}))
            same[level] = eq(q, kv)
        return self.plus(total, self.one(same)) if equal else total

    def _separated(self, op: str, form: Affine, groups: Mapping[int, Affine]) -> Sum:
        """``f(one digit) + g(another) op constant``: a product for each value of f."""
        if len(groups) != 2:
            raise FactorError("a comparison over more than two digits")
        (first, f), (second, g) = sorted(groups.items())
        rest = Affine(g.terms, form.constant)
        summand = _sum_of(f)
        total: Sum = {}
        for value in self._values(first, summand):
            other = call_of(op, rest.plus(Affine({}, float(value))))
            if self.is_empty(second, frozenset({other})):
                continue
            # Of a value of its own each, so no product is there already.
            total |= self.one({first: eq(summand, int(value)), second: other})
            if len(total) > TERM_LIMIT:
                raise FactorError(f"the mask has more than {TERM_LIMIT} products")
        return total

    def _values(self, level: int, summand: Expr) -> list[int]:
        q, kv = self.digits.radix.names(level)
        rows, columns = (np.arange(self.digits.extent(r, level)) for r in RANKS)
        if len(rows) * len(columns) > TABLE_LIMIT or not is_integer(summand):
            raise FactorError("a summand with too many values")
        found = np.unique(values(summand, {q: rows[:, None], kv: columns[None]}))
        if len(found) > 2 * TERM_LIMIT:
            raise FactorError("a summand with too many values")
        return [int(v) for v in found]


def _against_zero(op: str, offset: float) -> tuple[str | None, bool] | None:
    """``D + offset op 0`` as (strict comparison of D with 0, whether D == 0 is kept)."""
    known: dict[tuple[str, float], tuple[str | None, bool]] = {
        ("lt", 0): ("lt", False), ("le", 0): ("lt", True), ("gt", 0): ("gt", False),
        ("ge", 0): ("gt", True), ("eq", 0): (None, True),
        ("lt", -1): ("lt", True), ("le", 1): ("lt", False),
        ("gt", 1): ("gt", True), ("ge", -1): ("gt", False),
    }  # fmt: skip
    return known.get((op, offset))


def level_of(name: str) -> int:
    """The digit a rank of `Radix.names` stands for."""
    return int(name.lstrip("qkv"))


def is_whole(mask: Expr) -> bool:
    """True if a mask compares integers only: its value at a point is exact."""
    match mask:
        case Const(value):
            return isinstance(value, bool)
        case Call("and" | "or" | "not" | "cast_bool", args):
            return all(map(is_whole, args))
        case Call("where", (condition, yes, no)):
            return all(map(is_whole, (condition, yes, no)))
        case Call(op, args) if op in COMPARISONS:
            return all(map(is_integer, args))
    return False


def _by_level(form: Affine) -> dict[int, Affine]:
    """The terms of a form by the digit they speak of; `FactorError` for a term of two digits."""
    groups: dict[int, Affine] = {}
    for term, factor in form.terms.items():
        levels = {level_of(name) for name in ranks_of(term)}
        if len(levels) > 1:
            raise FactorError(f"{term} mixes digits")
        level = min(levels, default=0)
        groups[level] = groups.get(level, Affine({}, 0.0)).plus(Affine({term: factor}, 0.0))
    return groups


def _sum_of(form: Affine) -> Expr:
    total: Expr | None = None
    for term, factor in form.terms.items():
        if not float(factor).is_integer():
            raise FactorError("a comparison with fractions")
        part = term if factor == 1 else term * int(factor)
        total = part if total is None else total + part
    constant = int(form.constant)
    if total is None:
        return Const(constant)
    return total + constant if constant else total


def call_of(op: str, form: Affine) -> Expr:
    """``form op 0``."""
    if not float(form.constant).is_integer():
        raise FactorError("a comparison with fractions")
    return Call(op, (_sum_of(form), Const(0)))


def single_rank_cut(atom: Expr) -> tuple[str, int] | None:
    """(rank, first position with another truth) of a comparison of one position with a literal."""
    if not (isinstance(atom, Call) and atom.op in ("lt", "le", "gt", "ge")):
        return None
    form = affine(atom.args[0]).plus(affine(atom.args[1]), -1.0)
    if len(form.terms) != 1:
        return None
    ((term, factor),) = form.terms.items()
    if not isinstance(term, Rank) or term.name not in RANKS:
        return None
    if abs(factor) != 1 or not float(form.constant).is_integer():
        return None
    at = -int(form.constant / factor)  # factor * (x - at) op 0
    after = (atom.op in ("le", "gt")) == (factor > 0)  # x == at belongs to the lower side
    return term.name, at + 1 if after else at


def decided(mask: Expr, at: Mapping[str, int]) -> Expr:
    """``mask`` with comparisons of one position with a literal replaced by their truth."""

    def fold(node: Expr) -> Expr:
        cut = single_rank_cut(node)
        if cut is not None:
            points = {r: np.asarray(v) for r, v in at.items()}
            return TRUE if bool(values(node, points)) else FALSE
        return _folded(rebuild(node, tuple(map(fold, node.children))))

    return fold(mask)


def settled(mask: Expr, lengths: Mapping[str, int]) -> Expr:
    """``mask`` with comparisons that hold for all positions, or for none, replaced by that."""
    bounds = {r: Interval(np.asarray(0.0), np.asarray(n - 1.0)) for r, n in lengths.items()}

    def fold(node: Expr) -> Expr:
        if isinstance(node, Call) and node.op in COMPARISONS:
            held = truth(node, bounds)
            return node if held.lo != held.hi else TRUE if held.lo else FALSE
        return _folded(rebuild(node, tuple(map(fold, node.children))))

    return fold(mask)


def _folded(node: Expr) -> Expr:
    match node:
        case Call("and", (a, b)):
            if FALSE in (a, b):
                return FALSE
            return b if a == TRUE else a if b == TRUE else node
        case Call("or", (a, b)):
            if TRUE in (a, b):
                return TRUE
            return b if a == FALSE else a if b == FALSE else node
        case Call("not", (Const(value),)):
            return FALSE if value else TRUE
        case Call("not", (Call(op, args),)) if op in _NEGATED:
            return Call(_NEGATED[op], args)
        case Call("where", (Const(value), a, b)):
            return a if value else b
    return node


def cuts(mask: Expr) -> dict[str, set[int]]:
    """Positions of each rank where comparisons with literals change their truth."""
    found: dict[str, set[int]] = {r: set() for r in RANKS}
    for node in walk(mask):
        cut = single_rank_cut(node)
        if cut is not None:
            found[cut[0]].add(cut[1])
    return found
