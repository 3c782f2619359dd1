"""Normalisations without a softmax: sinks in the denominator, near misses, lookups, stored masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attn_rewrite as ar
from attn_rewrite.capture import capture_model
from attn_rewrite.passes.canonicalize import canonicalize
from tests.test_find_families import LENGTH, WIDTH, TalkingBefore
from tests.test_find_spellings import DYNAMIC, findings

SHAPE = (2, 4, 6, 8)


def _qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(SHAPE) for _ in range(3))


class Sink(nn.Module):
    """A logit per head that joins the denominator only, spelled in four ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.logit = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        column = self.logit.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        if self.spelling == "last":
            return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v
        if self.spelling == "first":
            return torch.cat([column, s], -1).softmax(-1)[..., 1:] @ v
        e = s.exp()
        if self.spelling == "denominator":
            return (e / (e.sum(-1, keepdim=True) + self.logit.exp().view(1, 4, 1, 1))) @ v
        return (e / (self.logit.view(4, 1, 1).exp() + e.sum(-1, keepdim=True))) @ v


@pytest.mark.parametrize("spelling", ["last", "first", "denominator", "sum second"])
def test_sink(spelling: str) -> None:
    q, k, v = _qkv()
    model = Sink(spelling).eval()
    (site,) = findings(model, (q, k, v)).sites
    top = site.cascade.producer("GM")
    assert top is not None
    assert "max(LM[b, h, q], M0[h]" in str(top.expr)
    weights = (q.double() @ k.double().mT).exp()
    total = weights.sum(-1, keepdim=True) + model.logit.double().exp().view(1, 4, 1, 1)
    exact = weights / total @ v.double()
    with torch.no_grad():
        own = (model(q, k, v).double() - exact).abs().max()
        found = (ar.optimize(model, "exact", (q, k, v))(q, k, v).double() - exact).abs().max()
    assert found <= max(2 * own, 4 * 2**-23 * exact.abs().max())


def test_softmax_off_by_one_has_a_sink_of_zero() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / (1 + e.sum(-1, keepdim=True))) @ v

    (site,) = findings(attend).sites
    assert "max(LM[b, h, q], 0.0)" in str(site.cascade.producer("GM").expr)


def _other_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).exp() / (q @ v.mT).exp().sum(-1, keepdim=True) @ v


def _whole_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / e.sum()) @ v


def _squares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / e.square().sum(-1, keepdim=True)) @ v


def _mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / e.mean(-1, keepdim=True)) @ v


def _relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).relu()
    return (e / e.sum(-1, keepdim=True)) @ v


def _late_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e @ v) / e.sum(-2, keepdim=True).mT


NEAR = {
    _other_sum: ("exponential-quotient", "not its own sum"),
    _whole_sum: ("exponential-quotient", "a sum over 4 axes"),
    _squares: ("exponential-quotient", "not its own sum"),
    _mean: ("exponential-quotient", "its mean"),
    _relu: ("normalised-without-exponential", "after relu"),
    _late_over_queries: ("exponential-quotient", "not its own sum"),
}


@pytest.mark.parametrize("function", NEAR, ids=lambda f: f.__name__)
def test_near_misses_are_refused(function) -> None:
    found = findings(function)
    assert not found.sites
    (refusal,) = found.refusals
    code, words = NEAR[function]
    assert refusal.code == code
    assert words in refusal.reason
    assert refusal.node
    assert refusal.source


def _rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return torch.div(e, e.sum(-1, keepdim=True), rounding_mode="floor") @ v


def _rounded_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return torch.div(e @ v, e.sum(-1, keepdim=True), rounding_mode="trunc")


def _bounded_above(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True).clamp(max=3.0)) @ v


def _bounded_below(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True).clamp_min(100.0)) @ v


def _whole_denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True).to(torch.int32)) @ v


def _whole_numerator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e.to(torch.int32) / e.sum(-1, keepdim=True)) @ v


def _truncated_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).to(torch.int32).to(v.dtype) @ v


def _truncated_before_late_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return (e.to(torch.int32).to(v.dtype) @ v) / e.sum(-1, keepdim=True)


def _rounded_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.div((q @ k.mT).softmax(-1), 0.1, rounding_mode="floor") @ v


