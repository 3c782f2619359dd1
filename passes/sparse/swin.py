"""Window attention in the manner of Swin: a partition of the grid, shifted in every other layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import TRUE, Expr, eq
from attn_rewrite.passes.sparse.laid_out import Grid, LaidOut, per_axis, same_count
from attn_rewrite.passes.transform import Option

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Swin(LaidOut):
    """Keep the keys of the query's own window; windows start ``shift`` positions early.

    Shifted windows are cut at the border (parts that a cyclic shift would bring together do not see
    each other).
    """

    name: ClassVar[str] = "swin"
    source: ClassVar[str] = "Liu et al. 2021 (Swin Transformer, 2103.14030), section 3.2"

    window: Annotated[int | tuple[int, ...], Option("positions of a window, per axis", minimum=1)]
    shift: Annotated[int | tuple[int, ...], Option("positions of the shift", minimum=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = self.axes() or 1
        pairs = zip(per_axis(self.window, axes), per_axis(self.shift, axes), strict=True)
        if any(not 0 <= shift < max(window, 1) or window < 1 for window, shift in pairs):
            raise ValueError("swin: a shift is at least 0 and less than its window")

    def axes(self) -> int | None:
        """As many as the lists have entries; a single number means every axis."""
        return same_count("swin", window=self.window, shift=self.shift)

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """Same window on every axis."""
        mask: Expr = TRUE
        count = len(grid.q)
        sizes = zip(per_axis(self.window, count), per_axis(self.shift, count), strict=True)
        for q, kv, (window, shift) in zip(grid.q, grid.kv, sizes, strict=True):
            kept = eq((q + shift) // window, (kv + shift) // window)
            mask = kept if mask == TRUE else mask & kept
        return mask
