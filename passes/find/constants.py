"""Tensors that are made of sizes alone: what they hold is known before anything runs.

A mask may be spelled with sorts, scatters, flips or loops that no rule reads.  Where it is computed
from fixed sizes, its elements are computed here and read as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from attn_rewrite.graph import is_tensor, op_name, shape_of
from attn_rewrite.memory import written

_MAX_NODES = 400
_MAX_ELEMENTS = 1 << 22


class Constants:
    """Values of nodes that follow from numbers alone; each is computed once."""

    def __init__(self, stored: Callable[[fx.Node], torch.Tensor | None]) -> None:
        """``stored`` gives the tensor that a ``get_attr`` reads, if it may be taken as fixed."""
        self._stored = stored
        self._known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor of ``node``; None if it depends on an input, on chance or on a write."""
        if not is_tensor(node) or not _is_small(node):
            return None
        order = self._order(node)
        for here in order or ():
            if here not in self._known:
                self._known[here] = self._run(here)
        found = self._known.get(node)
        return found if order is not None and isinstance(found, torch.Tensor) else None

    def _order(self, node: fx.Node) -> list[fx.Node] | None:
        """What ``node`` is made of, in the order of the graph; None if that is not fixed."""
        found, queue = {node}, [node]
        while queue:
            here = queue.pop()
            if here in self._known:
                continue
            if len(found) > _MAX_NODES or not self._is_fixed(here):
                return None
            new = [a for a in here.all_input_nodes if a not in found]
            found.update(new)
            queue.extend(new)
        return sorted(found)

    def _is_fixed(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return self._stored(node) is not None
        if node.op != "call_function" or not _is_small(node) or any(map(written, node.users)):
            return False
        target = node.target
        if op_name(node) == "getitem":
            return True
        return (
            isinstance(target, torch._ops.OpOverload)
            and target._schema.name.startswith("aten::")
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
            and not op_name(node).startswith(("empty", "new_empty", "sym_"))
        )

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            stored = self._stored(node)
            return None if stored is None else stored.detach().cpu()
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
        target = node.target
        assert callable(target)
        moved = [torch.device("cpu") if isinstance(a, torch.device) else a for a in args]
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        with torch.no_grad():
            return target(*moved, **kwargs)


def _is_small(node: fx.Node) -> bool:
    """Fixed sizes, and not many elements; lists of tensors and numbers are small."""
    if not is_tensor(node):
        return isinstance(node.meta.get("val"), (list, tuple, int, float))
    shape = shape_of(node)
    if not all(isinstance(s, int) for s in shape):
        return False
    count = 1
    for size in shape:
        count *= size
    return count <= _MAX_ELEMENTS
