"""The original computation of a Site repeated in float64: what raising is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from attn_rewrite.graph import op_name
from attn_rewrite.memory import written
from attn_rewrite.passes.find.vmapped import LEAVE, mapped
from attn_rewrite.site import Site

_DROPOUT = ("dropout", "dropout_", "native_dropout", "feature_dropout", "alpha_dropout")


def between(site: Site) -> tuple[fx.Node, ...]:
    """The Site's nodes that lead from its operands to its results, in graph order.

    What leaves `torch.vmap` for good is not followed: inside, no operator runs by itself.
    """
    own = {*site.nodes, *site.results}
    stop = {o.node for o in site.inputs.values()}
    left = {n for n in own if op_name(n) == LEAVE}
    if left:
        stop |= left - mapped(site.output.node.graph)
    found: set[fx.Node] = set()
    queue = list(site.results)
    while queue:
        node = queue.pop()
        if node in found or node in stop or node not in own:
            continue
        found.add(node)
        queue += node.all_input_nodes
    return tuple(n for n in site.output.node.graph.nodes if n in found)


def boundary(site: Site) -> tuple[fx.Node, ...]:
    """The nodes whose values `in_float64` needs: operands, and masks made elsewhere."""
    inside = between(site)
    own = set(inside)
    outer = [a for n in inside for a in n.all_input_nodes if a not in own]
    return tuple(dict.fromkeys((*outer, *(o.node for o in site.inputs.values()))))


def in_float64(site: Site, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    """The Site's results if its nodes had computed in float64, without dropout.

    ``values`` are those of `boundary`, as they were in the model's own dtype.
    """
    held = {node: map_aggregate(value, _double) for node, value in values.items()}
    for node in between(site):
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: held[n])
        held[node] = map_aggregate(_run(node, args, kwargs), _double)
    return {node: held[node] for node in site.results}


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value


def _run(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if op_name(node) in _DROPOUT:
        return args[0]
    target: Any = node.target
    args, kwargs = map_aggregate((args, kwargs), _wide)
    if op_name(node) == "scaled_dot_product_attention":
        args = tuple(0.0 if i == 4 else a for i, a in enumerate(args))
        kwargs = {k: 0.0 if k == "dropout_p" else v for k, v in kwargs.items()}
    # A kernel that writes in place must not touch the model's own values.
    safe = map_aggregate((args, kwargs), _copied) if written(node) else (args, kwargs)
    return target(*safe[0], **safe[1])


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if narrow else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
