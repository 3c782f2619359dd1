"""Orders of the tokens of a grid: permutations written as digits of a position.

A grid of F x H x W tokens is flattened row by row.  Another order visits the same tokens along
other axes first, or tile by tile.  Either way a position is a number in mixed radix, and the token
it stands for is the same digits with other weights: an order is a closed form, and so is its
inverse.  Tokens outside the grid (text, extra keys, padding) never move.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_rewrite.cascade.expr import FALSE, Const, Expr, Rank, where
from attn_rewrite.errors import PolicyError
from attn_rewrite.token_layout import TokenLayout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Letters of the axes of grids of one, two and three axes, slowest first.
LETTERS = {1: "w", 2: "hw", 3: "fhw"}


@dataclass(frozen=True)
class TokenOrder:
    """A permutation of the grid tokens of ``layout``.

    ``digits`` are (stride, extent), slowest first: position p of the new order has the digits of p
    in the radix of the extents, and holds the token ``sum(digit * stride)`` of the layout.
    """

    layout: TokenLayout
    digits: tuple[tuple[int, int], ...]

    @property
    def is_identity(self) -> bool:
        """True if nothing moves."""
        return self.digits == ((1, self.layout.tokens),)

    def source(self, position: Expr) -> Expr:
        """The token of the model that stands at ``position`` of the new order."""
        if self.is_identity:
            return position
        text, end = self.layout.text, self.layout.text + self.layout.tokens
        inside = self._mapped(position - text if text else position)
        outside = _either(position < text if text else FALSE, self._behind(position, end))
        moved = inside + text if text else inside
        return moved if outside == FALSE else where(outside, position, moved)

    def place(self, token: Expr) -> Expr:
        """Where a token of the model stands in the new order: the inverse of `source`."""
        return self.inverse().source(token)

    def inverse(self) -> TokenOrder:
        """The order that undoes this one."""
        extents = [n for _, n in self.digits]
        weights = [math.prod(extents[i + 1 :]) for i in range(len(extents))]
        by_token = sorted(zip(self.digits, weights, strict=True), reverse=True)
        return TokenOrder(self.layout, _joined([(w, n) for (_, n), w in by_token]))

    def indices(self, length: int) -> npt.NDArray[np.int64]:
        """`source` of every position of a sequence of ``length``, as int64 [length]."""
        import numpy as np

        from attn_rewrite.cascade.points import values

        at = np.arange(length, dtype=np.int64)
        return np.broadcast_to(values(self.source(Rank("q")), {"q": at}), at.shape).copy()

    def _mapped(self, place: Expr) -> Expr:
        total: Expr | None = None
        for number, (stride, extent) in enumerate(self.digits):
            weight = math.prod(n for _, n in self.digits[number + 1 :])
            digit = place // weight if weight > 1 else place
            digit = digit % extent if number else digit
            term = digit * stride if stride > 1 else digit
            total = term if total is None else total + term
        return Const(0) if total is None else total

    def _behind(self, position: Expr, end: int) -> Expr:
        layout = self.layout
        return position >= end if layout.extra or layout.suffix or layout.padding else FALSE


def axis_order(layout: TokenLayout, name: str) -> TokenOrder:
    """The grid flattened along other axes: ``"hwf"`` visits frames fastest and rows slowest.

    The letters are those of `LETTERS` for the grid's number of axes, in the new order.  Raises
    `PolicyError` for another word.  Source: PAROAttention (2506.16054), its six orders.
    """
    letters = LETTERS[len(layout.grid)]
    if sorted(name.lower()) != sorted(letters):
        known = ", ".join("".join(p) for p in itertools.permutations(letters))
        raise PolicyError(f"{name!r} is no order of the grid of {layout}; there are: {known}")
    axes = [letters.index(c) for c in name.lower()]
    strides = [math.prod(layout.grid[axis + 1 :]) for axis in range(len(layout.grid))]
    return TokenOrder(layout, _joined([(strides[a], layout.grid[a]) for a in axes]))


def axis_orders(layout: TokenLayout) -> tuple[str, ...]:
    """The names of every axis order of the grid, the model's own first."""
    return tuple(map("".join, itertools.permutations(LETTERS[len(layout.grid)])))


def tile_order(
    layout: TokenLayout, tile: tuple[int, ...], dilation: tuple[int, ...] | None = None
) -> TokenOrder:
    """Tiles one after the other, each row by row, and the tiles row by row too.

    ``tile`` has one extent per axis of the grid.  With a ``dilation`` per axis the tokens of one
    remainder stand together: classes of remainders row by row, inside a class tiles of every
    ``dilation``-th token, so that a dilated neighborhood is dense inside few tiles.  Tile times
    dilation divides the grid (`PolicyError`).  Source: Sliding Tile Attention (2502.04507), section
    3; DraftAttention (2505.14708), its 8 x 16 patches; dilation: Generalized Neighborhood Attention
    (2504.16922), section 4, its token permutation.
    """
    apart = (1,) * len(tile) if dilation is None else dilation
    for name, sizes in (("tile", tile), ("dilation", apart)):
        if len(sizes) != len(layout.grid):
            raise PolicyError(
                f"{name} {_by(sizes)} has {len(sizes)} axes, the grid of {layout} another"
            )
    if any(n % (t * d) for n, t, d in zip(layout.grid, tile, apart, strict=True)):
        what = f"tile {_by(tile)}" + (f" with dilation {_by(apart)}" if dilation else "")
        raise PolicyError(f"{what} does not divide the grid of {layout}")
    strides = [math.prod(layout.grid[axis + 1 :]) for axis in range(len(tile))]
    axes = list(zip(strides, tile, apart, layout.grid, strict=True))
    classes = [(s, d) for s, _, d, _ in axes]
    outer = [(s * t * d, n // (t * d)) for s, t, d, n in axes]
    inner = [(s * d, t) for s, t, d, _ in axes]
    return TokenOrder(layout, _joined([*classes, *outer, *inner]))


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _joined(digits: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring digits that count on are one, and digits of one value none."""
    out: list[tuple[int, int]] = []
    for stride, extent in digits:
        if extent == 1:
            continue
        if out and out[-1][0] == stride * extent:
            out[-1] = (stride, out[-1][1] * extent)
        else:
            out.append((stride, extent))
    return tuple(out) or ((1, 1),)


def _either(first: Expr, second: Expr) -> Expr:
    if FALSE in (first, second):
        return second if first == FALSE else first
    return first | second
