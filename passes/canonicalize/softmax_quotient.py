"""``exp(x) / exp(x).sum(dim)`` -> ``softmax(x)``, with or without the shift by the maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import (
    GraphBuilder,
    arguments,
    aten,
    inverted,
    is_call,
    is_tensor,
    op_name,
    shape_of,
    through,
    value_of,
)
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.find.product import Product, product_of
from attn_rewrite.sizes import as_size, same_size

_SAME_VALUE = (
    "to",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "expand_as",
    "clamp_min",
    "clamp",
    "alias",
)


def summed_exponential(denominator: Any) -> tuple[fx.Node, int] | None:
    """(exp node, axis) if ``denominator`` sums an exponential over one kept axis."""
    total = through(denominator, *_SAME_VALUE)
    if is_call(total, "unsqueeze"):
        axis, total, kept = total.args[1], through(total.args[0], *_SAME_VALUE), True
    else:
        axis, kept = None, False
    if not is_call(total, "sum"):
        return None
    named = arguments(total)
    dims = named.get("dim")
    where = [dims] if isinstance(dims, int) else list(dims or ())
    exponential = total.args[0]
    if len(where) != 1 or not is_call(exponential, "exp", "exp_"):
        return None
    if not all(_never_binds(c, exponential) for c in _clamps(denominator, total)):
        return None
    rank = len(shape_of(exponential))
    where_axis = int(where[0]) % rank
    if not named.get("keepdim") and not (
        kept and axis is not None and int(axis) % rank == where_axis
    ):
        return None
    return exponential, where_axis


def _clamps(denominator: Any, total: fx.Node) -> list[fx.Node]:
    """The bounds put on ``total`` on the way to ``denominator``."""
    found: list[fx.Node] = []
    while denominator is not total:
        if is_call(denominator, "clamp", "clamp_min"):
            found.append(denominator)
        denominator = denominator.args[0]
    return found


def _never_binds(clamp: fx.Node, exponential: fx.Node) -> bool:
    """True for a lower bound that only guards against a division by zero.

    After a shift by the row's maximum one term is exp(0): a bound up to 1 cannot bind.  Without it
    the bound may be no larger than one rounding error of 1.
    """
    named = arguments(clamp)
    low = named.get("min")
    if named.get("max") is not None or not isinstance(low, (int, float)):
        return False
    return low <= (1 if is_shifted(exponential) else torch.finfo(value_of(clamp).dtype).eps)


def is_shifted(exponential: fx.Node) -> bool:
    """True for ``exp(x - max(x))``."""
    shifted = exponential.args[0]
    if not is_call(shifted, "sub", "sub_") or not isinstance(shifted, fx.Node):
        return False
    if arguments(shifted).get("alpha", 1) != 1:
        return False
    top = through(shifted.args[1], "detach")
    if is_call(top, "getitem"):
        top = top.args[0] if top.args[1] == 0 else None
    return is_call(top, "amax", "max") and top.args[0] is shifted.args[0]


def softmax_of(build: GraphBuilder, exponential: fx.Node, axis: int) -> fx.Node:
    """``softmax`` of the exponent."""
    return build.call(aten.softmax.int, exponential.args[0], axis)  # type: ignore[no-any-return]


def _fraction(node: fx.Node) -> tuple[Any, Any]:
    """(numerator, denominator) of a division or of a product with a reciprocal."""
    top, bottom = node.args[0], node.args[1]
    if op_name(node) != "mul":
        return top, bottom
    if inverted(bottom) is None:
        top, bottom = bottom, top
    return top, inverted(bottom)


@dataclass(frozen=True)
class SoftmaxQuotient(Canonicalization):
    """An exponential divided by its own sum is a softmax."""

    name: ClassVar[str] = "softmax-quotient"
    targets: ClassVar[frozenset[str]] = frozenset({"div", "div_", "mul"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite ``e / e.sum(dim, keepdim=True)`` and ``e * (1 / e.sum(...))``."""
        top, bottom = _fraction(node)
        found = summed_exponential(bottom)
        if found is None or through(top, "to", "clone", "contiguous", "detach") is not found[0]:
            return None
        return softmax_of(build, *found)


