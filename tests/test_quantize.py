"""Number formats, scales, placement and schemes: known answers and dense references written here."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.cascade import NAMED, count_passes, fuse_reductions
from attn_rewrite.cascade.attention import (
    POINT,
    QK,
    SoftmaxAttention,
    edit_score,
    restrict,
    softmax_cascade,
)
from attn_rewrite.cascade.expr import Const, Rank, Read, call
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.staged import as_staged, staged_cascade
from attn_rewrite.cascade.text import parse, parse_expr
from attn_rewrite.cascade.values import Frame, evaluate
from attn_rewrite.outliers import infinity_norm, kurtosis
from attn_rewrite.passes import TRANSFORMS
from attn_rewrite.passes.quantize.packing import pack, pack_int4, unpack, unpack_int4
from attn_rewrite.passes.quantize.placement import check_placement
from attn_rewrite.passes.quantize.quantisers import (
    Affine,
    Float4,
    Float8,
    Granularity,
    Integer,
    Log2,
    rounded,
)
from attn_rewrite.passes.quantize.scheme import hadamard
from attn_rewrite.plan import Step, make_plan, rewritten
from attn_rewrite.policy import Policy
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal
from tests.sites import findings, make_site

X, S = Read("X", (Rank("n"),)), Read("S", ())


def value(expr, x=(), **scalars):
    """An expression over X[n] and scalars, evaluated by the oracle's arithmetic."""
    x = torch.as_tensor(x, dtype=torch.float64)
    held = {"X": x, **{n: torch.tensor(v, dtype=torch.float64) for n, v in scalars.items()}}
    frame = Frame(("n",), {"n": torch.arange(len(x))}, {"n": len(x)}, held)
    return evaluate(expr, frame).expand(len(x)).tolist()


def scheme(text, site, cascade=None):
    (transform,) = parse_pipeline(text)
    return transform.apply(site.cascade if cascade is None else cascade, site)


def random_inputs(site, batch=1, seed=0, v=None):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "Q": (batch, site.hq, site.q_len, site.d_qk),
        "K": (batch, site.hkv, site.kv_len, site.d_qk),
        "V": (batch, site.hkv, site.kv_len, site.d_v),
    }
    return {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}


def likeness(found, wanted):
    """Cosine in per cent, and relative L1."""
    cosine = 100 * float((found * wanted).sum() / found.norm() / wanted.norm())
    return cosine, float((found - wanted).abs().sum() / wanted.abs().sum())


# Number formats


def test_rounding_of_halves():
    x = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    assert value(rounded(X, "away"), x) == [127, 1, 2, 3, -1, -2, -3]
    assert value(rounded(X, "even"), x) == [127, 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize(("bits", "largest", "dtype"), [(8, 127, "i8"), (4, 7, "i4")])
def test_integers_are_symmetric_and_saturate(bits, largest, dtype):
    q = Integer(bits)
    assert (q.limit, q.dtype) == (largest, dtype)
    assert value(q.code(X, S), [1e6, -1e6, 0.4, largest], S=1.0) == [largest, -largest, 0, largest]
    assert max(value(q.scale(X), [3.0, -largest])) == 1.0


def test_a_block_of_zeros_has_codes_of_zero():
    scale = value(Integer().scale(X), [0.0, 0.0])
    assert min(scale) > 0
    assert value(Integer().code(X, S), [0.0, 0.0], S=scale[0]) == [0, 0]


def test_e4m3():
    above = 2**-10 * (1 + 1e-9)  # a cast by way of float32 would call this a tie
    x = [1 / 6, 1.6667e-4, 0.448, 2**-10, above, 500, -500, 448, 1.0, 0.0]
    wanted = [0.171875, 0, 0.4375, 0, 2**-9, 448, -448, 448, 1, 0]
    assert value(Float8().clipped(X), x) == wanted


@given(st.floats(-60000, 60000, width=32))
@settings(max_examples=200, deadline=None)
def test_8_bit_floats_are_those_of_torch(x):
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        limit = torch.finfo(dtype).max
        wanted = torch.tensor([x]).clamp(-limit, limit).to(dtype).to(torch.float64).tolist()
        assert value(Float8(kind).clipped(X), [x]) == wanted


def test_sums_of_half_precision_accumulators():
    """What P and V may be scaled to where 32 products, or two times 32, are added in float16."""
    largest = torch.finfo(torch.float16).max

    def sum_of(terms, p_limit, v_limit):
        p, v = Float8("e4m3", p_limit), Float8("e4m3", v_limit)
        codes = [value(f.code(X, f.scale(Const(1.0))), [1.0])[0] for f in (p, v)]
        return terms * codes[0] * codes[1]

    assert sum_of(64, 448, 2.25) == sum_of(64, 224, 4.5) == 64512 <= largest
    assert sum_of(32, 448, 448) == 6_422_528 > largest


def group_of_4_bits(x):
    """Scale and codes of one group."""
    scale = max(value(Float4().scale(X), x))
    return scale, value(Float4().code(X, S), x, S=scale)


def test_a_ramp_in_4_bit_floats():
    scale, codes = group_of_4_bits([i / 10 for i in range(16)])
    assert scale == 0.25
    assert codes == [0, 0.5, 1, 1, 1.5, 2, 2, 3, 3, 4, 4, 4, 4, 6, 6, 6]


def test_ties_of_4_bit_floats():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0]
    wanted = [0, 1, 1, 2, 2, 4, 4, 6]
    assert value(Float4().code(X, S), ties, S=1.0) == wanted
    assert value(Float4().code(X, S), [-t for t in ties], S=1.0) == [-w for w in wanted]


