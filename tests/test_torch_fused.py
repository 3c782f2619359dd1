"""Rows of tiled attention on PyTorch's fused CPU kernel, against dense float64 references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_rewrite.backends.torch import fused, patterns, pieces
from attn_rewrite.backends.torch import kernel as kernel_module
from attn_rewrite.backends.torch.blocks import choose_block
from attn_rewrite.backends.torch.ops import tiled_attention
from attn_rewrite.backends.torch.schedule import Row
from attn_rewrite.backends.torch.tiles import prepare
from attn_rewrite.cascade.attention import QK, as_softmax
from attn_rewrite.cascade.expr import KV, B, Expr, H, Q, Read, call, eq
from attn_rewrite.cascade.ir import TensorDecl
from tests.fused_rows import fused_rows
from tests.test_torch_backend import (
    GUARDS,
    _eager,
    assert_close,
    attention,
    keep_of,
    operands,
    reference,
)

SHAPES = [  # b, hq, group, q_len, kv_len, d_qk, d_v, block
    (1, 1, 1, 1, 1, 4, 4, 16),
    (2, 4, 1, 33, 33, 8, 8, 8),
    (2, 4, 2, 40, 57, 8, 8, 8),
    (1, 4, 4, 17, 50, 5, 5, 16),
    (3, 4, 1, 1, 45, 8, 8, 8),
]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[fused.Unit]:
    """Send rows of any size to the fused kernel; the units that ran."""
    ran = fused_rows(monkeypatch)
    monkeypatch.setattr(pieces, "WORTH_CALL", 32)
    for module in (pieces, patterns):
        monkeypatch.setattr(module, "SIDE", 8)
    return ran


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scratch", [1, 300, 1 << 18])
@pytest.mark.parametrize("lanes", [1, 3])
def test_rows_equal_dense_attention(
    name: str,
    shape: tuple[int, ...],
    scratch: int,
    lanes: int,
    rows: list[fused.Unit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "SCRATCH", scratch)
    monkeypatch.setattr(fused, "OUTPUTS", scratch)
    monkeypatch.setattr(kernel_module, "_lanes", lambda problem: lanes)
    guard, mask = GUARDS[name]
    q, k, v = operands(shape, torch.float64)
    keep = keep_of(mask, shape[1], shape[3], shape[4])
    got = tiled_attention(q, k, v, [], str(attention(guard, group=shape[2])), shape[-1])
    assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))
    assert bool(rows) == bool(keep.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["window", "sinks", "per head", "empty prefix", "two stripes"])
def test_types(dtype: torch.dtype, name: str, rows: list[fused.Unit]) -> None:
    guard, mask = GUARDS[name]
    q, k, v = operands(SHAPES[2], dtype)
    keep = keep_of(mask, 4, 40, 57)
    got = tiled_attention(q, k, v, [], str(attention(guard, group=2)), 8)
    assert got.dtype == dtype
    assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))
    assert rows


@pytest.mark.parametrize("layout", ["bshd", "expanded", "packed qkv"])
def test_strided_inputs(layout: str, rows: list[fused.Unit]) -> None:
    b, h, s = 2, 3, 29
    views = {
        "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t[:, :1].expand(-1, h, -1, -1),
        "packed qkv": lambda t: torch.stack([t, t, t], 2)[:, :, 1],
    }
    q, k, v = (views[layout](t) for t in operands((b, h, 1, s, s, 8, 8, 8), torch.float64))
    for name in ("window", "sinks", "per head"):
        guard, mask = GUARDS[name]
        keep = keep_of(mask, h, s, s)
        got = tiled_attention(q, k, v, [], str(attention(guard)), 8)
        assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))
    assert rows


def test_large_scores_in_pieces(rows: list[fused.Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SCRATCH", 100)
    q, k, v = operands(SHAPES[1])
    q, k = q * 100, k * 100
    guard, mask = GUARDS["causal"]
    keep = keep_of(mask, 4, 33, 33)
    got = tiled_attention(q, k, v, [], str(attention(guard, QK)), 8)
    assert_close(got, reference(q, k, v, keep, 1.0), _eager(q, k, v, keep, 1.0))
    assert any(len(unit.pieces) > 2 for unit in rows)


def test_a_mask_of_the_batch_entry_is_read_in_every_call(rows: list[fused.Unit]) -> None:
    shape = (2, 4, 2, 40, 40, 8, 8, 8)
    q, k, v = operands(shape, torch.float64)
    reads = (TensorDecl("M", ("b", "kv"), dtype="bool"),)
    text = str(attention((Q >= KV) & Read("M", (B, KV)), group=2, reads=reads))
    for seed in range(2):
        some = torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.5
        keep = torch.tril(torch.ones(40, 40, dtype=torch.bool)) & some[:, None, None]
        got = tiled_attention(q, k, v, [some], text, 8)
        assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))
        assert (got[~keep.any(-1).expand(2, 4, 40)] == 0).all()
    assert {unit.batch for unit in rows} == {(0, 1), (1, 2)}


@pytest.mark.parametrize("group", [1, 2])
def test_heads_that_cut_the_same_blocks_in_other_places(group: int, rows: list[fused.Unit]) -> None:
    shape = (2, 4, group, 40, 40, 8, 8, 8)
    q, k, v = operands(shape, torch.float64)
    guard = (Q >= KV) & (Q - KV < 9 + H)
    keep = keep_of(lambda h, q, k, ql, kl: (q >= k) & (q - k < 9 + h), 4, 40, 40)
    for _ in range(2):  # the second call finds its squares
        got = tiled_attention(q, k, v, [], str(attention(guard, group=group)), 8)
        assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))
    assert rows


@st.composite
def _problems(draw: st.DrawFn) -> tuple[tuple[int, ...], Expr, Any, int]:
    """Sizes, a guard, what it keeps as a function of numbers, and the scratch of a call."""
    number = st.integers
    group, heads = draw(number(1, 2)), draw(number(1, 2))
    sizes = (draw(number(1, 2)), group * heads, group, draw(number(1, 40)), draw(number(1, 40)))
    shape = (*sizes, 8, 8, draw(st.sampled_from([8, 16])))
    a, b, c = draw(number(-9, 9)), draw(number(1, 20)), draw(number(2, 11))
    near = ((a <= Q - KV) & (a + b > Q - KV), lambda h, q, k: (q - k >= a) & (q - k < a + b))
    strided = (eq((Q - KV) % c, 0), lambda h, q, k: (q - k) % c == 0)
    rows = ((Q % c < 3) | (KV < 8), lambda h, q, k: (q % c < 3) | (k < 8))
    tiles = (eq(Q // c, KV // c), lambda h, q, k: q // c == k // c)
    headed = (eq((KV // 8 + H) % 3, 0), lambda h, q, k: (k // 8 + h) % 3 == 0)
    one, two = (draw(st.sampled_from([near, strided, rows, tiles, headed])) for _ in range(2))
    if draw(st.booleans()):
        return shape, one[0] | two[0], lambda *x: one[1](*x) | two[1](*x), draw(number(1, 2000))
    return shape, one[0] & two[0], lambda *x: one[1](*x) & two[1](*x), draw(number(1, 2000))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(problem=_problems(), lanes=st.integers(1, 2))
def test_any_mask_in_any_pieces(
    rows: list[fused.Unit],
    monkeypatch: pytest.MonkeyPatch,
    problem: tuple[tuple[int, ...], Expr, Any, int],
    lanes: int,
) -> None:
    shape, guard, mask, scratch = problem
    monkeypatch.setattr(fused, "SCRATCH", scratch)
    monkeypatch.setattr(kernel_module, "_lanes", lambda problem: lanes)
    q, k, v = operands(shape)
    keep = keep_of(lambda h, q, k, ql, kl: mask(h, q, k), shape[1], shape[3], shape[4])
    got = tiled_attention(q, k, v, [], str(attention(guard, group=shape[2])), shape[-1])
    assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))


def test_squares_of_other_heights_are_not_the_same(rows: list[fused.Unit]) -> None:
    """The last row is a query shorter, and what it keeps of the last key has the same bits."""
    q, k, v = operands((1, 2, 1, 15, 9, 8, 8, 8), torch.float64)
    guard = (Q % 8 < 3) | (KV < 8)
    keep = keep_of(lambda h, q, k, ql, kl: (q % 8 < 3) | (k < 8), 2, 15, 9)
    got = tiled_attention(q, k, v, [], str(attention(guard)), 8)
    assert_close(got, reference(q, k, v, keep, 0.3), _eager(q, k, v, keep, 0.3))
    assert len(rows) > 1


def test_a_square_is_evaluated_once(
    rows: list[fused.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    original = patterns.Squares.add

    def spy(self: Any, head: int, row: Row, squares: Sequence[Tensor]) -> Any:
        asked.extend((head, row.queries, n) for n in range(len(squares)))
        return original(self, head, row, squares)

    monkeypatch.setattr(patterns.Squares, "add", spy)
    patterns._squares.cache_clear()
    q, k, v = operands((1, 2, 1, 64, 64, 8, 8, 8), torch.float64)
    guard = (Q - KV >= 0) & (Q - KV < 24)
    first = tiled_attention(q, k, v, [], str(attention(guard)), 8)
    assert len(asked) == len(set(asked)) == 8 + 5  # the diagonal, and the far edge of the window
    known = patterns._squares(guard, tuple(sorted({"b": 1, "h": 2, "hkv": 2, "q": 64, "kv": 64,
                                                   "d": 8, "f": 8}.items())))  # fmt: skip
    assert len(known._distinct) == 2
    assert torch.equal(tiled_attention(q, k, v, [], str(attention(guard)), 8), first)
    assert len(asked) == 8 + 5


def test_pieces_cover_the_row() -> None:
    keys = ((0, 300), (512, 5000), (6000, 6001))
    row = Row((0, 128), keys, ((0, 300), (900, 1000)), True, 38, 30)
    parts = pieces.pieces(row, 64, pieces.SCRATCH, 301)
    seen = sorted(at for part in parts for span in part.keys for at in range(*span))
    assert seen == [at for span in keys for at in range(*span)]
    assert [part.keys for part in parts[-1:]] == [((0, 300), (6000, 6001))]
    assert all(len(part.keys) == 1 for part in parts[:-1])
    for part in parts:
        each = 128 * bool(part.masked) + 128 * (len(part.keys) > 1)
        assert part.width * each <= pieces.SCRATCH
    masked = sorted(at for part in parts for at in _masked_keys(part))
    assert masked == [*range(300), *range(512 + 600, 512 + 700)]
    assert [part.certain for part in parts] == [True] * len(parts)
    plain = Row((0, 128), ((0, 100_000),), (), True, 782, 782)
    assert pieces.pieces(plain, 64, pieces.SCRATCH, 1) == [plain]


def test_ranges_that_touch_are_one_call() -> None:
    """Masked blocks come first in a row: beside what they cut from, they need no copies."""
    keys = ((0, 128), (512, 640), (1024, 1152), (640, 1024))
    row = Row((0, 128), keys, ((0, 384),), True, 6, 3)
    window, sinks = pieces.pieces(row, 64, pieces.SCRATCH, 192)
    assert (window.keys, window.masked) == (((512, 1152),), ((0, 128), (512, 640)))
    assert (sinks.keys, sinks.masked) == (((0, 128),), ((0, 128),))
    assert (window.certain, sinks.certain) == (True, False)


def _masked_keys(part: Row) -> list[int]:
    keys = [at for span in part.keys for at in range(*span)]
    return [keys[column] for span in part.masked for column in range(*span)]


def test_merging_weighs_pieces_by_their_sums() -> None:
    minus = -math.inf
    sums = [[math.log(1), minus, minus], [math.log(3), minus, 5.0], [minus, minus, 1e4]]
    results = [[1.0, 0.0, 0.0], [3.0, 0.0, 2.0], [0.0, 0.0, 4.0]]
    total, kept = (torch.tensor(t[0]).view(1, 1, 3, 1) for t in (results, sums))
    kept = kept[..., 0]
    for result, lse in zip(results[1:], sums[1:], strict=True):
        fused.merge(total, kept, torch.tensor(result).view(1, 1, 3, 1), torch.tensor([[lse]]))
    assert total.flatten().tolist() == pytest.approx([2.5, 0.0, 4.0])
    assert kept.flatten().tolist() == pytest.approx([math.log(4), minus, 1e4])


def test_keys_are_copied_in_the_largest_blocks_they_are_made_of() -> None:
    unit, index = pieces.blocks_of([(64, 96), (0, 16), (112, 128)])
    assert (unit, index.tolist()) == (16, [4, 5, 0, 7])
    unit, index = pieces.blocks_of([(32, 48), (96, 99)])
    assert (unit, index.tolist()) == (1, [*range(32, 48), 96, 97, 98])


@pytest.mark.parametrize("lanes", [1, 2, 64])
@pytest.mark.parametrize("group", [1, 2])
def test_every_lane_has_work(lanes: int, group: int, rows: list[fused.Unit]) -> None:
    q, k, v = operands((2, 8, group, 64, 64, 8, 8, 32))
    form = as_softmax(attention((Q >= KV) & (Q - KV < 24), group=group))
    assert form is not None
    problem = prepare(form, q, k, v, [], 32)
    found = fused.units(problem, lanes)
    seen = [
        (b, h, unit.queries)
        for unit in found
        for b in range(*unit.batch)
        for h in range(*unit.heads)
    ]
    assert sorted(seen) == [
        (b, h, q) for b in range(2) for h in range(8) for q in ((0, 32), (32, 64))
    ]
    # As many tasks as asked for, or one for each key head of a row.
    assert len(found) >= min(fused._TASKS * lanes, len(seen) // group)
    assert all(unit.heads[0] % group == unit.heads[1] % group == 0 for unit in found)


def test_a_smaller_tile_must_save_what_it_costs() -> None:
    fixed = {"q": 4096, "kv": 4096, "h": 2}
    narrow, wide = attention((Q >= KV) & (Q - KV < 16)), attention((Q >= KV) & (Q - KV < 1024))
    scattered = attention((call("abs", Q % 128 - KV % 128) <= 16) & (H >= 0))
    assert choose_block(narrow, fixed) == 32
    assert choose_block(wide, fixed) == 128
    assert choose_block(scattered, fixed) == 128
