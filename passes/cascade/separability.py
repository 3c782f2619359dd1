"""Does ``F(x, s)`` split into a part of the items x and a part of the state s?

Two readings: ``F = G(x) * H(s)`` for sums (the product distributes over them) and
``F = G(x) + H(s)`` for maxima and minima.  The test uses probes: with independent copies x0, s0 the
product form holds exactly when ``F(x,s) F(x0,s0) = F(x,s0) F(x0,s)``.  A failing probe at numbers
*is* the counterexample of the refusal; a passing one is proved by sympy before it is believed.

Sources: the probe identity is the one RedFuser checks (Tang et al., ASPLOS 2026); the repair
``t * H(a)^-1 * H(b)`` follows Neptune's Lemma 4.3 (Zhao et al., PLDI 2026).
"""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from attn_rewrite.cascade.expr import OPERATORS, Call, Const, Expr, Rank, Read, to_text, walk
from attn_rewrite.passes.cascade.algebra import (
    LN2,
    Term,
    evaluate,
    from_sympy,
    symbols_for,
    to_sympy,
)

PROBES = 24  # draws of numbers tried before a proof is attempted
_NOISE = 1e-9  # relative; the identity is evaluated in float64 with O(1) operands


@dataclass(frozen=True)
class Body:
    """``F``: an expression over items (they change along the rank) and state (complete values).

    ``items`` and ``state`` are the leaves (maximal state-free subtrees, reads of states); every
    other leaf is a constant of the row.  ``positive`` lists the leaves that are proved positive.
    """

    expr: Expr
    items: tuple[Expr, ...]
    state: tuple[Expr, ...]
    constants: tuple[Expr, ...] = ()
    positive: frozenset[Expr] = frozenset()

    @property
    def leaves(self) -> tuple[Expr, ...]:
        """Items, state and constants."""
        return (*self.items, *self.state, *self.constants)


@dataclass(frozen=True)
class Separation:
    """A proved split: ``F = G op H`` and the correction that re-bases an accumulated value.

    ``action`` is ``"mul"`` or ``"add"``; ``correction`` is over the old state (the leaves of ``F``)
    and the new one (`new_state` of each leaf).
    """

    action: str
    G: Expr
    H: Expr
    correction: Expr


@dataclass(frozen=True)
class Counterexample:
    """Numbers at which the probe identity fails: ``left != right``."""

    action: str
    first: tuple[tuple[str, float], ...]
    second: tuple[tuple[str, float], ...]
    left: float
    right: float

    def __str__(self) -> str:
        sign = "*" if self.action == "mul" else "+"
        at = ", ".join(f"{n}={v:.4g}" for n, v in self.first)
        other = ", ".join(f"{n}={v:.4g}" for n, v in self.second)
        return (
            f"at ({at}) and ({other}) F(x,s) {sign} F(x0,s0) = {self.left:.6g} "
            f"but F(x,s0) {sign} F(x0,s) = {self.right:.6g}"
        )


@dataclass(frozen=True)
class NotProved:
    """No number refutes the split, and sympy does not prove it."""

    action: str


def new_state(leaf: Expr) -> Expr:
    """The leaf that stands for a state *after* the step in a correction."""
    if isinstance(leaf, Read):
        return Read(f"{leaf.tensor}'", leaf.index)
    raise ValueError(f"a state must be a tensor read, got {to_text(leaf)}")


def leaves_of(
    expr: Expr, rank: str, states: frozenset[str], positive: frozenset[Expr] = frozenset()
) -> Body:
    """Split ``expr`` into items, states and constants; a maximal state-free subtree is one leaf."""
    items: dict[Expr, None] = {}
    state: dict[Expr, None] = {}
    constants: dict[Expr, None] = {}

    def visit(node: Expr) -> None:
        if isinstance(node, Read) and node.tensor in states:
            state[node] = None
        elif not any(isinstance(n, Read) and n.tensor in states for n in walk(node)):
            if isinstance(node, Const):
                return
            kind = items if moves_along(node, rank) else constants
            kind[node] = None
        else:
            for child in node.children:
                visit(child)

    visit(expr)
    return Body(expr, tuple(items), tuple(state), tuple(constants), positive)


def moves_along(expr: Expr, rank: str) -> bool:
    """Does the value change along ``rank``?"""
    return any(isinstance(n, Rank) and n.name == rank for n in walk(expr))


@functools.lru_cache(maxsize=512)
def separate(body: Body, action: str) -> Separation | Counterexample | NotProved:
    """Prove ``F = G * H`` (``"mul"``) or ``F = G + H`` (``"add"``), or refute it by numbers."""
    refuted = _refute(body, action)
    if refuted is not None:
        return refuted
    symbols = symbols_for(body.leaves, body.positive)
    term = to_sympy(body.expr, symbols)
    x, s = ([symbols[leaf] for leaf in part] for part in (body.items, body.state))
    if not _proved(term, x, s, action):
        return NotProved(action)
    return _split(body, term, symbols, action)