def test_a_group_of_small_probabilities():
    """A row maximum of 1 elsewhere: scaled by 1 the group is lost, by 448 * 6 it is kept."""
    p = [1e-3 * 2 ** (-k / 2) for k in range(16)]
    assert sum(p) == pytest.approx(0.00340088, abs=1e-8)
    assert group_of_4_bits(p)[0] == 0
    scale, codes = group_of_4_bits([2688 * x for x in p])
    assert scale == 0.4375
    assert codes == [6, 4, 3, 2, 1.5, 1, 1, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert scale * sum(codes) / 2688 == pytest.approx(0.00325521, abs=1e-8)


@pytest.mark.parametrize("length", [16, 21])
def test_fp4_is_what_is_written_here(length):
    """Groups of 16 channels, a short one at the end; scales may differ along the sum here."""
    site = make_site(hq=2, hkv=1, q_len=5, kv_len=7, d_qk=length)
    inputs = random_inputs(site)
    cascade = scheme("fp4(smooth_k=false, smooth_q=false)", site)
    assert check_placement(cascade) is None
    found = interpret(cascade, inputs, also=("QI", "KI"))
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    for name in "QK":
        for x, y in zip(inputs[name].split(16, -1), found[f"{name}I"].split(16, -1), strict=True):
            wide = x.abs().amax(-1, keepdim=True) / 6
            scale = wide.to(torch.float32).to(torch.float8_e4m3fn).double()
            steps = ((x.abs() / scale)[..., None] - levels).abs()
            near = levels[steps.argmin(-1)] * scale * x.sign()
            assert torch.allclose(y, near, rtol=0, atol=1e-12)


def test_bad_formats():
    for make in (
        lambda: Integer(1), lambda: Integer(9), lambda: Float8("e4m3", 500.0), lambda: Affine(9),
        lambda: Log2(1), lambda: Granularity("block"), lambda: Granularity("row"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected|give|is|reaches|has|known"):
            make()


def test_log2_codes():
    one = Read("P", ())
    assert value(Log2(4).value(X, one), [1, 0.5, 0.3, 0.01, 0], P=1.0) == [1, 0.5, 0.25, 2**-7, 0]
    # DGQ: the row without its start token, 6 bits.
    row = [0.06, 0.03, 0.01]
    assert value(Log2(6).code(X, one), [*row, 1e-30], P=0.06) == [0, 1, 3, 63]
    found = value(Log2(6).value(X, one), [*row, 0.0], P=0.06)
    assert found == pytest.approx([0.06, 0.03, 0.0075, 0.0], abs=1e-18)


def test_log2_has_no_leak_of_zeros():
    """4096 masked keys at 4 bits would add 0.125 of the maximum, had they a code."""
    assert sum(value(Log2(4).value(X, Read("P", ())), [0.0] * 4096, P=1.0)) == 0.0


def test_affine_codes_of_a_ramp():
    low, high = Const(0.0), Const(31.0)
    codes = value(Affine(2).code(X, low, high), range(32))
    assert [i for i in range(1, 32) if codes[i] != codes[i - 1]] == [6, 16, 26]
    assert value(Affine(2).step(low, high), [0])[0] == pytest.approx(31 / 3)
    # A constant group is itself, not NaN.
    same = Const(2.5)
    again = Affine(2).value(Affine(2).code(X, same, same), same, same)
    assert value(again, [2.5, 2.5]) == [2.5, 2.5]


def test_packing():
    assert int(pack(torch.tensor([0, 1, 2, 3] * 4), 2, 32)) == 0xE4E4E4E4
    assert pack_int4(torch.tensor([-8, 7])).tolist() == [0xF0]
    with pytest.raises(ValueError, match="0 to 3"):
        pack(torch.tensor([4]), 2)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_packing_undone(codes, seed):
    held = torch.tensor(codes)
    assert unpack_int4(pack_int4(held), len(codes)).tolist() == codes
    assert unpack(pack(held + 8, 4, 32), 4, len(codes), 32).tolist() == [c + 8 for c in codes]


# Who shares a scale


def groups(granularity, token, count):
    index = granularity.index(Rank("h"), Rank(token), Rank("d"))[-1]
    frame = Frame((token,), {token: torch.arange(count)}, {token: count}, {})
    return evaluate(index, frame).tolist()


def test_groups_of_threads():
    queries = groups(Granularity("thread"), "q", 1024)
    keys = groups(Granularity("thread"), "kv", 1024)
    assert [n for n in range(32) if queries[n] == 0] == [0, 8, 16, 24]
    assert [n for n in range(64) if keys[n] == 1] == [
        2, 3, 10, 11, 18, 19, 26, 27, 34, 35, 42, 43, 50, 51, 58, 59
    ]  # fmt: skip
    assert (max(queries) + 1, max(keys) + 1) == (256, 64)


@pytest.mark.parametrize(
    ("kind", "queries", "keys"),
    [("token", 200, 200), ("block", 2, 4), ("warp", 7, 4), ("thread", 56, 16)],
)
def test_number_of_scales(kind, queries, keys):
    site = make_site(hq=2, hkv=2, q_len=200, kv_len=200)
    cascade = scheme(f"int8(granularity={kind!r})", site)
    found = interpret(cascade, random_inputs(site), also=("QS", "KS"))
    assert found["QS"].shape == (1, 2, queries)
    assert found["KS"].shape == (1, 2, keys)


def test_scales_of_tensor_and_head():
    site = make_site(hq=2, hkv=2)
    inputs = random_inputs(site)
    whole = interpret(scheme("int8(granularity='tensor')", site), inputs, also=("QS",))["QS"]
    heads = interpret(scheme("int8(granularity='head')", site), inputs, also=("QS",))["QS"]
    assert float(whole) == float(inputs["Q"].abs().max()) / 127
    assert torch.equal(heads, inputs["Q"].abs().amax((2, 3)) / 127)


def test_keys_in_the_order_of_a_tensor_core_fragment():
    """Inside 16 tokens a fragment stores V in another order; P follows, and nothing changes."""
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    assert order.argsort().tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    site = make_site(q_len=9, kv_len=64)
    inputs = random_inputs(site)
    every = (16 * torch.arange(4)[:, None] + order).flatten()
    moved = {n: t if n == "Q" else t[:, :, every] for n, t in inputs.items()}
    for text in ("int8(pv=true)", "fp8", "int4(pv='fp8', granularity='block')"):
        cascade = scheme(text, site)
        first, second = (interpret(cascade, i, also=("PI",)) for i in (inputs, moved))
        assert torch.equal(first["PI"][..., every], second["PI"])
        assert torch.allclose(first["AV"], second["AV"], rtol=0, atol=1e-13)


# Placement


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("int8(granularity='channel')", "scale-placement", "QI differs along d, over which QK"),
        ("int8(pv=true, v_granularity='token')", "scale-placement", "VI differs along kv"),
        ("fp8(granularity='channel')", "scale-placement", "QI differs along d"),
    ],
)
def test_a_scale_must_be_constant_along_the_sum(text, code, says):
    refusal = scheme(text, make_site())
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert says in refusal.reason


@pytest.mark.parametrize("name", ["quantised-p", "quantised-qkv", "attention"])
def test_named_cascades_that_are_well_placed(name):
    known = {n: c for n, c in NAMED.items() if name in n}
    assert known
    assert all(check_placement(c) is None for c in known.values())


def test_a_token_scale_may_not_meet_the_values():
    """Scales of V per key, written by hand: the sum over keys cannot let them out."""
    text = """
ranks p, m, f
input A[m, p]
input V[f, m] dtype i8 scale VS
inputs VS[m]
PV[f, p] = A[m, p] * V[f, m]
"""
    found = check_placement(parse(text))
    assert found is not None
    assert found.tensor == "V"
    # Multiplied inside the sum it is a product of values again.
    assert check_placement(parse(text.replace("* V[f, m]", "* V[f, m] * VS[m]"))) is None


def test_a_fixed_scale_of_normalised_probabilities_is_refused():
    site = make_site()
    staged = as_staged(scheme("int8(pv=true)", site))
    late = call("cast_i8", call("round", Read("A", POINT) * 127.0))
    found = check_placement(staged_cascade(replace(staged, probability=late)))
    assert found is not None
    assert found.code == "static-scale-normalised"
    assert "round to zero" in found.reason


def test_why_a_fixed_scale_of_normalised_probabilities_is_refused():
    """At 2048 keys it leaves half of the output, below the maximum nearly all of it."""
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((2048, 64))) for _ in range(3))
    q = q[:64]
    p = torch.softmax(q @ k.T / 8, -1)
    below = (q @ k.T / 8 - (q @ k.T / 8).amax(-1, keepdim=True)).exp()
    normalised = torch.round(p * 127) / 127 @ v
    unnormalised = torch.round(below * 127) / 127 @ v / below.sum(-1, keepdim=True)
    assert likeness(normalised, p @ v)[0] < 60
    assert likeness(unnormalised, p @ v)[0] > 99.9


