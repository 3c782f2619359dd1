"""``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))`` -> ``softmax(x)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, shape_of, through
from attn_rewrite.passes.canonicalize.base import Canonicalization


@dataclass(frozen=True)
class LogSoftmax(Canonicalization):
    """The exponential of a log-softmax, in either spelling."""

    name: ClassVar[str] = "log-softmax"
    targets: ClassVar[frozenset[str]] = frozenset({"exp", "exp_"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the normaliser is taken over one kept axis."""
        inner: Any = node.args[0]
        if is_call(inner, "log_softmax", "_log_softmax"):
            named = arguments(inner)
            args = (named["self"], named["dim"])
            return build.call(aten.softmax.int, *args)  # type: ignore[no-any-return]
        axis = _normalised_axis(inner)
        if axis is None:
            return None
        return build.call(aten.softmax.int, inner.args[0], axis)  # type: ignore[no-any-return]


def _normalised_axis(inner: Any) -> int | None:
    """The axis of ``x - logsumexp(x, axis)``, kept with length 1; None if it is something else."""
    if not is_call(inner, "sub", "sub_") or arguments(inner).get("alpha", 1) != 1:
        return None
    source, norm = inner.args[:2]
    opened = norm.args[1] if is_call(norm, "unsqueeze") else None
    norm = norm.args[0] if opened is not None else norm
    if not is_call(norm, "logsumexp") or through(norm.args[0], "to") is not through(source, "to"):
        return None
    named = arguments(norm)
    dims = named["dim"] if isinstance(named["dim"], (list, tuple)) else [named["dim"]]
    rank = len(shape_of(source))
    if len(dims) != 1:
        return None
    axis = int(dims[0]) % rank
    kept = named["keepdim"] or (opened is not None and int(opened) % rank == axis)
    return axis if kept else None
