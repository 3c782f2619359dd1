"""Digits of numbers that are written as digits: ``(a * 12 + b * 4 + c) // 4 % 3`` is ``b``.

A position that was mapped to another order of the tokens is a sum of digits times strides.  Masks
ask for digits of that sum, and most of them are digits of the position again: found here by integer
bounds, so that masks of grids keep their closed forms in any order.  Exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attn_rewrite.cascade.expr import Call, Const, Expr, ranks_of, transform, walk
from attn_rewrite.cascade.interval import Affine, Interval, affine, evaluate, is_integer

_Box = dict[str, Interval]


def fold_digits(expr: Expr, lengths: Mapping[str, int]) -> Expr:
    """``expr`` with ``//`` and ``%`` by literals taken apart where bounds allow it.

    ``lengths`` are the extents of ranks; the same object where nothing changes.
    """
    if not any(isinstance(n, Call) and n.op in ("floordiv", "mod") for n in walk(expr)):
        return expr
    box = {
        r: Interval(np.asarray(0.0), np.asarray(float(max(n - 1, 0)))) for r, n in lengths.items()
    }

    def rule(node: Expr) -> Expr | None:
        match node:
            case Call("floordiv" | "mod", (inner, Const(int(n)))) if n > 0:
                return _divided(node, inner, n, box)
        return None

    return transform(expr, rule)


def _divided(node: Expr, inner: Expr, n: int, box: _Box) -> Expr | None:
    """``inner // n`` or ``inner % n``: multiples of n come apart, and what is left if it is small.

    ``(n * a + b) // n = a + b // n`` and ``(n * a + b) % n = b % n`` hold for all integers.
    """
    assert isinstance(node, Call)
    form = affine(inner)
    if not _whole(form):
        return None
    high = {t: c / n for t, c in form.terms.items() if c % n == 0}
    low = {t: c for t, c in form.terms.items() if c % n}
    rest = _expression(Affine(low, float(form.constant % n)))
    small = _inside(rest, n, box)
    if not high and 0 <= form.constant < n and not small:
        return _nested(node.op, inner, n)
    nested = _nested(node.op, rest, n)
    left = rest if small else Call(node.op, (rest, Const(n))) if nested is None else nested
    if node.op == "mod":
        return left
    whole = affine(Const(0) if small else left)
    return _expression(Affine(high, float(form.constant // n)).plus(whole))


def _inside(expr: Expr, n: int, box: _Box) -> bool:
    """``0 <= expr < n`` for all coordinates."""
    if not ranks_of(expr) <= box.keys():
        return False
    bound = evaluate(expr, box)
    return float(bound.lo) >= 0 and float(bound.hi) < n


def _nested(op: str, inner: Expr, n: int) -> Expr | None:
    """``x // a // n`` as ``x // (a * n)``, and ``x % (k * n) % n`` as ``x % n``."""
    match op, inner:
        case "floordiv", Call("floordiv", (x, Const(int(a)))) if a > 0:
            return Call("floordiv", (x, Const(a * n)))
        case "mod", Call("mod", (x, Const(int(m)))) if m > 0 and m % n == 0:
            return Call("mod", (x, Const(n)))
    return None


def _whole(form: Affine) -> bool:
    numbers = (form.constant, *form.terms.values())
    return all(float(c).is_integer() for c in numbers) and all(map(is_integer, form.terms))


def _expression(form: Affine) -> Expr:
    total: Expr | None = None
    for term, factor in form.terms.items():
        part = term if factor == 1 else term * int(factor)
        total = part if total is None else total + part
    constant = int(form.constant)
    if total is None:
        return Const(constant)
    return total + constant if constant else total