# Rewriting


SCHEMES = (
    "int8", "int8(pv=true)", "int8(pv='fp8', granularity='thread')", "int8(rotate=true)", "int4",
    "fp8", "fp4", "fp4(v=true, rotate=true)", "fp8(kind='e5m2', pv=false)", "dgq",
    "dgq(per='row', start=2)", "kv_int8(residual=4)",
    "kv_int4(group=8, residual=0)", "clipped_softmax", "int8(smooth_q=true, pv=true)",
)  # fmt: skip


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("heads", [None, (0, 1)])
def test_text_and_parts_of_a_quantised_cascade(text, heads):
    site = make_site(hkv=2, causal=True)
    (transform,) = parse_pipeline(text)
    if heads is None:
        cascade = transform.apply(site.cascade, site)
    else:
        cascade = transform.apply_to_heads(site.cascade, site, heads)
    assert not isinstance(cascade, Refusal), cascade
    assert parse(str(cascade)) == cascade
    assert staged_cascade(as_staged(cascade), cascade.name) == cascade
    assert check_placement(cascade) is None


@pytest.mark.parametrize("text", SCHEMES)
def test_heads_that_are_not_named_keep_their_numbers(text):
    site = make_site(hkv=2, q_len=37, kv_len=41)
    (transform,) = parse_pipeline(text)
    inputs = random_inputs(site)
    every = interpret(transform.apply(site.cascade, site), inputs)["AV"]
    some = interpret(transform.apply_to_heads(site.cascade, site, (2, 3)), inputs)["AV"]
    plain = interpret(site.cascade, inputs)["AV"]
    assert torch.allclose(some[:, :2], plain[:, :2], rtol=0, atol=1e-13)
    if "tensor" not in text and text != "dgq":  # one scale over all heads, or over those named
        assert torch.allclose(some[:, 2:], every[:, 2:], rtol=0, atol=1e-13)
    assert not torch.allclose(some[:, 2:], plain[:, 2:], rtol=0, atol=1e-9)


