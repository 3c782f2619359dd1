"""Soft-capped scores: large ones are bent towards a limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import Call, Expr, call, walk
from attn_rewrite.passes.transform import Option, ScoreEdit

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Softcap(ScoreEdit):
    """Replace the scaled product x of query and key by ``cap * tanh(x / cap)``.

    Biases and masks that are added to it, or chosen in its place, stay as they are.
    """

    name: ClassVar[str] = "softcap"
    source: ClassVar[str] = "Gemma Team 2024 (Gemma 2, 2408.00118), section 2"

    cap: Annotated[float, Option("limit of the size of a scaled product", minimum=1e-3)]

    def score(self, s: Expr, site: Site) -> Expr | Refusal:
        """The score with its product capped."""
        return self._capped(s)

    def _capped(self, s: Expr) -> Expr:
        if isinstance(s, Call) and s.op in ("add", "sub", "where"):
            return replace(s, args=tuple(self._capped(a) if QK in walk(a) else a for a in s.args))
        return self.cap * call("tanh", s / self.cap)