def _twice_the_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return torch.sub(s, s.logsumexp(-1, keepdim=True), alpha=2).exp() @ v


def _rounded_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp()
    return torch.div(e, e.sum(-1, keepdim=True) + 1, rounding_mode="floor") @ v


@pytest.mark.parametrize(
    "function",
    [
        _truncated_probabilities,
        _truncated_before_late_division,
        _rounded_probabilities,
        _twice_the_normaliser,
        _rounded_sink,
        _rounded,
        _rounded_late,
        _bounded_above,
        _bounded_below,
        _whole_denominator,
        _whole_numerator,
    ],
    ids=lambda f: f.__name__,
)
def test_a_quotient_that_changes_its_sum_is_no_softmax(function) -> None:
    """Each differs from the softmax by far more than rounding, and is refused with a reason."""
    args = [x.double() for x in _qkv()]
    q, k, v = args
    assert (function(*args) - (q @ k.mT).softmax(-1) @ v).abs().max() > 1e-2
    found = findings(function)
    assert not found.sites
    assert found.refusals
    assert all(r.code and r.reason and r.node and r.source for r in found.refusals)


@pytest.mark.parametrize(("fill", "sites"), [(0.0, 1), (1.0, 0)])
def test_rows_without_keys_are_zero_only_if_filled_with_zeros(fill: float, sites: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).masked_fill(q[..., :1] > 0, -math.inf)
        empty = (s == -math.inf).all(-1, keepdim=True)
        return torch.where(empty, torch.full_like(s, fill), s.softmax(-1)) @ v

    found = findings(attend)
    assert (len(found.sites), bool(found.refusals)) == (sites, not sites)


def test_a_bound_that_cannot_bind_is_no_obstacle() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        e = (s - s.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True).clamp(min=1e-6)) @ v

    found = findings(attend)
    assert (len(found.sites), found.refusals) == (1, ())


def _sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-q)) * v


def _mean_of_the_kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = (k > 0).to(v.dtype)
    return (v * keep).sum(2) / keep.sum(2).clamp(min=1)


def _unit_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.normalize(q, dim=-1) + v / v.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "function", [_sigmoid, _mean_of_the_kept, _unit_length], ids=lambda f: f.__name__
)
def test_other_quotients_are_nothing(function) -> None:
    found = findings(function)
    assert (found.sites, found.refusals) == ((), ())


