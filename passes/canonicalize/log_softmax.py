"""``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))`` -> ``softmax(x)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten, is_call, shape_of
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.canonicalize.softmax_quotient import through


@dataclass(frozen=True)
class LogSoftmax(Canonicalization):
    """The exponential of a log-softmax, in either spelling."""

    name: ClassVar[str] = "log-softmax"
    targets: ClassVar[frozenset[str]] = frozenset({"exp", "exp_"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """Rewrite where the normaliser is taken over one kept axis."""
        inner = node.args[0]
        if is_call(inner, "log_softmax", "_log_softmax"):
            named = arguments(inner)  # type: ignore[arg-type]
            return build.call(aten.softmax.int, named["self"], named["dim"])  # type: ignore[no-any-return]
        if not is_call(inner, "sub", "sub_"):
            return None
        source, norm = inner.args[0], inner.args[1]  # type: ignore[union-attr]
        norm, opened = (norm.args[0], norm.args[1]) if is_call(norm, "unsqueeze") else (norm, None)  # type: ignore[union-attr]
        if not is_call(norm, "logsumexp") or through(norm.args[0], "to") is not through(
            source, "to"
        ):  # type: ignore[union-attr]
            return None
        named = arguments(norm)  # type: ignore[arg-type]
        dims = named["dim"] if isinstance(named["dim"], (list, tuple)) else [named["dim"]]
        rank = len(shape_of(source))  # type: ignore[arg-type]
        if len(dims) != 1 or not (
            named["keepdim"] or (opened is not None and opened % rank == dims[0] % rank)
        ):  # type: ignore[operator]
            return None
        return build.call(aten.softmax.int, source, dims[0])  # type: ignore[no-any-return]
