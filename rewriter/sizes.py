"""Tensor extents: integers where they are static, sympy expressions where they are dynamic."""

from __future__ import annotations

from typing import Any

import sympy

Size = Any  # int, or a sympy expression of the shape environment


def as_size(value: Any) -> Size:
    """A tensor extent as an int where it is static, else as its sympy expression."""
    if isinstance(value, int):
        return value
    expr = getattr(getattr(value, "node", None), "expr", value)
    return int(expr) if getattr(expr, "is_Integer", False) else expr


def same_size(left: Size, right: Size) -> bool:
    """True if the two extents are equal for every value of their symbols."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    gap = sympy.expand(left - right)
    return bool(gap == 0 or sympy.expand(_bounds_decided(gap)) == 0)


def _bounds_decided(expr: sympy.Expr) -> sympy.Expr:
    """``expr`` without the maxima and minima that one argument decides for every extent: those are
    1 and more."""
    if not any(_is_bound(part) for part in sympy.preorder_traversal(expr)):
        return expr
    above = {
        x: 1 + sympy.Dummy(nonnegative=True, integer=True)
        for x in expr.free_symbols
        if x.is_positive and x.is_integer
    }
    return expr.xreplace(above).replace(
        _is_bound, lambda part: getattr(sympy, part.func.__name__)(*part.args)
    )


def _is_bound(expr: sympy.Basic) -> bool:
    """True for a maximum or minimum, also in torch's own spelling, which simplifies less."""
    return expr.func.__name__ in ("Max", "Min")


def divide(total: Size, part: Size) -> Size | None:
    """``total / part`` if it divides for every value of the symbols, else None."""
    if isinstance(total, int) and isinstance(part, int):
        return total // part if part > 0 and total % part == 0 else None
    ratio = sympy.cancel(sympy.sympify(total) / sympy.sympify(part))
    if sympy.fraction(ratio)[1] != 1:
        return None
    return as_size(ratio)
