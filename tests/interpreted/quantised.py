"""Generated kernels over 8-bit codes against the float64 oracle, under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_rewrite.backends.torch.einsums import emit_stages
from attn_rewrite.backends.triton.choose import choose_skipping
from attn_rewrite.backends.triton.decode import decode
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.launch import run
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.staged import emit_codes, split
from attn_rewrite.backends.triton.staging import stages_of
from attn_rewrite.cascade.attention import SoftmaxAttention, restrict, softmax_cascade
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.chunked import oracle
from attn_rewrite.graph import EagerBuilder
from attn_rewrite.passes.quantize.packing import pack_int4, unpack_int4
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal
from attn_rewrite.verify import rounding_bound
from tests.sites import make_site

SMALL = Schedule(block_rows=16, block_along=16)
INTEGER = "tl.dot({}, {}, out_dtype=tl.int32)"
FLOAT = "tl.dot({}, {}, input_precision=PRECISION, max_num_imprecise_acc="
# What the products of codes look like in the source.
SCHEMES = {
    "int8": (INTEGER.format("QI", "KI"),),
    "int8(pv=true)": (INTEGER.format("QI", "KI"), INTEGER.format("PI", "VI")),
    "int8(pv='fp8', granularity='thread')": (
        INTEGER.format("QI", "KI"), FLOAT.format("PI", "VI"),
    ),
    "fp8": (FLOAT.format("QI", "KI"), FLOAT.format("PI", "VI")),
    "fp8(kind='e5m2', pv=false)": (FLOAT.format("QI", "KI"),),
    "int4": (INTEGER.format("QI", "KI"),),
    "int4(pv=true, granularity='token')": (
        INTEGER.format("QI", "KI"), INTEGER.format("PI", "VI"),
    ),
    "int8(rotate=true, smooth_q=true, q_block=16)": (INTEGER.format("QI", "KI"),),
    "kv_int8(residual=4)": (),
}  # fmt: skip


def rewritten(text, site):
    cascade = site.cascade
    for transform in parse_pipeline(text):
        cascade = transform.apply(cascade, site)
        assert not isinstance(cascade, Refusal), cascade
    return cascade


def operands(site, dtype, seed, size=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "Q": (1, site.q_len, site.hq, site.d_qk), "K": (1, site.kv_len, site.hkv, site.d_qk),
        "V": (1, site.kv_len, site.hkv, site.d_v),
    }  # fmt: skip
    return {
        n: (size * torch.randn(s, generator=g)).to(dtype).transpose(1, 2) for n, s in shapes.items()
    }


def check(cascade, inputs, schedule=SMALL):
    """The kernel's output against the oracle of the cascade; the text of the kernel."""
    held = split(cascade)
    args = emit_codes(EagerBuilder(), held, cascade.inputs, list(inputs.values()))
    known = {t.name: a for t, a in zip(held.core.inputs, args, strict=True)}
    (stage,) = stages_of(held.core)
    schedule = schedule.with_(skipping=choose_skipping(stage.program))
    lanes = {"d": inputs["Q"].shape[3], "f": inputs["V"].shape[3]}
    source = emit(stage.program, schedule, lanes)
    found = run(source, known, {"AV": torch.float32})["AV"]
    wanted = oracle(cascade, inputs)
    error = float((found - wanted).abs().max())
    unit = torch.finfo(found.dtype).eps
    if known["V"].dtype in (torch.float16, torch.bfloat16) if "V" in known else False:
        unit = torch.finfo(known["V"].dtype).eps  # probabilities meet V in its type
    allowed = 4 * unit * float(wanted.abs().max())
    assert error <= rounding_bound(cascade, inputs, wanted, allowed, error)
    return source.text


@pytest.mark.parametrize("text", SCHEMES)
def test_products_of_codes(text):
    site = make_site(hq=2, hkv=1, q_len=33, kv_len=45, d_qk=24, d_v=40, causal=True)
    source = check(rewritten(text, site), operands(site, torch.float32, 1))
    for product in SCHEMES[text]:
        assert product in source


