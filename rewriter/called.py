"""Graphs that a graph calls: regions without gradients, under autocast, recomputed ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from attn_rewrite.graph import PARAMETER, is_parameter


def calls(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, Sequence[Any]]]:
    """Each graph that ``module`` calls by a higher-order operator, and what it is given."""
    for node in module.graph.nodes:
        for place, arg in enumerate(node.args if node.op == "call_function" else ()):
            if not isinstance(arg, fx.Node) or arg.op != "get_attr":
                continue
            called = getattr(module, str(arg.target), None)
            if isinstance(called, fx.GraphModule):
                yield called, node.args[place + 1 :]
                break


def mark_parameters(module: fx.GraphModule) -> None:
    """Note on inputs of graphs that are called, at any depth, whether they are given parameters."""
    for called, given in calls(module):
        inputs = [n for n in called.graph.nodes if n.op == "placeholder"]
        for value, own in zip(given, inputs, strict=False):
            if isinstance(value, fx.Node):
                own.meta.setdefault(PARAMETER, is_parameter(value))
        mark_parameters(called)
