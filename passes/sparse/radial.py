"""Radial attention: bands between frames that get thinner with the distance in time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.expr import FALSE, KV, Const, Expr, call, eq, where
from attn_rewrite.passes.sparse.laid_out import Grid, LaidOut, within
from attn_rewrite.passes.transform import Option, position
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.site import Site

BLOCK = 128


@dataclass(frozen=True)
class Radial(LaidOut):
    """Keep pairs of frames in bands whose width halves when the distance in time doubles.

    ``rule`` is the mask of the paper (tokens), or one of the two that were released (blocks of 128,
    counted from the first token of the grid): ``released`` sees neighbouring frames whole,
    ``released-2025-06`` half of them.  ``gamma`` scales the widths of the released rules; ``sink``
    keeps the first frame for every query.  Text is dense.
    """

    name: ClassVar[str] = "radial"
    source: ClassVar[str] = "Li et al. 2025 (Radial Attention, 2506.19852), section 4"
    framed: ClassVar[bool] = True

    rule: Annotated[
        Literal["paper", "released", "released-2025-06"], Option("which of the published masks")
    ] = "released"
    gamma: Annotated[float, Option("scale of the widths (released rules)", minimum=0)] = 1.0
    sink: Annotated[bool, Option("every query sees the first frame")] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.gamma):
            raise ValueError(f"radial: gamma is {self.gamma}, expected a number")
        if self.rule == "paper" and self.gamma != 1:
            raise ValueError('radial: gamma belongs to the released rules; leave it out of "paper"')

    def between(self, grid: Grid, site: Site) -> Expr | Refusal:
        """The bands over frames and the tokens of a frame."""
        frames, tokens = grid.sizes()[0], grid.sizes()[-1]
        if frames is None or tokens is None or len(grid.q) < 2:
            return self.misfit(site, "a text has no frames")
        if self.rule == "paper":
            mask = _paper(grid, frames, tokens)
            return mask | eq(grid.kv[0], 0) if self.sink else mask
        if tokens % BLOCK == 0:
            return self._aligned(grid, frames, tokens)
        if tokens >= BLOCK:
            return self._blocks(grid, site, frames, tokens)
        return self.misfit(site, f"frames of {tokens} tokens are smaller than a block of 128")

    def width(self, band: int, tokens: int) -> int | None:
        """Half-width in tokens where ``2**band`` is the distance in frames, rounded down.

        Band -1 is the frame itself; None is the whole frame.
        """
        if band < 1:
            return tokens // 2 if band == 0 and self.rule == "released-2025-06" else None
        reach = self.gamma * (1 << tokens.bit_length()) / (1 << (band + 1))
        return int(max(BLOCK, reach))

    def _aligned(self, grid: Grid, frames: int, tokens: int) -> Expr:
        """Frames are whole blocks: a band of blocks for each distance."""
        (i, k), (j, m) = grid.q, grid.kv
        blocks = tokens // BLOCK
        mask: Expr = FALSE
        for band, apart in _bands(i - j, frames):
            width = self.width(band, tokens)
            kept = apart & self._decimated(call("abs", i - j), band, tokens)
            if width is not None:
                reach = max(d for d in range(blocks) if _touches(d * BLOCK, width))
                kept = kept & within(k // BLOCK - m // BLOCK, reach)
            mask = _or(mask, kept)
        return _or(mask, eq(j, 0)) if self.sink else mask

    def _decimated(self, apart: Expr, band: int, tokens: int) -> Expr:
        """Far frames are kept at every ``every``-th distance only."""
        every = _every(band, tokens)
        return eq(apart % every, 0) if every > 1 else Const(True)

    def _blocks(self, grid: Grid, site: Site, frames: int, tokens: int) -> Expr:
        """Blocks straddle frames: a block is kept if one of the frame pairs it touches keeps it."""
        assert grid.layout is not None
        text = grid.layout.text
        rows, columns = ((p - text if text else p) // BLOCK * BLOCK for p in (position(site), KV))
        ends = frames * tokens
        mask: Expr = FALSE
        for row_frame, row in _frames(rows, tokens, ends):
            for column_frame, column in _frames(columns, tokens, ends):
                mask = _or(mask, self._pair(row_frame, column_frame, row, column, frames, tokens))
        last = ends // BLOCK * BLOCK  # what follows the last whole block is dense, like text
        if last < ends:
            mask = mask | (rows >= last) | (columns >= last)
        return mask

    def _pair(
        self,
        i: Expr,
        j: Expr,
        row: tuple[Expr, Expr],
        column: tuple[Expr, Expr],
        frames: int,
        tokens: int,
    ) -> Expr:
        """Whether the part of a block that lies in frames (i, j) is enough to keep it."""
        apart = call("abs", i - j)
        bands = [band for band, _ in _bands(i - j, frames)]
        width: Expr = Const(self.width(bands[-1], tokens) or tokens)
        kept = self._decimated(apart, bands[-1], tokens)
        for band in reversed(bands[:-1]):
            near = apart < (1 << (band + 1) if band >= 0 else 1)
            width = where(near, self.width(band, tokens) or tokens, width)
            kept = where(near, self._decimated(apart, band, tokens), kept)
        if self.sink:
            width, kept = where(eq(j, 0), tokens, width), eq(j, 0) | kept
        exists = (row[1] > row[0]) & (column[1] > column[0])
        return exists & kept & _enough(row, column, width)


def _or(left: Expr, right: Expr) -> Expr:
    return right if left == FALSE else left | right


def _paper(grid: Grid, frames: int, tokens: int) -> Expr:
    """The paper's mask: bands inside frames first, then diagonals of fewer and fewer frames."""
    (i, k), (j, m) = grid.q, grid.kv
    mask: Expr = FALSE
    for band, apart in _bands(i - j, frames):
        scale = 1 << max(band, 0)
        if scale <= tokens:
            kept = apart & within(k - m, tokens // scale - 1)
        else:
            kept = apart & eq(call("abs", i - j) % -(-scale // tokens), 0) & eq(k, m)
        mask = _or(mask, kept)
    return mask


def _bands(difference: Expr, frames: int) -> list[tuple[int, Expr]]:
    """(band, its pairs of frames): -1 the frame itself, b the distances 2**b to 2**(b + 1) - 1."""
    apart = call("abs", difference)
    result = [(-1, eq(apart, 0))]
    band = 0
    while (1 << band) < frames:
        result.append((band, (apart >= 1 << band) & (apart < 1 << (band + 1))))
        band += 1
    return result


def _every(band: int, tokens: int) -> int:
    """Of the distances of a band, every how many-th is kept."""
    if band < 0:
        return 1
    length = (1 << tokens.bit_length()) / (1 << (band + 1))
    return int(128 / length) if length < 128 else 1


def _frames(start: Expr, tokens: int, end: int) -> list[tuple[Expr, tuple[Expr, Expr]]]:
    """The frames a block from ``start`` touches (two at most), and the block's part of each,
    counted from the frame's first token; empty where the block does not reach."""
    result = []
    for extra in (0, 1):
        frame = start // tokens + extra
        first = frame * tokens
        stop = call("min", call("min", start + BLOCK, first + tokens), end)
        result.append((frame, (call("max", start, first) - first, stop - first)))
    return result


def _enough(row: tuple[Expr, Expr], column: tuple[Expr, Expr], width: Expr) -> Expr:
    """More than 60 % of the columns that ``|k - l| <= width`` touches have more than a third of the
    block's 128 rows."""
    third = BLOCK // 3 + 1
    touched = call("min", column[1], row[1] + width) - call("max", column[0], row[0] - width)
    covered = call("min", column[1], row[1] + width - (third - 1)) - call(
        "max", column[0], row[0] + (third - 1) - width
    )
    tall = row[1] - row[0] >= third
    return (touched > 0) & tall & (covered * 5 > touched * 3)


def _touches(distance: int, width: int) -> bool:
    """`_enough` of whole blocks ``distance`` tokens apart."""
    row, column = (0, BLOCK), (distance, distance + BLOCK)
    third = BLOCK // 3 + 1
    touched = min(column[1], row[1] + width) - max(column[0], row[0] - width)
    covered = min(column[1], row[1] + width - third + 1) - max(
        column[0], row[0] + third - 1 - width
    )
    return touched > 0 and covered * 5 > touched * 3
