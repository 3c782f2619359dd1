"""Block cover against brute force over every pair."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.cascade.cover import (
    Cover,
    block_counts,
    block_cover,
    depends_on_data,
    heads_differ,
)
from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    B,
    Call,
    Const,
    Expr,
    Extent,
    H,
    Q,
    Rank,
    Read,
    call,
    eq,
    where,
)

_PYTHON = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide,
    "mod": np.mod, "max": np.maximum, "min": np.minimum, "abs": np.abs, "neg": np.negative,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "and": np.logical_and, "or": np.logical_or,
    "not": np.logical_not, "where": np.where, "div": np.true_divide, "sqrt": np.sqrt,
}  # fmt: skip


def dense(expr: Expr, env: dict[str, np.ndarray | int]) -> np.ndarray:
    """The expression at every point; reads are looked up by tensor name."""
    match expr:
        case Const(value):
            return np.asarray(value)
        case Rank(name):
            return np.asarray(env[name])
        case Extent(name):
            return np.asarray(env[f"#{name}"])
        case Read(tensor, index):
            return np.asarray(env[tensor])[tuple(dense(i, env) for i in index)]
        case Call(op, args):
            return np.asarray(_PYTHON[op](*(dense(a, env) for a in args)))
    raise AssertionError(expr)


def brute(mask: Expr, q_len: int, kv_len: int, bq: int, bkv: int, **env: object) -> np.ndarray:
    """Cover of every block by looking at every pair."""
    points = {
        "q": np.arange(q_len)[:, None], "kv": np.arange(kv_len)[None],
        "#q": q_len, "#kv": kv_len, "h": 0, "b": 0, **env,
    }  # fmt: skip
    kept = np.broadcast_to(dense(mask, points), (q_len, kv_len)).astype(bool)
    rows = [
        [_cover_of(kept[i : i + bq, j : j + bkv]) for j in range(0, kv_len, bkv)]
        for i in range(0, q_len, bq)
    ]
    return np.array(rows, np.int8)


def _cover_of(block: np.ndarray) -> int:
    if block.all():
        return Cover.FULL
    return Cover.PARTIAL if block.any() else Cover.EMPTY


d = Q - KV
EXACT = {
    "causal": d >= 0,
    "causal with a cache": Q + (Extent("kv") - Extent("q")) >= KV,
    "window": (d >= 0) & (d < 6),
    "symmetric window": (d >= -3) & (d <= 2),
    "abs window": call("abs", d) <= 4,
    "sinks and window": (d >= 0) & ((KV < 3) | (d < 5)),
    "sinks or window": (KV < 5) | ((d >= 0) & (d < 9)),
    "chunk": eq(Q // 5, KV // 5),
    "chunk and causal": eq(Q // 7, KV // 7) & (d >= 0),
    "dilated": eq(d % 3, 0),
    "dilated, shifted": eq((d + 20) % 4, 1),
    "dilated window": eq(d % 2, 0) & (d >= 0) & (d < 8),
    "prefix": (KV < 6) | (d >= 0),
    "suffix rows": (Extent("q") <= Q + 4) | (d < 3),
    "strided sum that never vanishes": eq(2 * Q - 4 * KV, 1),
    "disc on a grid of 4": (
        (Q // 4 - KV // 4) * (Q // 4 - KV // 4) + (Q % 4 - KV % 4) * (Q % 4 - KV % 4) <= 5
    ),
    "contradiction": (d >= 2) & (d < 2),
    "tautology": (d >= 2) | (d < 2),
    "where on position": where(Q < 8, d >= 0, call("abs", d) < 3),
    "identity of div and mod": eq((Q // 3) * 3 + Q % 3, Q),
    "everything": TRUE,
    "nothing": ~TRUE,
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "bq", "bkv"),
    [(1, 1, 4, 4), (16, 16, 4, 4), (17, 23, 4, 8), (23, 9, 5, 3), (1, 40, 16, 16), (31, 31, 16, 8)],
)
def test_positional_masks_are_decided_exactly(
    name: str, q_len: int, kv_len: int, bq: int, bkv: int
) -> None:
    mask = EXACT[name]
    got = block_cover(mask, q_len=q_len, kv_len=kv_len, block_q=bq, block_kv=bkv)
    np.testing.assert_array_equal(got, brute(mask, q_len, kv_len, bq, bkv))


def _integers() -> st.SearchStrategy[Expr]:
    leaves: st.SearchStrategy[Expr] = st.one_of(
        st.sampled_from([Q, KV, H, Extent("q"), Extent("kv"), Q - KV]),
        st.integers(-9, 9).map(Const),
    )
    divisors = st.integers(1, 7).map(Const)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(call, st.sampled_from(["add", "sub", "mul", "max", "min"]), inner, inner),
            st.builds(call, st.sampled_from(["floordiv", "mod"]), inner, divisors),
            st.builds(call, st.sampled_from(["abs", "neg"]), inner),
        ),
        max_leaves=5,
    )


def masks() -> st.SearchStrategy[Expr]:
    """Random masks over q, kv and h: comparisons of integer expressions, combined."""
    comparisons = st.builds(
        call, st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), _integers(), _integers()
    )
    return st.recursive(
        comparisons,
        lambda inner: st.one_of(
            st.builds(call, st.sampled_from(["and", "or", "eq"]), inner, inner),
            st.builds(call, st.just("not"), inner),
            st.builds(call, st.just("where"), inner, inner, inner),
        ),
        max_leaves=4,
    )


sides = st.integers(1, 14)
blocks = st.integers(1, 6)


@settings(max_examples=300, deadline=None)
@given(mask=masks(), q_len=sides, kv_len=sides, bq=blocks, bkv=blocks, head=st.integers(0, 3))
def test_random_masks_are_decided_exactly(
    mask: Expr, q_len: int, kv_len: int, bq: int, bkv: int, head: int
) -> None:
    got = block_cover(mask, q_len=q_len, kv_len=kv_len, block_q=bq, block_kv=bkv, head=head)
    np.testing.assert_array_equal(got, brute(mask, q_len, kv_len, bq, bkv, h=head))


@settings(max_examples=100, deadline=None)
@given(mask=masks(), q_len=sides, kv_len=sides, block=blocks)
def test_no_head_means_every_head(mask: Expr, q_len: int, kv_len: int, block: int) -> None:
    got = block_cover(
        mask, q_len=q_len, kv_len=kv_len, block_q=block, block_kv=block, extents={"h": 3}
    )
    per_head = np.stack([brute(mask, q_len, kv_len, block, block, h=h) for h in range(3)])
    assert (per_head[:, got == Cover.EMPTY] == Cover.EMPTY).all()
    assert (per_head[:, got == Cover.FULL] == Cover.FULL).all()


@settings(max_examples=100, deadline=None)
@given(mask=masks(), q_len=sides, kv_len=sides, bq=blocks, bkv=blocks)
def test_counts_follow_the_cover(mask: Expr, q_len: int, kv_len: int, bq: int, bkv: int) -> None:
    counts = block_counts(mask, q_len=q_len, kv_len=kv_len, block_q=bq, block_kv=bkv, head=1)
    cells = brute(mask, q_len, kv_len, bq, bkv, h=1)
    pairs = brute(mask, q_len, kv_len, 1, 1, h=1)
    assert (counts.kept, counts.total) == (int((cells != Cover.EMPTY).sum()), cells.size)
    assert counts.full == int((cells == Cover.FULL).sum())
    assert counts.elements == int((pairs == Cover.FULL).sum())


def test_a_mask_of_heads_is_decided_per_head() -> None:
    mask = where(H < 2, (d >= 0) & (d < 4), eq(Q // 8, KV // 8))
    assert heads_differ(mask)
    assert not heads_differ(d >= 0)
    for head in (0, 1, 2, 5):
        got = block_cover(mask, q_len=24, kv_len=24, block_q=4, block_kv=4, head=head)
        np.testing.assert_array_equal(got, brute(mask, 24, 24, 4, 4, h=head))


def test_unknown_reads_stay_partial_only_where_they_matter() -> None:
    mask = Read("M", (B, KV)) & (d >= 0)
    assert depends_on_data(mask)
    got = block_cover(mask, q_len=12, kv_len=12, block_q=4, block_kv=4)
    lower = np.tril(np.ones((3, 3), np.int8))
    np.testing.assert_array_equal(got, lower * Cover.PARTIAL)
    either = block_cover(mask | (KV < 4), q_len=12, kv_len=12, block_q=4, block_kv=4)
    assert (either[:, 0] == Cover.FULL).all()


def test_unknown_documents_are_never_decided() -> None:
    same = eq(Read("doc", (B, Q)), Read("doc", (B, KV)))
    got = block_cover(same, q_len=8, kv_len=8, block_q=4, block_kv=4)
    assert (got == Cover.PARTIAL).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), q_len=sides, kv_len=sides, block=blocks, step=blocks)
def test_known_tables_are_read(seed: int, q_len: int, kv_len: int, block: int, step: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((2, -(-q_len // step), -(-kv_len // step))) < 0.4
    mask = Read("T", (H, Q // step, KV // step)) & (d > -3)
    got = block_cover(
        mask, q_len=q_len, kv_len=kv_len, block_q=block, block_kv=block, head=1, tables={"T": table}
    )
    np.testing.assert_array_equal(got, brute(mask, q_len, kv_len, block, block, h=1, T=table))


def test_rounded_comparisons_are_never_decided_at_the_border() -> None:
    mask = Q / 3 <= KV / 3
    got = block_cover(mask, q_len=9, kv_len=9, block_q=1, block_kv=1)
    want = brute(mask, 9, 9, 1, 1)
    equal = np.eye(9, dtype=bool)
    np.testing.assert_array_equal(got[~equal], want[~equal])
    assert (got[equal] == Cover.PARTIAL).all()


@pytest.mark.parametrize(
    ("name", "mask", "elements"),
    [
        ("window", (d >= 0) & (d < 1024), 118_800 * 1024 - 1024 * 1023 // 2),
        ("chunk", eq(Q // 1000, KV // 1000), 118 * 1000**2 + 800**2),
        ("dilated", eq(d % 7, 0), None),
    ],
)
def test_a_long_video_is_counted_fast(name: str, mask: Expr, elements: int | None) -> None:
    start = time.process_time()
    counts = block_counts(mask, q_len=118_800, kv_len=118_800, block_q=128, block_kv=128)
    assert counts.total == 929 * 929
    assert counts.elements == elements
    # The goal is 2 s on an idle machine; the limit leaves room for a loaded one.
    assert time.process_time() - start < 6
