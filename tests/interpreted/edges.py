"""What the operator promises at its edges, against dense attention written out row by row.

`tests/gpu` runs the same on a GPU: operands are made on `DEVICE`, references on the CPU.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor

import attn_rewrite.ops  # noqa: F401
from attn_rewrite.backends.triton.lower import lower
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, TRUE, B, Extent, H, Q, Read, call, eq
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import ToolError
from attn_rewrite.graph import EagerBuilder

DEVICE = "cpu"
OFFSET = SoftmaxAttention(
    QK * 0.25, Q - KV >= 5, sink=Read("off", (B, H, Q)), group=2,
    reads=(TensorDecl("off", ("b", "h", "q")),),
)  # fmt: skip


def attend(form: SoftmaxAttention, *inputs: Tensor, schedule: str = "") -> list[Tensor]:
    text = str(softmax_cascade(form, "edge"))
    there = [t.to(DEVICE) for t in inputs]
    found = torch.ops.attn_rewrite.triton_cascade(there, None, text, schedule, 0.0)
    return [t.cpu() for t in found]


def by_rows(q, k, v, keep=None, offset=None):
    """AV and LSE in float64, one query after the other; ``keep`` [q, kv], ``offset`` [b, h, q]."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = k[b, h // group] @ q[b, h, i] * 0.25
                if keep is not None:
                    scores = scores[keep[i]]
                values = v[b, h // group] if keep is None else v[b, h // group][keep[i]]
                terms = scores if offset is None else torch.cat([scores, offset[b, h, i, None]])
                if terms.numel() and terms.max() > -math.inf:
                    lse[b, h, i] = terms.logsumexp(0)
                    out[b, h, i] = (scores - lse[b, h, i]).exp() @ values
    return out, lse


def close(found: Tensor, wanted: Tensor, factor: float = 1.0, more: float = 0.0) -> None:
    assert torch.equal(found.isfinite(), wanted.isfinite())
    finite = wanted.isfinite()
    error = (found.double() - wanted.double())[finite].abs().max().item()
    assert error <= factor * 4e-6 * max(1.0, wanted[finite].abs().max().item()) + more


def lacks(dtype: torch.dtype) -> bool:
    """NVIDIA GPUs before compute capability 8.9 have no E4M3."""
    if DEVICE == "cpu" or dtype != torch.float8_e4m3fn or torch.version.hip:
        return False
    return torch.cuda.get_device_capability() < (8, 9)


def of_narrow_products(q: Tensor, k: Tensor) -> float:
    """What tensor cores may lose of a score: they add products of 8 bits with 13 bits of fraction."""
    if DEVICE == "cpu":
        return 0.0
    k = k.float().abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return 2.0**-12 * 0.25 * (q.float().abs() @ k.mT).max().item()


def operands(b=1, h=4, hkv=2, q=20, kv=33, d=16, f=24, seed=0):
    make = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(b, n, m, w, generator=make)
        for n, m, w in ((h, q, d), (hkv, kv, d), (hkv, kv, f))
    )


def gradients(out: Tensor, inputs: list[Tensor], pull: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, pull.to(out.dtype))


# Offsets per row


@pytest.mark.parametrize("rows", [20, 3])
def test_a_log_offset_per_row_joins_the_denominator(rows):
    q, k, v = operands(b=2, q=rows)
    offset = torch.randn(2, 4, rows, generator=torch.Generator().manual_seed(1)) * 3
    offset[0, 1] = -math.inf  # nothing came before: rows without keys stay empty
    keep = torch.arange(rows)[:, None] - torch.arange(33) >= 5
    found = attend(OFFSET, q, k, v, offset)
    for mine, wanted in zip(found, by_rows(q, k, v, keep, offset.double()), strict=True):
        close(mine, wanted)
    assert (found[0][0, 1, :3] == 0).all()
    assert (found[1][0, 1, :3] == -math.inf).all()


def test_parts_of_the_keys_join_by_the_log_sum_exp_of_the_other_part():
    q, k, v = operands()
    form = SoftmaxAttention(
        QK * 0.25, sink=Read("off", (B, H, Q)), group=2, reads=(TensorDecl("off", ("b", "h", "q")),)
    )
    none = torch.full(q.shape[:3], -math.inf)
    parts = [(k[:, :, s], v[:, :, s]) for s in (slice(0, 14), slice(14, 33))]
    sums = [attend(form, q, *p, none)[1] for p in parts]
    halves = [attend(form, q, *p, other) for p, other in zip(parts, sums[::-1], strict=True)]
    wanted, lse = by_rows(q, k, v)
    close(halves[0][0] + halves[1][0], wanted)
    for _, found in halves:
        close(found, lse)