class Codebook(nn.Module):
    """A soft lookup of learned codes: classifier weights, softmax, embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.codes.T).softmax(-1) @ self.codes


def test_lookup_is_not_attention() -> None:
    found = findings(Codebook(), (torch.randn(2, 5, 8),))
    assert not found.sites
    assert [r.code for r in found.refusals] == ["learned-keys"]


STORED = {
    "float tril": (torch.ones(16, 16).tril().view(1, 1, 16, 16), lambda s, m: s.masked_fill(m == 0, -math.inf)),
    "bool triu": (torch.ones(16, 16, dtype=torch.bool).triu(1), lambda s, m: s.masked_fill(m, -1e9)),
    "minus infinity": (torch.full((16, 16), -math.inf).triu(1), lambda s, m: s + m),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("past", [0, 3])
def test_stored_triangles(name: str, past: int) -> None:
    """A buffer cut to the lengths is the comparison it holds, also below a cache."""
    buffer, use = STORED[name]

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", buffer)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows, columns = q.shape[2], k.shape[2]
            part = self.mask[..., columns - rows : columns, :columns]
            return use(q @ k.mT, part).softmax(-1) @ v

    q, k, v = _qkv()
    (site,) = findings(Masked(), (q[:, :, past:], k, v)).sites
    assert (site.causal, site.offset) == (True, str(past))


def test_buffers_that_are_no_triangle_are_read() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask = torch.ones(6, 6).tril()
            mask[3, 5] = 1
            self.register_buffer("mask", mask)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).masked_fill(self.mask == 0, -math.inf).softmax(-1) @ v

    (site,) = findings(Masked()).sites
    assert not site.causal
    assert [n for n in site.inputs if n.startswith("M")]


def test_talking_heads_are_kept_and_costed() -> None:
    model = TalkingBefore().eval()
    report = ar.optimize(model, "exact", (torch.randn(2, LENGTH, WIDTH),)).report
    assert [r.code for r in report.all_refusals()] == ["talking-heads"]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def _running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.cumsum(-1)[..., -1:]) @ v


def _running_sum_selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.cumsum(-1)[..., -1].unsqueeze(-1)) @ v


def _column_of_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _scores(q, k).exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return out[..., :-1] / out[..., -1:]


def _column_of_ones_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _scores(q, k).exp() @ nn.functional.pad(v, (0, 1), value=1.0)
    top, bottom = out.split([v.shape[-1], 1], -1)
    return top / bottom


def _mean_times_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / (e.mean(-1, keepdim=True) * k.shape[2])) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "function",
    [
        _running_sum,
        _running_sum_selected,
        _column_of_ones,
        _column_of_ones_padded,
        _mean_times_length,
    ],
    ids=lambda f: f.__name__,
)
def test_sums_in_other_words(function, dynamic: bool) -> None:
    args = tuple(x.double() for x in _qkv())
    found = findings(function, args, DYNAMIC if dynamic else None)
    assert (len(found.sites), found.refusals) == (1, ())
    q, k, v = args
    assert (function(q, k, v) - _scores(q, k).softmax(-1) @ v).abs().max() < 1e-12
    site = found.sites[0]
    assert (site.hq, site.d_qk, site.d_v, site.causal) == (4, 8, 8, False)


def test_a_column_of_ones_beside_values_with_a_batch_of_their_own() -> None:
    """The sum of the left operand has no batch, the product has."""

    class Shared(nn.Module):
        def forward(self, x: Tensor, v: Tensor) -> Tensor:
            out = (x @ x.mT).exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
            return out[..., :-1] / out[..., -1:].reshape(v.shape[0], v.shape[1], 1)

    args = (torch.randn(5, 8).double() / 4, torch.randn(3, 5, 7).double())
    host = canonicalize(capture_model(Shared(), args, dynamic_shapes={}).graph)
    torch.testing.assert_close(host(*args), Shared()(*args))


def _twice_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / (2 * e.sum(-1, keepdim=True))) @ v


def _root_of_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True).sqrt()) @ v


def _largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.amax(-1, keepdim=True)) @ v


def _largest_by_max(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.max(-1, keepdim=True).values) @ v


def _half_the_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _scores(q, k)
    return (s - 0.5 * s.logsumexp(-1, keepdim=True)).exp() @ v


def _logarithms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scores(q, k).log_softmax(-1) @ v


def _whole_running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.cumsum(-1)) @ v


def _first_of_the_running_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / e.cumsum(-1)[..., :1]) @ v


def _mean_times_seven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = _scores(q, k).exp()
    return (e / (e.mean(-1, keepdim=True) * 7)) @ v


def _column_of_twos(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _scores(q, k).exp() @ torch.cat([v, torch.full_like(v[..., :1], 2.0)], -1)
    return out[..., :-1] / out[..., -1:]


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (_twice_the_sum, "exponential-quotient"),
        (_root_of_the_sum, "exponential-quotient"),
        (_largest, "exponential-quotient"),
        (_largest_by_max, "exponential-quotient"),
        (_half_the_logarithm, "exponential-quotient"),
        (_twice_the_normaliser, "exponential-quotient"),
        (_logarithms, "log-probabilities"),
        (_whole_running_sum, "exponential-quotient"),
        (_first_of_the_running_sum, "exponential-quotient"),
        (_mean_times_seven, "exponential-quotient"),
        (_column_of_twos, "exponential-quotient"),
    ],
    ids=lambda f: getattr(f, "__name__", f),
)
def test_other_normalisers_are_refused(function, code: str) -> None:
    """Each differs from the softmax, and is refused once with its node and line."""
    q, k, v = (x.double() for x in _qkv())
    assert (function(q, k, v) - _scores(q, k).softmax(-1) @ v).abs().max() > 1e-2
    found = findings(function)
    assert not found.sites
    assert {r.code for r in found.refusals} == {code}
    assert all(r.reason and r.node and r.source for r in found.refusals)