@dataclass(frozen=True)
class LateQuotient(Canonicalization):
    """``(exp(x) @ v) / exp(x).sum(k)`` -> ``softmax(x) @ v``: the division after the product."""

    name: ClassVar[str] = "late-quotient"
    targets: ClassVar[frozenset[str]] = frozenset({"div", "div_", "mul"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the sum runs over the contracted (last) axis of the left operand."""
        product, bottom = _fraction(node)
        found = summed_exponential(bottom)
        contraction = product_of(product) if is_tensor(product) else None
        if found is None or contraction is None or not isinstance(product, fx.Node):
            return None
        exponential, axis = found
        if not _divides_rows(contraction, exponential, axis):
            return None
        probabilities = softmax_of(build, exponential, axis)
        if is_call(product, "einsum"):
            tensors = [probabilities, contraction.right]
            return build.call(aten.einsum.default, product.args[0], tensors)  # type: ignore[no-any-return]
        target = product.target
        assert callable(target)
        return build.call(target, probabilities, product.args[1])  # type: ignore[no-any-return]


def _divides_rows(product: Product, exponential: fx.Node, axis: int) -> bool:
    """The product sums ``exponential`` (its left operand) over ``axis``, and its sum over that
    axis, kept with length 1, broadcasts against the product's output row by row.
    """
    if through(product.left, "to", "clone") is not exponential:
        return False
    labels = product.left_labels
    if product.contracted != (labels[axis],) or len(labels) != len(product.out_labels):
        return False
    kept = [x for i, x in enumerate(labels) if i != axis]
    return all(
        mine == out or (i == axis and out not in kept)
        for i, (mine, out) in enumerate(zip(labels, product.out_labels, strict=True))
    )


@dataclass(frozen=True)
class SoftmaxShift(Canonicalization):
    """``softmax(x - m)`` -> ``softmax(x)`` and ``softmax(m - x)`` -> ``softmax(-x)`` where m is
    constant along the softmax axis."""

    name: ClassVar[str] = "softmax-shift"
    targets: ClassVar[frozenset[str]] = frozenset({"softmax", "_softmax"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite shifts by a maximum, or by anything else of length 1 along the axis, also those
        of a difference that is cast to a wider type."""
        named = arguments(node)
        shifted, dtype = named["self"], named.get("dtype")
        while is_call(shifted, "to") and _widens(shifted):
            dtype = dtype or value_of(shifted).dtype
            shifted = shifted.args[0]
        if not is_call(shifted, "sub", "sub_") or arguments(shifted).get("alpha", 1) != 1:
            return None
        first, second = shifted.args[:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        shape = shape_of(shifted)
        axis = named["dim"] % len(shape) - len(shape)
        if same_size(as_size(shape[axis]), 1):
            return None
        if _covers(first, shape, axis) and _is_constant(second, axis):
            source = first
        elif _covers(second, shape, axis) and _is_constant(first, axis):
            source = build.call(aten.neg.default, second)
        else:
            return None
        args = (source, named["dim"], dtype)
        return build.call(aten.softmax.int, *args)  # type: ignore[no-any-return]


def _widens(cast: fx.Node) -> bool:
    """True for a cast from a floating type to one of no fewer bits."""
    source = cast.args[0]
    assert isinstance(source, fx.Node)
    before, after = value_of(source).dtype, value_of(cast).dtype
    if not (before.is_floating_point and after.is_floating_point):
        return False
    return torch.finfo(before).bits <= torch.finfo(after).bits


def _covers(source: fx.Node, shape: tuple[Any, ...], axis: int) -> bool:
    """As many dimensions as the difference has, and as long along the axis."""
    own = shape_of(source)
    return len(own) == len(shape) and same_size(as_size(own[axis]), as_size(shape[axis]))


def _is_constant(shift: fx.Node, axis: int) -> bool:
    """One number for the whole axis, repeated or to be repeated."""
    while is_call(shift, "expand", "expand_as", "broadcast_to"):
        repeated = shift.args[0]
        assert isinstance(repeated, fx.Node)
        if len(shape_of(repeated)) < -axis:
            return True
        shift = repeated
    own = shape_of(shift)
    return len(own) < -axis or same_size(as_size(own[axis]), 1)