def test_the_gradient_of_an_offset_per_row():
    inputs = [*operands(), torch.randn(1, 4, 20)]
    inputs[3][0, 2] = -math.inf
    mine = [t.requires_grad_() for t in inputs]
    pull = torch.randn(1, 4, 20, 24)
    found = torch.autograd.grad(attend(OFFSET, *mine)[0], mine, pull)
    q, k, v, offset = (t.detach().double().requires_grad_() for t in inputs)
    keep = torch.arange(20)[:, None] - torch.arange(33) >= 5
    s = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~keep, -math.inf)
    # Rows without keys and offset are NaN in a plain softmax, and constant here.
    terms = torch.cat([s, offset[..., None]], -1)
    p = terms.masked_fill((terms == -math.inf).all(-1, keepdim=True), 0.0).softmax(-1)[..., :-1]
    out = p.masked_fill(~keep, 0.0) @ v.repeat_interleave(2, 1)
    wanted = torch.autograd.grad(out, [q, k, v, offset], pull.double())
    for a, b in zip(found, wanted, strict=True):
        assert not a.isnan().any()
        close(a, b, 4.0)


# Packed heads and lists


@pytest.mark.parametrize(("h", "hkv", "q"), [(5, 1, 16), (7, 1, 13)])
def test_lists_hold_for_groups_that_do_not_divide_a_block(h, hkv, q):
    x = operands(h=h, hkv=hkv, q=q, kv=70)
    guard = eq((Q - KV) // 8 % 2, 0)
    keep = torch.div(torch.arange(q)[:, None] - torch.arange(70), 8, rounding_mode="floor") % 2 == 0
    form = SoftmaxAttention(QK * 0.25, guard, group=h // hkv)
    close(attend(form, *x)[0], by_rows(*x, keep)[0])


@pytest.mark.parametrize(("heads", "extra"), [(1, TRUE), (2, Q - KV >= 0)])
def test_a_table_of_blocks_forward_and_backward(extra, heads):
    x = [t.requires_grad_() for t in operands(h=2, hkv=2, q=100, kv=100, f=16)]
    table = torch.rand(heads, 2, 2, generator=torch.Generator().manual_seed(2)) < 0.5
    table[0, 0] = False  # a block of queries without keys
    form = SoftmaxAttention(
        QK * 0.25, Read("keep", (H, Q // 64, KV // 64)) & extra,
        reads=(TensorDecl("keep", ("h", "qb", "kb"), dtype="bool"),),
    )  # fmt: skip
    at = torch.arange(100)
    keep = table[:, at // 64][:, :, at // 64].expand(2, -1, -1)
    keep = keep & (at[:, None] >= at) if extra != TRUE else keep
    out, _ = attend(form, *x, table)
    pull = torch.randn_like(out)
    y = [t.detach().double().requires_grad_() for t in x]
    s = (y[0] @ y[1].mT * 0.25).masked_fill(~keep, -math.inf)
    p = (s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    wanted = p @ y[2] / p.sum(-1, keepdim=True).clamp_min(1e-300)
    close(out, wanted)
    mine, exact = gradients(out, x, pull), gradients(wanted, y, pull)
    for a, b in zip(mine, exact, strict=True):
        close(a, b, 4.0)


def test_a_neighbourhood_on_a_grid():
    side, height = 9, 7
    x = operands(h=1, hkv=1, q=63, kv=63)
    row, column = (
        call("clip", Q // side - 1, 0, height - 3),
        call("clip", Q % side - 1, 0, side - 3),
    )
    guard = ((KV // side >= row) & (KV // side < row + 3)
             & (KV % side >= column) & (KV % side < column + 3))  # fmt: skip
    keep = torch.zeros(63, 63, dtype=torch.bool)
    for i in range(63):
        top, left = min(max(i // side - 1, 0), 4), min(max(i % side - 1, 0), 6)
        for y in range(top, top + 3):
            keep[i, y * side + left : y * side + left + 3] = True
    close(attend(SoftmaxAttention(QK * 0.25, guard), *x)[0], by_rows(*x, keep)[0])


# Layouts, types, shapes


def test_offsets_beyond_32_bits():
    """Lanes 2^28 elements apart: the address space is there, the memory is not touched."""
    q, k, v = operands(h=1, hkv=1, q=3, kv=5, f=16)
    if DEVICE == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        room = mmap.mmap(-1, 2 * (1 << 32) + 4096, flags=flags)
        wide = torch.frombuffer(room, dtype=torch.float16)
    else:
        wide = torch.empty((1 << 32) + 2048, dtype=torch.float16, device=DEVICE)
    far = wide.as_strided((1, 1, 5, 16), (0, 0, 1, 1 << 28))
    far.copy_(k)
    found, _ = attend(SoftmaxAttention(QK * 0.25), q.half(), far, v.half())
    wanted, _ = by_rows(q.half(), k.half(), v.half())
    assert (found.double() - wanted).abs().max() <= 2**-10 * wanted.abs().max()


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (2, 3, 1, 0), (1, 0, 2, 3)])
def test_operands_of_any_layout_are_read_in_place(order):
    back = [order.index(i) for i in range(4)]
    x = [t.permute(order).contiguous().permute(back) for t in operands(b=2)]
    close(attend(SoftmaxAttention(QK * 0.25, group=2), *x)[0], by_rows(*x)[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_operands_give_bfloat16(dtype):
    x = [t.to(dtype) for t in operands()]
    if lacks(dtype):
        with pytest.raises(ToolError, match="fp8e4nv"):
            attend(SoftmaxAttention(QK * 0.25, group=2), *x)
        return
    found, lse = attend(SoftmaxAttention(QK * 0.25, group=2), *x)
    assert (found.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wanted, _ = by_rows(*(t.float() for t in x))
    # Probabilities are rounded to float16, the result to bfloat16.
    assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_nothing_to_attend_to_and_nobody_to_attend():
    q, k, v = operands()
    out, lse = attend(SoftmaxAttention(QK * 0.25, group=2), q, k[:, :, :0], v[:, :, :0])
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out, lse = attend(SoftmaxAttention(QK * 0.25, group=2), q[:, :, :0], k, v)
    assert (out.shape, lse.shape) == ((1, 4, 0, 24), (1, 4, 0))


def test_gradients_of_operands_that_broadcast():
    make = torch.Generator().manual_seed(3)
    shapes = ((1, 2, 9, 16), (3, 1, 11, 16), (3, 2, 11, 16))
    x = [torch.randn(s, generator=make).requires_grad_() for s in shapes]
    out, _ = attend(SoftmaxAttention(QK * 0.25), *x)
    pull = torch.randn(out.shape, generator=make)
    y = [t.detach().double().requires_grad_() for t in x]
    wanted = (y[0] @ y[1].mT * 0.25).softmax(-1) @ y[2]
    mine, exact = gradients(out, x, pull), gradients(wanted, y, pull)
    for a, b, t in zip(mine, exact, x, strict=True):
        assert a.shape == t.shape
        close(a, b, 4.0)


def test_dropout_with_a_schedule_of_ones_own():
    kernel = lower(softmax_cascade(SoftmaxAttention(QK * 0.25, group=2), "edge"), dropout=0.5)
    q, k, _ = (t.to(DEVICE) for t in operands())
    ones = torch.ones(1, 2, 33, 16, device=DEVICE)
    torch.manual_seed(0)
    first = kernel.emit(EagerBuilder(), [q, k, ones])
    torch.manual_seed(0)
    text, seed = str(kernel.cascade), torch.randint(0, 2**31 - 1, [1], device=DEVICE)
    own = torch.ops.attn_rewrite.triton_cascade(
        [q, k, ones], seed, text, '{"block_along": 16, "block_rows": 32}', 0.5
    )[0]
    assert (first - own).abs().max() < 1e-5
    assert first.std() > 0.05


# Shapes that real models have, and a few that none has


def causal_rows(q: int, kv: int) -> Tensor:
    return torch.arange(q)[:, None] + kv - q >= torch.arange(kv)


CACHED = Q + Extent("kv") - Extent("q") >= KV


@pytest.mark.parametrize(
    ("d", "f"),
    [(16, 17), (72, 72), (80, 80), (96, 33), (128, 1), (160, 160), (192, 128), (256, 256)],
)
def test_head_dimensions_with_the_default_tiles(d, f):
    x = operands(h=2, hkv=1, q=9, kv=35, d=d, f=f)
    form = SoftmaxAttention(QK * 0.25, CACHED, group=2)
    for mine, wanted in zip(attend(form, *x), by_rows(*x, causal_rows(9, 35)), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("length", [1, 2, 63, 129])
@pytest.mark.parametrize("extra", [TRUE, Q - KV < 40])
def test_seven_query_heads_of_one_key_head(length, extra):
    x = operands(h=7, hkv=1, q=length, kv=length, d=20)
    at = torch.arange(length)
    keep = at[:, None] >= at
    keep = keep if extra == TRUE else keep & (at[:, None] - at < 40)
    form = SoftmaxAttention(QK * 0.25, (Q >= KV) & extra, group=7)
    for mine, wanted in zip(attend(form, *x), by_rows(*x, keep), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize(("q", "kv"), [(40, 7), (70, 1), (1, 70), (17, 16)])
def test_more_queries_than_keys_leave_rows_without_keys(q, kv):
    x = operands(q=q, kv=kv)
    form = SoftmaxAttention(QK * 0.25, CACHED, group=2)
    for mine, wanted in zip(attend(form, *x), by_rows(*x, causal_rows(q, kv)), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("rows", [20, 3])
def test_columns_and_rows_of_minus_infinity_in_a_bias(rows):
    q, k, v = operands(b=2, q=rows)
    bias = torch.randn(2, 1, rows, 33, generator=torch.Generator().manual_seed(4))
    bias[..., :17] = -math.inf
    bias[..., 20:30:3] = -math.inf
    bias[0, 0, 1] = -math.inf  # nothing is left of this row
    form = SoftmaxAttention(
        QK * 0.25 + Read("bias", (B, H, Q, KV)), group=2,
        reads=(TensorDecl("bias", ("b", "h", "q", "kv")),),
    )  # fmt: skip
    out, lse = attend(form, q, k, v, bias)
    s = (q.double() @ k.double().repeat_interleave(2, 1).mT * 0.25) + bias
    wanted_lse = s.logsumexp(-1)
    p = (s - wanted_lse.nan_to_num(neginf=0.0)[..., None]).exp()
    close(out, p @ v.double().repeat_interleave(2, 1))
    close(lse, wanted_lse)
    assert (lse[0, :, 1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("h", "hkv", "q", "kv"), [(7, 1, 1, 129), (4, 2, 63, 63), (2, 2, 2, 1)])
def test_eight_bit_operands_of_many_shapes(dtype, h, hkv, q, kv):
    x = [t.to(dtype) for t in operands(h=h, hkv=hkv, q=q, kv=kv, d=72, f=40)]
    form = SoftmaxAttention(QK * 0.25, CACHED, group=h // hkv)
    if lacks(dtype):
        return  # refused, as the test above sees
    found, lse = attend(form, *x)
    wanted, wanted_lse = by_rows(*(t.float() for t in x), causal_rows(q, kv))
    assert (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    close(lse, wanted_lse, more=of_narrow_products(*x[:2]))


def test_operands_of_stride_zero():
    q, k, v = operands(b=3, h=4, hkv=4)
    k, v = k[:1, :1].expand(3, 4, -1, -1), v[:1, :1].expand(3, 4, -1, -1)
    close(attend(SoftmaxAttention(QK * 0.25), q, k, v)[0], by_rows(q, k, v)[0])


@pytest.mark.parametrize("spread", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_ten_thousand_in_narrow_types(spread, dtype):
    """One key decides each row; its value comes out as it is stored."""
    make = torch.Generator().manual_seed(5)
    q = torch.full((1, 1, 40, 16), spread / 100).to(dtype)
    place = torch.randperm(40, generator=make)
    k = (place.float()[:, None].expand(-1, 16) / 40)[None, None].to(dtype)
    v = torch.randn(1, 1, 40, 16, generator=make).to(dtype)
    found, lse = attend(SoftmaxAttention(QK * 25.0), q, k, v)
    best = int(place.argmax() if spread > 0 else place.argmin())
    assert lse.isfinite().all()
    assert torch.equal(found[0, 0], v[0, 0, best].expand(40, -1))
