"""``x.div_(c)`` -> ``div(x, c)`` where nobody else sees the write.

Exact: the same operator out of place.  Later readers of ``x`` read the result; a view of ``x``, or
``x`` itself being a view, could see the write by another way, and is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attn_rewrite.graph import TRANSPARENT, GraphBuilder, op_name
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.transform import Exactness

_NAMES = (
    "add_ sub_ mul_ div_ masked_fill_ where_ neg_ exp_ tanh_ sigmoid_ relu_ clamp_ softmax_ "
    "dropout_ fill_ triu_ tril_"
)
_VIEWS = frozenset(
    "view reshape transpose permute unsqueeze squeeze expand slice select split chunk unbind t "
    "getitem flatten unflatten detach contiguous to alias narrow diagonal as_strided".split()
)


@dataclass(frozen=True)
class InPlace(Canonicalization):
    """Functionalise an in-place operator on a tensor that has no views."""

    name: ClassVar[str] = "in-place"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset(_NAMES.split())

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the written tensor is made by an operator that returns a new tensor."""
        source = node.args[0]
        target = node.target
        if not isinstance(source, fx.Node) or not isinstance(target, torch._ops.OpOverload):
            return None
        if source.op != "call_function" or op_name(source) in _VIEWS | TRANSPARENT:
            return None
        if any(op_name(u) in _VIEWS | TRANSPARENT for u in source.users):
            return None
        functional = _out_of_place(target)
        if functional is None:
            return None
        new = build.call(functional, *node.args, **node.kwargs)
        for user in list(source.users):
            if user is not new and node < user:
                user.replace_input_with(source, new)
        return new  # type: ignore[no-any-return]


def _out_of_place(target: torch._ops.OpOverload) -> Any:
    packet = getattr(
        torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None
    )
    return getattr(packet, target._overloadname, None)
