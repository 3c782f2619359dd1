"""Which nodes share memory, and which write to it: read from operator schemas.

Schemas say which operand a result is, or may be, a view of (``Tensor(a)``) and which operands are
written to (``Tensor(a!)``), for operators of other namespaces too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from attn_rewrite.graph import TRANSPARENT, op_name

# May return its operand, which neither its schema nor a tag says.
_UNSAID = frozenset({"type_as"})


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands that an operator writes to; none where it changes nothing that is read."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return ()
    if op_name(node) in TRANSPARENT:  # requires_grad_, detach_: no element changes
        return ()
    return tuple(
        operand
        for value, argument in _operands(node, target)
        if argument.alias_info is not None and argument.alias_info.is_write
        for operand in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(operand, fx.Node)
    )


def viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory the node's value is, or may be; None where it is its own."""
    target = node.target
    if target is operator.getitem:
        parts = node.args[0]
        return parts if isinstance(parts, fx.Node) and viewed(parts) is not None else None
    if not isinstance(target, torch._ops.OpOverload):
        return None
    operands = list(_operands(node, target))
    if torch.Tag.maybe_aliasing_or_mutating in target.tags or op_name(node) in _UNSAID:
        return next((v for v, _ in operands if isinstance(v, fx.Node)), None)
    if all(r.alias_info is None for r in target._schema.returns):
        return None
    shared = (v for v, argument in operands if argument.alias_info is not None)
    return next((v for v in shared if isinstance(v, fx.Node)), None)


def views_to_memory(node: fx.Node) -> list[fx.Node]:
    """``node``, what it is a view of, and so on, up to what made the memory."""
    chain = [node]
    while (source := viewed(chain[-1])) is not None:
        chain.append(source)
    return chain


def sharing(node: fx.Node) -> list[fx.Node]:
    """Every node that has, or may have, memory in common with ``node``."""
    root = views_to_memory(node)[-1]
    roots = [root]
    if root.op == "get_attr":  # one buffer, read by several nodes
        roots = list(root.graph.find_nodes(op="get_attr", target=root.target))
    found = dict.fromkeys(roots)
    stack = roots
    while stack:
        here = stack.pop()
        new = [u for u in here.users if u not in found and viewed(u) is here]
        found.update(dict.fromkeys(new))
        stack.extend(new)
    return list(found)


def is_overwritten(node: fx.Node) -> bool:
    """True if anything in the graph, before or after it, writes to the memory of ``node``."""
    members = set(sharing(node))
    return any(o in members for m in members for user in m.users for o in written(user))


def is_dead_write(node: fx.Node) -> bool:
    """True for a write to memory that the graph made and reads no more."""
    operands = written(node)
    if not operands or node.users:
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # what is drawn next hangs on it
        return False
    return all(
        views_to_memory(o)[-1].op == "call_function"
        and not any(node < user for member in sharing(o) for user in member.users)
        for o in operands
    )


def _operands(node: fx.Node, target: torch._ops.OpOverload) -> Iterator[tuple[Any, Any]]:
    """(value, schema argument) of the operands that are given."""
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            yield node.args[i], argument
        elif argument.name in node.kwargs:
            yield node.kwargs[argument.name], argument
