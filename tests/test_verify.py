"""Verification: measured errors, the oracle in slices, and what follows from a check."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attn_rewrite.backends.torch import lower
from attn_rewrite.budget import Bound
from attn_rewrite.capture import capture_model
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, edit_score, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, Extent, H, Q, Read, call
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.text import parse
from attn_rewrite.chunked import oracle
from attn_rewrite.errors import VerifyError
from attn_rewrite.outputs import compare_outputs
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.report import ErrorMeasure
from attn_rewrite.site import Refusal
from attn_rewrite.verify import (
    Candidate,
    _Observed,
    check_sites,
    implementation_bound,
    measure,
    worst_site,
)
from attn_rewrite.walk import Walk, flat_inputs


def test_measure_known_answers():
    reference = torch.tensor([[1.0, 2.0], [-2.0, 0.0]])
    result = torch.tensor([[1.0, 2.5], [-2.0, 1.0]])
    found = measure(result, reference)
    assert found.max_abs == 1.0
    assert found.max_reference == 2.0
    assert found.relative_l1 == pytest.approx(1.5 / 5)
    assert found.rmse == pytest.approx(math.sqrt(1.25 / 4))
    wanted = torch.nn.functional.cosine_similarity(result.flatten(), reference.flatten(), dim=0)
    assert found.cosine == pytest.approx(float(wanted))
    assert found.rows_excluded == 0


def test_equal_tensors_have_no_error():
    value = torch.randn(3, 5)
    assert measure(value, value) == ErrorMeasure(
        pytest.approx(1.0), 0.0, 0.0, 0.0, float(value.abs().max())
    )
    zero = torch.zeros(2, 2)
    assert (measure(zero, zero).cosine, measure(zero, zero).relative_l1) == (1.0, 0.0)
    assert (measure(zero + 1, zero).cosine, measure(zero + 1, zero).relative_l1) == (0.0, math.inf)
    assert measure(torch.zeros(0, 3), torch.zeros(0, 3)).max_abs == 0.0
    assert measure(torch.tensor(2.0), torch.tensor(1.0)).max_abs == 1.0


def test_rows_where_the_reference_is_nan_are_left_out_and_counted():
    reference = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [3.0, 4.0]])
    result = torch.tensor([[1.0, 2.0], [100.0, 100.0], [3.0, 5.0]])
    found = measure(result, reference)
    assert (found.max_abs, found.rows_excluded) == (1.0, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_infinite_error(bad):
    found = measure(torch.tensor([[1.0, bad]]), torch.tensor([[1.0, 2.0]]))
    assert found.max_abs == found.rmse == found.relative_l1 == math.inf
    assert found.cosine == 0.0
    for metric in ("cosine", "rmse", "relative_l1", "max_abs"):
        assert not Bound(metric, 0.5).allows(found)


def test_equal_infinities_are_no_error():
    value = torch.tensor([[-math.inf, 1.0], [math.inf, 2.0]])
    assert measure(value, value).max_abs == 0.0
    assert measure(-value, value).max_abs == math.inf


def test_measure_is_the_same_in_pieces(monkeypatch):
    result, reference = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    whole = measure(result, reference)
    monkeypatch.setattr("attn_rewrite.measuring._CHUNK", 12)
    parts = measure(result, reference)
    for name, value in vars(whole).items():
        assert getattr(parts, name) == pytest.approx(value), name


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[2, 1\] and \[2, 2\]"):
        measure(torch.zeros(2, 1), torch.zeros(2, 2))


def test_bound_is_the_larger_of_both():
    reference = torch.tensor([1.0, 3.0], dtype=torch.float64)
    near = reference.float()
    assert implementation_bound(near, reference) == 4 * torch.finfo(torch.float32).eps * 3
    off = near + 0.25
    assert implementation_bound(off, reference) == 0.5
    assert implementation_bound(near, reference, reference * 10) == (
        4 * torch.finfo(torch.float32).eps * 30
    )


RICH = softmax_cascade(
    SoftmaxAttention(
        # ALiBi by head, a padding mask by batch entry, positions from the end, a table per head.
        score=QK * 0.3
        - (H + 1) * 0.1 * call("abs", Q + Extent("kv") - Extent("q") - KV)
        + Read("T", (H, (Q + B) % 5)),
        guard=(Q + Extent("kv") - Extent("q") >= KV) & Read("M", (B, KV)),
        group=2,
        reads=(TensorDecl("T", ("h", "t")), TensorDecl("M", ("b", "kv"), dtype="bool")),
    )
)


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(1, 9)
)
@settings(max_examples=40, deadline=None)
def test_the_oracle_in_slices_is_the_oracle(batch, key_heads, q_len, kv_len, pieces):
    generator = torch.Generator().manual_seed(batch + 10 * q_len)
    heads = 2 * key_heads
    inputs = {
        "Q": torch.randn(batch, heads, q_len, 4, generator=generator),
        "K": torch.randn(batch, key_heads, kv_len, 4, generator=generator),
        "V": torch.randn(batch, key_heads, kv_len, 3, generator=generator),
        "T": torch.randn(heads, 5, generator=generator),
        "M": torch.rand(batch, kv_len, generator=generator) > 0.2,
    }
    whole = interpret(RICH, inputs)["AV"]
    need = batch * heads * q_len * kv_len * 8 * 4
    cut = oracle(RICH, inputs, limit=max(1, need // pieces))
    assert cut.shape == whole.shape
    assert torch.allclose(cut, whole, rtol=0, atol=1e-14)
    assert torch.equal(oracle(RICH, inputs), whole)


def test_slices_keep_memory_small(monkeypatch):
    seen = []

    def spy(cascade, inputs):
        shapes = [inputs[n].shape for n in ("Q", "K")]
        seen.append(shapes[0][0] * shapes[0][1] * shapes[0][2] * shapes[1][2] * 8 * 4)
        return interpret(cascade, inputs)

    monkeypatch.setattr("attn_rewrite.chunked.interpret", spy)
    inputs = {n: torch.randn(2, 4, 16, 8) for n in "QKV"}
    oracle(softmax_cascade(SoftmaxAttention()), inputs, limit=16 * 8 * 4 * 3)
    assert max(seen) <= 16 * 8 * 4 * 3
    assert len(seen) > 1


def test_a_cascade_that_steps_through_queries_is_not_cut_there():
    text = str(softmax_cascade(SoftmaxAttention()))
    # Every row reads the scores of row 0: rows depend on each other.
    shared = parse(text.replace("exp(S[b, h, q, kv]", "exp(S[b, h, 0, kv]"))
    inputs = {n: torch.randn(1, 1, 6, 4) for n in "QKV"}
    assert torch.allclose(oracle(shared, inputs, limit=1), interpret(shared, inputs)["AV"])


@dataclass
class Found:
    """A captured model with its Sites."""

    model: nn.Module
    host: object
    args: tuple
    kwargs: dict
    sites: tuple


def found(model, *args, **kwargs):
    captured = capture_model(model, args, kwargs)
    host = canonicalize(captured.graph)
    return Found(model, host, captured.args, captured.kwargs, find(host).sites)


def kernel_of(site, cascade):
    extents = {n: v if isinstance(v, int) else None for n, v in site.extents().items()}
    kernel = lower(cascade, dropout=site.dropout, extents=extents)
    assert not isinstance(kernel, Refusal)
    return kernel


def candidate(site, transform=None):
    cascade = site.cascade if transform is None else transform.apply(site.cascade, site)
    return Candidate(site, cascade, kernel_of(site, cascade), kernel_of(site, site.cascade))


class Attention(nn.Module):
    """Written out, four heads on two key heads."""

    def __init__(self, causal=False, dropout=0.0):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.causal, self.dropout = causal, nn.Dropout(dropout)

    def forward(self, x, mask=None):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 4).transpose(1, 2)
        k, v = (
            part(x).view(batch, length, 2, 4).transpose(1, 2).repeat_interleave(2, 1)
            for part in (self.k, self.v)
        )
        scores = q @ k.transpose(-1, -2) / 2
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        weights = self.dropout(torch.softmax(scores.float(), -1).to(scores.dtype))
        return (weights @ v).transpose(1, 2).reshape(batch, length, 16)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(True), Attention()

    def forward(self, x):
        return {"y": self.second(x + self.first(x))}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    return found(Two().eval(), torch.randn(2, 24, 16))


def run(f, candidates, **options):
    return check_sites(f.host, f.args, f.kwargs, candidates, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_sites_pass(dtype):
    f = found(Two().eval().to(dtype), torch.randn(2, 24, 16, dtype=dtype))
    checks = run(f, [candidate(s) for s in f.sites])
    assert [c.site for c in checks] == [s.name for s in f.sites]
    for check in checks:
        assert check.verdict == "accepted"
        assert check.raising.max_abs < 1e-14
        assert check.approximation is None
        assert 0 <= check.implementation.max_abs <= check.implementation_bound
        assert check.implementation_bound < 1e-5 or dtype is torch.bfloat16
        assert check.seconds > 0


def test_measured_errors_are_those_of_a_run_by_hand(two):
    """Both errors of the first Site against dense float64 attention on its own operands."""
    check = run(two, [candidate(two.sites[0], Window(5))])[0]
    module = two.model.first
    x = two.args[0]
    with torch.no_grad():
        q = module.q(x).view(2, 24, 4, 4).transpose(1, 2).double()
        k, v = (
            p(x).view(2, 24, 2, 4).transpose(1, 2).repeat_interleave(2, 1).double()
            for p in (module.k, module.v)
        )
    at = torch.arange(24)
    distance = at[:, None] - at

    def dense(mask):
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -math.inf)
        return torch.softmax(scores, -1) @ v

    exact, near = dense(distance >= 0), dense((distance >= 0) & (distance < 5))
    difference = near - exact
    assert check.approximation.max_abs == pytest.approx(float(difference.abs().max()))
    assert check.approximation.relative_l1 == pytest.approx(
        float(difference.abs().sum() / exact.abs().sum())
    )
    cosine = torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0)
    assert check.approximation.cosine == pytest.approx(float(cosine))
    assert check.approximation.max_reference == pytest.approx(float(exact.abs().max()))


def test_slices_change_no_verdict(two):
    candidates = [candidate(s, Window(3, sinks=1)) for s in two.sites]
    whole, cut = run(two, candidates), run(two, candidates, limit=5000)
    for a, b in zip(whole, cut, strict=True):
        assert (a.site, a.verdict) == (b.site, b.verdict)
        assert a.approximation.max_abs == pytest.approx(b.approximation.max_abs)


@pytest.mark.parametrize("wrong", ["scale", "mask", "shift"])
def test_a_wrong_raise_keeps_the_site(two, wrong):
    site = two.sites[0]
    if wrong == "scale":
        cascade = edit_score(site.cascade, QK * 0.501)
    elif wrong == "mask":
        cascade = Window(23).apply(site.cascade, site)  # one pair of 300 is lost
    else:
        cascade = parse(str(site.cascade).replace("kv <= q", "kv <= q + 1"))
    assert cascade != site.cascade
    liar = replace(site, cascade=cascade)
    (check,) = run(two, [Candidate(liar, cascade, kernel_of(site, cascade))])
    assert check.verdict == "kept"
    (refusal,) = check.refusals
    assert (refusal.code, refusal.site) == ("raise-mismatch", site.name)
    assert check.implementation is None


@dataclass(frozen=True)
class Off:
    """A kernel that is wrong by a factor."""

    inner: object
    factor: float
    name: str = "off"

    def emit(self, build, inputs):
        return self.inner.emit(build, inputs) * self.factor


def test_a_wrong_kernel_is_our_bug(two):
    good, bad = candidate(two.sites[0]), candidate(two.sites[1], Window(4))
    with pytest.raises(VerifyError) as caught:
        run(two, [good, replace(bad, kernel=Off(bad.kernel, 1.00001))])
    message = str(caught.value)
    assert two.sites[1].name in message
    assert two.sites[0].name + ":" not in message
    assert "bound" in message
    with pytest.raises(VerifyError):
        run(two, [replace(good, kernel=Off(good.kernel, math.nan))])


def test_over_budget_goes_back_to_exact(two):
    candidates = [candidate(s, Window(2)) for s in two.sites]
    free = run(two, candidates)
    assert {c.verdict for c in free} == {"accepted"}
    limit = max(c.approximation.cosine for c in free)
    assert limit > min(c.approximation.cosine for c in free)
    checks = run(two, candidates, bound=Bound("cosine", limit))
    assert sorted(c.verdict for c in checks) == ["accepted", "reverted"]
    for check, before in zip(checks, free, strict=True):
        assert check.approximation == before.approximation
        assert check.implementation.max_abs <= check.implementation_bound
    (back,) = [c for c in checks if c.verdict == "reverted"]
    site = next(s for s in two.sites if s.name == back.site)
    assert back.implementation == run(two, [candidate(site)])[0].implementation
    bare = [replace(c, exact=None) for c in candidates]
    checks = run(two, bare, bound=Bound("max_abs", 0.0))
    assert [(c.verdict, c.implementation) for c in checks] == [("reverted", None)] * 2


def test_rows_where_the_original_is_nan_are_left_out():
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    f = found(Attention().eval(), torch.randn(2, 12, 16), mask=mask)
    (check,) = run(f, [candidate(f.sites[0])])
    assert check.verdict == "accepted"
    assert check.raising.rows_excluded == check.implementation.rows_excluded == 4 * 12
    assert math.isfinite(check.implementation.max_abs)


def test_dropout_is_said_not_measured():
    f = found(Attention(dropout=0.25).train(), torch.randn(2, 12, 16))
    (site,) = f.sites
    assert site.dropout == 0.25
    (check,) = run(f, [candidate(site)])
    assert check.verdict == "accepted"
    assert check.raising.max_abs < 1e-14
    assert check.implementation is None
    assert "dropout 0.25" in check.note


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


def test_sites_in_nested_graphs_are_checked():
    f = found(Autocast().eval(), torch.randn(2, 12, 16))
    (site,) = f.sites
    assert site.graph is not f.host
    (check,) = run(f, [candidate(site)])
    assert check.verdict == "accepted"
    assert check.raising.max_abs < 1e-14
    assert check.implementation.max_abs <= check.implementation_bound


def test_a_site_that_is_not_in_the_graph_is_an_error(two):
    other = found(Two().eval(), torch.randn(2, 24, 16))
    with pytest.raises(VerifyError, match="without computing"):
        run(two, [candidate(other.sites[0])])


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.rest = nn.Sequential(*(nn.Linear(16, 16) for _ in range(60)))

    def forward(self, x):
        return self.rest(self.attention(x))


def test_values_are_freed_on_the_way():
    f = found(Deep().eval(), torch.randn(1, 8, 16))
    candidates = [candidate(s) for s in f.sites]
    walk = _Observed({c.site.output.node: [c] for c in candidates}, None, 1 << 20)
    most = 0

    class Counting(Walk):
        def run_node(self, n):
            nonlocal most
            tensors = [
                v
                for k, v in self.env.items()
                if k.op == "call_function" and isinstance(v, torch.Tensor)
            ]
            most = max(most, len(tensors))
            return super().run_node(n)

    with torch.no_grad():
        Counting(f.host, walk).run(*flat_inputs(f.host, f.args, f.kwargs))
    assert len(walk.checks) == 1
    assert most <= 10


class Named(nn.Module):
    def forward(self, x, *, scale, shift):
        return x * scale + shift


def test_inputs_are_ordered_like_the_graph():
    x, scale, shift = torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 5.0)
    captured = capture_model(Named(), (x,), {"scale": scale, "shift": shift})
    values = flat_inputs(captured.graph, (x,), {"shift": shift, "scale": scale})
    out = torch.fx.Interpreter(captured.graph).run(*values, enable_io_processing=False)
    leaf = torch.utils._pytree.tree_leaves(out)[0]
    assert leaf.tolist() == [7.0] * 3
    with pytest.raises(ValueError, match="3 inputs, 2 values"):
        flat_inputs(captured.graph, (x,), {"shift": shift})


def test_outputs_are_compared_by_name():
    x = torch.ones(2, 3)
    errors = compare_outputs(
        {"a": x, "n": 3, "b": (x, x.long())}, {"a": x, "n": 3, "b": (x + 1, x)}
    )
    assert {name: e.max_abs for name, e in errors.items()} == {"a": 0.0, "b.0": 1.0}
    assert list(compare_outputs(x, x)) == ["output"]
    with pytest.raises(VerifyError, match="returns"):
        compare_outputs({"a": x}, {"c": x})
    with pytest.raises(VerifyError, match=r"is \[3\], in the original \[2, 3\]"):
        compare_outputs({"a": x}, {"a": x[0]})


def test_the_worst_site():
    base = ErrorMeasure(0.9, 0.1, 0.1, 0.1, 1.0)
    errors = {"a": replace(base, cosine=0.99, rmse=0.5), "b": replace(base, cosine=0.5, rmse=0.2)}
    assert worst_site(errors, Bound("cosine", 0.9)) == "b"
    assert worst_site(errors, Bound("rmse", 0.9)) == "a"
    assert worst_site({}, Bound("rmse", 0.9)) is None
