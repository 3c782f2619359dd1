"""Kept pairs of blocks where a mask ties digits of a position together.

In an order of tiles a row of the grid is ``tile * 8 + row of the tile``: two digits that stand far
apart.  Digits that some comparison ties together are one *part* here.  A mask reads a position
through few expressions (the row, its block, ...), so the positions of a part fall into few
*classes* that the mask cannot tell apart, and a product of atoms is a small table over classes.
A block is a union of few boxes of digits, in which parts are independent: its pairs are products
over the parts of (positions per class) x table x (positions per class).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.digits import RANKS, Digits, is_whole, level_of
from attn_rewrite.cascade.expr import Call, Expr, Rank, conjunction, ranks_of, substitute
from attn_rewrite.cascade.points import values
from attn_rewrite.cascade.products import COMPARISONS, Expansion, Sum
from attn_rewrite.cascade.relation import TABLE_LIMIT, FactorError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Box = tuple[tuple[int, int], ...]  # half-open bounds per digit

# Positions a part may have, and boxes the blocks of one side may fall into.
POSITION_LIMIT = 1 << 20
BOX_LIMIT = 1 << 15
_CHUNK = 1 << 21  # pairs of boxes counted at a time; bounds memory


def pairs_of_spans(mask: Expr, digits: Digits, edges: tuple[Ints, Ints]) -> Ints:
    """Kept pairs between consecutive ``edges`` of q and of kv (positions from the origin).

    ``mask`` is over the digits (`in_digits`).  Exact; raises `FactorError` where a part of it is
    too large for a table.
    """
    expansion = ClassExpansion(mask, digits)
    terms = expansion.of(mask)
    sides = [_Boxes.of(e, digits.radix.strides) for e in edges]
    weights = [
        [expansion.weights(rank, part, side.boxes) for part in range(expansion.parts + 1)]
        for rank, side in zip(RANKS, sides, strict=True)
    ]
    out = np.zeros((len(edges[0]) - 1, len(edges[1]) - 1), np.int64)
    if not sides[0].boxes or not sides[1].boxes:
        return out
    rows = max(1, _CHUNK // len(sides[1].boxes))
    for start in range(0, len(sides[0].boxes), rows):
        some = slice(start, start + rows)
        total = np.zeros((len(sides[0].owner[some]), len(sides[1].boxes)))
        for atoms, sign in terms.items():
            product = np.full_like(total, float(sign))
            for part in range(expansion.parts + 1):
                q, kv = weights[0][part], weights[1][part]
                table = q.counts @ expansion.table(part, atoms) @ kv.counts.T
                product *= table[q.at[some]][:, kv.at]
            total += product
        by_block = np.add.reduceat(total, sides[1].starts, axis=1)
        owners = sides[0].owner[some]
        np.add.at(out, (owners[:, None], sides[1].blocks[None]), by_block.astype(np.int64))
    return out


@dataclass(frozen=True)
class _Boxes:
    """Boxes of the spans of one side: ``owner`` is the span of each; ``starts`` the first box of
    each of the ``blocks`` that are not empty."""

    boxes: list[Box]
    owner: Ints
    starts: Ints
    blocks: Ints

    @staticmethod
    def of(edges: Ints, strides: tuple[int, ...]) -> _Boxes:
        boxes, owner = [], []
        for block, (start, stop) in enumerate(itertools.pairwise(map(int, edges))):
            found = list(boxes_of(start, stop, strides))
            boxes += found
            owner += [block] * len(found)
            if len(boxes) > BOX_LIMIT:
                raise FactorError("blocks of too many boxes")
        owners = np.asarray(owner, np.int64)
        blocks, starts = np.unique(owners, return_index=True)
        return _Boxes(boxes, owners, starts, blocks)


def boxes_of(start: int, stop: int, strides: tuple[int, ...]) -> Iterator[Box]:
    """The positions from ``start`` up to ``stop`` as boxes of digits, highest digit first."""
    if start >= stop:
        return
    stride, rest = strides[0], strides[1:]
    first, last = -(-start // stride), stop // stride
    if first > last:  # inside one value of the digit
        for box in boxes_of(start - last * stride, stop - last * stride, rest):
            yield ((last, last + 1), *box)
        return
    whole = tuple((0, high // low) for high, low in itertools.pairwise(strides))
    for box in (
        boxes_of(start - (first - 1) * stride, stride, rest) if start < first * stride else ()
    ):
        yield ((first - 1, first), *box)
    if first < last:
        yield ((first, last), *whole)
    for box in boxes_of(0, stop - last * stride, rest) if last * stride < stop else ():
        yield ((last, last + 1), *box)


@dataclass(frozen=True)
class _Weights:
    """Positions per class, float64 [distinct boxes, classes], and the row ``at`` of every box."""

    counts: Floats
    at: Ints


@dataclass(frozen=True)
class _Side:
    """One rank of a part: its digits, the class of every value of them, and what the mask reads.

    ``features`` are expressions over these digits alone; ``at`` their values, one per class.
    """

    levels: tuple[int, ...]
    classes: Ints
    at: dict[Expr, npt.NDArray[np.generic]]

    @property
    def size(self) -> int:
        """Classes."""
        return int(self.classes.max(initial=0)) + 1


class ClassExpansion(Expansion):
    """A mask over digits as products over the parts its comparisons tie together."""

    def __init__(self, mask: Expr, digits: Digits) -> None:
        self.digits = digits
        self.members = _parts(mask)
        super().__init__(len(self.members))
        self.sides = {
            rank: [self._side(rank, part, mask) for part in self.members] for rank in RANKS
        }
        if any(q.size * kv.size > TABLE_LIMIT for q, kv in zip(*self.sides.values(), strict=True)):
            raise FactorError("a part with too many classes")
        free = {
            rank: tuple(
                level
                for level in range(len(digits.radix.strides))
                if not any(f"{rank}{level}" in part for part in self.members)
            )
            for rank in RANKS
        }
        # The last part: digits that the mask does not read.
        for rank in RANKS:
            self.sides[rank].append(_Side(free[rank], np.zeros((), np.int64), {}))

    def _side(self, rank: str, part: frozenset[str], mask: Expr) -> _Side:
        levels = tuple(sorted(level_of(n) for n in part if n.rstrip("0123456789") == rank))
        shape = tuple(self.digits.extent(rank, level) for level in levels)
        if np.prod(shape, dtype=np.float64) > POSITION_LIMIT:
            raise FactorError("a part with too many positions")
        names = {f"{rank}{level}" for level in levels}
        found = sorted({f for f in _features(mask, rank) if ranks_of(f) <= names}, key=str)
        grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij") if shape else []
        at = {f"{rank}{level}": index for level, index in zip(levels, grid, strict=True)}
        read = [np.broadcast_to(values(f, at), shape).ravel() for f in found]
        if not read:
            return _Side(levels, np.zeros(shape, np.int64), {})
        distinct, classes = np.unique(np.stack(read, 1), axis=0, return_inverse=True)
        kinds = {
            f: distinct[:, i].astype(r.dtype)
            for i, (f, r) in enumerate(zip(found, read, strict=True))
        }
        return _Side(levels, classes.reshape(shape).astype(np.int64), kinds)

    def only_part(self, mask: Expr) -> int | None:
        """The part whose digits are the only ones of a mask."""
        names = ranks_of(mask)
        if not names or not is_whole(mask):
            return None
        return next((i for i, part in enumerate(self.members) if names <= part), None)

    def comparison(self, atom: Call) -> Sum:
        """Parts are closed under comparisons: only one between literals comes here, or one that
        may round."""
        if ranks_of(atom):
            raise FactorError(f"{atom} may round")
        return self.one() if bool(values(atom, {})) else {}

    def holds_nowhere(self, part: int, atoms: frozenset[Expr]) -> bool:
        """True if no pair of classes satisfies the atoms."""
        return not self._kept(part, atoms).any()

    def table(self, part: int, product: tuple[frozenset[Expr], ...]) -> Floats:
        """Which classes of q and kv a product keeps, float64 [classes of q, classes of kv]."""
        atoms = product[part] if part < self.parts else frozenset[Expr]()
        return self._kept(part, atoms).astype(np.float64)

    def _kept(self, part: int, atoms: frozenset[Expr]) -> npt.NDArray[np.bool_]:
        q, kv = (self.sides[rank][part] for rank in RANKS)
        names: dict[Expr, Expr] = {}
        at: dict[str, npt.NDArray[np.generic]] = {}
        for side, column in ((q, False), (kv, True)):
            for feature, kinds in side.at.items():
                name = f"f{len(names)}"
                names[feature] = Rank(name)
                at[name] = kinds[None] if column else kinds[:, None]
        mask = substitute(conjunction(tuple(sorted(atoms, key=str))), names)
        return np.broadcast_to(values(mask, at), (q.size, kv.size))

    def weights(self, rank: str, part: int, boxes: list[Box]) -> _Weights:
        """How many positions of each class are in each box."""
        side = self.sides[rank][part]
        distinct: dict[Box, int] = {}
        at = [distinct.setdefault(tuple(b[n] for n in side.levels), len(distinct)) for b in boxes]
        counts = np.zeros((len(distinct), side.size))
        for box, row in distinct.items():
            if not side.at:
                counts[row] = np.prod([high - low for low, high in box], dtype=np.float64)
                continue
            inside = side.classes[tuple(slice(*bounds) for bounds in box)]
            counts[row] = np.bincount(inside.ravel(), minlength=side.size)
        return _Weights(counts, np.asarray(at, np.int64))


def _parts(mask: Expr) -> tuple[frozenset[str], ...]:
    """Digits that comparisons of ``mask`` tie together, as names of ranks."""
    tied: nx.Graph[str] = nx.Graph()
    for atom in _comparisons(mask):
        names = sorted(ranks_of(atom))
        nx.add_path(tied, names)
    return tuple(frozenset(p) for p in nx.connected_components(tied))


def _comparisons(mask: Expr) -> Iterator[Expr]:
    """The outermost comparisons."""
    if isinstance(mask, Call) and mask.op in COMPARISONS:
        yield mask
    else:
        for child in mask.children:
            yield from _comparisons(child)


def _features(expr: Expr, rank: str) -> Iterator[Expr]:
    """The largest subexpressions over digits of ``rank`` alone."""
    names = ranks_of(expr)
    if names and all(n.rstrip("0123456789") == rank for n in names):
        yield expr
    else:
        for child in expr.children:
            yield from _features(child, rank)