def _refute(body: Body, action: str) -> Counterexample | None:
    """Numbers that break the identity; the draw is seeded, so a refusal is reproducible."""
    source = random.Random(0)
    for _ in range(PROBES):
        constants = {c: _draw(source, c, body) for c in body.constants}
        x, x0 = ({i: _draw(source, i, body) for i in body.items} for _ in range(2))
        s, s0 = ({i: _draw(source, i, body) for i in body.state} for _ in range(2))

        def at(
            items: Mapping[Expr, float],
            state: Mapping[Expr, float],
            constants: Mapping[Expr, float] = constants,
        ) -> float:
            return evaluate(body.expr, {**constants, **items, **state})

        join = operator.mul if action == "mul" else operator.add
        left, right = join(at(x, s), at(x0, s0)), join(at(x, s0), at(x0, s))
        scale = max(abs(left), abs(right), 1e-6 if action == "mul" else 1.0)
        if math.isfinite(left) and math.isfinite(right) and abs(left - right) > _NOISE * scale:
            first, second = (
                tuple(
                    (to_text(k), v) for k, v in sorted(point.items(), key=lambda p: to_text(p[0]))
                )
                for point in ({**constants, **x, **s}, {**x0, **s0})
            )
            return Counterexample(action, first, second, left, right)
    return None


def _draw(source: random.Random, leaf: Expr, body: Body) -> float:
    if isinstance(leaf, Call) and OPERATORS[leaf.op].boolean:
        return float(source.random() < 0.5)
    return source.uniform(0.25, 3.0) if leaf in body.positive else source.uniform(-3.0, 3.0)


def _proved(term: Term, x: list[sympy.Symbol], s: list[sympy.Symbol], action: str) -> bool:
    other = {v: sympy.Dummy(f"{v.name}_0", **v.assumptions0) for v in (*x, *s)}
    at_x0, at_s0 = ({v: other[v] for v in group} for group in (x, s))
    f, fx0, fs0 = term, term.xreplace(at_x0), term.xreplace(at_s0)
    both = fx0.xreplace(at_s0)
    gap = f * both - fs0 * fx0 if action == "mul" else f + both - fs0 - fx0
    if sympy.expand(gap) == 0:
        return True
    return bool(sympy.simplify(gap) == 0)


def _split(
    body: Body, term: Term, symbols: Mapping[Expr, sympy.Symbol], action: str
) -> Separation | NotProved:
    state = {symbols[leaf] for leaf in body.state}
    fresh = {v: sympy.Dummy(f"{v.name}_new", **v.assumptions0) for v in state}
    expanded = (
        sympy.expand(term, power_base=True, force=True) if action == "mul" else sympy.expand(term)
    )
    parts = (sympy.Mul if action == "mul" else sympy.Add).make_args(_factored(expanded, action))
    with_state = [p for p in parts if p.free_symbols & state]
    without = [p for p in parts if not p.free_symbols & state]
    row = state | {symbols[c] for c in body.constants} | {LN2}
    if any(p.free_symbols - row for p in with_state):
        return NotProved(action)
    join = sympy.Mul if action == "mul" else sympy.Add
    h, g = sympy.powsimp(join(*with_state)), sympy.powsimp(join(*without))
    changed = h.xreplace(fresh)
    correction = sympy.powsimp(sympy.expand(changed / h)) if action == "mul" else changed - h
    leaves = {symbol: leaf for leaf, symbol in symbols.items()}
    renamed = {dummy: new_state(leaves[v]) for v, dummy in fresh.items()}
    try:
        return Separation(
            action,
            from_sympy(g, leaves),
            from_sympy(h, leaves),
            from_sympy(sympy.powsimp(correction, combine="exp"), {**leaves, **renamed}),
        )
    except ValueError:
        return NotProved(action)


def _factored(term: Term, action: str) -> Term:
    """A product (or sum) whose parts do not mix items and state where that is possible."""
    if action == "add" or not isinstance(term, sympy.Add):
        return term
    return sympy.factor(term)


def is_range_guard(factor: Expr, states: frozenset[str]) -> bool:
    """Does the factor keep exponentials of the items in range, so that it must not be deferred?

    True for an exponential of a state: deferring ``exp(-GM)`` would accumulate ``exp(QK)``.
    """
    return any(
        isinstance(n, Call)
        and (n.op in ("exp", "exp2") or (n.op == "pow" and not isinstance(n.args[1], Const)))
        and any(isinstance(r, Read) and r.tensor in states for r in walk(n))
        for n in walk(factor)
    )
