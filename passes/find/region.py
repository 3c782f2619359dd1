"""The region a site covers: from its output back to its operands, on the dataflow graph."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch import fx

from attn_rewrite.graph import op_name
from attn_rewrite.passes.find.anchor import FLEX


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a node reads, but for the block lists of ``flex_attention``: they add no meaning."""
    if op_name(node) != FLEX:
        return node.all_input_nodes
    lists = {x for x in node.args[4] if isinstance(x, fx.Node)}  # type: ignore[union-attr]
    return [a for a in node.all_input_nodes if a not in lists]


def region(outputs: Sequence[fx.Node], operands: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes between ``operands`` (exclusive) and ``outputs`` (inclusive), in graph order."""
    stop = set(operands)
    flow = nx.DiGraph()
    flow.add_nodes_from(outputs)
    queue = list(outputs)
    while queue:
        node = queue.pop()
        for source in _sources(node):
            if source in stop or source.op != "call_function":
                continue
            if source not in flow:
                queue.append(source)
            flow.add_edge(source, node)
    # A node that does not lie behind an operand (a mask made from shapes) is not the site's own.
    behind = {n for n in flow if any(a in stop or a in flow for a in n.all_input_nodes)}
    return tuple(sorted(behind)) if len(behind) < 512 else tuple(outputs)  # nodes compare by place
