"""Masks that depend on the distance of query and key alone: bands of ``row - column``.

A band mask is a list of pieces, each a range of distances with one value.  It is read from a tensor
that is known (a stored buffer, a mask made of fixed sizes) or from an expression, and written as
comparisons of positions, so that every spelling of a band has one form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_rewrite.cascade.expr import FALSE, TRUE, Const, Expr, Scalar, call, where

# More pieces than this are a pattern of another kind.
MAX_PIECES = 7


@dataclass(frozen=True)
class Piece:
    """One value for the distances ``low .. high``, both included; None where there is no end."""

    low: int | None
    high: int | None
    value: Scalar


Pieces = tuple[Piece, ...]


def merged(pieces: Sequence[Piece]) -> Pieces:
    """Neighbours of equal value joined; ``pieces`` go up without a gap."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].value == piece.value and type(out[-1].value) is type(piece.value):
            piece = Piece(out.pop().low, piece.high, piece.value)
        out.append(piece)
    return tuple(out)


def bands_of(value: torch.Tensor) -> Pieces | None:
    """The pieces of a tensor whose last two dimensions are rows and columns; None if it is not so.

    Other dimensions have length 1, and there are at least two rows and two columns.
    """
    if value.dim() < 2 or value.device.type == "meta":
        return None
    rows, columns = value.shape[-2:]
    if value.numel() != rows * columns or rows < 2 or columns < 2:
        return None
    square = value.reshape(rows, columns)
    if not torch.equal(square[1:, 1:], square[:-1, :-1]):
        return None
    line = torch.cat([square[0].flip(0), square[1:, 0]])  # by distance, the lowest first
    starts = torch.nonzero(line[1:] != line[:-1]).flatten() + 1
    if len(starts) >= MAX_PIECES or bool((line != line).any()):
        return None
    edges = [0, *starts.tolist(), len(line)]
    last = len(edges) - 2
    return tuple(
        Piece(
            None if n == 0 else edges[n] - columns + 1,
            None if n == last else edges[n + 1] - columns,
            line[edges[n]].item(),
        )
        for n in range(last + 1)
    )


def written(pieces: Pieces, row: Expr, column: Expr) -> Expr | None:
    """A choice between two values by the distance ``row - column``; None for three or more values.

    The condition is that of the value in the middle, or of the higher distances where there are
    two pieces: what a mask keeps, as a rule.
    """
    values = list(dict.fromkeys((type(p.value), p.value) for p in pieces))
    if len(values) > 2:
        return None
    inside = pieces[1 if len(pieces) > 1 else 0].value
    others = [v for _, v in values if v != inside or type(v) is not type(inside)]
    condition = _within([p for p in pieces if p.value == inside], row, column)
    if not others:
        return Const(inside)
    if isinstance(inside, bool) and isinstance(others[0], bool):
        return condition if inside else call("not", condition)
    return where(condition, inside, others[0])


def _within(pieces: Sequence[Piece], row: Expr, column: Expr) -> Expr:
    """The distance lies in one of the ranges."""
    total: Expr = FALSE
    for piece in pieces:
        part: Expr = TRUE
        if piece.low is not None:
            part = call("le", column, row - piece.low)
        if piece.high is not None:
            upper = call("le", row, column + piece.high)
            part = upper if part == TRUE else call("and", part, upper)
        total = part if total == FALSE else call("or", total, part)
    return total
