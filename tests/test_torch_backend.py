"""The torch backend against dense float64 references written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attn_rewrite.ops
from attn_rewrite.backends.torch import Kernel, lower, lower_cascade_to_callable
from attn_rewrite.backends.torch import kernel as kernel_module
from attn_rewrite.backends.torch import tiles as tiles_module
from attn_rewrite.backends.torch.dense import emit_dense
from attn_rewrite.backends.torch.form import (
    depends_only_on_distance,
    is_causal,
    is_causal_with_offset,
    linear_score,
)
from attn_rewrite.backends.torch.lanes import run_in_lanes
from attn_rewrite.backends.torch.ops import run, tile_counts, tiled_attention
from attn_rewrite.cascade import interpret, parse
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, as_softmax, softmax_cascade
from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    B,
    Const,
    Expr,
    Extent,
    H,
    Q,
    Read,
    call,
    eq,
    where,
)
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.named import NAMED
from attn_rewrite.conditioning import score_rounding
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import EagerBuilder
from attn_rewrite.site import Refusal

Mask = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
d = Q - KV
NEG = -math.inf

# Guard and the same mask by hand, from coordinates h, q, kv (broadcastable) and the lengths.
GUARDS: dict[str, tuple[Expr, Mask]] = {
    "none": (TRUE, lambda h, q, k, ql, kl: (q == q) & (k == k)),
    "causal": (d >= 0, lambda h, q, k, ql, kl: q >= k),
    "cached": (
        Q + (Extent("kv") - Extent("q")) >= KV,
        lambda h, q, k, ql, kl: q + kl - ql >= k,
    ),
    "window": ((d >= 0) & (d < 11), lambda h, q, k, ql, kl: (q >= k) & (q - k < 11)),
    "symmetric": (call("abs", d) <= 6, lambda h, q, k, ql, kl: (q - k).abs() <= 6),
    "sinks": (
        (d >= 0) & ((KV < 3) | (d < 9)),
        lambda h, q, k, ql, kl: (q >= k) & ((k < 3) | (q - k < 9)),
    ),
    "chunk": (eq(Q // 10, KV // 10), lambda h, q, k, ql, kl: q // 10 == k // 10),
    "dilated": (eq(d % 5, 0) & (d >= 0), lambda h, q, k, ql, kl: (((q - k) % 5) == 0) & (q >= k)),
    "two stripes": (
        (KV // 8 % 3).__lt__(1) & (Q // 8 % 2).__lt__(1),
        lambda h, q, k, ql, kl: (k // 8 % 3 < 1) & (q // 8 % 2 < 1),
    ),
    "empty prefix": (d >= 13, lambda h, q, k, ql, kl: q - k >= 13),
    "per head": (
        where(H < 2, (d >= 0) & (d < 7), eq(Q // 16, KV // 16)),
        lambda h, q, k, ql, kl: torch.where(h < 2, (q >= k) & (q - k < 7), q // 16 == k // 16),
    ),
    "nothing": (d > 10_000, lambda h, q, k, ql, kl: q - k > 10_000),
}
SHAPES = [  # b, hq, group, q_len, kv_len, d_qk, d_v, block
    (1, 1, 1, 1, 1, 4, 4, 16),
    (2, 4, 1, 33, 33, 8, 8, 8),
    (2, 4, 2, 40, 57, 8, 6, 8),
    (1, 4, 4, 17, 50, 5, 9, 16),
    (3, 4, 1, 1, 45, 8, 8, 8),
]


def keep_of(mask: Mask, hq: int, q_len: int, kv_len: int) -> Tensor:
    h = torch.arange(hq).view(-1, 1, 1)
    q, k = torch.arange(q_len).view(-1, 1), torch.arange(kv_len)
    return mask(h, q, k, q_len, kv_len).expand(hq, q_len, kv_len)


def reference(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, bias: Tensor | float = 0.0
) -> Tensor:
    """Dense attention in float64; rows without keys are 0."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale + bias).masked_fill(~keep, NEG)
    some = keep.any(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(~some, 0.0), -1).masked_fill(~some, 0.0)
    return p @ v


def bound(want: Tensor, dtype: torch.dtype, original: Tensor | None = None) -> float:
    """max(2 x error of the original in the same type, 4 eps x max|reference|)."""
    own = 0.0 if original is None else (original.double() - want).abs().max().item()
    return max(2 * own, 4 * torch.finfo(dtype).eps * want.abs().max().item())


def assert_close(got: Tensor, want: Tensor, original: Tensor | None = None) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    error = (got.double() - want).abs().max().item() if want.numel() else 0.0
    assert error <= (bound(want, got.dtype, original) if want.numel() else 0.0)


