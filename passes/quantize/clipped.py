"""clipped_softmax: probabilities that reach exact zero, so that heads can do nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import TRUE, Const, Expr, Extent, call, where
from attn_rewrite.cascade.staged import PV, A, StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.transform import Option, outside

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class ClippedSoftmax(Quantisation):
    """clip((zeta - gamma) * softmax + gamma, 0, 1): exact zeros without huge scores.

    A change of the model that wants fine-tuning; afterwards its activations have fewer outliers and
    quantise better.  gamma is given, or -alpha over the number of keys.  Rows no longer sum to one,
    so it takes two passes and no smoothing of V.  Differentiable.
    """

    name: ClassVar[str] = "clipped_softmax"
    decodes: ClassVar[bool] = True
    maps_only: ClassVar[bool] = True
    source: ClassVar[str] = "Bondarenko et al. 2023 (Quantizable Transformers), section 4.1"

    alpha: Annotated[float, Option("gamma = -alpha / number of keys", minimum=0)] = 4.0
    gamma: Annotated[float | None, Option("lower end of the stretch", maximum=0)] = None
    zeta: Annotated[float, Option("upper end of the stretch", minimum=1)] = 1.0

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """Stretch and clip the normalised probabilities."""
        if staged.probability is not None:
            reason = f"{self.name}: these probabilities are mapped already; name one map a Site"
            return self.refuse(site, "quantise-mapped", reason)
        gamma: Expr = (
            call("div", -self.alpha, Extent("kv")) if self.gamma is None else Const(self.gamma)
        )
        clipped: Expr = call("clip", (Const(self.zeta) - gamma) * A + gamma, 0.0, 1.0)
        others = TRUE if heads is None else outside(heads)
        if heads is not None:
            clipped = where(others, A, clipped)
        return replace(staged, probability=clipped, output=PV)
