"""Boolean expressions as signed sums of products, each factor about one part of the positions.

What the parts are is the business of a subclass: single digits (`digits`), or digits that a mask
ties together (`classes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from attn_rewrite.cascade.expr import Call, Const, Expr
from attn_rewrite.cascade.relation import FactorError

COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
# Products a mask may expand to before the closed form is given up.
TERM_LIMIT = 600
# Pairs of products a conjunction may try: each asks for a relation of its own.
PAIR_LIMIT = 1 << 13

Atoms = tuple[frozenset[Expr], ...]  # per part
Sum = dict[Atoms, int]  # products with their signs


class Expansion(ABC):
    """A boolean expression over positions as a signed sum of products of atoms on ``parts``."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.empty: dict[tuple[int, frozenset[Expr]], bool] = {}

    @abstractmethod
    def only_part(self, mask: Expr) -> int | None:
        """The part a mask is about, if it is one and can be an atom."""

    @abstractmethod
    def comparison(self, atom: Call) -> Sum:
        """A comparison over several parts; `FactorError` where it is no sum of products."""

    @abstractmethod
    def holds_nowhere(self, part: int, atoms: frozenset[Expr]) -> bool:
        """True if no pair satisfies all of ``atoms``."""

    def is_empty(self, part: int, atoms: frozenset[Expr]) -> bool:
        """`holds_nowhere`, asked once."""
        if not atoms:
            return False
        key = (part, atoms)
        if key not in self.empty:
            self.empty[key] = self.holds_nowhere(part, atoms)
        return self.empty[key]

    def one(self, atoms: Mapping[int, Expr] | None = None) -> Sum:
        """A single product."""
        given = atoms or {}
        parts = tuple(
            frozenset({given[n]}) if n in given else frozenset[Expr]() for n in range(self.parts)
        )
        return self._pruned({parts: 1})

    def _pruned(self, terms: Sum) -> Sum:
        kept = {
            t: n
            for t, n in terms.items()
            if n and not any(self.is_empty(part, a) for part, a in enumerate(t))
        }
        if len(kept) > TERM_LIMIT:
            raise FactorError(f"the mask has more than {TERM_LIMIT} products")
        return kept

    def times(self, left: Sum, right: Sum) -> Sum:
        """The conjunction."""
        if len(left) * len(right) > PAIR_LIMIT:
            raise FactorError("the mask has too many products")
        out: Sum = {}
        for a, m in left.items():
            for b, n in right.items():
                key = tuple(x | y for x, y in zip(a, b, strict=True))
                out[key] = out.get(key, 0) + m * n
        return self._pruned(out)

    def plus(self, left: Sum, right: Sum, sign: int = 1) -> Sum:
        """The sum of two, the second ``sign`` times."""
        out = dict(left)
        for key, n in right.items():
            out[key] = out.get(key, 0) + sign * n
        return self._pruned(out)

    def of(self, mask: Expr) -> Sum:
        """Expand a mask; raises `FactorError`."""
        part = self.only_part(mask)
        if part is not None:
            return self.one({part: mask})
        match mask:
            case Const(value):
                return self.one() if value else {}
            case Call("and", (a, b)):
                return self.times(self.of(a), self.of(b))
            case Call("or", (a, b)):
                first, second = self.of(a), self.of(b)
                return self.plus(self.plus(first, second), self.times(first, second), -1)
            case Call("not", (a,)):
                return self.plus(self.one(), self.of(a), -1)
            case Call("where", (c, a, b)):
                yes, no = self.of(c), self.of(~c)
                return self.plus(self.times(yes, self.of(a)), self.times(no, self.of(b)))
            case Call("cast_bool", (a,)):
                return self.of(a)
            case Call(op, _) if op in COMPARISONS:
                return self.comparison(mask)
        raise FactorError(f"{mask} is no comparison")
