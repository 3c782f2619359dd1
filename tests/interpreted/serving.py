"""Decoding over parts and pages, and sequences end to end, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from attn_rewrite.backends.triton.decode import Pages, decode, is_worth_splitting, parts_for
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade import NAMED
from attn_rewrite.cascade.attention import QK, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, Extent, H, Q, Read
from attn_rewrite.errors import LowerError
from tests.interpreted.dense import CASES, Case, bound, inputs_for, reference

SMALL = Schedule(block_rows=16, block_along=16, skipping="bounds")
SIZES = {"b": 2, "h": 4, "group": 2, "q": 3, "kv": 90, "d": 16, "f": 24}
ONE = Case(Q + Extent("kv") - Extent("q") >= KV, CASES["cached"].mask, skipping="bounds")


def close(found, case, x):
    for got, want, low in zip(
        (found["AV"], found["LSE"]), reference(case, x, torch.float64),
        reference(case, x, torch.float32), strict=True,
    ):  # fmt: skip
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        assert (got.double() - want)[finite].abs().max() <= 2 * bound(want, low, torch.float32)


@pytest.mark.parametrize("name", ["cached", "sink logit", "late"])
@pytest.mark.parametrize("splits", [3, 50, None])
def test_parts_of_the_keys_are_merged(name, splits):
    case = CASES[name]
    sizes = SIZES | ({"q": 20, "kv": 60} if name != "cached" else {})
    x = inputs_for(case, sizes, torch.float32, 21)
    cascade = softmax_cascade(case.form(2), "case")
    close(decode(cascade, x, splits=splits, schedule=SMALL.with_(pack=2)), case, x)


def test_a_part_without_keys_adds_nothing():
    case = CASES["dense"]
    x = inputs_for(case, SIZES | {"kv": 17}, torch.float32, 22)
    cascade = softmax_cascade(case.form(2), "case")
    close(decode(cascade, x, splits=2, schedule=SMALL.with_(skipping="none")), case, x)


@pytest.mark.parametrize(("case", "skipping"), [(ONE, "bounds"), (CASES["dense"], "none")])
@pytest.mark.parametrize("lengths", [[90, 20], [0, 1], [64, 0]])
def test_pages_of_different_fill(case, skipping, lengths):
    page = 32
    make = torch.Generator().manual_seed(23)
    table = torch.randperm(8, generator=make)[:6].view(2, 3).to(torch.int32)
    x = inputs_for(case, SIZES, torch.float32, 23)
    keys, values = torch.randn(8, 2, page, 16), torch.randn(8, 2, page, 24)
    found = decode(
        softmax_cascade(case.form(2), "case"), {**x, "K": keys, "V": values},
        pages=Pages(table, torch.tensor(lengths, dtype=torch.int32)), splits=3, schedule=SMALL.with_(skipping=skipping),
    )  # fmt: skip
    for entry, length in enumerate(lengths):
        if length == 0:
            assert (found["AV"][entry] == 0).all()
            assert (found["LSE"][entry] == -torch.inf).all()
            continue
        whole = [
            torch.cat(list(t[table[entry].long()]), 1)[None, :, :length] for t in (keys, values)
        ]
        mine = {"Q": x["Q"][entry : entry + 1], "K": whole[0], "V": whole[1]}
        close({n: t[entry : entry + 1] for n, t in found.items()}, case, mine)


SCALED = Case(
    ONE.guard, ONE.mask,
    score=QK * Read("KS", (B, H // 2, KV)), weight=Read("VS", (B, H // 2, KV)),
    scores=lambda s, q, k, x: s / 0.25 * x["KS"].repeat_interleave(2, 1)[:, :, None],
    weights=lambda q, k, x: x["VS"].repeat_interleave(2, 1)[:, :, None],
    reads=(("KS", ("b", "hkv", "kv"), "float"), ("VS", ("b", "hkv", "kv"), "float")),
)  # fmt: skip


def test_pages_hold_the_scales_of_their_keys():
    """An 8-bit cache whose keys and values have a scale each, in pages of their own."""
    page, lengths, make = 16, [75, 1], torch.Generator().manual_seed(32)
    table = torch.randperm(12, generator=make)[:10].view(2, 5).to(torch.int32)
    q = torch.randn(2, 4, 3, 16, generator=make)
    cache = {n: torch.randint(-127, 128, (12, 2, page, w), generator=make, dtype=torch.int8)
             for n, w in (("K", 16), ("V", 24))}  # fmt: skip
    cache |= {n: torch.rand(12, 2, page, generator=make) / 100 for n in ("KS", "VS")}
    found = decode(
        softmax_cascade(SCALED.form(2), "case"), {"Q": q, **cache},
        pages=Pages(table, torch.tensor(lengths, dtype=torch.int32)), splits=2,
        schedule=SMALL,
    )  # fmt: skip
    for entry, length in enumerate(lengths):
        mine = {n: torch.cat(list(t[table[entry].long()]), 1)[None, :, :length].float()
                for n, t in cache.items()}  # fmt: skip
        wanted, lse = reference(SCALED, {"Q": q[entry : entry + 1], **mine}, torch.float64)
        # Probabilities meet codes in float16.
        error = (found["AV"][entry] - wanted[0]).abs().max()
        assert error <= 2**-10 * (mine["V"] * mine["VS"][..., None]).abs().max()
        finite = lse[0].isfinite()
        assert (found["LSE"][entry] - lse[0])[finite].abs().max() <= 4e-6 * lse[0][
            finite
        ].abs().max()


def test_the_operator_splits_few_queries_over_many_keys():
    import attn_rewrite.ops  # noqa: F401

    x = inputs_for(ONE, SIZES | {"b": 1, "h": 2, "q": 1, "kv": 600}, torch.float32, 25)
    cascade = softmax_cascade(ONE.form(2), "case")
    found = torch.ops.attn_rewrite.triton_cascade(list(x.values()), None, str(cascade), "", 0.0)
    close(dict(zip(("AV", "LSE"), found, strict=True)), ONE, x)
    split = decode(cascade, x)
    assert torch.equal(found[0], split["AV"])
    assert not is_worth_splitting({**x, "K": x["K"][:, :, :100]})


@pytest.mark.parametrize("kv", [0, 1])
def test_a_cache_of_no_or_one_key(kv):
    x = inputs_for(CASES["dense"], SIZES | {"q": 1, "kv": kv}, torch.float32, 26)
    cascade = softmax_cascade(CASES["dense"].form(2), "case")
    found = decode(cascade, x, splits=3)
    if kv:
        close(found, CASES["dense"], x)
    else:
        assert (found["AV"] == 0).all()
        assert (found["LSE"] == -torch.inf).all()


def test_a_batch_of_different_lengths_over_parts():
    case = CASES["lengths"]
    x = inputs_for(case, SIZES | {"b": 3, "q": 60, "kv": 60}, torch.float32, 27)
    x["lens"] = torch.tensor([0, 1, 47], dtype=torch.int32)
    x["Q"] = x["Q"][:, :, :2]  # the first rows: few queries
    cascade = softmax_cascade(case.form(2), "case")
    close(decode(cascade, x, splits=3, schedule=SMALL), case, x)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cache_of_8_bits_under_wider_queries(kind):
    """Values of the cache are exact; probabilities are rounded to float16, not to 8 bits."""
    x = inputs_for(ONE, SIZES | {"b": 1}, torch.float16, 29)
    narrow = {n: t.to(kind) if n in "KV" else t for n, t in x.items()}
    cascade = softmax_cascade(ONE.form(2), "case")
    exact = {n: t.float() for n, t in narrow.items()}
    wanted = reference(ONE, exact, torch.float64)[0]
    limit = 2**-10 * exact["V"].abs().max()
    found = decode(cascade, narrow, splits=3)["AV"]
    assert found.dtype == torch.float16
    assert (found.double() - wanted).abs().max() <= limit
    starts = [torch.tensor([0, n], dtype=torch.int32) for n in (3, 90)]
    flat = {n: t[0] for n, t in narrow.items()}
    found = attend_varlen(cascade, flat, Sequences(*starts, 3, 90))["AV"]
    assert (found[None].double() - wanted).abs().max() <= limit


def test_operators_for_serving_run_what_the_functions_run():
    import attn_rewrite.ops  # noqa: F401

    cascade = softmax_cascade(ONE.form(2), "case")
    text = str(cascade)
    x = inputs_for(ONE, SIZES | {"b": 1, "q": 12, "kv": 12}, torch.float32, 28)
    flat = {n: t[0] for n, t in x.items()}
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    found = torch.ops.attn_rewrite.triton_varlen(list(flat.values()), starts, starts, 7, 7, text)
    wanted = attend_varlen(cascade, flat, Sequences(starts, starts, 7, 7))
    assert torch.equal(found[0], wanted["AV"])
    assert torch.equal(found[1], wanted["LSE"])
    table, lengths = (torch.tensor(t, dtype=torch.int32) for t in ([[1, 0]], [20]))
    keys = [torch.randn(2, 2, 16, n) for n in (16, 24)]
    found = torch.ops.attn_rewrite.triton_paged([x["Q"], *keys], table, lengths, text)
    pages = Pages(table, lengths)
    wanted = decode(cascade, {"Q": x["Q"], "K": keys[0], "V": keys[1]}, pages=pages)
    assert torch.equal(found[0], wanted["AV"])
    q = x["Q"].requires_grad_()
    out = torch.ops.attn_rewrite.triton_paged([q, *keys], table, lengths, text)[0]
    with pytest.raises((RuntimeError, NotImplementedError), match=r"autograd|require grad"):
        out.sum().backward()


def test_what_has_no_states_cannot_be_split():
    with pytest.raises(LowerError, match="cannot be split"):
        decode(NAMED["sigmoid"], {})


def test_the_number_of_parts_fills_a_gpu_and_no_more():
    assert parts_for(programs=8, tiles=512) == 33
    assert parts_for(programs=8, tiles=40) == 10
    assert parts_for(programs=1024, tiles=512) == 1
    assert parts_for(programs=1, tiles=0) == 1


@pytest.mark.parametrize("pack", [1, 2])
def test_sequences_end_to_end(pack):
    q_lens, kv_lens = [5, 0, 37, 1], [9, 3, 37, 50]
    starts = [
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (q_lens, kv_lens)
    ]
    x = inputs_for(ONE, SIZES | {"b": 1, "q": sum(q_lens), "kv": sum(kv_lens)}, torch.float32, 24)
    found = attend_varlen(
        softmax_cascade(ONE.form(2), "case"), {n: t[0] for n, t in x.items()},
        Sequences(*starts, max(q_lens), max(kv_lens)), SMALL.with_(pack=pack),
    )  # fmt: skip
    for i, length in enumerate(q_lens):
        if not length:
            continue
        rows, keys = (slice(int(s[i]), int(s[i + 1])) for s in starts)
        mine = {"Q": x["Q"][:, :, rows], "K": x["K"][:, :, keys], "V": x["V"][:, :, keys]}
        close({n: t[None, :, rows] for n, t in found.items()}, ONE, mine)


def test_a_bias_per_pair_has_no_place_in_sequences_end_to_end():
    case = CASES["bias"]
    with pytest.raises(LowerError, match="every pair"):
        attend_varlen(softmax_cascade(case.form(2), "case"), {}, None)


@pytest.mark.parametrize("name", ["blocks", "by position", "per token", "bias"])
def test_tables_beside_sequences_end_to_end(name):
    """What has a batch rank is laid end to end; everything else is read by position."""
    lens = [40, 1, 0, 34]
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    own = {
        "blocks": CASES["blocks"],
        "by position": Case(
            score=QK * 0.25 + Read("T", (H, KV)), scores=lambda s, q, k, x: s + x["T"][:, None],
            reads=(("T", ("h", "kv"), "float"),),
        ),
        "bias": Case(
            score=QK * 0.25 + Read("T", (H, Q, KV)), scores=lambda s, q, k, x: s + x["T"],
            reads=(("T", ("h", "q", "kv"), "float"),),
        ),
        "per token": Case(
            score=QK * 0.25 + Read("T", (B, KV)), scores=lambda s, q, k, x: s + x["T"][:, None, None],
            reads=(("T", ("b", "kv"), "float"),),
        ),
    }  # fmt: skip
    case, make = own[name], torch.Generator().manual_seed(33)
    x = inputs_for(CASES["dense"], SIZES | {"b": 1, "q": 75, "kv": 75}, torch.float32, 33)
    table = {
        "blocks": {"keep": torch.rand(4, 3, 3, generator=make) < 0.5},
        "by position": {"T": torch.randn(4, 40, generator=make)},
        "per token": {"T": torch.randn(1, 75, generator=make)},
        "bias": {"T": torch.randn(4, 40, 40, generator=make)},
    }[name]
    found = attend_varlen(
        softmax_cascade(case.form(2), "case"), {**{n: t[0] for n, t in x.items()}, **table},
        Sequences(starts, starts, 40, 40),
    )  # fmt: skip
    for i, length in enumerate(lens):
        if length:
            part = slice(int(starts[i]), int(starts[i + 1]))
            mine = {n: t[:, :, part] for n, t in x.items()} | table
            if name == "per token":
                mine["T"] = table["T"][:, part]
            elif name != "blocks":
                mine["T"] = table["T"][..., :length]
            if name == "bias":
                mine["T"] = mine["T"][:, :length]
            close({n: t[None, :, part] for n, t in found.items()}, case, mine)


@pytest.mark.parametrize("lens", [[0, 7, 0], [0, 0], [0, 0, 1], [129, 0, 2]])
def test_sequences_of_no_tokens_anywhere(lens):
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    x = inputs_for(
        ONE,
        SIZES | {"b": 1, "h": 7, "group": 7, "q": sum(lens), "kv": sum(lens)},
        torch.float32,
        30,
    )
    found = attend_varlen(
        softmax_cascade(ONE.form(7), "case"), {n: t[0] for n, t in x.items()},
        Sequences(starts, starts, max(lens), max(lens)),
    )  # fmt: skip
    assert found["AV"].shape == (7, sum(lens), 24)
    for i, length in enumerate(lens):
        if length:
            part = slice(int(starts[i]), int(starts[i + 1]))
            mine = {n: t[None, :, part] for n, t in found.items()}
            close(mine, ONE, {n: t[:, :, part] for n, t in x.items()})


def test_a_window_over_shuffled_pages():
    """Loop bounds count positions, wherever the pages lie; most pages are never read."""
    case = Case(
        (Q + Extent("kv") - Extent("q") >= KV) & (Q + Extent("kv") - Extent("q") - KV < 21),
        lambda q, k, x: (
            (k <= q + x["K"].shape[2] - x["Q"].shape[2])
            & (q + x["K"].shape[2] - x["Q"].shape[2] - k < 21)
        ),
    )
    page, lengths = 16, [75, 30]
    table = torch.tensor([[9, 2, 7, 0, 4], [5, 11, 1, 3, 8]], dtype=torch.int32)
    x = inputs_for(case, SIZES, torch.float32, 31)
    cache = {n: torch.randn(12, 2, page, w) for n, w in (("K", 16), ("V", 24))}
    for entry, first in ((0, 3), (1, 0)):  # pages before the window hold no numbers
        for number in table[entry, :first]:
            cache["K"][number] = torch.nan
    found = decode(
        softmax_cascade(case.form(2), "case"), {**x, **cache},
        pages=Pages(table, torch.tensor(lengths, dtype=torch.int32)), splits=2, schedule=SMALL,
    )  # fmt: skip
    for entry, length in enumerate(lengths):
        k, v = (torch.cat(list(cache[n][table[entry].long()]), 1)[None, :, :length] for n in "KV")
        k = k.nan_to_num(0.0)
        mine = {n: t[entry : entry + 1] for n, t in found.items()}
        close(mine, case, {"Q": x["Q"][entry : entry + 1], "K": k, "V": v})
