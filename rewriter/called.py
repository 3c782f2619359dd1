"""Graphs that a graph calls: regions without gradients, under autocast, recomputed ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from torch import fx

from attn_rewrite.graph import PARAMETER, is_parameter


def called_by(node: fx.Node) -> Iterator[tuple[fx.GraphModule, Sequence[Any]]]:
    """The graphs among the arguments of a higher-order operator, each with the arguments behind
    it."""
    for place, arg in enumerate(node.args if node.op == "call_function" else ()):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            called = attrgetter(str(arg.target))(node.graph.owning_module)
            if isinstance(called, fx.GraphModule):
                yield called, node.args[place + 1 :]


def mark_parameters(module: fx.GraphModule) -> None:
    """Note on inputs of regions, at any depth, whether they are given parameters.

    A region is the one graph of its call, and its inputs stand behind it.  Branches are two graphs
    and are given theirs in another way: they are left as they are.
    """
    for node in module.graph.nodes:
        calls = list(called_by(node))
        if len(calls) == 1:
            ((called, given),) = calls
            inputs = called.graph.find_nodes(op="placeholder")
            for value, own in zip(given, inputs, strict=False):
                if isinstance(value, fx.Node):
                    own.meta.setdefault(PARAMETER, is_parameter(value))
        for called, _ in calls:
            mark_parameters(called)
