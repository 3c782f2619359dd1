"""Operands of a product walked back to where they are made."""

from __future__ import annotations

from torch import fx

from attn_rewrite.graph import arguments, is_call, value_of
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.layout import pull, pure

Dims = tuple[Atoms, ...]


def trim(
    node: fx.Node, dims: Dims, axes: Axes, *, scale: bool = True
) -> tuple[float, tuple[fx.Node, Dims]]:
    """Walk an operand back through layout operators (and constant factors) to where it is made."""
    factor = 1.0
    while True:
        if scale and _scales(node):
            times = float(node.args[1])  # type: ignore[arg-type]
            factor *= times if is_call(node, "mul", "mul_") else 1.0 / times
            node = node.args[0]  # type: ignore[assignment]
            continue
        moved = pull(node, dims, axes)
        atoms = None if moved is None else pure(moved[1])
        if moved is None or atoms is None or value_of(moved[0]).dtype != value_of(node).dtype:
            return factor, (node, dims)
        if len({a for d in atoms for a in axes.resolve(d)}) != sum(
            len(axes.resolve(d)) for d in atoms
        ):
            return factor, (node, dims)
        node, dims = moved[0], atoms


def _scales(node: fx.Node) -> bool:
    """True for a tensor times, or divided by, a number."""
    return (
        is_call(node, "mul", "mul_", "div", "div_")
        and isinstance(node.args[1], (int, float))
        and isinstance(node.args[0], fx.Node)
        and arguments(node).get("rounding_mode") is None
    )
