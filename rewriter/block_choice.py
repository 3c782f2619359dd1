"""Which blocks of an attention map to keep, and in which order of the tokens: pure arithmetic.

Source: PAROAttention (2506.16054), section 3.  Its score of an order adds the share of blocks that
could be skipped, which should be large, to the incoherence of blocks, which should be small, and
takes the least: as printed that prefers the order with the fewest blocks to skip.  Here the share
of blocks that can *not* be skipped is added; the printed form is there by name.  Neither sees
whether a block is empty, so the default asks for what the masks are made for: how much of the
attention the kept blocks hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

METRICS = ("recall", "blocks", "literal")
# Orders whose scores differ by less are as good as each other: the first one is taken.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Target:
    """How much to keep: a share of the blocks, or as few as hold a share of the attention."""

    density: float | None = None
    recall: float | None = None


def sparse_share(small: Floats, areas: Floats, sigma: float) -> float:
    """Share of the blocks of which at least ``sigma`` of the elements are small."""
    return float(np.mean(small / areas >= sigma))


def incoherence(sums: Floats, tops: Floats, areas: Floats) -> float:
    """Largest over mean element of a block, averaged over the blocks that hold anything.

    1 for a map without such a block.
    """
    full = sums > 0
    if not full.any():
        return 1.0
    return float(np.mean(tops[full] / (sums[full] / areas[full])))


def block_scores(
    sparse: Sequence[float], quant: Sequence[float], alpha: float, *, literal: bool = False
) -> list[float]:
    """The score of each candidate order, least is best, from `sparse_share` and `incoherence`.

    Both are divided by their sum over the candidates; a sum of 0 leaves its term out.
    """
    first = [s if literal else 1 - s for s in sparse]
    return [
        alpha * _share(a, first) + (1 - alpha) * _share(b, quant)
        for a, b in zip(first, quant, strict=True)
    ]


def _share(value: float, values: Sequence[float]) -> float:
    total = sum(values)
    return value / total if total else 0.0


def best(scores: Sequence[float], then: Sequence[float]) -> int:
    """The candidate of the least score, by ``then`` where scores are equal, else the first."""
    near = [i for i, s in enumerate(scores) if s <= min(scores) + _EQUAL]
    least = min(then[i] for i in near)
    return next(i for i in near if then[i] <= least + _EQUAL)


def choose_blocks(sums: Floats, forced: Bools, target: Target) -> Bools:
    """The blocks to keep: ``forced`` ones, one in every row, and those that hold the most.

    The density is that of the blocks that are not forced; it is exceeded only where rows would be
    empty.  Equal blocks are taken in reading order.
    """
    keep = forced.copy()
    free = ~forced
    rows = np.flatnonzero(~forced.any(1))
    keep[rows, sums[rows].argmax(1)] = True
    wanted = _count(sums, keep, free, target)
    order = np.argsort(-np.where(free & ~keep, sums, -np.inf), axis=None, kind="stable")
    missing = max(wanted - int((keep & free).sum()), 0)
    keep.reshape(-1)[order[:missing]] = True
    return keep


def _count(sums: Floats, keep: Bools, free: Bools, target: Target) -> int:
    """How many of the free blocks to keep."""
    if target.density is not None:
        return round(target.density * int(free.sum()))
    assert target.recall is not None
    have = float(sums[keep].sum())
    rest = np.sort(sums[free & ~keep])[::-1].cumsum() + have
    goal = target.recall * float(sums.sum()) * (1 - 1e-12)
    more = 0 if have >= goal else int(np.searchsorted(rest, goal)) + 1
    return int((keep & free).sum()) + min(more, len(rest))


def recall_of(sums: Floats, keep: Bools) -> float:
    """Share of the attention that the kept blocks hold."""
    total = float(sums.sum())
    return float(sums[keep].sum()) / total if total else 1.0


def target_score(sums: Floats, forced: Bools, target: Target) -> float:
    """How badly an order serves a target: attention lost at a density, or blocks for a recall."""
    keep = choose_blocks(sums, forced, target)
    return 1 - recall_of(sums, keep) if target.density is not None else float(keep.mean())


def text_blocks(length: int, block: int, first: int, last: int) -> Bools:
    """Which of the blocks of ``length`` positions hold any outside ``first`` to ``last``."""
    starts = np.arange(0, length, block)
    stops = np.minimum(starts + block, length)
    return (starts < first) | (stops > last)
