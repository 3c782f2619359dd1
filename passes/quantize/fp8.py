"""fp8: products of 8-bit floats, probabilities included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.staged import StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.quantisers import Float8, Granularity
from attn_rewrite.passes.quantize.scheme import Coding, Scheme
from attn_rewrite.passes.transform import Option

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site

Grain = Literal["tensor", "head", "block", "warp", "thread", "token", "channel"]


@dataclass(frozen=True)
class Fp8(Quantisation):
    """Multiply 8-bit floats: Q and K with a scale per head, V per head, P below its row maximum.

    ``p_range`` is what the row maximum becomes: 256 scales by a power of two, so that it cancels to
    the last bit; 448 fills the format.  Their accuracy is the same on ordinary rows.
    """

    name: ClassVar[str] = "fp8"
    source: ClassVar[str] = (
        "Shah et al. 2024 (FlashAttention-3), section 3.3; Micikevicius et al. 2022 (formats)"
    )

    kind: Annotated[Literal["e4m3", "e5m2"], Option("format of Q, K and V")] = "e4m3"
    pv: Annotated[bool, Option("also the product with V")] = True
    granularity: Annotated[Grain, Option("elements of Q and K with one scale")] = "head"
    q_block: Annotated[int, Option("queries in a block", minimum=1)] = 128
    k_block: Annotated[int, Option("keys in a block", minimum=1)] = 64
    v_granularity: Annotated[
        Literal["tensor", "head", "channel", "token"], Option("elements of V with one scale")
    ] = "head"
    p_range: Annotated[
        float, Option("what the row maximum of P is scaled to", minimum=1, maximum=448)
    ] = 256.0
    smooth_k: Annotated[bool, Option("take the mean over the keys off K")] = False
    smooth_v: Annotated[bool, Option("take the mean over the keys off V")] = False
    rotate: Annotated[bool, Option("multiply Q and K by a Hadamard matrix first")] = False

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """8-bit floats as the options say."""
        code = Float8(self.kind)
        blocked = self.granularity == "block"
        values = Coding(code, Granularity(self.v_granularity)) if self.pv else None
        scheme = Scheme(
            q=Coding(code, Granularity(self.granularity, self.q_block if blocked else 0)),
            k=Coding(code, Granularity(self.granularity, self.k_block if blocked else 0)),
            v=values,
            p=Float8("e4m3", self.p_range) if self.pv else None,
            smooth_k=self.smooth_k,
            smooth_v=self.smooth_v and self.pv,
            rotate=self.rotate,
        )
        return self.schemed(staged, site, heads, scheme)
