"""paro: an order of the tokens for each head and a static list of blocks, both by calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.block_choice import Target
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.sparse.blocks import Semantics
from attn_rewrite.passes.sparse.laid_out import LaidOut
from attn_rewrite.passes.transform import Option
from attn_rewrite.site import Refusal
from attn_rewrite.token_layout import TokenLayout
from attn_rewrite.token_order import TokenOrder, axis_order, axis_orders

if TYPE_CHECKING:
    from attn_rewrite.site import Site

CODE = "paro-uncalibrated"


@dataclass(frozen=True)
class Paro(LaidOut):
    """Reorder the tokens of each head so that its map is made of blocks, and keep the heaviest.

    For each key head the order of the grid's axes that serves the target best is chosen on
    calibration inputs, and for each head the blocks that hold the most attention, or as many as
    hold ``recall`` of it.  Text is dense, and so is every block that touches it; ``density`` is
    that of the other blocks.  What is chosen is written down as ``reorder(...) | blocks(...)``.
    """

    name: ClassVar[str] = "paro"
    source: ClassVar[str] = "Zhao et al. 2025 (PAROAttention, 2506.16054), section 3"

    density: Annotated[float | None, Option("share of the blocks to keep", 0, 1)] = None
    recall: Annotated[float | None, Option("share of the attention to keep", 0, 1)] = None
    block: Annotated[int, Option("positions of a block", minimum=1)] = 64
    metric: Annotated[
        Literal["recall", "blocks", "literal"],
        Option("chooses orders: attention kept; the paper's with its sign put right; as printed"),
    ] = "recall"
    semantics: Annotated[Semantics, Option("what dropped pairs do to the rest of a row")] = (
        "renormalised"
    )
    alpha: Annotated[float, Option("weight of sparsity against incoherence", 0, 1)] = 0.5
    epsilon: Annotated[float, Option("probabilities below it are small", 0, 1)] = 1e-3
    sigma: Annotated[float, Option("share of small ones in a block to skip", 0, 1)] = 0.9
    orders: Annotated[tuple[str, ...] | None, Option("orders to choose from; none: all")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.density is None) == (self.recall is None):
            raise ValueError("paro: give density or recall, one of them")
        if self.orders == ():
            raise ValueError("paro: orders is empty; leave it out for all")

    @property
    def target(self) -> Target:
        """How much to keep."""
        return Target(self.density, self.recall)

    def candidates(self, layout: TokenLayout) -> dict[str, TokenOrder]:
        """The orders to choose from, by name (`PolicyError` for one the grid does not have)."""
        return {n: axis_order(layout, n) for n in self.orders or axis_orders(layout)}

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Calibration puts other transforms in the place of this one."""
        reason = "paro chooses by measuring; give calibration inputs"
        return self.refuse(site, CODE, reason)

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """As `apply`."""
        return self.apply(cascade, site)

    def grid(self, site: Site) -> TokenLayout | Refusal:
        """The layout given or found; a Refusal where there is no grid or a length is dynamic."""
        if not isinstance(site.q_len, int) or not isinstance(site.kv_len, int):
            reason = (
                f"paro makes lists of blocks for one length, but this one is {site.q_len} by "
                f"{site.kv_len}; capture with a fixed length"
            )
            return self.refuse(site, "paro-dynamic", reason)
        layout = self.token_layout(site)
        if isinstance(layout, Refusal):
            return layout
        if layout is None:
            reason = (
                "paro wants a grid, but no grid was found in the graph; say what the "
                f'{site.q_len} positions mean with layout="grid=FxHxW,text=N"'
            )
            return self.refuse(site, "layout-unknown", reason)
        try:
            self.candidates(layout)
        except PolicyError as error:
            return self.refuse(site, "paro-misfit", f"paro: {error}")
        return layout
