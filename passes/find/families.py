"""Attention that is not one softmax between two products: recognised, named and raised.

===========  ====================================================================================
``softmax``  scores or probabilities mixed between the products: talking heads (Shazeer et al. 2020,
             arXiv:2003.02436), a second map added (ConViT's gated positions, arXiv:2103.10697;
             differential attention, arXiv:2410.05258)
``linear``   softmax of K over the keys, then K^T V, then Q (Efficient attention, arXiv:1812.01243;
             CoaT, arXiv:2104.06399)
===========  ====================================================================================

Such a Site has the cascade of exactly what it computes, and a refusal that says why it is left as
it is.
"""

from __future__ import annotations

from torch import fx

from attn_rewrite.graph import is_call, is_tensor, op_name, shape_of
from attn_rewrite.passes.find.anchor import SOFTMAX
from attn_rewrite.passes.find.layout import only_moves
from attn_rewrite.passes.find.linear import linear
from attn_rewrite.passes.find.mixed import mixed
from attn_rewrite.passes.find.product import contraction, of_weights
from attn_rewrite.site import Refusal, Site

# Refusals of `match` behind which an attention with mixed maps may be.
_MIXED = frozenset(
    {
        "no-score-product", "no-key-axis", "probabilities-summed", "not-a-value-product",
        "axis-mismatch", "axes-inconsistent", "probabilities-escape",
    }
)  # fmt: skip
_STEPS = 24


def recognise(
    node: fx.Node, found: Site | Refusal, module: fx.GraphModule, name: str
) -> Site | None:
    """The Site around a softmax that `match` refused, or took for something else."""
    if op_name(node) not in SOFTMAX or not is_tensor(node) or not shape_of(node):
        return None
    if isinstance(found, Site):
        return mixed(node, module, name) if _has_weights_for_queries(found) else None
    if found.code in _MIXED:
        site = mixed(node, module, name)
        if site is not None:
            return site
    return linear(node, module, name) if found.code == "no-score-product" else None


def _has_weights_for_queries(site: Site) -> bool:
    """Scores that a matrix of weights mixes look like keys that learned queries are compared to."""
    query, key = site.inputs["Q"].node, site.inputs["K"].node
    return (of_weights(query) and _is_product(key)) or (of_weights(key) and _is_product(query))


def _is_product(node: fx.Node) -> bool:
    """True for a product of activations, moved and scaled."""
    for _ in range(_STEPS):
        found = contraction(node)
        if found is not None:
            return not (of_weights(found.product.left) or of_weights(found.product.right))
        if not (only_moves(node) or is_call(node, "mul", "div", "add", "where", "masked_fill")):
            return False
        source = next((a for a in node.all_input_nodes if is_tensor(a)), None)
        if source is None:
            return False
        node = source
    return False
