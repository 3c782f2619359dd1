"""One form for masks that were computed: with minimum and maximum, products, differences, signs.

Two exact rules, both by evaluation.  An expression of the distance ``q - kv`` alone is evaluated at
every distance: outside of the largest number in it by interval arithmetic, inside by halving until
each range has one value.  Arithmetic on a few conditions is evaluated for every combination of
their truth values.  Both leave what has no such form as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from attn_rewrite.cascade.expr import (
    FALSE,
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjunction,
    conjuncts,
    rebuild,
    substitute,
    walk,
    where,
)
from attn_rewrite.cascade.interval import Interval, affine, evaluate
from attn_rewrite.cascade.simplify import is_boolean, mask_value, simplify
from attn_rewrite.passes.find.bands import MAX_PIECES, Piece, Pieces, merged, written

Q, KV = Rank("q"), Rank("kv")
_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_ARITHMETIC = frozenset({"add", "sub", "mul", "neg", "div", "pow", "abs", *_COMPARISONS})
_COMPUTED = frozenset({"max", "min", "clip", "sign", "relu", "floor", "ceil", "round"})
_MAX_ATOMS = 4
_FURTHEST = 1 << 24  # distances up to here are exact as numbers of single precision


@lru_cache(maxsize=512)
def normal(expr: Expr) -> Expr:
    """``expr`` with its computed masks in normal form; an equal one if there are none."""
    if _is_computed(expr, "or"):
        found = by_distance(expr)
        if found is None and _is_computed(expr):
            found = _by_truth(expr)
        if found is not None:
            return simplify(found)
    new = rebuild(expr, tuple(map(normal, expr.children)))
    if isinstance(new, Call) and new.op == "sub" and _is_choice(new.args[1]):
        condition, yes, no = new.args[1].children
        return simplify(new.args[0] + where(condition, -yes, -no))
    return new


def _is_computed(expr: Expr, *others: str) -> bool:
    """A mask of positions and conditions in which something is computed from conditions, or with
    one of the operators ``others``."""
    if not isinstance(expr, Call) or any(isinstance(n, Extent) for n in walk(expr)):
        return False
    return any(
        isinstance(n, Call)
        and (
            n.op in _COMPUTED
            or n.op in others
            or (n.op in _COMPARISONS and any(map(_is_fraction, walk(n))))
            or (n.op in _ARITHMETIC and any(is_boolean(a) or _is_choice(a) for a in n.args))
        )
        for n in walk(expr)
    )


def _is_fraction(expr: Expr) -> bool:
    return (
        isinstance(expr, Const) and math.isfinite(expr.value) and not float(expr.value).is_integer()
    )


def _is_choice(expr: Expr) -> bool:
    return (
        isinstance(expr, Call)
        and expr.op == "where"
        and all(isinstance(a, Const) or _is_choice(a) for a in expr.args[1:])
    )


# By distance


def by_distance(expr: Expr) -> Expr | None:
    """An expression of ``q - kv`` alone with two values at most, as a choice by that distance."""
    pieces = pieces_of(expr)
    return None if pieces is None else written(pieces, Q, KV)


def pieces_of(expr: Expr) -> Pieces | None:
    """The values of ``expr`` by the distance ``q - kv``; None if it depends on anything else."""
    if not _of_distance(expr):
        return None
    along = substitute(expr, {KV: Const(0)})
    numbers = (abs(n.value) for n in walk(expr) if isinstance(n, Const))
    edge = 2 + math.ceil(max((float(n) for n in numbers if n < _FURTHEST), default=0))
    found: list[Piece] = []
    for low, high in ((None, -edge - 1), (-edge, edge), (edge + 1, None)):
        if not _halve(along, low, high, found):
            return None
    return merged(found)


def _of_distance(expr: Expr) -> bool:
    """True if moving query and key by the same amount changes nothing."""
    match expr:
        case Const():
            return True
        case Rank() | Extent() | Read():
            return False
        case Call(op, args) if op in _COMPARISONS:
            left, right = args
            return _of_distance(left - right) or (_of_distance(left) and _of_distance(right))
        case Call("add" | "sub" | "neg" | "mul", args):
            terms = dict(affine(expr).terms)
            if set(terms) == {expr}:
                return all(map(_of_distance, args))
            if terms.pop(Q, 0.0) + terms.pop(KV, 0.0) != 0.0:
                return False
            return all(map(_of_distance, terms))
        case Call(_, args):
            return all(map(_of_distance, args))
    return False


def _halve(along: Expr, low: int | None, high: int | None, found: list[Piece]) -> bool:
    """Append the pieces of a range; False if there are too many, or a value cannot be had."""
    if len(merged(found)) > MAX_PIECES:
        return False
    value = _value(along, low, high)
    if value is not None:
        found.append(Piece(low, high, value))
        return True
    if low is None or high is None or low == high:
        return False
    middle = (low + high) // 2
    return _halve(along, low, middle, found) and _halve(along, middle + 1, high, found)


def _value(along: Expr, low: int | None, high: int | None) -> Any:
    """The one value of ``along`` for q in a range; None if there may be several."""
    if low is not None and low == high:
        exact = simplify(substitute(along, {Q: Const(low)}))
        return exact.value if isinstance(exact, Const) else None
    ends = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
    with np.errstate(all="ignore"):
        inside = evaluate(along, {"q": Interval(*map(np.asarray, ends))})
    lowest, highest = float(inside.lo), float(inside.hi)
    if lowest != highest:
        return None
    sample = simplify(substitute(along, {Q: Const(_inner(low, high))}))
    return sample.value if isinstance(sample, Const) and sample.value == lowest else None


def _inner(low: int | None, high: int | None) -> int:
    if low is None:
        assert high is not None
        return high
    return low


# By truth values


def _by_truth(expr: Expr) -> Expr | None:
    """Arithmetic on at most four conditions, with two values at most, as a choice between them."""
    atoms = list(dict.fromkeys(_atoms(expr)))
    if not 0 < len(atoms) <= _MAX_ATOMS or expr in atoms:
        return None
    table: dict[tuple[bool, ...], Any] = {}
    for row in itertools.product((False, True), repeat=len(atoms)):
        held = simplify(substitute(expr, {a: Const(t) for a, t in zip(atoms, row, strict=True)}))
        if not isinstance(held, Const) or held.value != held.value:
            return None
        table[row] = held.value
    values = list(dict.fromkeys((type(v), v) for v in table.values()))
    if len(values) == 1:
        return Const(values[0][1])
    if len(values) != 2:
        return None
    high = max((v for _, v in values), key=float)
    condition = _condition(atoms, [row for row, v in table.items() if v == high])
    low = next(v for _, v in values if v != high)
    if isinstance(high, bool) and isinstance(low, bool):
        return condition
    return where(condition, high, low)


def _atoms(expr: Expr) -> Iterator[Expr]:
    """The comparisons, and reads of truth values, of which an expression is made; the expression
    itself where it is made of anything else."""
    match expr:
        case Const():
            return
        case Call("where", (condition, yes, no)):
            yield from _conditions(condition)
            yield from _atoms(yes)
            yield from _atoms(no)
        case Call(op, args) if op in _COMPARISONS and not any(map(_is_plain, args)):
            for arg in args:
                yield from _atoms(arg)
        case Call() if is_boolean(expr):
            yield from _conditions(expr)
        case Call(_, args) if args:
            for arg in args:
                yield from _atoms(arg)
        case _:
            yield from itertools.repeat(expr, 1)
            yield from (Rank(f"no condition {n}") for n in range(_MAX_ATOMS))


def _conditions(expr: Expr) -> Iterator[Expr]:
    match expr:
        case Const():
            return
        case Call("and" | "or" | "not", args):
            for arg in args:
                yield from _conditions(arg)
        case Call(op, args) if op in _COMPARISONS and not any(map(_is_plain, args)):
            yield from _atoms(expr)
        case _:
            yield expr


def _is_plain(expr: Expr) -> bool:
    """A position, a size or a tensor, or arithmetic on such: no condition in it."""
    inside = list(walk(expr))
    if any(is_boolean(n) or (isinstance(n, Call) and n.op == "where") for n in inside):
        return False
    return any(isinstance(n, (Rank, Extent, Read)) for n in inside)


def _condition(atoms: list[Expr], rows: list[tuple[bool, ...]]) -> Expr:
    """A short formula over ``atoms`` that is true in exactly these rows of the table.

    What holds in all of them is a term of its own, so that a causal term is seen as one.
    """
    import sympy
    from sympy.logic import SOPform

    columns = [{row[i] for row in rows} for i in range(len(atoms))]
    fixed = [i for i, c in enumerate(columns) if len(c) == 1]
    free = [i for i in range(len(atoms)) if i not in fixed]
    terms = [atoms[i] if True in columns[i] else call("not", atoms[i]) for i in fixed]
    if free:
        names = sympy.symbols(f"a:{len(free)}")
        rest = SOPform(names, [[int(row[i]) for i in free] for row in rows])
        formula = _formula(rest, {n: atoms[i] for n, i in zip(names, free, strict=True)})
        terms += [] if formula == TRUE else [formula]
    return conjunction(tuple(terms))


def _formula(formula: Any, atoms: Mapping[Any, Expr]) -> Expr:
    import sympy

    if formula in atoms:
        return atoms[formula]
    if formula in (sympy.true, sympy.false):
        return TRUE if formula == sympy.true else FALSE
    parts = [_formula(a, atoms) for a in sorted(formula.args, key=str)]
    if isinstance(formula, sympy.Not):
        return call("not", parts[0])
    op = "and" if isinstance(formula, sympy.And) else "or"
    total = parts[0]
    for part in parts[1:]:
        total = call(op, total, part)
    return total


# What a mask removes


def removing(score: Expr) -> tuple[Expr, ...]:
    """Conditions that every score which is not removed fulfils.

    Only what lowers the score itself counts: a mask inside of a bounded function, a maximum or a
    difference that adds it removes nothing.
    """
    match score:
        case Call("where", (condition, yes, no)):
            if mask_value(no):
                return (*conjuncts(condition), *removing(yes))
            if mask_value(yes):
                return (*conjuncts(simplify(call("not", condition))), *removing(no))
            return tuple(t for t in removing(yes) if t in removing(no))
        case Call("add" | "min", (a, b)):
            found = (*removing(a), *removing(b), *_far_below(a), *_far_below(b))
            return tuple(dict.fromkeys(found))
        case Call("max", (a, b)):
            return tuple(t for t in removing(a) if t in removing(b))
        case Call("sub", (a, b)):
            return (*removing(a), *_far_below(simplify(call("neg", b))))
        case Call(op, (a,)) if op.startswith("cast_f"):
            return removing(a)
    return ()


def _far_below(term: Expr) -> tuple[Expr, ...]:
    """``kv <= q`` where a term that grows with the distance removes every later key."""
    if isinstance(term, Const) or not _of_distance(term):
        return ()
    along = substitute(term, {KV: Const(0)})
    with np.errstate(all="ignore"):
        later = evaluate(along, {"q": Interval(np.asarray(-np.inf), np.asarray(-1.0))})
    return (call("le", KV, Q),) if mask_value(Const(float(later.hi))) else ()
