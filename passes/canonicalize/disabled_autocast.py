"""A region with autocast turned off, where it is off anyway: its operators, without the region.

GPT-2's ``reorder_and_upcast_attn`` computes the scores in such a region and their softmax outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, is_call, live_users
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.transform import Exactness


@dataclass(frozen=True)
class DisabledAutocast(Canonicalization):
    """Inline a region with one result; in the outermost graph alone, around which nothing is on."""

    name: ClassVar[str] = "disabled-autocast"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({"getitem"})
    outermost: ClassVar[bool] = True

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite the result of a region of operators; regions inside of it stay."""
        region: Any = node.args[0]
        if not is_call(region, "wrap_with_autocast") or live_users(region) != [node]:
            return None
        _, _, enabled, _, called, *operands = region.args
        module = getattr(node.graph.owning_module, str(getattr(called, "target", "")), None)
        if enabled is not False or not isinstance(module, fx.GraphModule) or region.kwargs:
            return None
        inner = list(module.graph.nodes)
        inputs = [n for n in inner if n.op == "placeholder"]
        if len(inputs) != len(operands) or any(n.op == "get_attr" for n in inner):
            return None
        values: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
        for here in inner:
            if here.op == "call_function":
                args, kwargs = fx.node.map_arg((here.args, here.kwargs), values.__getitem__)
                assert callable(here.target)
                values[here] = build.call(here.target, *args, **kwargs)
        (results,) = next(n for n in inner if n.op == "output").args
        index = node.args[1]
        if not isinstance(results, (list, tuple)) or not isinstance(index, int):
            return None
        return values.get(results[index])
