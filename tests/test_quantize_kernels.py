"""Quantised attention as it runs: kernels against the oracle, and models end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attn_rewrite as ar
from attn_rewrite.backends.torch.integers import integer_matmul
from attn_rewrite.backends.torch.lower import lower
from attn_rewrite.cascade.attention import SoftmaxAttention, restrict, softmax_cascade
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.chunked import oracle
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import EagerBuilder
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal
from attn_rewrite.verify import rounding_bound
from tests.sites import make_site

SCHEMES = (
    "int8", "int8(pv=true)", "int8(pv='fp8', granularity='thread')", "int8(rotate=true)", "int4",
    "int4(pv=true, granularity='token')", "fp4(v=true)", "fp8", "fp8(kind='e5m2', pv=false)", "dgq",
    "dgq(per='row', start=2)", "kv_int8(residual=4)", "kv_int4(group=8, residual=0)",
    "clipped_softmax", "int8 | dgq", "int8(rounding='away')", "int4 | clipped_softmax",
)  # fmt: skip


def rewritten(text, site, heads=None):
    cascade = site.cascade
    for transform in parse_pipeline(text):
        if heads is None:
            cascade = transform.apply(cascade, site)
        else:
            cascade = transform.apply_to_heads(cascade, site, heads)
        assert not isinstance(cascade, Refusal), cascade
    return cascade


def operands(site, batch, dtype, seed, size=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "Q": (batch, site.q_len, site.hq, site.d_qk),
        "K": (batch, site.kv_len, site.hkv, site.d_qk),
        "V": (batch, site.kv_len, site.hkv, site.d_v),
    }
    # [b, n, h, d] seen as [b, h, n, d]: never contiguous.
    return {
        n: (size * torch.randn(s, generator=g)).to(dtype).transpose(1, 2) for n, s in shapes.items()
    }


def compare(cascade, inputs, exact, block=16):
    """The kernel against the oracle, beside an exact kernel of the same type."""
    kernel = lower(cascade, block=block)
    assert not isinstance(kernel, Refusal), kernel
    found = kernel.emit(EagerBuilder(), list(inputs.values()))
    wanted = oracle(cascade, inputs)
    assert found.dtype == inputs["Q"].dtype
    assert found.shape == wanted.shape
    plain = lower(exact, block=block).emit(EagerBuilder(), list(inputs.values()))
    reference = oracle(exact, inputs)
    bound = max(
        2 * float((plain - reference).abs().max()),
        4
        * torch.finfo(found.dtype).eps
        * max(float(wanted.abs().max()), float(reference.abs().max())),
    )
    error = float((found - wanted).abs().max())
    # Huge scores: what rounding does to this attention, not to the exact one.
    assert error <= rounding_bound(cascade, inputs, wanted, bound, error)
    return kernel


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_scheme_runs_as_its_cascade_says(text, dtype):
    site = make_site(hkv=2, q_len=33, kv_len=70, d_qk=16, d_v=24, kind="self", causal=True)
    inputs = operands(site, 2, dtype, 1)
    compare(rewritten(text, site), inputs, site.cascade)


@given(
    st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, 4]),
    st.booleans(), st.integers(0, 1 << 20), st.sampled_from([1e-6, 1.0, 10.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_odd_shapes(text, q_len, kv_len, hkv, causal, seed, size):
    site = make_site(
        hkv=hkv, q_len=q_len, kv_len=kv_len, d_qk=6, d_v=9, causal=causal, offset="#kv - #q"
    )
    compare(rewritten(text, site), operands(site, 1, torch.float32, seed, size), site.cascade)


# Scores in the hundreds: two evaluations that add in another order differ by more than either is
# off, so one of them is no yardstick for the other.
@pytest.mark.parametrize(
    ("text", "q_len", "kv_len", "hkv", "seed"),
    [
        ("kv_int8(residual=4)", 30, 62, 2, 0),
        ("int8(rotate=true)", 5, 39, 1, 1),
        ("fp8(kind='e5m2', pv=false)", 17, 33, 4, 3),
    ],
)
def test_scores_in_the_hundreds(text, q_len, kv_len, hkv, seed):
    site = make_site(
        hkv=hkv, q_len=q_len, kv_len=kv_len, d_qk=6, d_v=9, causal=False, offset="#kv - #q"
    )
    compare(rewritten(text, site), operands(site, 1, torch.float32, seed, 10.0), site.cascade)


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "fp8", "dgq(per='row')", "int4"])
@pytest.mark.parametrize("window", ["window(size=20)", "window(size=9, sinks=2)"])
@pytest.mark.parametrize("order", [0, 1])
def test_windows_are_skipped_and_quantised(text, window, order):
    site = make_site(hkv=2, q_len=150, kv_len=150, d_qk=16, causal=True)
    both = f"{window} | {text}" if order == 0 else f"{text} | {window}"
    inputs = operands(site, 1, torch.float32, 2)
    exact = rewritten(window, site)
    kernel = compare(rewritten(both, site), inputs, exact)
    assert kernel.name in ("tiled", "mapped")


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "int4(rotate=true)", "dgq(per='row')"])
def test_some_heads(text):
    site = make_site(hkv=2, q_len=30, kv_len=40, d_qk=16)
    cascade = rewritten(text, site, (0, 1))
    compare(cascade, operands(site, 2, torch.float32, 3), site.cascade)


@pytest.mark.parametrize("text", ["int8", "int8(pv=true)", "int4", "kv_int8(residual=3)"])
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
    site = make_site(cascade=softmax_cascade(form), q_len=20, kv_len=31, d_qk=16)
    keep = torch.rand(2, 31, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[1] = False  # a batch entry without keys: only the sink is left
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(4, 20, 31, generator=g)
    bias[:, :, :5] = -torch.inf
    reads = {"BIAS": bias, "KEEP": keep, "SINK": torch.tensor([0.0, 1.0, -1.0, 3.0])}
    inputs = {**operands(site, 2, torch.float32, 4), **reads}
    compare(rewritten(text, site), inputs, site.cascade)


def test_queries_without_keys_give_zero():
    site = make_site(q_len=20, kv_len=20, d_qk=16)
    holes = restrict(site.cascade, parse_expr("kv > q + 3"))
    inputs = operands(site, 1, torch.float32, 5)
    for text in ("int8", "int8(pv=true)", "fp8", "dgq", "clipped_softmax"):
        (transform,) = parse_pipeline(text)
        cascade = transform.apply(holes, site)
        found = lower(cascade).emit(EagerBuilder(), list(inputs.values()))
        assert not found[:, :, 16:].any(), text
        compare(cascade, inputs, holes)


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_huge_scores(score):
    site = make_site(q_len=17, kv_len=33, d_qk=16)
    inputs = operands(site, 1, torch.float32, 6)
    inputs["Q"] = inputs["Q"] * abs(score) ** 0.5
    inputs["K"] = inputs["K"] * score / abs(score) ** 0.5
    for text in ("int8", "int8(pv=true)", "fp8"):
        compare(rewritten(text, site), inputs, site.cascade)


def test_operands_are_not_written_to():
    site = make_site(hkv=2, q_len=30, kv_len=40, d_qk=16)
    inputs = operands(site, 1, torch.float32, 7)
    held = {n: t.clone() for n, t in inputs.items()}
    for text in SCHEMES:
        lower(rewritten(text, site)).emit(EagerBuilder(), list(inputs.values()))
    assert all(torch.equal(inputs[n], held[n]) for n in held)


@pytest.mark.parametrize(("terms", "count"), [(128, 1), (1041, 3), (4096, 2)])
def test_integer_products_are_exact(terms, count):
    a = torch.full((count, 5, terms), 127, dtype=torch.int8)
    b = torch.full((count, 7, terms), -127, dtype=torch.int8)
    b[:, 1::2] = 127
    wanted = 127 * 127 * terms
    found = integer_matmul(a, b)
    assert found.shape == (count, 5, 7)
    assert found.abs().unique().tolist() == [wanted]
    assert wanted != 2_064_512 or terms == 128
    odd = torch.randint(-127, 128, (count, 3, terms), dtype=torch.int8)
    assert torch.equal(integer_matmul(odd, a), odd.double() @ a.double().mT)
    assert integer_matmul(a[:, :0], b).shape == (count, 0, 7)


def test_gradients_pass_straight_through():
    """Of int8 QK: those of an attention whose operands are the codes times their scales."""
    site = make_site(q_len=20, kv_len=30, d_qk=16)
    inputs = {n: t.requires_grad_() for n, t in operands(site, 1, torch.float64, 8).items()}
    kernel = lower(rewritten("int8(smooth_k=false)", site))
    kernel.emit(EagerBuilder(), list(inputs.values())).square().sum().backward()

    def coded(x, block):
        parts = x.detach().split(block, 2)
        scales = [p.abs().amax((2, 3), keepdim=True) / 127 for p in parts]
        return torch.cat([torch.round(p / s) * s for p, s in zip(parts, scales, strict=True)], 2)

    q, k = (coded(inputs[n], b).requires_grad_() for n, b in (("Q", 128), ("K", 64)))
    v = inputs["V"].detach().requires_grad_()
    (torch.softmax(q @ k.mT * 0.5, -1) @ v).square().sum().backward()
    assert torch.allclose(inputs["V"].grad, v.grad)
    for name, other in (("Q", q), ("K", k)):
        # The scale depends on the largest element of its block, which gets more.
        close = torch.isclose(inputs[name].grad, other.grad, rtol=1e-9, atol=1e-12)
        assert int((~close).sum()) <= 4 * 2
        assert inputs[name].grad.abs().sum() > 0


def test_rounded_probabilities_say_that_they_have_no_gradient():
    site = make_site(q_len=20, kv_len=30, d_qk=16)
    inputs = [t.requires_grad_() for t in operands(site, 1, torch.float32, 8).values()]
    out = lower(rewritten("int8(pv=true)", site)).emit(EagerBuilder(), inputs)
    with pytest.raises(RuntimeError, match="mapped_attention"):
        out.sum().backward()


# Models

SLOW = pytest.mark.slow


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(64, 192), nn.Linear(64, 64), causal

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, n, d))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(False), Attention(True)

    def forward(self, x):
        return self.second(x + self.first(x))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval(), torch.randn(2, 90, 64)


@pytest.mark.parametrize(
    "policy",
    [
        "int8", pytest.param("int8(pv=true)", marks=SLOW), "window(size=16) | int8(pv=true)", pytest.param("int4", marks=SLOW),
        pytest.param("kv_int8(residual=8)", marks=SLOW),
    ],
)  # fmt: skip
def test_a_model_end_to_end(model, policy, tmp_path):
    source, x = model
    optimized = ar.optimize(source, policy, (x,))
    for site in optimized.report.sites:
        assert site.exactness == "approximate"
        assert site.implementation.max_abs <= site.implementation_bound
        assert site.approximation.rmse > 0
        assert site.unbudgeted
    notes = " ".join(optimized.report.notes)
    assert "gains no time on a CPU" in notes
    assert "passes over the keys" in notes
    other = torch.randn(1, 37, 64)
    assert optimized(other).shape == other.shape
    ar.save(optimized, tmp_path / "saved")
    assert torch.equal(ar.load(tmp_path / "saved")(x), optimized(x))
    code = (
        "import sys, torch, attn_rewrite.ops\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "print(float(program(torch.zeros(1, 37, 64)).abs().sum()))\n"
    )
    if policy == "int8(pv=true)":
        command = [sys.executable, "-c", code, str(tmp_path / "saved" / "model.pt2")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
        assert done.returncode == 0, done.stderr


def test_a_budget_sends_rough_schemes_back(model):
    source, x = model
    optimized = ar.optimize(source, "int4", (x,), budget="site: cosine>=0.99999")
    assert {s.status for s in optimized.report.sites} == {"reverted"}
    assert torch.allclose(optimized(x), source(x), atol=1e-5)


def test_executed_tiles_are_counted(model):
    source, x = model
    optimized = ar.optimize(source, "window(size=16) | int8(pv=true)", (x,))
    executed, total = optimized.report.sites[1].cost_after.tiles
    assert executed < total


def test_edits_come_before_quantisation(model):
    from attn_rewrite.passes.transform import ScoreEdit
    from attn_rewrite.plan import Step
    from attn_rewrite.plan import rewritten as planned

    class Halve(ScoreEdit):
        name = "halve"

        def score(self, s, site):
            return s * 0.5

    site = make_site()
    int8 = parse_pipeline("int8")
    late = planned(site, Step(site.name, (*int8, Halve())))
    assert late.code == "edit-after-quantisation"
    assert not isinstance(planned(site, Step(site.name, (Halve(), *int8))), Refusal)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("window(size=16) | int8", marks=SLOW), "clipped_softmax", pytest.param("int4", marks=SLOW),
        pytest.param("kv_int8(residual=8)", marks=SLOW), pytest.param("int8", marks=SLOW),
    ],
)  # fmt: skip
def test_onnx_computes_the_same(model, policy, tmp_path):
    """One site, so that its operands are the same to the last bit and no code can differ."""
    source, x = model[0].second, model[1]
    optimized = ar.optimize(source, policy, (x,))
    artifact = ar.export_onnx(optimized, tmp_path / "model.onnx")
    assert max(artifact.errors.values()) < 0.1 * float(
        (optimized(x) - source(x)).detach().abs().max()
    )


@pytest.mark.parametrize("policy", ["int8(pv='fp8')", "fp8", "fp4"])
def test_onnx_refuses_what_it_has_no_kernel_for(model, policy, tmp_path):
    source, x = model[0].second, model[1]
    with pytest.raises(LowerError) as caught:
        ar.export_onnx(ar.optimize(source, policy, (x,)), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_with_clipped_softmax(model):
    source, x = model
    torch.manual_seed(1)
    trained = Model()
    optimized = ar.optimize(trained, "clipped_softmax(gamma=-0.03)")
    optimized(x).square().mean().backward()
    gradients = [p.grad for p in trained.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert trained.first.qkv.weight.grad.abs().sum() > 0


def test_the_oracle_agrees_with_itself_in_slices():
    site = make_site(hkv=2, q_len=60, kv_len=70, d_qk=16)
    inputs = operands(site, 2, torch.float32, 9)
    for text in ("int8(pv=true)", "int4", "dgq(per='row')", "kv_int8(residual=4)"):
        cascade = rewritten(text, site)
        whole = interpret(cascade, inputs)["AV"]
        assert torch.allclose(oracle(cascade, inputs, limit=20_000), whole, rtol=0, atol=1e-12)


# The real checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "least"), [("int8", 0.9999), ("int8(pv=true)", 0.999)])
def test_minilm_keeps_its_embeddings(policy, least):
    """All 72 heads quantised, nothing selected: the embeddings of the shipped texts."""
    examples = Path(__file__).resolve().parents[1] / "examples"
    command = [sys.executable, str(examples / "quantised_embeddings.py"), policy, str(least)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"}, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "72 of 72 heads" in done.stdout
