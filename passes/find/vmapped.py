"""`torch.vmap` in a captured graph: which batch levels a value varies with.

A predicate mapped over positions is captured with its scalars: ``_add_batch_dim(x, dim, level)``
takes a dimension away, ``_remove_batch_dim(y, level, size, dim)`` puts one in.  Between the two the
value of a node has no dimension for the level, so such a node cannot be read as a tensor from
outside.
"""

from __future__ import annotations

from torch import fx

from attn_rewrite.graph import op_name

ENTER, LEAVE = "_add_batch_dim", "_remove_batch_dim"
# A mapped predicate is small; what is larger is taken to vary with every level.
_NODES = 256


def varies(node: fx.Node) -> bool:
    """True if ``node`` is computed inside a mapped function from what it is mapped over."""
    seen, queue = {node}, [node]
    while queue:
        here = queue.pop()
        if op_name(here) == ENTER or len(seen) > _NODES:
            return True
        if op_name(here) == LEAVE and here is not node:
            continue
        new = [a for a in here.all_input_nodes if a not in seen]
        seen.update(new)
        queue.extend(new)
    return False


def mapped(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose values have no dimension for some level: no operator runs on them outside."""
    levels: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        own = frozenset().union(*(levels.get(a, frozenset()) for a in node.all_input_nodes))
        if op_name(node) == ENTER:
            own |= {node.args[2]}
        elif op_name(node) == LEAVE:
            own -= {node.args[1]}
        if own:
            levels[node] = own
    return frozenset(levels)
