"""Blocks of masks in another order of the tokens, against brute force over every pair."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.cascade.classes import boxes_of, pairs_of_spans
from attn_rewrite.cascade.counting import block_pairs
from attn_rewrite.cascade.digits import Digits, in_digits, radix_of
from attn_rewrite.cascade.expr import KV, Expr, Q, call
from attn_rewrite.cascade.points import values
from attn_rewrite.cascade.relation import FactorError
from attn_rewrite.simulate.mask import mask_of
from attn_rewrite.token_layout import TokenLayout


def brute(mask: Expr, q: np.ndarray, kv: np.ndarray) -> np.ndarray:
    """Kept pairs between consecutive edges, from every pair."""
    kept = values(mask, {"q": np.arange(q[-1])[:, None], "kv": np.arange(kv[-1])[None]})
    sums = np.zeros((q[-1] + 1, kv[-1] + 1), np.int64)
    sums[1:, 1:] = np.broadcast_to(kept, (q[-1], kv[-1])).cumsum(0).cumsum(1)
    return np.diff(np.diff(sums[q][:, kv], axis=0), axis=1)


def by_classes(mask: Expr, q: np.ndarray, kv: np.ndarray) -> np.ndarray:
    radix = radix_of(mask)
    digits = Digits(radix, {"q": int(q[-1]), "kv": int(kv[-1])})
    return pairs_of_spans(in_digits(mask, radix), digits, (q, kv))


@st.composite
def tiled(draw: st.DrawFn) -> tuple[Expr, int]:
    """A mask of a grid whose tokens are in an order of tiles, and the number of tokens."""
    tile = draw(st.tuples(*[st.integers(1, 4)] * 3))
    tiles = draw(st.tuples(*[st.integers(1, 4)] * 3))
    grid = tuple(a * b for a, b in zip(tile, tiles, strict=True))
    window = [draw(st.integers(1, n)) for n in grid]
    stride = [draw(st.integers(1, w)) for w in window]
    causal = [str(draw(st.booleans())).lower() for _ in grid]
    causal_text = f"[{','.join(causal)}]"
    pattern = draw(
        st.sampled_from(
            [
                f"gna(window={window}, stride={stride}, causal={causal_text})",
                "radial(rule='paper')",
                f"union(of=[neighborhood(window={window}), radial(rule='paper')])",
            ]
        )
    )
    return mask_of(f"{pattern} | reorder(tile={list(tile)})", TokenLayout(grid)), int(np.prod(grid))


def edges(draw: st.DrawFn, length: int) -> np.ndarray:
    inner = draw(st.lists(st.integers(0, length), max_size=6))
    return np.asarray([0, *sorted(inner), length])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_orders_of_tiles(data: st.DataObject) -> None:
    mask, length = data.draw(tiled())
    q, kv = (data.draw(st.composite(edges)(length)) for _ in range(2))
    np.testing.assert_array_equal(by_classes(mask, q, kv), brute(mask, q, kv))


@pytest.mark.parametrize(
    "mask",
    [
        (Q // 8 + Q % 4 <= KV // 8 + KV % 4) & (Q // 4 % 2 <= KV // 4 % 2),
        (Q // 8 * 3 + Q % 4 < 7) | ~(call("abs", Q // 8 - KV // 8) + KV % 4 < 3),
        call("ne", Q // 8 * 4 + Q % 4, KV // 8 * 4 + KV % 4),
        (Q // 8 < 3) & (KV // 4 % 2 < 1),
    ],
)
def test_digits_that_are_tied_together(mask: Expr) -> None:
    q, kv = np.asarray([0, 3, 8, 8, 21, 37]), np.asarray([0, 16, 17, 41])
    np.testing.assert_array_equal(by_classes(mask, q, kv), brute(mask, q, kv))


@given(st.integers(0, 130), st.integers(0, 130))
def test_boxes_are_the_positions_between(start: int, length: int) -> None:
    strides = (30, 6, 2, 1)
    found = [
        sum(d * s for d, s in zip(digits, strides, strict=True))
        for box in boxes_of(start, start + length, strides)
        for digits in np.ndindex(*(high - low for low, high in box))
        for digits in [tuple(low + d for d, (low, _) in zip(digits, box, strict=True))]
    ]
    assert sorted(found) == list(range(start, start + length))


@pytest.mark.parametrize(
    "mask", [Q // 8 * (KV % 8) / 3 < KV // 8, (Q + Q // 8 * 7) * (KV + KV // 8) < 10**6]
)
def test_what_has_no_table_is_said(mask: Expr) -> None:
    span = np.asarray([0, 1 << 22])
    with pytest.raises(FactorError, match=r"may round|too many"):
        by_classes(mask, span, span)


@pytest.mark.parametrize(
    ("policy", "text", "seen"),
    [
        ("neighborhood(window=[18, 24, 24]) | reorder(tile=[6, 8, 8])", 0, 18 * 24 * 24),
        ("gna(window=[18, 24, 24], stride=[1, 4, 2]) | reorder(tile=[5, 4, 10])", 0, 18 * 24 * 24),
        ("neighborhood(window=[18, 24, 24]) | reorder(tile=[6, 8, 8])", 200, 18 * 24 * 24),
        ("radial | reorder(tile=[6, 8, 8])", 200, None),
    ],
)
def test_long_videos(policy: str, text: int, seen: int | None) -> None:
    """The blocks of 115,200 tokens without a matrix of tokens, with and without text."""
    layout = TokenLayout((30, 48, 80), text=text)
    mask, length = mask_of(policy, layout), layout.q_len
    tracemalloc.start()
    pairs = block_pairs(mask, q_len=length, kv_len=length, block_q=128, block_kv=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 29
    assert pairs is not None
    if seen is not None:
        assert pairs.sum() == 115_200 * (seen + 2 * text) + text * text
    row = length // 300
    rows = np.arange(row * 128, row * 128 + 128)
    kept = values(mask, {"q": rows[:, None], "kv": np.arange(length)[None]})
    by_block = np.add.reduceat(kept.sum(0), np.arange(0, length, 128))
    np.testing.assert_array_equal(pairs[row], by_block)
