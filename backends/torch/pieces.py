"""What a row of blocks asks of the fused kernel: pieces of its keys, each one call.

A range of keys that is long enough is a call on views of K and V; keys that lie scattered are
copied together.  Nothing here touches a tensor of the model, so the pieces of a schedule are made
once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attn_rewrite.backends.torch.patterns import SIDE
from attn_rewrite.backends.torch.schedule import Row, Schedule, Span, clipped, merged

# Elements of the mask, and of the copied keys and values, of one call, in every lane.
SCRATCH = 3 << 16
# Keys of a range, counted in every head, that are worth a call of their own: merging its output
# costs less than copying them.
WORTH_CALL = 12 * SIDE


@dataclass(frozen=True)
class Copied:
    """Keys that one call copies together: blocks of ``unit`` keys, a range of `Plan.index`."""

    unit: int
    blocks: Span


@dataclass(frozen=True)
class Piece:
    """Keys of a row that one call sees; ``row`` has only them, where the guard is evaluated."""

    width: int
    keys: Span | Copied
    row: Row | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The pieces of every row of a schedule, in its order, and the blocks that they copy.

    One tensor holds the blocks of all pieces, as there may be thousands.
    """

    parts: tuple[tuple[tuple[Piece, ...], ...], ...]
    index: Tensor

    @cached_property
    def most_copied(self) -> int:
        """Keys that the largest piece copies."""
        return max((p.width for p in self._pieces() if isinstance(p.keys, Copied)), default=0)

    @cached_property
    def largest_mask(self) -> int:
        """Scores of the largest piece whose guard is evaluated."""
        guarded = ((p.row.height, p.width) for p in self._pieces() if p.row is not None)
        return max((height * width for height, width in guarded), default=0)

    def _pieces(self) -> itertools.chain[Piece]:
        return itertools.chain.from_iterable(itertools.chain.from_iterable(self.parts))


@lru_cache(maxsize=32)
def plan_of(schedule: Schedule, depth: int, room: int) -> Plan:
    """The pieces of a schedule, for heads ``depth`` wide and calls that need at most ``room``."""
    blocks: list[npt.NDArray[np.int64]] = []
    ends = [0]

    def piece(row: Row) -> Piece:
        guarded = row if row.masked else None
        if len(row.keys) == 1:
            return Piece(row.width, row.keys[0], guarded)
        unit, found = blocks_of(row.keys)
        blocks.append(found)
        ends.append(ends[-1] + len(found))
        return Piece(row.width, Copied(unit, (ends[-2], ends[-1])), guarded)

    def cut(row: Row, heads: int) -> tuple[Piece, ...]:
        return tuple(map(piece, pieces(row, depth, room, WORTH_CALL // heads)))

    each = 1 if schedule.per_head else schedule.group
    counts = [(part, (part.heads[1] - part.heads[0]) * each) for part in schedule.parts]
    parts = tuple(
        tuple(cut(row, each if copies(row) else count) for row in part.rows)
        for part, count in counts
    )
    return Plan(parts, torch.from_numpy(np.concatenate([np.empty(0, np.int64), *blocks])))


def copies(row: Row) -> bool:
    """Whether a row copies keys and needs no mask: then nothing is gained by many heads at once."""
    return not row.masked and len(row.keys) > 1


def blocks_of(keys: Sequence[Span]) -> tuple[int, npt.NDArray[np.int64]]:
    """Ranges of keys as blocks of equal size, the largest that they are made of."""
    unit = math.gcd(*itertools.chain(*keys))
    low, high = np.asarray(keys, np.int64).T // unit
    ends = np.cumsum(high - low)
    return unit, np.arange(ends[-1]) + np.repeat(high - ends, high - low)


def pieces(row: Row, depth: int, room: int, worth: int) -> list[Row]:
    """The row as rows of fewer keys whose masks and copied keys fit ``room`` elements.

    Each range that has at least ``worth`` keys has pieces of its own, the others are taken
    together.  Keys of one range that need no mask are never cut.
    """
    row = in_order(row)
    columns = _columns(row)
    long = [[c] for c in columns if c[1] - c[0] >= worth]
    short = [c for c in columns if c[1] - c[0] < worth]
    found = [_part(row, group) for group in (*long, short) if group]
    return [piece for part in found for piece in _cut(part, depth, room)]


def in_order(row: Row) -> Row:
    """The row with its keys from first to last: ranges that touch are one, masked or not."""
    by_key = sorted(zip(row.keys, _columns(row), strict=True))
    ordered = _part(row, [columns for _, columns in by_key])
    return replace(ordered, keys=merged(ordered.keys), masked=merged(ordered.masked))


def _columns(row: Row) -> list[Span]:
    """The columns of each range of keys."""
    ends = list(itertools.accumulate((high - low for low, high in row.keys), initial=0))
    return list(itertools.pairwise(ends))


def _cut(row: Row, depth: int, room: int) -> list[Row]:
    each = row.height * bool(row.masked) + 2 * depth * (len(row.keys) > 1)
    most = room // each if each else row.width
    if row.width <= most:
        return [row]
    most = max(most // SIDE, 1) * SIDE
    step = -(-row.width // -(-row.width // most))
    step = min(-(-step // SIDE) * SIDE, most)
    spans = [(at, min(at + step, row.width)) for at in range(0, row.width, step)]
    return [_part(row, [span]) for span in spans]


def _part(row: Row, columns: Sequence[Span]) -> Row:
    """Some of the columns of a row."""
    keys: list[Span] = []
    masked: list[Span] = []
    at = 0
    for start, stop in columns:
        keys += clipped(row.keys, start, stop)
        for low, high in row.masked:
            first, last = max(low, start) - start, min(high, stop) - start
            if first < last:
                masked.append((at + first, at + last))
        at += stop - start
    certain = sum(high - low for low, high in masked) < at
    return replace(row, keys=tuple(keys), masked=tuple(masked), certain=certain)
