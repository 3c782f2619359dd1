"""What may follow the expression of an Einsum: actions with their merges, and filters.

An action of the paper has a compute and a merge part (``reduce_k +(union)``).  Here the merge goes
with the operator: a product touches the points where both operands are present, a quotient those
where the divisor is, every other operator all points.  So a merge may be written, but only its own;
another one is a filter (``where A[k] != 0``).

Source: extended Einsums as used by FuseMax (Nayak et al., MICRO 2024), section II.
"""

from __future__ import annotations

from collections.abc import Callable

from attn_rewrite.cascade.expr import Call, Expr, walk
from attn_rewrite.cascade.notation import Reader, Token

REDUCTIONS = {
    "add": "add", "sum": "add", "+": "add", "mul": "mul", "prod": "mul", "*": "mul", "x": "mul",
    ".": "mul", "max": "max", "min": "min", "or": "or", "and": "and", "|": "or", "&": "and",
}  # fmt: skip
_MAPS = {**REDUCTIONS, "sub": "sub", "-": "sub", "div": "div", "/": "div", "exp": "exp"}
_MERGES = {
    "union": "union", "intersect": "intersection", "intersection": "intersection",
    "pass": "pass-through", "through": "pass-through", "right": "right present",
}  # fmt: skip
_ALSO = {"sub": ("pass-through",), "exp": ("pass-through",)}
_MERGE_OF = {"mul": "intersection", "div": "right present", "and": "intersection"}

Reductions = list[tuple[str, str]]


class Clauses(Reader):
    """The grammar after an expression: ``:: map_k x(intersect) reduce_k +(union) where k <= i``."""

    def tail(self, expr: Expr) -> Callable[[Reductions, list[Expr]], None] | None:
        """The reader of a ``::`` or ``where`` clause, which may start the next line."""
        at = self.at
        self.skip_newlines()
        if self.accept("::"):
            return lambda reduce, guards: self._actions(expr, reduce)
        if self.is_word("where"):
            self.take()
            return lambda reduce, guards: guards.append(self.expression())
        self.at = at
        return None

    def _actions(self, expr: Expr, reduce: Reductions) -> None:
        """One action or more, with or without commas between them."""
        while True:
            token = self.peek()
            kind, rank = self._action()
            if kind == "map":
                self._map(expr, token)
            else:
                reduce.append((rank, self._reduction(rank)))
            if not self.accept(",") and not self._at_action():
                return

    def _at_action(self) -> bool:
        token = self.peek()
        return token.kind in ("name", "string") and token.text.strip('"').startswith(
            ("reduce_", "map_")
        )

    def _action(self) -> tuple[str, str]:
        """(``map`` or ``reduce``, rank)."""
        token = self.peek()
        word = self.name("'reduce_rank operator'")
        for kind in ("reduce", "map"):
            if word == kind:
                self.accept("(")
                rank = self.name(f"the rank to {kind}")
                self.accept(")")
                return kind, rank
            if word.startswith(f"{kind}_"):
                return kind, word.removeprefix(f"{kind}_")
        raise self.error("'reduce_rank operator'", token)

    def _reduction(self, rank: str) -> str:
        """The operator that folds ``rank``: ``max``, ``= max``, ``(max)`` or ``max(union)``."""
        self.accept("=")
        bracket = self.accept("(")
        op = REDUCTIONS.get(self.peek().text)
        if op is None:
            raise self.error(f"a reduction of {rank} (add, mul, max, min, or, and)")
        self.take()
        self._merge(f"reduce_{rank}", "union")
        if bracket:
            self.expect(")", f"the reduction of {rank}")
        return op

    def _map(self, expr: Expr, start: Token) -> None:
        """A map says what the expression says already; it must be one of its operators."""
        op = _MAPS.get(self.peek().text)
        if op is None or not any(isinstance(n, Call) and n.op == op for n in walk(expr)):
            raise self.error(f"an operator of the expression {expr} after {start.text}")
        self.take()
        own = (_MERGE_OF.get(op, "union"), *_ALSO.get(op, ()))
        self._merge(start.text, *own)

    def _merge(self, what: str, *own: str) -> None:
        if not self.accept("("):
            return
        token = self.peek()
        merge = "pass-through" if token.text == "1" else _MERGES.get(token.text)
        if merge not in own:
            raise self.error(f"the merge of {what}, which is {own[0]} (others are filters: where)")
        while not self.is_op(")") and self.peek().kind in ("name", "number", "op"):
            self.take()
        self.expect(")", f"the merge of {what}")
