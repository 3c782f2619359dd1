"""Relations between one digit of the query position and one of the key position, with prefix sums.

A relation is a conjunction of atoms over two ranks.  ``below(x, y)`` counts its pairs in the corner
``q < x, kv < y``, which is all that block counts need.  Short digits are tabulated; long ones must
be *bands*: for each q an interval of kv whose ends do not decrease.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.expr import Call, Const, Expr, Rank, conjunction, ranks_of
from attn_rewrite.cascade.interval import Affine, affine, is_integer
from attn_rewrite.cascade.points import values

Ints = npt.NDArray[np.int64]

# Pairs a table may hold (32 MB of prefix sums).
TABLE_LIMIT = 1 << 22
_CHUNK = 1 << 15  # pairs evaluated at a time, so that intermediates stay in the cache


class FactorError(ValueError):
    """A mask, or a part of it, has no closed form of this kind."""


class Relation(Protocol):
    """Pairs (q, kv) of one digit."""

    def below(self, x: Ints, y: Ints) -> Ints:
        """Pairs with ``q < x[i]`` and ``kv < y[j]``, as a matrix [i, j]; bounds may exceed."""
        ...


@dataclass(frozen=True, eq=False)
class Table:
    """A relation as prefix sums [q + 1, kv + 1]."""

    sums: Ints

    def below(self, x: Ints, y: Ints) -> Ints:
        """Read the prefix sums."""
        rows, columns = (n - 1 for n in self.sums.shape)
        part: Ints = self.sums[np.minimum(x, rows)]
        return part[:, np.minimum(y, columns)]


@dataclass(frozen=True, eq=False)
class Band:
    """``low[q] <= kv < high[q]`` with ends that do not decrease."""

    low: Ints
    high: Ints

    def below(self, x: Ints, y: Ints) -> Ints:
        """Sum of ``min(high, y) - min(low, y)`` over the rows below x."""
        x = np.minimum(x, len(self.low))
        return _capped(self.high, x, y) - _capped(self.low, x, y)


def _capped(ends: Ints, x: Ints, y: Ints) -> Ints:
    """``sum(min(ends[q], y[j]) for q < x[i])``: ends are sorted, so the capped ones come last."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends)])
    free = np.searchsorted(ends, y)
    total: Ints = sums[np.minimum(x[:, None], free)] + y * np.maximum(x[:, None] - free, 0)
    return total


def relation(atoms: Iterable[Expr], q: str, kv: str, lengths: tuple[int, int]) -> Relation:
    """The conjunction of ``atoms`` over ranks ``q`` and ``kv`` of the given lengths.

    Raises `FactorError` where the digits are long and the atoms are no band.
    """
    atoms = tuple(atoms)
    if lengths[0] * lengths[1] > TABLE_LIMIT:
        return _band(atoms, q, kv, lengths)
    rows, columns = (np.arange(n, dtype=np.int64) for n in lengths)
    mask = conjunction(atoms)
    sums = np.zeros((lengths[0] + 1, lengths[1] + 1), np.int64)
    step = max(1, _CHUNK // max(1, lengths[1]))
    for start in range(0, lengths[0], step):
        part = rows[start : start + step]
        kept = values(mask, {q: part[:, None], kv: columns[None]})
        sums[start + 1 : start + 1 + len(part), 1:] = kept
    return Table(sums.cumsum(0).cumsum(1))


def _band(atoms: tuple[Expr, ...], q: str, kv: str, lengths: tuple[int, int]) -> Band:
    rows = np.arange(lengths[0], dtype=np.int64)
    low, high = np.zeros_like(rows), np.full_like(rows, lengths[1])
    for atom in atoms:
        for bound in _bounds(atom, kv):
            end = np.broadcast_to(values(bound.end, {q: rows}), rows.shape)
            if bound.above:
                high = np.minimum(high, end + 1)
            else:
                low = np.maximum(low, end)
    low, high = np.clip(low, 0, lengths[1]), np.clip(high, 0, lengths[1])
    high = np.maximum(low, high)
    if (np.diff(low) < 0).any() or (np.diff(high) < 0).any():
        raise FactorError("a long digit whose keys do not move forward with the query")
    return Band(low, high)


@dataclass(frozen=True)
class _Bound:
    """``kv <= end`` (above) or ``kv >= end``, where ``end`` does not depend on kv."""

    end: Expr
    above: bool


def _bounds(atom: Expr, kv: str) -> tuple[_Bound, ...]:
    match atom:
        case Call("lt" | "le" | "gt" | "ge" | "eq" as op, (left, right)) if is_integer(
            left - right
        ):
            form = affine(left).plus(affine(right), -1.0)  # form op 0
        case _:
            raise FactorError(f"{atom} is no bound on {kv}")
    factor = form.terms.get(Rank(kv), 0.0)
    rest = Affine({t: v for t, v in form.terms.items() if t != Rank(kv)}, form.constant)
    if abs(factor) != 1 or any(kv in ranks_of(t) for t in rest.terms):
        raise FactorError(f"{atom} is no bound on {kv}")
    end = _expression(rest.times(-1.0 / factor))  # form = factor * (kv - end)
    slack = {"lt": -1, "gt": 1}.get(op, 0) * int(factor)
    if op == "eq":
        return (_Bound(end, True), _Bound(end, False))
    return (_Bound(end + slack, (op in ("lt", "le")) == (factor > 0)),)


def _expression(form: Affine) -> Expr:
    total: Expr = Const(int(form.constant))
    for term, value in form.terms.items():
        if not float(value).is_integer():
            raise FactorError("a bound with fractions")
        total = total + term * int(value)
    return total
