"""``torch.special.softmax`` -> ``softmax``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from attn_rewrite.graph import GraphBuilder, arguments, aten
from attn_rewrite.passes.canonicalize.base import Canonicalization
from attn_rewrite.passes.transform import Exactness


@dataclass(frozen=True)
class SpecialSoftmax(Canonicalization):
    """The alias in ``torch.special``."""

    name: ClassVar[str] = "special-softmax"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    targets: ClassVar[frozenset[str]] = frozenset({"special_softmax"})

    def rewrite(self, node: fx.Node, build: GraphBuilder) -> fx.Node | None:
        """The same call by its own name."""
        named = arguments(node)
        args = (named["self"], named["dim"], named.get("dtype"))
        return build.call(aten.softmax.int, *args)  # type: ignore[no-any-return]
