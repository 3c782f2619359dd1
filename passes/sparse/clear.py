"""CLEAR: image tokens see a disc around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import Expr
from attn_rewrite.passes.sparse.laid_out import Grid, LaidOut
from attn_rewrite.passes.transform import Option

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Clear(LaidOut):
    """Keep keys nearer than ``radius`` tokens (strictly, Euclidean) on a grid of two axes.

    Text is dense.  Pooled keys after the image (``extra`` of the layout) are seen by the image and
    not by the text.
    """

    name: ClassVar[str] = "clear"
    source: ClassVar[str] = "Liu et al. 2024 (CLEAR, 2412.16112), section 3.2"

    radius: Annotated[int, Option("distance in tokens that is just not seen", minimum=1)]

    def axes(self) -> int | None:
        """Rows and columns."""
        return 2

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """``dy * dy + dx * dx < radius * radius``."""
        dy, dx = (q - kv for q, kv in zip(grid.q, grid.kv, strict=True))
        return dy * dy + dx * dx < self.radius * self.radius
