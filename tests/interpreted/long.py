"""Lengths up to 2^20, and operands that span more than 2^31 elements, in few tiles."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor

from attn_rewrite.backends.triton.decode import Pages, decode
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.launch import run
from attn_rewrite.backends.triton.lists import make_lists
from attn_rewrite.backends.triton.prepare import stages
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, Expr, Extent, Q, call, eq

LONG = 1 << 20
BEHIND = Q + Extent("kv") - Extent("q") - KV  # how far a key lies behind the query


def attend(form: SoftmaxAttention, schedule: Schedule, x: dict, **tables: Tensor) -> dict:
    (stage,) = stages(str(softmax_cascade(form, "long")))
    lanes = {"d": x["Q"].shape[3], "f": x["V"].shape[3]}
    return run(emit(stage.program, schedule, lanes), x, tables=tables)


def rows(q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """AV and LSE in float64 of queries [q, d] over the keys that each of them keeps."""
    out, lse = [], []
    for one, at in zip(q.double(), kept, strict=True):
        scores = k[at].double() @ one * 0.25
        lse.append(scores.logsumexp(0))
        out.append((scores - lse[-1]).exp() @ v[at].double())
    return torch.stack(out), torch.stack(lse)


def operands(q: int, kv: int = LONG, d: int = 16) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(1, 1, length, d, generator=make)
        for n, length in (("Q", q), ("K", kv), ("V", kv))
    }


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found.double() - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.parametrize("rows_of", [1, 5])
def test_a_window_at_the_end_of_a_million_keys(rows_of):
    """Loop bounds and masks at positions of 20 bits."""
    x = operands(rows_of)
    form = SoftmaxAttention(QK * 0.25, (BEHIND >= 0) & (BEHIND < 40))
    found = attend(form, Schedule(block_rows=16, block_along=16, skipping="bounds"), x)
    ends = [LONG - rows_of + i for i in range(rows_of)]
    kept = [torch.arange(e - 39, e + 1) for e in ends]
    for mine, wanted in zip((found["AV"], found["LSE"]),
                            rows(x["Q"][0, 0], x["K"][0, 0], x["V"][0, 0], kept), strict=True):  # fmt: skip
        close(mine[0, 0], wanted)


SPARSE: dict[str, tuple[Expr, object]] = {
    # Products of positions leave 32 bits.
    "products": ((BEHIND < 40) & eq(call("mod", KV * KV, 7), 1),
                 lambda kv: (kv > LONG - 41) & (kv * kv % 7 == 1)),
    "ends": ((KV < 9) | (BEHIND < 9), lambda kv: (kv < 9) | (kv > LONG - 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_lists_over_a_million_keys(name):
    guard, kept = SPARSE[name]
    x = operands(1)
    schedule = Schedule(block_rows=16, block_along=1024, skipping="lists")
    lists = make_lists(guard, schedule, q_len=1, kv_len=LONG, heads=1, batch=1)
    assert 0 < lists.kept <= 4 < lists.total == 1024
    tables = {"tiles": torch.from_numpy(lists.tiles), "columns": torch.from_numpy(lists.columns)}
    found = attend(SoftmaxAttention(QK * 0.25, guard), schedule, x, **tables)
    at = kept(torch.arange(LONG)).nonzero()[:, 0]
    close(found["AV"][0, 0], rows(x["Q"][0, 0], x["K"][0, 0], x["V"][0, 0], [at])[0])


def test_decoding_over_a_million_keys_in_parts():
    x = operands(1)
    cascade = softmax_cascade(SoftmaxAttention(QK * 0.25, BEHIND >= 0), "long")
    schedule = Schedule(block_rows=16, block_along=8192, skipping="bounds")
    found = decode(cascade, x, splits=7, schedule=schedule)
    scores = x["K"][0, 0].double() @ x["Q"][0, 0, 0].double() * 0.25
    p = scores.softmax(0)
    close(found["AV"][0, 0, 0], p @ x["V"][0, 0].double())
    close(found["LSE"][0, 0], scores.logsumexp(0)[None])


def sparse_memory(elements: int) -> Tensor:
    """float16 elements of address space; only what is written takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)


FAR = 1 << 28  # elements; eleven of them are beyond 2^31
SHAPE = (11, 1, 17, 16)


