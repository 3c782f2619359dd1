"""`torch.vmap` in a captured graph: which batch levels a value varies with.

A predicate mapped over positions is captured with its scalars: ``_add_batch_dim(x, dim, level)``
takes a dimension away, ``_remove_batch_dim(y, level, size, dim)`` puts one in.  Between the two the
value of a node has no dimension for the level, so such a node cannot be read as a tensor from
outside.
"""

from __future__ import annotations

from torch import fx

from attn_rewrite.graph import LEVEL_CLOSES, LEVEL_OPENS, LEVEL_PRELUDE, op_name

ENTER, LEAVE = "_add_batch_dim", "_remove_batch_dim"


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


def drop_empty_levels(graph: fx.Graph) -> None:
    """Erase the levels that no value enters or leaves any more.

    They have no effect, and a saved program may call operators on tensors only.  Levels inside a
    level that stays keep their numbers: an empty one has no other inside.
    """
    opened: list[tuple[fx.Node, bool]] = []
    for node in list(graph.nodes):
        name = op_name(node)
        if name == LEVEL_OPENS:
            opened.append((node, False))
        if name in (ENTER, LEAVE) or (name == LEVEL_OPENS and node.users):
            opened = [(level, True) for level, _ in opened]
        elif name == LEVEL_CLOSES and opened:
            level, used = opened.pop()
            if not used and not node.users:
                graph.erase_node(node)
                graph.erase_node(level)
    if any(op_name(n) == LEVEL_OPENS for n in graph.nodes):
        return
    for node in [n for n in graph.nodes if op_name(n) == LEVEL_PRELUDE and not n.users]:
        graph.erase_node(node)
