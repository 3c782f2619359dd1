"""Which tiles a block-sparse attention runs, as constant tables: pure numpy, made before any graph.

Any guard at fixed lengths has a closed-form cover (`attn_rewrite.cascade.cover`).  A *row* is one
block of queries of one head, with the key blocks its cover keeps.  Rows that keep the same number
of blocks are stacked into *steps*; a step is one score tile, and no block is in a step that the
cover does not keep: there is no padding.  Rows that keep nothing are in no step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attn_rewrite.cascade.cover import Cells, Cover, block_cover, heads_differ
from attn_rewrite.cascade.expr import Expr, tensors_of

Table = npt.NDArray[np.generic]
Ints = npt.NDArray[np.int64]

# Scores of one step, in elements: 4 MB of float32, what two cores keep in their caches.
TILE_ELEMENTS = 1 << 20
# A smaller block must save this share of the scores to be worth its smaller products.
WORTH_HALVING = 0.85


@dataclass(frozen=True)
class Problem:
    """Fixed sizes of an attention: query heads, query heads per key head, lengths, examples."""

    heads: int
    group: int
    q_len: int
    kv_len: int
    batch: int = 1


@dataclass(frozen=True)
class Steps:
    """Steps of ``size`` rows each that run the same body.

    ``rows`` [steps, size] numbers rows (head * query blocks + query block); ``keys`` the key blocks
    (key head * key blocks + key block) of all steps in a row, ``spans`` [steps, 3] the first entry
    of a step in ``keys``, the blocks per row, and how many of these, the last ones, the guard
    decides.  ``masked`` False: none in any step.  ``certain``: every query keeps a whole block.
    """

    size: int
    masked: bool
    certain: bool
    rows: Ints
    keys: Ints
    spans: Ints


@dataclass(frozen=True)
class BlockPlan:
    """Everything a block-sparse attention runs: ``executed`` blocks of ``total`` over all heads."""

    problem: Problem
    block: int
    groups: tuple[Steps, ...]
    executed: int
    total: int

    @property
    def q_blocks(self) -> int:
        """Blocks of queries, the last one possibly short."""
        return -(-self.problem.q_len // self.block)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys, the last one possibly short."""
        return -(-self.problem.kv_len // self.block)

    @property
    def pairs(self) -> int:
        """Scores computed for one example, over all query heads."""
        return self.executed * self.block**2

    def order(self) -> Ints:
        """For every row its place in the outputs of all steps; the place after them where none."""
        run = np.concatenate([g.rows.ravel() for g in self.groups] or [np.empty(0, np.int64)])
        places = np.full(self.problem.heads * self.q_blocks, len(run), np.int64)
        places[run] = np.arange(len(run))
        return places

    def __str__(self) -> str:
        share = self.executed / self.total if self.total else 0.0
        steps = sum(len(g.rows) for g in self.groups)
        return (
            f"blocks of {self.block}: {self.executed} of {self.total} ({share:.1%}) "
            f"in {steps} steps of {len(self.groups)} loops"
        )


def plan_blocks(
    guard: Expr, problem: Problem, block: int, tables: Mapping[str, Table] | None = None
) -> BlockPlan:
    """The steps of ``guard``, in blocks of ``block`` or half of that where it saves enough."""
    known = {n: t for n, t in (tables or {}).items() if n in tensors_of(guard)}
    whole = _plan(guard, problem, block, known)
    if block < 64 or block % 2:
        return whole
    half = _plan(guard, problem, block // 2, known)
    return half if half.pairs <= WORTH_HALVING * whole.pairs else whole


def _plan(guard: Expr, problem: Problem, block: int, tables: Mapping[str, Table]) -> BlockPlan:
    def cover(head: int | None) -> Cells:
        cells = block_cover(
            guard, q_len=problem.q_len, kv_len=problem.kv_len, block_q=block, block_kv=block,
            head=head, extents={"h": problem.heads}, tables=tables,
        )  # fmt: skip
        return _short_keys(cells, problem.kv_len % block)

    one = None if heads_differ(guard) else cover(None)
    covers = [cover(h) if one is None else one for h in range(problem.heads)]
    groups = _groups(covers, problem, block)
    executed = sum(int((c != Cover.EMPTY).sum()) for c in covers)
    return BlockPlan(problem, block, groups, executed, sum(c.size for c in covers))


def _short_keys(cells: Cells, rest: int) -> Cells:
    """A last key block that is cut short is never whole: its padding is masked."""
    if rest:
        cells = cells.copy()
        cells[:, -1] = np.where(cells[:, -1] == Cover.FULL, Cover.PARTIAL, cells[:, -1])
    return cells


def _groups(covers: list[Cells], problem: Problem, block: int) -> tuple[Steps, ...]:
    """Rows by exact block count, cut into steps whose sizes are powers of two."""
    buckets: dict[tuple[int, int], list[tuple[int, Ints]]] = defaultdict(list)
    for head, cells in enumerate(covers):
        first_key = head // problem.group * cells.shape[1]
        for i, row in enumerate(cells):
            # Whole blocks first, so that the guard decides the last columns of the tile only.
            kept = np.flatnonzero(row != Cover.EMPTY)
            kept = kept[np.argsort(row[kept] == Cover.PARTIAL, kind="stable")]
            if len(kept):
                partial = int((row == Cover.PARTIAL).sum())
                item = (head * len(cells) + i, first_key + kept)
                buckets[len(kept), partial].append(item)
    steps: dict[tuple[int, bool, bool], list[tuple[int, int, list[tuple[int, Ints]]]]]
    steps = defaultdict(list)
    for (count, partial), items in sorted(buckets.items()):
        for part in _powers(items, TILE_ELEMENTS // (count * block**2 * problem.batch)):
            kind = (len(part), partial > 0, partial < count)
            steps[kind].append((count, partial, part))
    return tuple(_steps(*kind, found) for kind, found in sorted(steps.items()))


def _powers(items: list[tuple[int, Ints]], most: int) -> list[list[tuple[int, Ints]]]:
    """``items`` in pieces of the largest power of two up to ``most``, then smaller ones."""
    size, at, pieces = 1 << max(most, 1).bit_length() - 1, 0, []
    while at < len(items):
        while size > len(items) - at:
            size //= 2
        pieces.append(items[at : at + size])
        at += size
    return pieces


def _steps(
    size: int, masked: bool, certain: bool, found: list[tuple[int, int, list[tuple[int, Ints]]]]
) -> Steps:
    counts = np.array([[count, partial] for count, partial, _ in found], np.int64)
    starts = np.cumsum(counts[:, 0] * size) - counts[:, 0] * size
    return Steps(
        size,
        masked,
        certain,
        rows=np.array([[row for row, _ in part] for _, _, part in found], np.int64),
        keys=np.concatenate([keys for _, _, part in found for _, keys in part]),
        spans=np.concatenate([starts[:, None], counts], 1),
    )
