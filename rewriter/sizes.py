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
    return bool(sympy.expand(left - right) == 0)


def divide(total: Size, part: Size) -> Size | None:
    """``total / part`` if it divides for every value of the symbols, else None."""
    if isinstance(total, int) and isinstance(part, int):
        return total // part if part > 0 and total % part == 0 else None
    ratio = sympy.cancel(sympy.sympify(total) / sympy.sympify(part))
    if sympy.fraction(ratio)[1] != 1:
        return None
    return as_size(ratio)
