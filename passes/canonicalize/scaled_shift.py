"""``softmax((x - m) * c)`` -> ``softmax(x * c)`` for a number c and m constant along the axis.

So is ``exp2((s - max) * log2(e))`` over its sum, which `softmax_quotient` brings to this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, is_tensor, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True)
class ScaledShift(Canonicalization):
    """A shift that is scaled is a shift."""

    name: ClassVar[str] = "scaled-shift"
    targets: ClassVar[frozenset[str]] = frozenset({"softmax", "_softmax"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the factor is a number."""
        named = arguments(node)
        shifted, scales = named["self"], []
        while _is_scaled(shifted):
            scales.append((shifted.target, shifted.args[1]))
            shifted = shifted.args[0]
        if not scales or not is_call(shifted, "sub") or shifted.kwargs:
            return None
        if not is_tensor(shifted.args[1]):
            return None
        source, shift = shifted.args
        if len(shape_of(shift)) != len(shape_of(source)):
            return None
        if not same_size(as_size(shape_of(shift)[named["dim"]]), 1):
            return None
        for target, factor in reversed(scales):
            source = build.call(target, source, factor)
        return build.call(aten.softmax.int, source, named["dim"], named.get("dtype"))  # type: ignore[no-any-return]


def _is_scaled(node: fx.Node) -> bool:
    """A tensor times, or divided by, a number; nothing that rounds."""
    return (
        is_call(node, "mul", "div")
        and not node.kwargs
        and is_tensor(node.args[0])
        and isinstance(node.args[1], (int, float))
    )