def operands(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, group, q_len, kv_len, d_qk, d_v, _ = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((hq, q_len, d_qk), (hq // group, kv_len, d_qk), (hq // group, kv_len, d_v))
    q, k, v = (torch.randn(b, *s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
    return q, k, v


def attention(guard: Expr = TRUE, score: Expr = QK * 0.3, **parts: Any) -> Cascade:
    return softmax_cascade(SoftmaxAttention(score=score, guard=guard, **parts))


# The operator


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_equal_dense_attention(name: str, shape: tuple[int, ...]) -> None:
    guard, mask = GUARDS[name]
    q, k, v = operands(shape)
    got = tiled_attention(q, k, v, [], str(attention(guard, group=shape[2])), shape[-1])
    want = reference(q, k, v, keep_of(mask, shape[1], shape[3], shape[4]), 0.3)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["window", "sinks", "per head", "empty prefix"])
def test_types_compute_in_float32_or_wider(dtype: torch.dtype, name: str) -> None:
    guard, mask = GUARDS[name]
    q, k, v = operands(SHAPES[2], dtype)
    got = tiled_attention(q, k, v, [], str(attention(guard, group=2)), 8)
    assert got.dtype == dtype
    assert_close(got, reference(q, k, v, keep_of(mask, 4, 40, 57), 0.3))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(GUARDS)),
    b=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    block=st.sampled_from([1, 3, 4, 16, 64]),
    budget=st.sampled_from([1, 200, 1 << 20]),
)
def test_odd_shapes_and_small_tiles(
    name: str, b: int, heads: int, group: int, q_len: int, kv_len: int, block: int, budget: int
) -> None:
    guard, mask = GUARDS[name]
    shape = (b, heads * group, group, q_len, kv_len, 4, 3, block)
    q, k, v = operands(shape, torch.float64)
    cascade = str(attention(guard, group=group))
    with pytest.MonkeyPatch.context() as patch:
        # Small tiles exercise every way a row is cut: batch, heads, queries, stacks of rows.
        patch.setattr(tiles_module, "TILE_ELEMENTS", budget)
        patch.setattr(tiles_module, "_MIN_HEIGHT", 2)
        got = tiled_attention(q, k, v, [], cascade, block)
    want = reference(q, k, v, keep_of(mask, heads * group, q_len, kv_len), 0.3)
    assert_close(got, want)


@pytest.mark.parametrize("layout", ["bshd", "expanded", "reversed slice", "packed qkv"])
def test_strided_inputs(layout: str) -> None:
    b, h, s, n = 2, 3, 29, 8
    base = operands((b, h, 1, s, s, n, n, 8))
    views = {
        "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t[:, :1].expand(-1, h, -1, -1),
        "reversed slice": lambda t: torch.cat([t, t], -1)[..., ::2],
        "packed qkv": lambda t: torch.stack([t, t, t], 2)[:, :, 1],
    }
    q, k, v = (views[layout](t) for t in base)
    for name in ("window", "sinks", "per head"):
        guard, mask = GUARDS[name]
        got = tiled_attention(q, k, v, [], str(attention(guard)), 8)
        assert_close(got, reference(q, k, v, keep_of(mask, h, s, s), 0.3))


def test_large_scores_stay_finite() -> None:
    q, k, v = operands(SHAPES[1])
    guard, mask = GUARDS["window"]
    keep = keep_of(mask, 4, 33, 33)
    got = tiled_attention(q * 100, k * 100, v, [], str(attention(guard, QK)), 8)
    want = reference(q * 100, k * 100, v, keep, 1.0)
    original = _eager(q * 100, k * 100, v, keep, 1.0)
    assert (q * 100 @ (k * 100).mT).abs().max() > 1e4
    assert_close(got, want, original)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, bias: Tensor | float = 0.0
) -> Tensor:
    """What a model computes: the same formula in the type of its inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale + bias).masked_fill(~keep, NEG)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("name", ["window", "sinks", "per head", "two stripes"])
@pytest.mark.parametrize("group", [1, 2])
def test_lanes_compute_what_one_thread_computes(
    name: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(kernel_module, "_lanes", lambda problem: 3)
    shape = (2, 4, group, 60, 60, 8, 8, 8)
    q, k, v = operands(shape)
    guard, mask = GUARDS[name]
    got = tiled_attention(q, k, v, [], str(attention(guard, group=group)), 8)
    assert_close(got, reference(q, k, v, keep_of(mask, 4, 60, 60), 0.3))
    assert torch.get_num_threads() == threads


def test_an_error_in_a_lane_reaches_the_caller() -> None:
    def make() -> Callable[[int], None]:
        def function(task: int) -> None:
            if task == 5:
                raise ValueError("task 5")

        return function

    with pytest.raises(ValueError, match="task 5"):
        run_in_lanes(range(20), make, 2)
    done: list[int] = []
    run_in_lanes(range(20), lambda: done.append, 2)
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("size", [33, 700])
def test_autocast_does_not_reach_into_the_kernel(size: int) -> None:
    q, k, v = operands((1, 8, 1, size, size, 8, 8, 64))
    guard, mask = GUARDS["causal"]
    with torch.autocast("cpu", torch.bfloat16):
        got = tiled_attention(q, k, v, [], str(attention(guard)), 64)
    assert_close(got, reference(q, k, v, keep_of(mask, 8, size, size), 0.3))


def test_rows_of_minus_infinity_in_the_score_are_zero_and_nan_is_kept() -> None:
    q, k, v = operands(SHAPES[1])
    padding = torch.ones(2, 33, dtype=torch.bool)
    padding[1, :12] = False
    cascade = attention(
        GUARDS["causal"][0],
        where(Read("M", (B, KV)), QK * 0.3, NEG),
        reads=(TensorDecl("M", ("b", "kv"), dtype="bool"),),
    )
    keep = torch.tril(torch.ones(33, 33, dtype=torch.bool)) & padding[:, None, None]
    got = tiled_attention(q, k, v, [padding], str(cascade), 8)
    assert_close(got, reference(q, k, v, keep, 0.3))
    assert (got[1, :, :12] == 0).all()
    poisoned = q.clone()
    poisoned[0, 1, 20] = math.nan
    got = tiled_attention(poisoned, k, v, [padding], str(cascade), 8)
    assert got[0, 1, 20].isnan().all()
    assert int(got.isnan().sum()) == 8


READS: dict[str, tuple[Expr, tuple[str, ...], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "full bias": (Read("T", (B, H, Q, KV)), ("b", "h", "q", "kv"), (2, 4, 40, 57), lambda t: t),
    "bias of batch 1": (
        Read("T", (B, H, Q, KV)), ("b", "h", "q", "kv"), (1, 4, 40, 57), lambda t: t,
    ),
    "bias of head 1": (
        Read("T", (B, H, Q, KV)), ("b", "h", "q", "kv"), (2, 1, 40, 57), lambda t: t,
    ),
    "keys first": (
        Read("T", (KV, H, Q)), ("kv", "h", "q"), (57, 4, 40), lambda t: t.permute(1, 2, 0),
    ),
    "per key": (Read("T", (B, KV)), ("b", "kv"), (2, 57), lambda t: t[:, None, None]),
    "relative": (
        Read("T", (H, Q - KV + 56)), ("h", "r"), (4, 40 + 57),
        lambda t: t[:, torch.arange(40)[:, None] - torch.arange(57) + 56],
    ),
    "slope": (
        Read("T", (H,)) * (KV - Q), ("h",), (4,),
        lambda t: t.view(-1, 1, 1) * (torch.arange(57) - torch.arange(40)[:, None]),
    ),
    "table of blocks": (
        Read("T", (H, Q // 8, KV // 8)), ("h", "n", "m"), (4, 5, 8),
        lambda t: t[:, torch.arange(40)[:, None] // 8, torch.arange(57) // 8],
    ),
    "scalar": (Read("T", ()), (), (), lambda t: t),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("guard", ["window", "two stripes", "per head"])
@pytest.mark.parametrize("group", [1, 2])
def test_score_terms_that_read_tensors(name: str, guard: str, group: int) -> None:
    expr, ranks, size, spread = READS[name]
    shape = (2, 4, group, 40, 57, 8, 6, 8)
    q, k, v = operands(shape)
    table = torch.randn(size, generator=torch.Generator().manual_seed(1))
    reads = (TensorDecl("T", ranks),)
    cascade = attention(GUARDS[guard][0], QK * 0.3 + expr, group=group, reads=reads)
    keep = keep_of(GUARDS[guard][1], 4, 40, 57)
    want = reference(q, k, v, keep, 0.3, spread(table.double()))
    original = _eager(q, k, v, keep, 0.3, spread(table))
    assert_close(tiled_attention(q, k, v, [table], str(cascade), 8), want, original)
    dense = softmax_cascade_kernel(cascade, "dense")
    assert_close(dense.emit(EagerBuilder(), [q, k, v, table]), want, original)


def softmax_cascade_kernel(cascade: Cascade, name: str) -> Kernel:
    """The kernel of that name for a cascade, whatever `lower` would choose."""
    if name != "dense":
        kernel = lower(cascade, block=8, extents={"q": 40, "kv": 57})
        assert isinstance(kernel, Kernel)
        assert kernel.name == name
        return kernel
    kernel = lower(cascade, dropout=1e-9)
    assert isinstance(kernel, Kernel)
    form = form_of(cascade)
    return Kernel(
        "dense", cascade, kernel.exactness, "test", {}, lambda b, i: emit_dense(b, form, i)
    )


def test_block_lists_are_read_before_the_kernel_and_really_skip() -> None:
    shape = (1, 2, 1, 64, 64, 5, 8, 8)
    q, k, v = operands(shape)
    lists = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    lists[1, 2] = False
    guard = Read("L", (H, Q // 8, KV // 8))
    cascade = attention(guard, reads=(TensorDecl("L", ("h", "n", "m"), dtype="bool"),))
    keep = lists.repeat_interleave(8, 1).repeat_interleave(8, 2)
    # Below the operator, as dispatch modes do not look inside it.
    got, pairs = counted(lambda: run(form_of(cascade), q, k, v, [lists], 8), 5)
    assert_close(got, reference(q, k, v, keep, 0.3))
    assert pairs == int(keep.sum())
    counts = tile_counts(cascade, 64, 64, 8, 2, tables={"L": lists.numpy()})
    assert (counts.executed, counts.full, counts.total) == (int(lists.sum()),) * 2 + (128,)
    kernel = lower(cascade, block=8)
    assert isinstance(kernel, Kernel)
    assert kernel.name == "tiled"


@pytest.mark.parametrize("guard", ["window", "per head", "two stripes"])
def test_soft_cap_sink_and_weight(guard: str) -> None:
    q, k, v = operands(SHAPES[2])
    sink = torch.randn(4, generator=torch.Generator().manual_seed(5))
    cascade = attention(
        GUARDS[guard][0],
        call("tanh", QK * 0.02) * 15.0,
        sink=Read("s", (H,)),
        weight=Read("w", (B, H, Q)) * 2,
        group=2,
        reads=(TensorDecl("s", ("h",)), TensorDecl("w", ("b", "h", "q"))),
    )
    weight = torch.rand(2, 4, 40)
    scores = torch.tanh(q.double() @ k.double().repeat_interleave(2, 1).mT * 0.02) * 15
    scores = scores.masked_fill(~keep_of(GUARDS[guard][1], 4, 40, 57), NEG)
    extra = sink.double().view(1, -1, 1, 1).expand(2, 4, 40, 1)
    p = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    want = (p * weight.double()[..., None] * 2) @ v.double().repeat_interleave(2, 1)
    assert_close(tiled_attention(q, k, v, [sink, weight], str(cascade), 8), want)
    dense = softmax_cascade_kernel(cascade, "dense").emit(EagerBuilder(), [q, k, v, sink, weight])
    assert_close(dense, want)


@pytest.mark.parametrize("name", ["window", "sinks", "per head", "cached"])
def test_the_kernel_agrees_with_the_oracle(name: str) -> None:
    q, k, v = operands(SHAPES[2])
    cascade = attention(GUARDS[name][0], group=2)
    want = interpret(cascade, {"Q": q, "K": k, "V": v})["AV"]
    assert_close(tiled_attention(q, k, v, [], str(cascade), 8), want)


# Counting what runs


class _Products(TorchDispatchMode):
    """Sums the elements of every score product that runs."""

    def __init__(self, d_qk: int) -> None:
        super().__init__()
        self.d_qk, self.pairs = d_qk, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.baddbmm, torch.ops.aten.bmm):
            left, right = args[-2:]
            if left.shape[-1] == self.d_qk:
                self.pairs += left.shape[0] * left.shape[1] * right.shape[2]
        return func(*args, **(kwargs or {}))


def form_of(cascade: Cascade) -> SoftmaxAttention:
    form = as_softmax(cascade)
    assert form is not None
    return form


def counted(function: Callable[[], Tensor], d_qk: int = 8) -> tuple[Tensor, int]:
    with _Products(d_qk) as products:
        result = function()
    return result, products.pairs


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("group", [1, 2])
def test_counts_are_what_ran(name: str, group: int) -> None:
    shape = (1, 4, group, 96, 80, 8, 16, 16)
    q, k, v = operands(shape)
    cascade = attention(GUARDS[name][0], group=group)
    _, pairs = counted(lambda: run(form_of(cascade), q, k, v, [], 16))
    counts = tile_counts(cascade, 96, 80, 16, 4)
    keep = keep_of(GUARDS[name][1], 4, 96, 80)
    assert pairs == counts.pairs == counts.executed * 16 * 16
    assert counts.executed == int(_blocks(keep, "any").sum())
    assert counts.full == int(_blocks(keep, "all").sum())
    assert counts.total == 4 * 6 * 5


def _blocks(keep: Tensor, how: str) -> Tensor:
    cut = keep.view(4, 6, 16, 5, 16).permute(0, 1, 3, 2, 4).flatten(3)
    return cut.any(-1) if how == "any" else cut.all(-1)


def test_mask_arithmetic_runs_only_in_partial_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = kernel_module._GuardBounds._bound

    def spy(self: Any, job: Any, start: int, stop: int) -> Tensor:
        seen.append((stop - start) * job.row.height)
        return original(self, job, start, stop)

    monkeypatch.setattr(kernel_module._GuardBounds, "_bound", spy)
    q, k, v = operands((1, 2, 1, 128, 128, 8, 8, 8))
    cascade = attention((d >= 0) & (d < 32))
    tiled_attention(q, k, v, [], str(cascade), 8)
    counts = tile_counts(cascade, 128, 128, 8, 1)
    assert sum(seen) == (counts.executed - counts.full) * 64


# torch.compile, torch.export, autograd


def test_opcheck() -> None:
    q, k, v = (t.requires_grad_() for t in operands((1, 4, 2, 20, 24, 4, 6, 8)))
    bias = torch.randn(4, 20, 24, requires_grad=True)
    reads = (TensorDecl("T", ("h", "q", "kv")),)
    text = str(attention(GUARDS["window"][0], QK + Read("T", (H, Q, KV)), group=2, reads=reads))
    torch.library.opcheck(tiled_attention, (q, k, v, [bias], text, 8))
    grad = torch.randn(1, 4, 20, 6)
    backward = torch.ops.attn_rewrite.tiled_attention_backward.default
    arguments = (grad, *(t.detach() for t in (q, k, v)), [bias.detach()], text, 8, [0])
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["window", "per head", "empty prefix", "two stripes"])
@pytest.mark.parametrize("group", [1, 2])
def test_gradients(name: str, group: int) -> None:
    shape = (1, 4, group, 7, 10, 3, 2, 4)
    q, k, v = (t.requires_grad_() for t in operands(shape, torch.float64))
    slope = torch.rand(4, dtype=torch.float64, requires_grad=True)
    sink = torch.rand(4, dtype=torch.float64, requires_grad=True)
    cascade = attention(
        GUARDS[name][0],
        call("tanh", QK * 0.3) + Read("m", (H,)) * d,
        sink=Read("s", (H,)),
        group=group,
        reads=(TensorDecl("m", ("h",)), TensorDecl("s", ("h",))),
    )
    text = str(cascade)

    def function(*tensors: Tensor) -> Tensor:
        return tiled_attention(*tensors[:3], list(tensors[3:]), text, 4)

    assert torch.autograd.gradcheck(function, (q, k, v, slope, sink))


class Layer(nn.Module):
    """A linear layer, tiled attention and a reshape, on [b, s, width]."""

    def __init__(self, text: str, heads: int = 2) -> None:
        super().__init__()
        self.text, self.heads, self.mix = text, heads, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.mix(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = torch.ops.attn_rewrite.tiled_attention(q, k, v, [], self.text, 8)
        return out.transpose(1, 2).reshape(b, s, 8)


def test_export_with_dynamic_batch_and_length_round_trips(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Layer(str(attention(GUARDS["window"][0])))
    shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (torch.randn(2, 19, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for b, s in ((1, 40), (3, 7)):
        x = torch.randn(b, s, 8)
        assert torch.equal(loaded(x), model(x))


def test_compile_with_gradients() -> None:
    torch.manual_seed(0)
    model = Layer(str(attention(GUARDS["window"][0])))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for s in (19, 30):
        x = torch.randn(2, s, 8)
        want, got = model(x).square().sum(), compiled(x).square().sum()
        (wanted,) = torch.autograd.grad(want, [model.mix.weight])
        (found,) = torch.autograd.grad(got, [model.mix.weight])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(found, wanted)


def test_bare_import_registers_the_operators() -> None:
    assert attn_rewrite.ops.tiled_attention is tiled_attention
    assert torch.ops.attn_rewrite.tiled_attention.default is not None


def test_bad_arguments_are_named() -> None:
    q, k, v = operands(SHAPES[1])
    text = str(attention(GUARDS["window"][0], group=2))
    with pytest.raises(ValueError, match="2 query heads for each key head"):
        tiled_attention(q, k, v, [], text, 8)
    with pytest.raises(ValueError, match="got 1 reads"):
        tiled_attention(q, k[:, :2], v[:, :2], [q], text, 8)
    with pytest.raises(LowerError, match="softmax attention"):
        tiled_attention(q, k, v, [], str(NAMED["linear-attention"]), 8)


# Choosing a kernel


def name_of(cascade: Cascade, **options: Any) -> str:
    kernel = lower(cascade, **options)
    assert isinstance(kernel, Kernel)
    assert kernel.source.startswith(f"# {kernel.name}")
    return kernel.name


M = Read("M", (B, KV))
BIAS = Read("T", (H, Q, KV))
FMIN = torch.finfo(torch.float32).min
HALF_MIN = torch.finfo(torch.float16).min
WITH_M = {"reads": (TensorDecl("M", ("b", "kv"), dtype="bool"),)}
WITH_T = {"reads": (TensorDecl("T", ("h", "q", "kv")),)}


@pytest.mark.parametrize(
    ("cascade", "options", "name"),
    [
        (attention(), {}, "sdpa"),
        (attention(d >= 0), {}, "sdpa"),
        (attention(KV <= Q), {}, "sdpa"),
        (attention(KV < Q + 1), {}, "sdpa"),
        (attention(~(KV > Q)), {}, "sdpa"),
        (attention(GUARDS["cached"][0]), {}, "sdpa"),
        (attention(score=call("cast_f32", QK) / 8 + BIAS, **WITH_T), {}, "sdpa"),
        (attention(score=where(M, QK * 0.1, NEG), **WITH_M), {}, "sdpa"),
        (attention(score=where(M, QK * 0.1, FMIN), **WITH_M), {}, "sdpa"),
        (attention(score=where(M, QK * 0.1, HALF_MIN), **WITH_M), {}, "dense"),
        (attention(M, **WITH_M), {}, "sdpa"),
        (attention(GUARDS["window"][0]), {}, "tiled"),
        (attention(GUARDS["window"][0], where(M, QK, NEG), **WITH_M), {}, "tiled"),
        (attention(GUARDS["window"][0]), {"extents": {"q": 64, "kv": 64}}, "sdpa"),
        (attention(GUARDS["window"][0]), {"dropout": 0.1}, "sdpa"),
        (attention(d >= 0, call("tanh", QK)), {}, "tiled"),
        (attention(score=call("tanh", QK)), {}, "dense"),
        (attention(weight=BIAS, **WITH_T), {}, "dense"),
        (attention(sink=Read("s", (H,)), reads=(TensorDecl("s", ("h",)),)), {}, "dense"),
        (NAMED["linear-attention"], {}, "dense"),
    ],
)
def test_lower_chooses(cascade: Cascade, options: dict[str, Any], name: str) -> None:
    assert name_of(cascade, **options) == name


CASES: dict[str, tuple[Cascade, list[Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {}


def _case(name: str, cascade: Cascade, reads: list[Tensor], keep: Tensor, bias: Any = 0.0) -> None:
    CASES[name] = (cascade, reads, lambda q, k, v: reference(q, k, v, keep, 0.3, bias))


_rng = torch.Generator().manual_seed(9)
_pad = torch.ones(2, 57, dtype=torch.bool)
_pad[0, :20] = False
_bias = torch.randn(4, 40, 57, generator=_rng)
_all = torch.ones(40, 57, dtype=torch.bool)
_tri = torch.arange(40)[:, None] >= torch.arange(57)
_case("plain", attention(group=2), [], _all)
_case("causal", attention(d >= 0, group=2), [], _tri)
_case("causal mask in the score", attention(score=where(d >= 0, QK * 0.3, FMIN), group=2), [], _tri)
_case(
    "cached", attention(GUARDS["cached"][0], group=2), [], keep_of(GUARDS["cached"][1], 4, 40, 57)
)
_case("bias", attention(score=BIAS + QK * 0.3, group=2, **WITH_T), [_bias], _all, _bias.double())
_case(
    "bias and padding and guard",
    attention(
        M & (Q < 30),
        BIAS + QK * 0.3,
        group=2,
        reads=(*WITH_T["reads"], *WITH_M["reads"]),
    ),
    [_bias, _pad],
    _pad[:, None, None] & (torch.arange(40) < 30)[:, None],
    _bias.double(),
)
_case("padding", attention(score=where(M, QK * 0.3, NEG), group=2, **WITH_M), [_pad],
      _pad[:, None, None].expand(2, 1, 40, 57))  # fmt: skip
_case("padding and causal", attention(d >= 0, where(M, QK * 0.3, NEG), group=2, **WITH_M), [_pad],
      _pad[:, None, None] & _tri)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("choice", ["lower", "dense"])
def test_lowered_cascades_equal_dense_attention(name: str, dtype: torch.dtype, choice: str) -> None:
    cascade, reads, want = CASES[name]
    q, k, v = operands(SHAPES[2], dtype)
    kernel = lower(cascade) if choice == "lower" else softmax_cascade_kernel(cascade, "dense")
    assert isinstance(kernel, Kernel)
    got = kernel.emit(EagerBuilder(), [q, k, v, *reads])
    assert got.dtype == dtype
    expected = want(q, k, v)
    if dtype == torch.bfloat16 and name.startswith("bias"):
        # SDPA takes the bias in the type of q, as the original does.
        rounded = [r.to(dtype) if r.is_floating_point() else r for r in reads]
        original = softmax_cascade_kernel(cascade, "dense").emit(
            EagerBuilder(), [q, k, v, *rounded]
        )
        assert_close(got, expected, original)
    elif dtype == torch.float64:
        # The reference has no wider type to be right in: what rounding scores may change counts.
        inputs = dict(zip((t.name for t in cascade.inputs), (q, k, v, *reads), strict=True))
        moved = score_rounding(cascade, inputs)
        assert moved is not None
        assert (got - expected).abs().max().item() <= max(bound(expected, dtype), 2 * moved)
    else:
        assert_close(got, expected)


def test_a_finite_mask_keeps_the_mean_of_the_values_on_empty_rows() -> None:
    q, k, v = operands(SHAPES[2])
    padding = torch.zeros(2, 57, dtype=torch.bool)
    cascade = attention(score=where(M, QK * 0.3, FMIN), group=2, **WITH_M)
    for kernel in (lower(cascade), softmax_cascade_kernel(cascade, "dense")):
        assert isinstance(kernel, Kernel)
        got = kernel.emit(EagerBuilder(), [q, k, v, padding])
        want = v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 40, 6)
        assert_close(got, want)


def test_dropout_reaches_the_probabilities() -> None:
    q, k, v = operands(SHAPES[1])
    for cascade in (attention(), attention(score=call("tanh", QK))):
        kernel = lower(cascade, dropout=0.5)
        assert isinstance(kernel, Kernel)
        torch.manual_seed(0)
        first = kernel.emit(EagerBuilder(), [q, k, v])
        torch.manual_seed(1)
        assert not torch.equal(first, kernel.emit(EagerBuilder(), [q, k, v]))


def test_scores_of_other_ranks_are_refused() -> None:
    from attn_rewrite.cascade.expr import Rank

    refusal = lower(attention(Rank("d") > 2))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "rank-not-iterated"


class DenseLayer(nn.Module):
    """Runs a kernel on its inputs, so that it can be exported."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Any:
        return self.kernel.emit(EagerBuilder(), [q, k, v, m])


@pytest.mark.parametrize(
    "score", [call("tanh", QK) + d * 0.1, where(M, QK * 0.3, NEG), QK * Read("M", (B, Q // 4))]
)
@pytest.mark.parametrize("guard", ["causal", "window", "two stripes"])
def test_dense_lowering_exports_with_dynamic_lengths(score: Expr, guard: str) -> None:
    kernel = softmax_cascade_kernel(attention(GUARDS[guard][0], score, **WITH_M), "dense")
    layer = DenseLayer(kernel)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shapes = {"q": dynamic, "k": dynamic, "v": dynamic, "m": {0: dynamic[0], 1: dynamic[2]}}
    q, k, v = operands((2, 2, 1, 12, 12, 4, 4, 8))
    program = torch.export.export(
        layer, (q, k, v, torch.ones(2, 12, dtype=torch.bool)), dynamic_shapes=shapes
    )
    q, k, v = operands((3, 2, 1, 21, 21, 4, 4, 8))
    m = torch.rand(3, 21) < 0.7
    assert torch.equal(program.module()(q, k, v, m), layer(q, k, v, m))


# Questions about scores


def test_linear_scores_are_seen_through_their_spellings() -> None:
    bias = Read("T", (H, Q, KV))
    assert linear_score(call("cast_f32", QK) / 4) == linear_score(0.25 * QK)
    found = linear_score((QK + bias) * 0.5)
    assert found is not None
    assert (found.scale, found.bias) == (0.5, bias * 0.5)
    negative = linear_score(bias - QK)
    assert negative is None or negative.scale == -1.0
    assert linear_score(QK * QK) is None
    assert linear_score(call("tanh", QK)) is None
    assert linear_score(where(QK > 0, QK, NEG)) is None
    assert linear_score(bias) is None


def test_only_the_causal_mask_is_causal() -> None:
    for mask in (d >= 0, KV <= Q, d > -1, KV - Q <= 0, ~(KV > Q), ~(Q < KV)):
        assert is_causal(mask), str(mask)
    for mask in (
        d >= 1,
        d > 0,
        KV >= Q,
        d <= 0,
        2 * Q >= KV,
        (d >= 0) & (d < 9),
        H >= KV,
        eq(d, 0),
    ):
        assert not is_causal(mask), str(mask)
    shifted = Q + Extent("kv") - Extent("q") >= KV
    assert is_causal_with_offset(shifted)
    assert not is_causal(shifted)
    assert is_causal(shifted, square=True)


def test_masks_of_the_distance_are_told_from_others() -> None:
    for mask in ((d >= 0) & (d < 9), eq(d % 3, 0), call("abs", d) <= 4, KV <= Q, ~(Q - KV > 2)):
        assert depends_only_on_distance(mask), str(mask)
    for mask in ((d >= 0) | (KV < 3), eq(Q // 3, KV // 3), d * Q > 3, M & (d >= 0), H * d > 1):
        assert not depends_only_on_distance(mask), str(mask)


# Any cascade


def _inputs(cascade: Cascade) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    sizes = {"b": 2, "h": 4, "hkv": 2, "q": 6, "p": 6, "kv": 6, "m": 6, "e": 4, "d": 4, "f": 4}
    sizes |= {r.name: r.size for r in cascade.ranks if r.size is not None}
    # A table of relative positions holds every distance, -5 to 5.
    found = {}
    for t in cascade.inputs:
        shape = [sizes.get(r, 12) if t.name not in ("bias", "C") else 11 for r in t.ranks]
        value = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.1
        integers = value.mul(9).long()
        found[t.name] = {"bool": value > 0.6, "i64": integers, "i8": integers}.get(t.dtype, value)
    return found


# Inputs whose meaning a random tensor does not have: a block size, for one.
_SKIPPED = {n for n, c in NAMED.items() if any(t.name.isupper() and not t.ranks for t in c.inputs)}


@pytest.mark.parametrize("name", [n for n in NAMED if n not in _SKIPPED])
def test_every_named_cascade_lowers_to_torch(name: str) -> None:
    cascade = NAMED[name]
    inputs = _inputs(cascade)
    want = interpret(cascade, inputs)
    got = lower_cascade_to_callable(cascade)(inputs)
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key].double(), value.double(), rtol=1e-6, atol=1e-7)


def test_a_cascade_with_guards_and_other_reductions() -> None:
    cascade = parse(
        """
        cascade odd
        inputs A[k, m], W[m]
        output Y, Z, C
        Y[m] = A[k, m] * W[m] :: reduce_k max where k + m < 5
        Z[k] = A[k, m] :: reduce_m min
        C[m] = A[k, m] * A[k, m] where k < m
        """
    )
    a, w = torch.randn(7, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    got = lower_cascade_to_callable(cascade)({"A": a, "W": w})
    k, m = torch.arange(7)[:, None], torch.arange(4)
    torch.testing.assert_close(got["Y"], (a * w).masked_fill(k + m >= 5, NEG).amax(0))
    torch.testing.assert_close(got["Z"], a.amin(1))
    torch.testing.assert_close(got["C"], (a * a * (k < m)).sum(0))


def test_integer_casts_saturate() -> None:
    cascade = parse("cascade c\ninput X[m]\noutput Y\nY[m] = cast_i8(round(X[m] * 100)) / 100")
    x = torch.tensor([0.017, 3.0, -9.0], dtype=torch.float64)
    got = lower_cascade_to_callable(cascade)({"X": x})["Y"]
    torch.testing.assert_close(got, torch.tensor([0.02, 1.27, -1.28], dtype=torch.float64))


def test_outputs_at_computed_indices_fold_what_lands_together() -> None:
    cascade = parse("cascade c\ninput X[m]\noutput Y\nY[m // 2] = X[m] :: reduce_m max")
    x = torch.tensor([3.0, -1.0, 2.0, 5.0, -4.0])
    found = lower_cascade_to_callable(cascade)({"X": x})["Y"]
    assert found[:3].tolist() == [3.0, 5.0, -4.0]
    assert interpret(cascade, {"X": x})["Y"][:3].tolist() == [3.0, 5.0, -4.0]


def test_run_takes_a_form() -> None:
    q, k, v = operands(SHAPES[1])
    form = SoftmaxAttention(score=QK * 0.3, guard=d >= 0)
    keep = torch.tril(torch.ones(33, 33, dtype=torch.bool))
    assert_close(run(form, q, k, v, [], 8), reference(q, k, v, keep, 0.3))
    assert np.isclose(tile_counts(softmax_cascade(form), 33, 33, 8, 1).density, 15 / 25)
    assert Const(1) != Const(True)
