"""What a form of attention costs in ONNX Runtime on a CPU: work counted, prices measured.

The prices of a form are seconds for a call, for a step of its loops, for a number of Q, K, V and
the output that is moved, for a score, and for a multiplication of the two products
(`prices.PRICES`, written by ``examples/benchmarks/onnx_prices.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_rewrite.backends.onnx.blocks import BlockPlan
from attn_rewrite.backends.onnx.prices import PRICES
from attn_rewrite.backends.onnx.tile_plans import HeadPlan, Plan, TilePlan

# Operators, or plans of our own.
Form = str | Plan
# Operators that compute nothing above the diagonal.
CAUSAL = ("GroupQueryAttention", "GroupQueryAttention with a window")


@dataclass(frozen=True)
class Sizes:
    """What an attention is over: heads, lengths, widths of keys and of values."""

    heads: int
    key_heads: int
    q_len: int
    kv_len: int
    width: int
    out: int
    batch: int = 1


@dataclass(frozen=True)
class Work:
    """What a form does in one call, in the units that have prices."""

    calls: float
    steps: float
    moved: float
    scores: float
    products: float

    def plus(self, other: Work) -> Work:
        """Both, in one call."""
        pairs = zip(self.counts(), other.counts(), strict=True)
        return replace(Work(*(a + b for a, b in pairs)), calls=self.calls)

    def counts(self) -> tuple[float, ...]:
        """The numbers in the order of the prices."""
        return self.calls, self.steps, self.moved, self.scores, self.products


def kind_of(form: Form) -> str:
    """The name that ``form`` has a price under."""
    if isinstance(form, str):
        return form
    return "blocks" if isinstance(form, BlockPlan) else "tiles"


def work(form: Form, sizes: Sizes) -> Work:
    """What ``form`` does at ``sizes``."""
    if isinstance(form, HeadPlan):
        parts = [
            work(plan, replace(sizes, heads=b - a, key_heads=max(1, (b - a) // _group(sizes))))
            for (a, b), plan in form.parts
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        return total
    steps, columns, pairs = _steps(form, sizes)
    scores = float(sizes.batch * pairs)
    both = sizes.width + sizes.out
    ends = sizes.heads * sizes.q_len * both
    moved = sizes.batch * (ends + columns * both)
    return Work(1.0, steps, float(moved), scores, scores * both)


def _group(sizes: Sizes) -> int:
    return max(1, sizes.heads // sizes.key_heads)


def _steps(form: str | TilePlan | BlockPlan, sizes: Sizes) -> tuple[int, int, int]:
    """Steps of a loop, keys that are moved, and scores, over all heads of one example."""
    if isinstance(form, BlockPlan):
        return sum(len(g.rows) for g in form.groups), form.executed * form.block, form.pairs
    keys = sizes.key_heads * sizes.kv_len
    if isinstance(form, str):
        pairs = sizes.q_len * sizes.kv_len
        if form in CAUSAL:
            pairs = sizes.q_len * (sizes.q_len + 1) // 2
        return 0, keys, sizes.heads * pairs
    pairs = form.pairs(sizes.q_len, sizes.kv_len)
    steps = -(-sizes.q_len // form.rows)
    gathered = keys if form.dense else sizes.key_heads * pairs // min(form.rows, sizes.q_len)
    return steps, gathered, sizes.heads * pairs


def estimate(form: Form, sizes: Sizes) -> float:
    """Seconds of one call of ``form`` at ``sizes`` (float32, the threads of the measurement)."""
    prices = PRICES[kind_of(form)]
    return sum(n * p for n, p in zip(work(form, sizes).counts(), prices, strict=True))
