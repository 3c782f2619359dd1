"""Tensors that are made of sizes alone: what they hold is known before anything runs.

A mask may be spelled with sorts, scatters, flips or loops that no rule reads.  Where it is computed
from fixed sizes, its elements are computed here and read as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from attn_rewrite.graph import is_tensor, op_name, origin, shape_of
from attn_rewrite.memory import is_overwritten, written

_MAX_NODES = 400
_MAX_ELEMENTS = 1 << 22


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What ``path`` names below ``module``; None if nothing."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def stored(module: torch.nn.Module | None, node: fx.Node) -> torch.Tensor | None:
    """The buffer that a ``get_attr`` reads, where it stays what it is: no parameter, which training
    changes, and nothing that the graph writes to, which is another at the next call."""
    value = None if module is None else attribute(module, str(node.target))
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return None
    # A write that nothing reads is gone from the normal form; the node it was made of has it still.
    moves = value.device.type == "meta" or is_overwritten(origin(node) or node)
    return None if moves else value


class Constants:
    """Values of nodes that follow from numbers alone; each is computed once."""

    def __init__(self, module: torch.nn.Module | None) -> None:
        """``module`` holds what a ``get_attr`` reads."""
        self._module = module
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
            return stored(self._module, node) is not None
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
            held = stored(self._module, node)
            return None if held is None else held.detach().cpu()
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