@pytest.mark.parametrize("d", [1, 7, 16, 33])
@pytest.mark.parametrize("pv", ["", "pv=true, "])
def test_codes_of_four_bits_lie_two_in_a_byte(d, pv):
    """Keys of any width, an odd one with half a byte to spare; what is read is what is packed."""
    site = make_site(hq=4, hkv=2, q_len=19, kv_len=37, d_qk=d, d_v=9, causal=True)
    cascade, x = rewritten(f"int4({pv}smooth_q=false)", site), operands(site, torch.float32, 8)
    held = split(cascade)
    (decl,) = (t for t in held.core.inputs if t.name == "KI")
    made = dict(
        zip(
            [t.name for t in held.core.inputs],
            emit_codes(EagerBuilder(), held, cascade.inputs, list(x.values())),
            strict=True,
        )
    )
    assert decl.dtype == "i4"
    assert made["KI"].dtype == torch.uint8
    assert made["KI"].shape == (1, 2, 37, (d + 1) // 2)
    plain = emit_stages(EagerBuilder(), held.stages, {n: x[n] for n in ("Q", "K", "V")
                        if n in {t.name for t in held.stages.inputs}})  # fmt: skip
    codes = plain["KI"].to(torch.int8)
    assert codes.abs().max() == 7
    assert torch.equal(unpack_int4(made["KI"], d), codes)
    assert torch.equal(made["KI"], pack_int4(codes))
    text = check(cascade, x)
    assert "// 2" in text
    assert "& 15" in text


def test_two_packed_operands_and_few_queries_over_a_long_cache():
    """Values too, which the emitter takes wherever another input has their width."""
    form = SoftmaxAttention(
        score=parse_expr("QK[b, h, q, kv] * 0.05"), guard=parse_expr("kv <= q + #kv - #q"),
        group=2, reads=(TensorDecl("WIDTH", ("f",)),),
    )  # fmt: skip
    cascade = softmax_cascade(form)
    inputs = tuple(replace(t, dtype="i4") if t.name in "KV" else t for t in cascade.inputs)
    cascade = replace(cascade, inputs=inputs)
    g = torch.Generator().manual_seed(9)
    kc, vc = (torch.randint(-8, 8, (2, 2, 300, n), generator=g, dtype=torch.int8) for n in (15, 20))
    x = {
        "Q": torch.randn(2, 4, 3, 15, generator=g),
        "K": pack_int4(kc), "V": pack_int4(vc),
        "WIDTH": torch.zeros(20),
    }  # fmt: skip
    wanted = interpret(cascade, {**x, "K": kc, "V": vc})["AV"]
    (stage,) = stages_of(cascade)
    lanes = {"d": 15, "f": 20}
    for pack in (1, 2):
        source = emit(stage.program, SMALL.with_(pack=pack, widen=frozenset("KV")), lanes)
        error = (run(source, x, {"AV": torch.float32})["AV"] - wanted).abs().max()
        assert error <= 2**-9 * wanted.abs().max()  # probabilities meet codes in float16
    keys = replace(cascade, inputs=(*inputs[:2], replace(inputs[2], dtype="i8"), inputs[3]))
    for splits in (1, 3):
        found = decode(keys, {**x, "V": vc}, splits=splits)["AV"]
        assert (found - wanted).abs().max() <= 2**-9 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "fp8"])
def test_narrow_models(text, dtype):
    site = make_site(hq=2, hkv=1, q_len=33, kv_len=45, d_qk=16, d_v=16)
    check(rewritten(text, site), operands(site, dtype, 2))


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "fp8"])
@pytest.mark.parametrize("order", [0, 1])
def test_windows_leave_out_tiles(text, order):
    site = make_site(hq=1, hkv=1, q_len=70, kv_len=70, d_qk=16, d_v=16, causal=True)
    both = [f"window(size=9, sinks=2) | {text}", f"{text} | window(size=9, sinks=2)"][order]
    assert "begin" in check(rewritten(both, site), operands(site, torch.float32, 3))


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "fp8"])
def test_masks_biases_and_sinks_that_are_read(text):
    form = SoftmaxAttention(
        score=parse_expr("QK[b, h, q, kv] * 0.3 + BIAS[h, q, kv]"),
        guard=parse_expr("KEEP[b, kv]"),
        sink=parse_expr("SINK[h]"),
        reads=(
            TensorDecl("BIAS", ("h", "q", "kv")),
            TensorDecl("KEEP", ("b", "kv"), dtype="bool"),
            TensorDecl("SINK", ("h",)),
        ),
    )
    site = make_site(cascade=softmax_cascade(form), q_len=20, kv_len=31, d_qk=16, d_v=16)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(4, 20, 31, generator=g)
    bias[:, :, :5] = -torch.inf
    reads = {
        "BIAS": bias, "KEEP": torch.rand(1, 31, generator=g) > 0.3,
        "SINK": torch.tensor([0.0, 1.0, -1.0, 3.0]),
    }  # fmt: skip
    check(rewritten(text, site), {**operands(site, torch.float32, 4), **reads})


@pytest.mark.parametrize("text", ["int8", "int8(pv=true, smooth_v=true)", "fp8"])
def test_queries_without_keys_give_zero(text):
    site = make_site(q_len=20, kv_len=20, hq=1, hkv=1, d_qk=16, d_v=16)
    holes = restrict(site.cascade, parse_expr("kv > q + 3"))
    (transform,) = parse_pipeline(text)
    check(transform.apply(holes, site), operands(site, torch.float32, 5))


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "fp8"])
@pytest.mark.parametrize("size", [1e-4, 30.0])
def test_large_and_small_scores(text, size):
    site = make_site(hq=1, hkv=1, q_len=17, kv_len=33, d_qk=16, d_v=16)
    check(rewritten(text, site), operands(site, torch.float32, 6, size))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    text=st.sampled_from(["int8", "int8(pv=true)", "fp8", "int8(granularity='thread')"]),
    q=st.integers(1, 40), kv=st.integers(1, 50), d=st.integers(1, 40), f=st.integers(1, 40),
    hkv=st.sampled_from([1, 2]), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(text, q, kv, d, f, hkv, causal, seed):
    site = make_site(hkv=hkv, q_len=q, kv_len=kv, d_qk=d, d_v=f, causal=causal, offset="#kv - #q")
    check(rewritten(text, site), operands(site, torch.float32, seed))


def test_8_bit_floats_of_the_interpreter_are_those_of_torch():
    """Halves to even, carries kept, subnormals rounded: what a kernel of probabilities needs."""
    import triton
    import triton.language as tl

    from attn_rewrite.backends.triton.interpreted import exact_conversions

    @triton.jit
    def convert(x, y, n: tl.constexpr):
        i = tl.arange(0, n)
        narrow = tl.load(x + i).to(tl.float8e4nv, fp_downcast_rounding="rtne")
        tl.store(y + i, narrow.to(tl.float32))

    x = torch.tensor([447.0, 1.97, 200.0, 0.003, 2.0**-10, -5.3, 0.0, 1 / 6])
    y = torch.zeros(8)
    with exact_conversions():
        convert[(1,)](x, y, 8)
    assert torch.equal(y, x.to(torch.float8_e4m3fn).float())