def test_two_schemes_on_one_site():
    site = make_site(hkv=2, q_len=37, kv_len=41)
    steps = [
        Step(site.name, parse_pipeline(text), heads)
        for text, heads in (("int8(pv=true)", (0, 1)), ("int8(rotate=true)", (2, 3)))
    ]
    inputs = random_inputs(site)
    both = interpret(rewritten(site, *steps), inputs)["AV"]
    for text, heads in (("int8(pv=true)", [0, 1]), ("int8(rotate=true)", [2, 3])):
        alone = interpret(scheme(text, site), inputs)["AV"]
        assert torch.allclose(both[:, heads], alone[:, heads], rtol=0, atol=1e-12)


def dense_int8(q, k, v, scale, keep, *, pv=False, block=(128, 64)):
    """SageAttention written plainly, one head at a time: [n, d] each, float64."""

    def codes(x, size):
        parts = [p / (p.abs().max() / 127) for p in x.split(size)]
        scales = [p.abs().max() / 127 for p in x.split(size)]
        return [torch.round(p).clamp(-127, 127) for p in parts], scales

    (qi, qs), (ki, ks) = codes(q, block[0]), codes(k - k.mean(0), block[1])
    rows = [
        torch.cat([a @ b.T * (s * t) for b, t in zip(ki, ks, strict=True)], 1)
        for a, s in zip(qi, qs, strict=True)
    ]
    s = (torch.cat(rows) * scale).masked_fill(~keep, -math.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    if not pv:
        return p / p.sum(-1, keepdim=True) @ v
    mean = v.mean(0)
    scales = (v - mean).abs().amax(0) / 127
    vi = torch.round((v - mean) / scales)
    return torch.round(p * 127) @ vi / p.sum(-1, keepdim=True) / 127 * scales + mean


@given(
    st.integers(1, 40), st.integers(1, 90), st.booleans(), st.booleans(), st.sampled_from([1, 2])
)
@settings(max_examples=30, deadline=None)
def test_int8_is_what_is_written_here(q_len, kv_len, causal, pv, hkv):
    site = make_site(hq=2, hkv=hkv, q_len=q_len, kv_len=kv_len, causal=causal, d_v=5)
    inputs = random_inputs(site, seed=q_len * 100 + kv_len)
    found = interpret(TRANSFORMS["int8"](pv=pv).apply(site.cascade, site), inputs)["AV"]
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    keep = keep.tril() if causal else keep
    for head in range(2):
        q, (k, v) = inputs["Q"][0, head], (inputs[n][0, head * hkv // 2] for n in "KV")
        if kv_len == 1:
            continue  # K less its mean is 0, which this reference divides by
        wanted = dense_int8(q, k, v, 0.5, keep, pv=pv)
        assert torch.allclose(found[0, head], wanted, rtol=0, atol=1e-12)


def numpy_data():
    rng = np.random.default_rng(0)
    return [
        torch.from_numpy(rng.standard_normal((1024, 64)).astype(np.float32)).double()
        for _ in range(3)
    ]


def run_on(text, q, k, v):
    site = make_site(
        hq=1, hkv=1, q_len=len(q), kv_len=len(k), d_qk=q.shape[1], d_v=v.shape[1],
        cascade=softmax_cascade(SoftmaxAttention(score=QK * q.shape[1] ** -0.5)),
    )  # fmt: skip
    inputs = {"Q": q[None, None], "K": k[None, None], "V": v[None, None]}
    cascade = scheme(text, site)
    assert not isinstance(cascade, Refusal), cascade
    return likeness(interpret(cascade, inputs)["AV"], interpret(site.cascade, inputs)["AV"])


@pytest.mark.parametrize(
    ("text", "cosine", "l1"),
    [
        ("int8(granularity='token')", 99.9964, 0.0082),
        ("int8", 99.9921, 0.0123),
        ("int4(granularity='tensor', smooth_q=false)", 96.61, 0.264),
        ("int4(granularity='block', smooth_q=false)", 97.38, 0.229),
        ("int4(smooth_q=false)", 98.24, 0.186),
        ("int4(granularity='token', smooth_q=false)", 98.84, 0.150),
    ],
)
def test_accuracy_of_the_tiers_on_normal_data(text, cosine, l1):
    """Measured by another emulation, in numpy, on the same numbers; equal to its last digit."""
    found = run_on(text, *numpy_data())
    assert found[0] == pytest.approx(cosine, abs=0.0055 if cosine < 99 else 6e-5)
    assert found[1] == pytest.approx(l1, abs=6e-4 if cosine < 99 else 6e-5)


@pytest.mark.parametrize(
    ("text", "cosine", "l1"),
    [
        ("int8(granularity='token', pv=true, smooth_v=false)", 99.9730, 0.0219),
        ("int8(pv=true, smooth_v=false)", 99.9684, 0.0239),
        ("int8(granularity='thread', pv='fp8')", 99.9359, 0.0356),
    ],
)
def test_accuracy_of_rounding_below_the_running_maximum(text, cosine, l1):
    """The published loop rounds P tile by tile: derived here by fusing with local rounding."""
    q, k, v = numpy_data()
    site = make_site(hq=1, hkv=1, q_len=1024, kv_len=1024, d_qk=64, d_v=64, scale=0.125)
    site = replace(site, cascade=softmax_cascade(SoftmaxAttention(score=QK * 0.125)))
    inputs = {"Q": q[None, None], "K": k[None, None], "V": v[None, None]}
    fused = fuse_reductions(scheme(text, site), "kv", tile=64, local_rounding=True)
    found = interpret(fused.cascade, inputs)["AV"]
    measured = likeness(found, interpret(site.cascade, inputs)["AV"])
    assert measured[0] == pytest.approx(cosine, abs=6e-5)
    assert measured[1] == pytest.approx(l1, abs=6e-5)
    # Below the maximum of the complete row, as the cascade itself says, it is a little coarser.
    assert 99.9 < run_on(text, q, k, v)[0] < cosine


def test_smoothing_mends_channel_bias():
    q, k, v = numpy_data()
    rng = np.random.default_rng(1)
    k = k + 4 * torch.from_numpy(rng.standard_normal(64))
    q = q + 2 * torch.from_numpy(rng.standard_normal(64))
    plain = run_on("int4(granularity='block', smooth_k=false, smooth_q=false)", q, k, v)
    both = run_on("int4(granularity='block')", q, k, v)
    assert plain[0] < 93
    assert both[0] > 98


def test_smoothing_and_rotation_mend_different_outliers():
    q, k, v = numpy_data()
    rng = np.random.default_rng(2)
    spikes = [
        torch.from_numpy(10 * rng.standard_normal((1024, 64)) * (rng.random((1024, 64)) < 1e-3))
        for _ in range(2)
    ]
    options = {
        "none": "smooth_k=false, smooth_q=false", "rotated": "smooth_k=false, smooth_q=false, rotate=true",
        "smooth": "smooth_k=true, smooth_q=true", "both": "smooth_k=true, smooth_q=true, rotate=true",
    }  # fmt: skip
    found = {
        n: run_on(f"int4(granularity='block', {o})", q + spikes[0], k + spikes[1], v)[1]
        for n, o in options.items()
    }
    assert found["rotated"] < 0.5 * found["none"]
    assert found["smooth"] > 0.8 * found["none"]
    assert found["both"] < 1.1 * found["rotated"]


def test_smoothing_mends_biased_values():
    q, k, _ = numpy_data()
    v = 8.5 + 0.1 * torch.randn(1024, 64, generator=torch.Generator().manual_seed(0)).double()
    plain = run_on("int8(pv='fp8')", q[:128], k, v)[1]
    assert run_on("int8(pv='fp8', smooth_v=true)", q[:128], k, v)[1] < 0.01 * plain


def test_smooth_keys_change_no_probability():
    """softmax(Q K) = softmax(Q (K - mean)); codes of 8 bits hide nothing at this tolerance."""
    site = make_site(hkv=2, q_len=9, kv_len=13)
    inputs = random_inputs(site)
    shifted = {**inputs, "K": inputs["K"] + 100 * torch.randn(1, 2, 1, 8, dtype=torch.float64)}
    cascade = scheme("int8", site)
    first, second = (interpret(cascade, i)["AV"] for i in (inputs, shifted))
    assert torch.allclose(first, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("score", ["tanh(QK[b, h, q, kv] * 0.1) * 5.0", "abs(QK[b, h, q, kv])"])
def test_the_mean_of_the_keys_stays_where_the_score_is_not_linear(score):
    site = make_site(q_len=20, kv_len=30)
    cascade = edit_score(site.cascade, parse_expr(score))
    inputs = random_inputs(site)
    inputs["K"] = inputs["K"] + 3.0
    wanted = interpret(cascade, inputs)["AV"]
    smooth = scheme("int8", site, cascade)
    assert "QKM" in str(smooth)
    assert likeness(interpret(smooth, inputs)["AV"], wanted)[0] > 99.9


def test_the_mean_of_the_keys_stays_beside_a_sink():
    form = SoftmaxAttention(
        score=QK * 0.5, sink=parse_expr("SINK[h]"), reads=(TensorDecl("SINK", ("h",)),)
    )
    site = make_site(cascade=softmax_cascade(form), q_len=20, kv_len=30)
    inputs = {**random_inputs(site), "SINK": torch.tensor([0.0, 1.0, 2.0, 30.0])}
    inputs["K"] = inputs["K"] + 3.0
    wanted = interpret(site.cascade, inputs)["AV"]
    assert likeness(interpret(scheme("int8(pv=true)", site), inputs)["AV"], wanted)[0] > 99.9


def test_hadamard():
    def matrix(size):
        frame = Frame(("i", "j"), {r: torch.arange(size) for r in "ij"}, {"i": size, "j": size}, {})
        return evaluate(hadamard(Rank("i"), Rank("j"), size), frame).expand(size, size)

    assert (torch.tensor([4.0, 0, 0, 0], dtype=torch.float64) @ matrix(4)).tolist() == [2, 2, 2, 2]
    for size in (64, 80, 96, 7, 1):
        assert torch.allclose(matrix(size) @ matrix(size), torch.eye(size).double(), atol=1e-12)


@pytest.mark.parametrize(
    ("gap", "true", "int8", "times_one", "times_256", "times_448"),
    [
        (8, 0.5787, 0, 0, 0.5791, 0.6017), (10, 0.1568, 0, 0, 0.1581, 0.1505),
        (12, 0.0245, 0, 0, 0.0305, 0.0174), (14, 0.0034, 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_mass_behind_a_sink(gap, true, int8, times_one, times_256, times_448):
    """4096 keys, one logit 0 and the others -gap: what is left of the others."""
    p = math.exp(-gap)
    total = 1 + 4095 * p
    kept = [4095 * c[0] / total for c in (
        value(Integer().code(X, Const(1 / 127)) / 127.0, [p]), value(Float8().clipped(X), [p]),
        value(Float8().clipped(X * 256.0) / 256.0, [p]), value(Float8().clipped(X * 448.0) / 448.0, [p]),
    )]  # fmt: skip
    assert 4095 * p / total == pytest.approx(true, abs=2e-4)
    assert kept == pytest.approx([int8, times_one, times_256, times_448], abs=2e-4)


def test_dgq_keeps_the_start_token_of_cross_attention():
    site = make_site(kind="cross", q_len=5, kv_len=7)
    inputs = random_inputs(site)
    inputs["K"][:, :, 0] = 3 * inputs["Q"][:, :, 0]
    found = interpret(scheme("dgq(bits=6)", site), inputs, also=("A", "PI", "PS"))
    assert torch.equal(found["PI"][..., 0], found["A"][..., 0])
    peak = found["A"][..., 1:].amax()
    assert float(found["PS"]) == float(peak)
    codes = torch.round(-torch.log2(found["A"][..., 1:] / peak)).clamp(0, 63)
    assert torch.allclose(found["PI"][..., 1:], peak * 2.0**-codes, rtol=1e-12)


def test_clipped_softmax():
    uniform = {
        "Q": torch.zeros(1, 1, 1, 1),
        "K": torch.zeros(1, 1, 4, 1),
        "V": torch.ones(1, 1, 4, 1),
    }
    site = make_site(hq=1, hkv=1, q_len=1, kv_len=4, d_qk=1, d_v=1)
    found = interpret(scheme("clipped_softmax(gamma=-0.1)", site), uniform, also=("PI",))["PI"]
    assert found.flatten().tolist() == pytest.approx([0.175] * 4)
    logits = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64).log() * 2
    peaked = {**uniform, "Q": torch.ones(1, 1, 1, 1), "K": logits.view(1, 1, 4, 1)}
    found = interpret(scheme("clipped_softmax(gamma=-0.03)", site), peaked, also=("PI",))["PI"]
    assert found.flatten().tolist() == pytest.approx([0.9691, 0, 0, 0])
    # gamma = -alpha over the number of keys.
    assert "(-12.0) / #kv" in str(scheme("clipped_softmax(alpha=12.0)", site))
    assert -12 / 512 == -0.0234375


def test_kivi_numbers():
    """Keys per channel and 32 tokens, values per token and 32 channels, the last tokens untouched."""
    site = make_site(hq=1, hkv=1, q_len=1, kv_len=100, d_qk=8, d_v=40)
    inputs = random_inputs(site)
    found = interpret(scheme("kv_int4(residual=20)", site), inputs, also=("KD", "VD"))

    def coded(x):  # [groups, n]
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = (high - low) / 15
        return torch.round((x - low) / step) * step + low

    k, v = inputs["K"][0, 0], inputs["V"][0, 0]
    for start in (0, 32):  # 80 old tokens hold two whole groups
        part = coded(k[start : start + 32].T).T
        assert torch.allclose(found["KD"][0, 0, start : start + 32], part, atol=1e-12)
    assert torch.equal(found["KD"][0, 0, 64:], k[64:])
    assert torch.allclose(found["VD"][0, 0, :80, :32], coded(v[:80, :32]), atol=1e-12)
    assert torch.allclose(found["VD"][0, 0, :80, 32:], coded(v[:80, 32:]), atol=1e-12)
    assert torch.equal(found["VD"][0, 0, 80:], v[80:])


def test_static_scales():
    site = make_site(hq=2, hkv=2)
    cascade = scheme("int8(q_scale=[0.5, 0.25], k_scale=[0.1], smooth_k=false)", site)
    found = interpret(cascade, random_inputs(site), also=("QS", "KS", "QI"))
    assert found["QS"].tolist() == [[0.5, 0.25]]
    assert float(found["KS"]) == 0.1
    assert torch.equal(found["QI"][0, 1], torch.round(random_inputs(site)["Q"][0, 1] / 0.25).long())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int8(q_scale=[0.1])", "q_scale and k_scale, or neither"),
        ("int8(q_scale=[-0.1], k_scale=[1.0])", "positive"),
        ("int8(granularity='row')", "granularity is 'row'"),
        ("int8(pv='int4')", "pv is 'int4'"),
        ("calibrated(tiers=[])", "tiers is empty"),
        ("calibrated(tiers=['exact'])", "is not one quantising scheme"),
        ("dgq(bits=9)", "bits is 9"),
    ],
)
def test_bad_options(text, says):
    with pytest.raises(ValueError, match=says):
        parse_pipeline(text)


# Refusals


def test_refusals_of_sites():
    cases = [
        ({"family": "linear"}, "quantise-linear"),
        ({"dropout": 0.1}, "quantise-dropout"),
        ({"d_qk": 2048}, "quantise-head-dim"),
        ({"q_len": 1, "kv_len": 512}, "quantise-decode"),
        ({"q_len": 4, "kv_len": 4}, None),
        ({}, None),
    ]
    for facts, code in cases:
        refusal = TRANSFORMS["int8"]().admits(make_site(**facts))
        assert (refusal.code if refusal else None) == code, facts
    assert TRANSFORMS["kv_int8"]().admits(make_site(q_len=1, kv_len=512)) is None


def test_probabilities_that_are_used_elsewhere_are_refused():
    away = Refusal("probabilities-escape", "the probabilities are an output", "", None, None)
    plan = make_plan(findings(make_site(refusals=(away,))), Policy.parse("int8"))
    assert [s.text for s in plan.steps] == ["keep"]
    assert [r.code for r in plan.refusals] == ["probabilities-escape"]


def refused(text, form, **facts):
    site = make_site(cascade=softmax_cascade(form), **facts)
    result = scheme(text, site)
    return result.code if isinstance(result, Refusal) else None


def test_refusals_of_forms():
    weighted = SoftmaxAttention(
        score=QK, weight=parse_expr("W[h]"), reads=(TensorDecl("W", ("h",)),)
    )
    sink = SoftmaxAttention(score=QK, sink=parse_expr("Z[h]"), reads=(TensorDecl("Z", ("h",)),))
    assert refused("int8(pv=true)", weighted) == "quantise-weighted"
    assert refused("int8", weighted) is None
    assert refused("int8(pv=true, smooth_v=true)", sink) == "smooth-v-rows"
    assert refused("int8(pv=true)", sink) is None  # the mean of V stays on V by itself
    position = SoftmaxAttention(score=parse_expr("cast_f32(q - kv)"))
    assert refused("int8", position) == "quantise-score"


def test_refusals_of_cascades():
    site = make_site(hkv=2)
    assert scheme("int8", site, NAMED["attention-3pass"]).code == "quantise-form"
    assert scheme("int8", site, scheme("int4", site)).code == "quantise-twice"
    assert (
        TRANSFORMS["int8"]().apply_to_heads(site.cascade, site, (0, 2, 3)).code == "quantise-heads"
    )
    clipped = scheme("clipped_softmax", site)
    assert scheme("int8(pv=true)", site, clipped).code == "quantise-mapped"
    assert scheme("dgq", site, clipped).code == "quantise-mapped"
    assert scheme("calibrated", site).code == "not-calibrated"


@pytest.mark.parametrize(("offset", "first"), [("0", 1), ("#kv - #q", 3)])
def test_causal_alignment_is_that_of_the_site(offset, first):
    """2 queries, 4 keys: top-left they see 1 and 2 keys, bottom-right 3 and 4."""
    site = make_site(causal=True, offset=offset, q_len=2, kv_len=4)
    inputs = random_inputs(site)
    p = interpret(scheme("int8(pv=true)", site), inputs, also=("SN",))["SN"]
    assert (p != 0).sum(-1).tolist() == [[[first, first + 1]] * 4]


def test_zero_operands_give_zero_or_the_mean():
    site = make_site()
    inputs = random_inputs(site)
    for text in ("int8(pv=true)", "int4", "fp8", "kv_int4(residual=0)", "dgq"):
        cascade = scheme(text, site)
        for name in "QKV":
            found = interpret(cascade, {**inputs, name: torch.zeros_like(inputs[name])})["AV"]
            assert found.isfinite().all()
            if name == "V":
                assert not found.any()


def test_a_query_without_keys_gives_zero():
    site = make_site(q_len=4, kv_len=4)
    cascade = restrict(site.cascade, parse_expr("kv > q"))
    for text in ("int8(pv=true, smooth_v=true)", "fp8", "dgq", "clipped_softmax", "int8"):
        found = interpret(scheme(text, site, cascade), random_inputs(site))["AV"]
        assert not found[:, :, 3].any(), text


# Passes


def test_passes_over_the_keys():
    site = make_site(hkv=2)
    whole = scheme("int8", site)
    fused = fuse_reductions(whole, "kv")
    assert (count_passes(whole, "kv"), fused.passes) == (5, 4)
    inputs = random_inputs(site)
    assert torch.allclose(
        interpret(fused.cascade, inputs)["AV"], interpret(whole, inputs)["AV"], rtol=0, atol=1e-12
    )


def test_rounded_probabilities_do_not_fuse():
    refusal = fuse_reductions(scheme("int8(pv=true)", make_site()), "kv")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "not-separable"
    local = fuse_reductions(scheme("int8(pv=true)", make_site()), "kv", local_rounding=True)
    assert local.passes == 4


# Outliers


def test_outlier_metrics():
    one = torch.zeros(1, 768)
    one[0, 5] = 1
    assert kurtosis(one) == pytest.approx(480.56, abs=0.01)
    assert kurtosis(one[:, :16]) == pytest.approx(12.360, abs=1e-3)
    assert kurtosis(torch.tensor([[1.0, -1.0] * 8])) == pytest.approx(0.8789, abs=1e-4)
    assert infinity_norm(torch.tensor([[1.0, -3.0], [0.5, 1.0]])) == 2.0


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "int4", "dgq", "kv_int8"])
def test_golden(golden, text):
    site = make_site(hkv=2, causal=True)
    name = text.replace("(", "-").replace(")", "").replace("=", "-")
    golden(f"quantize/{name}.txt", f"{site.cascade}\n\n-- {text}\n\n{scheme(text, site)}\n")
