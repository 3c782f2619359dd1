"""Operators that would change nothing, or undo the one before, and are not emitted.

What is written out Einsum by Einsum asks for every value over its whole frame.  In a graph each
operator has a price of its own: capture, export, and a copy where it fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attn_rewrite.backends.torch.emit import value_of
from attn_rewrite.graph import Builder, aten


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two extents are equal by their expressions; nothing is assumed of symbols."""
    one, other = value_of(one), value_of(other)
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return type(one) is type(other) and one == other


def expanded(build: Builder, value: Any, shape: Sequence[Any]) -> Any:
    """``value`` expanded to ``shape`` (-1 keeps an extent); itself where it has that shape."""
    have = value_of(value).shape
    fits = len(have) == len(shape) and all(
        (isinstance(want, int) and want == -1) or is_same_size(found, want)
        for found, want in zip(have, shape, strict=True)
    )
    return value if fits else build.call(aten.expand.default, value, list(shape))


def filled(build: Builder, value: Any, dropped: Any, fill: float) -> Any:
    """``value`` with ``fill`` where ``dropped``; what was filled there before is filled anew."""
    while _is(value, aten.masked_fill.Scalar) and value.args[1] is dropped:
        value = value.args[0]
    return build.call(aten.masked_fill.Scalar, value, dropped, fill)


def squeezed(build: Builder, value: Any, dims: Sequence[int]) -> Any:
    """``value`` without the dimensions ``dims``, each of extent one."""
    left = list(dims)
    while _is(value, aten.unsqueeze.default) and value.args[1] in left:
        value, at = value.args
        left = [d - (d > at) for d in left if d != at]
    return build.call(aten.squeeze.dims, value, left) if left else value


def _is(value: Any, operator: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is operator
