"""fp4: queries and keys in 4-bit floats with a scale for every 16 channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.staged import StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.quantisers import Float4, Granularity
from attn_rewrite.passes.quantize.scheme import Coding, Scheme
from attn_rewrite.passes.transform import Option

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site

GROUP = 16  # elements that share a scale


@dataclass(frozen=True)
class Fp4(Quantisation):
    """Attend to queries and keys as NVFP4 holds them (SageAttention3): E2M1 codes, E4M3 scales.

    Microscaling: a tensor core applies one scale to 16 contracted elements, so scales may differ
    along the channels.  Here the codes become numbers again before the product, to measure what the
    format costs; probabilities stay in floating point.
    """

    name: ClassVar[str] = "fp4"
    source: ClassVar[str] = "Zhang et al. 2025c (SageAttention3, 2505.11594), section 3"

    v: Annotated[bool, Option("also V, in groups of 16 tokens of a channel")] = False
    smooth_k: Annotated[bool, Option("take the mean over the keys off K")] = True
    smooth_q: Annotated[bool, Option("take the mean of each block of queries off Q")] = True
    q_block: Annotated[int, Option("queries of a mean", minimum=1)] = 128
    rotate: Annotated[bool, Option("multiply Q and K by a Hadamard matrix first")] = False

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """Numbers of the format, as the options say."""
        along = Coding(Float4(), Granularity("group", GROUP), expanded=True)
        scheme = Scheme(
            q=along,
            k=along,
            v=Coding(Float4(), Granularity("channel", GROUP), expanded=True) if self.v else None,
            smooth_q=self.smooth_q,
            smooth_k=self.smooth_k,
            rotate=self.rotate,
            smooth_block=self.q_block,
        )
        return self.schemed(staged, site, heads, scheme)
