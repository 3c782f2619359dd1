"""The region a site covers: from its output back to its operands, on the dataflow graph."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch import fx


def region(output: fx.Node, operands: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes between ``operands`` (exclusive) and ``output`` (inclusive), in graph order."""
    stop = set(operands)
    flow = nx.DiGraph()
    flow.add_node(output)
    queue = [output]
    while queue:
        node = queue.pop()
        for source in node.all_input_nodes:
            if source in stop or source.op != "call_function":
                continue
            if source not in flow:
                queue.append(source)
            flow.add_edge(source, node)
    # A node that does not lie behind an operand (a mask made from shapes) is not the site's own.
    behind = {n for n in flow if any(a in stop or a in flow for a in n.all_input_nodes)}
    return tuple(sorted(behind)) if len(behind) < 512 else (output,)  # nodes compare by place
