"""How an attention is cut into tiles: bands that follow the queries, by head, or blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from attn_rewrite.backends.onnx.bands import EVERY_KEY, Reach, Segment, segments
from attn_rewrite.backends.onnx.blocks import BlockPlan, Problem, plan_blocks
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.cover import heads_differ
from attn_rewrite.cascade.expr import FALSE, TRUE, Const, H, substitute
from attn_rewrite.cascade.simplify import simplify

DEFAULT_ROWS = 128
# Blocks must leave out this share of what bands compute: their gathers cost more than slices.
WORTH_BLOCKS = 0.8


@dataclass(frozen=True)
class TilePlan:
    """How one attention is tiled: ``rows`` queries a step, and the key ranges of a step."""

    rows: int
    segments: tuple[Segment | Reach, ...]

    @property
    def dense(self) -> bool:
        """True where a step reads every key, so that nothing is skipped."""
        return EVERY_KEY in self.segments

    @property
    def width(self) -> int | None:
        """The keys of a step; None where the step reads all of them, or its place decides."""
        if self.dense or self.reach is not None:
            return None
        return sum(s.width or 0 for s in self.segments if isinstance(s, Segment))

    @property
    def reach(self) -> Reach | None:
        """The keys of a step where their number follows its place."""
        return next((s for s in self.segments if isinstance(s, Reach)), None)

    def pairs(self, q_len: int, kv_len: int) -> int:
        """Scores computed for one head."""
        if self.reach is None:
            return q_len * min(kv_len if self.width is None else self.width, kv_len)
        sizes = {"q": q_len, "kv": kv_len}
        starts = np.arange(0, q_len, self.rows)
        low, high = np.zeros_like(starts), np.full_like(starts, kv_len)
        if self.reach.low is not None:
            low = np.clip(starts + self.reach.low.at(sizes), 0, kv_len - 1)
        if self.reach.high is not None:
            high = np.clip(starts + self.rows + self.reach.high.at(sizes), low + 1, kv_len)
        return int((high - low).sum()) * min(self.rows, q_len)

    def __str__(self) -> str:
        return f"{self.rows} queries a step, " + ", ".join(map(str, self.segments))


@dataclass(frozen=True)
class HeadPlan:
    """Consecutive query heads, half-open, with bands of their own."""

    parts: tuple[tuple[tuple[int, int], TilePlan], ...]

    @property
    def dense(self) -> bool:
        """True where some head reads every key."""
        return any(plan.dense for _, plan in self.parts)

    @property
    def reach(self) -> Reach | None:
        """The keys of some head where their number follows the place of a step."""
        return next((plan.reach for _, plan in self.parts if plan.reach), None)

    def __str__(self) -> str:
        return "; ".join(f"heads {a} to {b - 1}: {plan}" for (a, b), plan in self.parts)


Plan = TilePlan | HeadPlan | BlockPlan


def plan_tiles(form: SoftmaxAttention, rows: int = DEFAULT_ROWS) -> TilePlan:
    """The tiling of ``form`` with ``rows`` queries a step."""
    found = segments(form.guard, rows)
    return TilePlan(rows, (EVERY_KEY,) if EVERY_KEY in found else found)


def choose_plan(form: SoftmaxAttention, inputs: Sequence[ir.Value], rows: int) -> Plan:
    """Bands that follow the queries where the mask has them, else the blocks of its cover.

    Blocks need fixed lengths.  They also replace bands that are the same for all heads where the
    cover is much smaller, as it is where heads differ, and a step over every key where it is
    smaller at all.
    """
    bands = plan_tiles(form, rows)
    q, _, _, *reads = inputs
    heads = q.shape[1] if q.shape is not None and isinstance(q.shape[1], int) else None
    q_len, kv_len = fixed_lengths(inputs)
    if heads is None or form.guard in (TRUE, FALSE):
        return bands
    if q_len is None or kv_len is None:
        wide = bands.dense or bands.reach is not None
        return plan_heads(form, heads, rows) if wide and heads_differ(form.guard) else bands
    batch = q.shape[0] if q.shape is not None and isinstance(q.shape[0], int) else 1
    problem = Problem(heads, form.group, q_len, kv_len, batch)
    blocks = plan_blocks(form.guard, problem, rows, _known(reads, form))
    band_pairs = heads * bands.pairs(q_len, kv_len)
    enough = band_pairs - 1 if bands.dense else WORTH_BLOCKS * band_pairs
    return blocks if blocks.pairs <= enough else bands


def fixed_lengths(inputs: Sequence[ir.Value]) -> tuple[int | None, int | None]:
    """The lengths of q and k; None where they are dynamic."""
    sizes = (None if x.shape is None else x.shape[2] for x in inputs[:2])
    q_len, kv_len = (n if isinstance(n, int) else None for n in sizes)
    return q_len, kv_len


def plan_heads(form: SoftmaxAttention, heads: int, rows: int) -> HeadPlan:
    """Bands of every head, heads with equal ones together."""
    parts: list[tuple[tuple[int, int], TilePlan]] = []
    for head in range(heads):
        guard = simplify(substitute(form.guard, {H: Const(head)}))
        plan = plan_tiles(replace(form, guard=guard), rows)
        if parts and parts[-1][1] == plan:
            parts[-1] = ((parts[-1][0][0], head + 1), plan)
        else:
            parts.append(((head, head + 1), plan))
    return HeadPlan(tuple(parts))


def _known(reads: Sequence[ir.Value], form: SoftmaxAttention) -> dict[str, np.ndarray[Any, Any]]:
    """The values of the reads that are constants of the model."""
    found = {}
    for value, declared in zip(reads, form.reads, strict=True):
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            found[declared.name] = tensor.numpy()
    return found