@pytest.mark.parametrize("dim", [0, 2, 3])
def test_keys_beyond_two_to_the_31_elements(dim):
    """Batch entries, positions or lanes so far apart that offsets leave 32 bits."""
    make = torch.Generator().manual_seed(1)
    shape = SHAPE if dim == 0 else (1, *SHAPE[1:])
    q, k, v = (torch.randn(shape, generator=make).half() for _ in "QKV")
    strides = [16 * 17, 16 * 17, 16, 1]
    strides[dim] = FAR
    wide = sparse_memory((shape[dim] - 1) * FAR + 16 * 17 * 16)
    far = wide.as_strided(shape, strides)
    far.copy_(k)
    schedule = Schedule(block_rows=32, block_along=32)
    found = attend(SoftmaxAttention(QK * 0.25), schedule, {"Q": q, "K": far, "V": v})["AV"]
    wanted = (q.double() @ k.double().mT * 0.25).softmax(-1) @ v.double()
    assert (found.double() - wanted).abs().max() <= 2**-10 * wanted.abs().max()


def test_pages_beyond_two_to_the_31_elements():
    """A pool of pages of which the last ones are used."""
    make = torch.Generator().manual_seed(2)
    count, page = 3, 16
    strides = (FAR, 16 * page, 16, 1)
    pool = sparse_memory(12 * FAR)
    cache = {n: pool[o:].as_strided((11, 1, page, 16), strides) for n, o in (("K", 0), ("V", 4096))}
    table = torch.tensor([[10, 9, 0]], dtype=torch.int32)
    for t in cache.values():
        for number in table[0].tolist():
            t[number].copy_(torch.randn(1, page, 16, generator=make))
    q = torch.randn(1, 1, 1, 16, generator=make).half()
    length = count * page - 5
    found = decode(
        softmax_cascade(SoftmaxAttention(QK * 0.25), "long"), {"Q": q, **cache},
        pages=Pages(table, torch.tensor([length], dtype=torch.int32)), splits=2,
    )["AV"]  # fmt: skip
    k, v = (
        torch.cat([t[n, 0] for n in table[0].tolist()])[:length].double() for t in cache.values()
    )
    wanted = (q[0, 0].double() @ k.mT * 0.25).softmax(-1) @ v
    assert (found[0, 0].double() - wanted).abs().max() <= 2**-10 * wanted.abs().max()


def test_sequences_that_end_beyond_two_to_the_31_elements():
    make = torch.Generator().manual_seed(3)
    k, q, v = (torch.randn(1, 20, 16, generator=make).half() for _ in "kqv")
    far = sparse_memory(20 * FAR + 16).as_strided((1, 20, 16), (0, FAR, 1))
    far.copy_(k)
    starts = torch.tensor([0, 9, 20], dtype=torch.int32)
    found = attend_varlen(
        softmax_cascade(SoftmaxAttention(QK * 0.25), "long"), {"Q": q, "K": far, "V": v},
        Sequences(starts, starts, 11, 11),
    )["AV"]  # fmt: skip
    for a, b in ((0, 9), (9, 20)):
        one, keys, values = (t[0, a:b].double() for t in (q, k, v))
        wanted = (one @ keys.mT * 0.25).softmax(-1) @ values
        assert (found[0, a:b].double() - wanted).abs().max() <= 2**-10 * wanted.abs().max()


@pytest.mark.slow
def test_a_million_queries_and_keys():
    """Every position of a window over 2^20 queries; the rows at both ends and between are checked."""
    x = operands(LONG, d=2)
    form = SoftmaxAttention(QK * 0.25, (Q - KV >= 0) & (Q - KV < 20))
    found = attend(form, Schedule(block_rows=1024, block_along=512, skipping="bounds"), x)
    at = torch.tensor([0, 1, 19, 20, 1023, 1024, LONG // 2 - 1, LONG // 2, LONG - 2, LONG - 1])
    kept = [torch.arange(max(0, int(i) - 19), int(i) + 1) for i in at]
    wanted, lse = rows(x["Q"][0, 0, at], x["K"][0, 0], x["V"][0, 0], kept)
    close(found["AV"][0, 0, at], wanted)
    close(found["LSE"][0, 0, at], lse)
    assert found["AV"].isfinite().all()
    assert not math.isinf(found["LSE"].min().item())
