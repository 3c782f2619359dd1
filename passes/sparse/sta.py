"""Sliding tile attention: neighborhoods of whole tiles of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import TRUE, Const, Expr
from attn_rewrite.passes.sparse.laid_out import Grid, LaidOut, same_count
from attn_rewrite.passes.sparse.neighborhood import Span
from attn_rewrite.passes.transform import Option
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.site import Site


@dataclass(frozen=True)
class Sta(LaidOut):
    """Keep a window of whole tiles around the query's tile, shifted inward at the borders.

    ``window`` and ``tile`` are in tokens per axis; windows are multiples of tiles and tiles divide
    the grid, so that in tile order every block is empty or full.
    """

    name: ClassVar[str] = "sta"
    source: ClassVar[str] = "Zhang et al. 2025 (Sliding Tile Attention, 2502.04507), section 3"

    window: Annotated[tuple[int, ...], Option("tokens each query sees, per axis")]
    tile: Annotated[tuple[int, ...], Option("tokens of a tile, per axis")] = (6, 8, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.axes()
        if not self.tile or min(*self.tile, *self.window, 1) < 1:
            raise ValueError("sta: windows and tiles are at least 1")
        if any(w % t for w, t in zip(self.window, self.tile, strict=True)):
            raise ValueError(
                f"sta: window {list(self.window)} is no multiple of tile {list(self.tile)}"
            )

    def axes(self) -> int | None:
        """As many as the tile has."""
        return same_count("sta", window=self.window, tile=self.tile)

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """Neighborhoods over the tile coordinates."""
        mask: Expr = TRUE
        entries = zip(grid.sizes(), self.tile, self.window, strict=True)
        for axis, (extent, tile, window) in enumerate(entries):
            if extent is None or extent % tile:
                return self.misfit(site, f"axis {axis}: tile {tile} does not divide {extent}")
            span, tiles = Span(window // tile), extent // tile
            if problem := span.problem(tiles):
                return self.misfit(site, f"axis {axis}, in tiles: {problem}")
            kept = span.keeps(grid.q[axis] // tile, grid.kv[axis] // tile, Const(tiles))
            mask = kept if mask == TRUE else mask & kept
        return mask
