"""`flex_attention`: the score and mask functions of its call are graphs, lifted like any other.

The operator calls ``score_mod(score, b, h, q, kv)`` and ``mask_mod(b, h, q, kv)`` on numbers; their
graphs are read with the coordinates of the scores in the place of those numbers, and with the
tensors that they close over as tensors of the host graph.  What the operator computes is the masked
softmax of PyTorch's dense form: block lists only say where the mask is empty.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from attn_rewrite.cascade.expr import Expr, Read, where
from attn_rewrite.graph import is_tensor, op_name
from attn_rewrite.passes.find.anchor import Anchor, Pairs, ValueProduct, pairs, refuse
from attn_rewrite.passes.find.constants import attribute
from attn_rewrite.passes.find.layout import coordinate
from attn_rewrite.passes.find.lse import of_flex
from attn_rewrite.site import Refusal


def open_flex(node: fx.Node, module: nn.Module) -> Anchor | Refusal:
    """Lift the scores of a call; the value product is its first result."""
    q, k, v, score_mod, block_mask, scale = node.args[:6]
    if not all(map(is_tensor, (q, k, v))) or not isinstance(scale, (int, float)):
        return refuse("flex-arguments", "the scale of flex_attention is not a number", node)
    results: dict[Any, fx.Node] = {u.args[1]: u for u in node.users if op_name(u) == "getitem"}
    lse = of_flex(results)
    if isinstance(lse, str):
        return refuse("logsumexp-used", lse, node)
    found = pairs(node, q, k, v, gqa=True, module=module)
    if found is None:
        reason = "the batch dimensions of query, key and value do not broadcast"
        return refuse("sdpa-shapes", reason, node)
    buffers = [list(x) if isinstance(x, (list, tuple)) else [] for x in node.args[7:9]]
    score: Expr = Read("D0") * float(scale)
    assert isinstance(block_mask, (list, tuple))
    mods: tuple[tuple[Any, list[Expr]], ...] = ((score_mod, [score]), (block_mask[-1], []))
    lifted = [
        _applied(found, mod, first, held)
        for (mod, first), held in zip(mods, [*buffers, [], []], strict=False)
    ]
    if lifted[0] is None or lifted[1] is None:
        name = "score_mod" if lifted[0] is None else "mask_mod"
        reason = f"the {name} of flex_attention does something that is no known expression"
        return refuse("flex-function", reason, node)
    masked = where(lifted[1], lifted[0], -math.inf)
    value = ValueProduct(results[0], v, found.value_dims, found.out_dims, found.features)  # type: ignore[arg-type]
    place = (node, found.axes, found.lifter, found.dims, found.keys)
    sums = None if lse is None else (lse, found.dims[:-1])
    return Anchor(*place, masked, value=value, lse=sums)


def _applied(found: Pairs, mod: Any, first: list[Expr], buffers: list[Any]) -> Expr | None:
    """The result of a function of coordinates, as an expression."""
    lifter = found.lifter
    graph = attribute(lifter.module, str(mod.target)) if isinstance(mod, fx.Node) else None
    places = [coordinate(d, found.axes) for d in found.dims]
    if not isinstance(graph, fx.GraphModule) or any(p is None for p in places):
        return None
    values: list[Any] = [*first, *places, *buffers]
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(inputs) != len(values):
        return None
    lifter.bound.update(zip(inputs, values, strict=True))
    lifter.places.update((p, d) for p, d in zip(places, found.dims, strict=True) if p is not None)
    (result,) = next(n for n in reversed(graph.graph.nodes) if n.op == "output").args
    if isinstance(result, (list, tuple)):
        (result,) = result
    return lifter.lift(result, ()) if isinstance(result, fx.Node) else None
