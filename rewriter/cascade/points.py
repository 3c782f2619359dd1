"""Values of expressions at points, with numpy: integers stay integers, broadcasting as usual."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.expr import Call, Const, Expr, Rank

Array = npt.NDArray[Any]

_RULES: dict[str, Callable[..., Any]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "or": np.logical_or, "and": np.logical_and,
    "not": np.logical_not, "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": np.true_divide, "floordiv": np.floor_divide, "mod": np.mod, "neg": np.negative,
    "min": np.minimum, "max": np.maximum, "abs": np.abs, "where": np.where,
    "cast_bool": lambda a: np.asarray(a).astype(np.bool_),
}  # fmt: skip


class PointError(ValueError):
    """An expression uses an operator or a tensor that has no value at a point."""


def values(expr: Expr, coordinates: Mapping[str, Array]) -> Array:
    """The value of ``expr`` at the points of ``coordinates`` (int64 arrays that broadcast).

    Raises `PointError` for tensor reads, extents, unknown ranks and operators that round.
    """
    memo: dict[Expr, Array] = {}

    def of(node: Expr) -> Array:
        if node not in memo:
            memo[node] = _value(node, coordinates, of)
        return memo[node]

    return of(expr)


def _value(node: Expr, coordinates: Mapping[str, Array], of: Callable[[Expr], Array]) -> Array:
    match node:
        case Const(value):
            return np.asarray(value)
        case Rank(name) if name in coordinates:
            return coordinates[name]
        case Call(op, args) if op in _RULES:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(_RULES[op](*map(of, args)))
    raise PointError(f"{node} has no value at a point")
