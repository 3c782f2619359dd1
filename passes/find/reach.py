"""From a softmax forward to the product that takes its probabilities, whatever stands between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attn_rewrite.graph import live_users, op_name
from attn_rewrite.passes.find.layout import only_moves
from attn_rewrite.passes.find.product import Product, contraction, of_weights, product_of

_STEPS = 64
_ELEMENTWISE = frozenset(
    "add sub rsub mul div to dropout neg where masked_fill clamp nan_to_num sum lerp "
    "reciprocal".split()
)


@dataclass(frozen=True, eq=False)
class Way:
    """A product of two activations, and every node between it and the start (both included)."""

    product: Product
    map_on_left: bool
    nodes: frozenset[fx.Node]

    @property
    def value(self) -> fx.Node:
        """The operand that does not come from the start."""
        return self.product.right if self.map_on_left else self.product.left


def reach(start: fx.Node, through: frozenset[fx.Node] = frozenset()) -> Way | None:
    """The one product where everything that is made of ``start`` ends; None if there is none.

    Linear maps with weights of the model, and the products ``through``, are passed.
    """
    seen, queue = {start}, [start]
    end: Product | None = None
    while queue:
        for user in live_users(queue.pop()):
            product = product_of(user)
            if product is not None and user not in through and not _mixes(product):
                if end is not None and end.node is not user:
                    return None
                end = product
            elif user not in seen:
                if not _passes(user, through) or len(seen) > _STEPS:
                    return None
                seen.add(user)
                queue.append(user)
    if end is None or (end.left in seen) == (end.right in seen):
        return None
    return Way(end, end.left in seen, frozenset({*seen, end.node}))


def _mixes(product: Product) -> bool:
    return of_weights(product.left) != of_weights(product.right)


def _passes(node: fx.Node, through: frozenset[fx.Node]) -> bool:
    if node in through or contraction(node) is not None or only_moves(node):
        return True
    name = op_name(node).removesuffix("_")
    return name in _ELEMENTWISE or name in ("chunk", "split", "split_with_sizes", "unbind")
