"""Kept pairs of every block of a mask, exactly and without a token-level matrix.

The mask is cut where comparisons with literals change (text, image, padding), written over digits
of the positions (`digits`) and expanded into products of relations.  The pairs of a product in the
corner ``q < x, kv < y`` follow digit by digit from prefix sums; blocks are differences of corners.
Where a mask ties digits together, blocks are cut into boxes instead (`classes`).
The cost is (blocks + 1) squared per product: a grid of 118,800 tokens takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.classes import pairs_of_spans
from attn_rewrite.cascade.digits import (
    RANKS,
    DigitExpansion,
    Digits,
    Radix,
    cuts,
    decided,
    in_digits,
    radix_of,
    settled,
)
from attn_rewrite.cascade.expr import Expr, Rank, Read, ranks_of, substitute, walk
from attn_rewrite.cascade.fold_digits import fold_digits
from attn_rewrite.cascade.points import PointError
from attn_rewrite.cascade.products import Atoms
from attn_rewrite.cascade.relation import FactorError
from attn_rewrite.cascade.simplify import simplify

Ints = npt.NDArray[np.int64]
Spans = tuple[tuple[int, int], tuple[int, int]]  # of q and of kv
Edges = tuple[Ints, Ints]
_CUT_LIMIT = 16
_CHUNK = 1 << 21  # corners computed at a time; bounds memory


def block_pairs(mask: Expr, *, q_len: int, kv_len: int, block_q: int, block_kv: int) -> Ints | None:
    """Kept pairs of every block, int64 [ceil(q_len / block_q), ceil(kv_len / block_kv)].

    ``mask`` is over ``q`` and ``kv`` with extents and the head substituted.  None where the mask
    has no closed form of this kind (it reads a tensor, or mixes digits); exact otherwise.
    """
    if ranks_of(mask) - {"q", "kv"} or any(isinstance(n, Read) for n in walk(mask)):
        return None
    flat = Radix((1,), {"q": 0, "kv": 0})
    lengths = {"q": q_len, "kv": kv_len}
    edges = {
        "q": np.append(np.arange(0, q_len, block_q), q_len),
        "kv": np.append(np.arange(0, kv_len, block_kv), kv_len),
    }
    # Digits first: without them a short mask of blocks would be tabulated token by token.
    for count in (_by_corners, partial(_by_corners, radix=flat), _by_boxes):
        try:
            return _blocks(mask, count, lengths, edges)
        except (FactorError, PointError):
            continue
    return None


def _blocks(
    mask: Expr,
    count: Callable[[Expr, Spans, Edges], Ints],
    lengths: Mapping[str, int],
    edges: Mapping[str, Ints],
) -> Ints:
    """Kept pairs between consecutive edges."""
    at = cuts(mask)
    parts: dict[str, list[tuple[int, int]]] = {}
    for rank, length in lengths.items():
        inner = sorted({c for c in at[rank] if 0 < c < length})
        if len(inner) > _CUT_LIMIT:
            raise FactorError("the mask is cut too often")
        parts[rank] = list(pairwise([0, *inner, length]))
    total = np.zeros((len(edges["q"]) - 1, len(edges["kv"]) - 1), np.int64)
    for q, kv in product(parts["q"], parts["kv"]):
        part = decided(mask, {"q": q[0], "kv": kv[0]})
        total += count(part, (q, kv), (edges["q"], edges["kv"]))
    return total


def _by_boxes(mask: Expr, spans: Spans, edges: Edges) -> Ints:
    """`_blocks` of the pairs in ``spans`` of a mask that ties digits together."""
    first = {rank: span[0] for rank, span in zip(RANKS, spans, strict=True)}
    lengths = {rank: span[1] - span[0] for rank, span in zip(RANKS, spans, strict=True)}
    moved = substitute(mask, {Rank(r): Rank(r) + start for r, start in first.items() if start})
    mask = settled(fold_digits(simplify(moved), lengths), lengths)
    radix = radix_of(mask)
    if any(radix.origin.values()):
        raise FactorError("digits that do not begin with the span")
    (q, kv), (q_edges, kv_edges) = spans, edges
    inside = (np.clip(q_edges, *q) - q[0], np.clip(kv_edges, *kv) - kv[0])
    return pairs_of_spans(in_digits(mask, radix), Digits(radix, lengths), inside)


def _by_corners(mask: Expr, spans: Spans, edges: Edges, radix: Radix | None = None) -> Ints:
    """`_blocks` of the pairs in ``spans`` of a mask whose digits are independent."""
    radix = radix_of(mask) if radix is None else radix
    starts = tuple(radix.origin[r] for r in RANKS)
    if not ranks_of(mask):  # all or nothing: digits do not matter
        starts = (spans[0][0], spans[1][0])
        radix = Radix((1,), {"q": starts[0], "kv": starts[1]})
    if any(span[0] < start for span, start in zip(spans, starts, strict=True)):
        raise FactorError("digits before their origin")
    lengths = {r: s[1] - o for r, s, o in zip(RANKS, spans, starts, strict=True)}
    expansion = DigitExpansion(Digits(radix, lengths))
    terms = expansion.of(in_digits(mask, radix))
    points = [
        np.append(np.clip(e, *span) - start, span[0] - start)
        for e, span, start in zip(edges, spans, starts, strict=True)
    ]
    total = np.zeros((len(points[0]), len(points[1])), np.int64)
    rows = max(1, _CHUNK // len(points[1]))
    for start in range(0, len(points[0]), rows):
        for atoms, sign in terms.items():
            some = points[0][start : start + rows]
            total[start : start + rows] += sign * _below(expansion, atoms, 0, some, points[1])
    # The last point of each side is where the span begins: take away what lies before it.
    corners = total[:-1, :-1] - total[-1:, :-1] - total[:-1, -1:] + total[-1, -1]
    counts: Ints = np.diff(np.diff(corners, axis=0), axis=1)
    return counts


def _below(expansion: DigitExpansion, atoms: Atoms, level: int, x: Ints, y: Ints) -> Ints:
    """Pairs of one product with ``q < x[i]`` and ``kv < y[j]`` in digits from ``level`` down."""
    strides = expansion.digits.radix.strides
    if not any(atoms[level:]):
        return x[:, None] * y[None]
    found = expansion.relation(level, atoms[level])
    if level + 1 == len(strides):
        return found.below(x, y)
    (x_digit, x_rest), (y_digit, y_rest) = (
        np.divmod(x, strides[level]),
        np.divmod(y, strides[level]),
    )
    whole = np.asarray([strides[level]], np.int64)
    inner = _below(expansion, atoms, level + 1, np.append(x_rest, whole), np.append(y_rest, whole))
    # Corners at x and x + 1 of the few values the digit has.
    (xs, x_at), (ys, y_at) = (
        np.unique(x_digit, return_inverse=True),
        np.unique(y_digit, return_inverse=True),
    )
    here = found.below(xs, ys)
    row, column = found.below(xs + 1, ys) - here, found.below(xs, ys + 1) - here
    both = found.below(xs + 1, ys + 1) - here - row - column

    def spread(table: Ints) -> Ints:
        wide: Ints = table[x_at][:, y_at]
        return wide

    below: Ints = (
        spread(here) * inner[-1, -1]
        + spread(column) * inner[-1:, :-1]
        + spread(row) * inner[:-1, -1:]
        + spread(both) * inner[:-1, :-1]
    )
    return below
