"""The yardstick of rewritten attention: right in float64, and no cover for a kernel's bug."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_rewrite.backends.torch.lower import lower
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, H, Q, Read, call
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.cascade.staged import as_staged, staged_cascade
from attn_rewrite.chunked import oracle
from attn_rewrite.conditioning import score_rounding
from attn_rewrite.driver import lowered
from attn_rewrite.errors import VerifyError
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.plan import make_plan, rewritten
from attn_rewrite.policy import Policy
from attn_rewrite.rounding import plain_attention
from attn_rewrite.verify import Candidate, check_sites
from tests.spellings import PLAIN
from tests.test_find_spellings import Module, capture

FORM = SoftmaxAttention(
    score=QK * 0.25 + Read("M", (B, KV)),
    guard=(KV <= Q) & (KV >= 3),  # the first three rows keep nothing
    weight=call("exp", Read("W", (H,))),
    sink=Read("L", (H,)),
    group=2,
    reads=(TensorDecl("M", ("b", "kv")), TensorDecl("W", ("h",)), TensorDecl("L", ("h",))),
)


def dense(q, k, v, m, w, sink):
    """The same attention by hand."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    s = q @ k.mT * 0.25 + m[:, None, None]
    n = torch.arange(s.shape[-1])
    s = s.masked_fill((n[None, :] > n[:, None]) | (n < 3)[None, :], -torch.inf)
    with_sink = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return with_sink.softmax(-1)[..., :-1] * w.exp().view(1, -1, 1, 1) @ v


@pytest.mark.parametrize("limit", [1 << 28, 20_000], ids=["whole", "sliced"])
@pytest.mark.parametrize("sink", [True, False])
def test_plain_attention_is_right_in_float64(limit: int, sink: bool) -> None:
    torch.manual_seed(0)
    inputs = {n: torch.randn(2, 4 if n == "Q" else 2, 33, 16).double() for n in "QKV"}
    inputs |= {"M": torch.randn(2, 33).double(), "W": torch.randn(4).double()}
    inputs |= {"L": torch.randn(4).double()}
    cascade = softmax_cascade(FORM if sink else replace(FORM, sink=None))
    found = plain_attention(cascade, inputs, limit)
    assert (found - oracle(cascade, inputs)).abs().max() < 1e-13
    if sink:
        assert (found - dense(*inputs.values())).abs().max() < 1e-13
    assert found[:, :, :3].abs().max() == 0


class Off:
    """A kernel that is a little wrong: the scale of a wrong head width, say."""

    name = "off"

    def __init__(self, kernel, factor: float) -> None:
        self.kernel, self.factor = kernel, factor

    def emit(self, build, inputs):
        q, *rest = inputs
        return self.kernel.emit(build, [q * self.factor, *rest])


@pytest.mark.parametrize("policy", ["window(size=65, sinks=1)", "window(size=5)"])
def test_a_wrong_kernel_is_still_caught(policy: str) -> None:
    torch.manual_seed(2)
    args = tuple(torch.randn(2, 4, 512, 16) for _ in range(3))
    host = canonicalize(capture(Module(PLAIN["sdpa"]), args))
    findings = find(host)
    (site,) = findings.sites
    cascade = rewritten(site, *make_plan(findings, Policy.parse(policy)).steps)
    kernel = lowered(site, cascade).kernel
    (check,) = check_sites(host, args, {}, [Candidate(site, cascade, kernel)])
    assert check.implementation.max_abs <= check.implementation_bound
    with pytest.raises(VerifyError, match="more than rounding"):
        check_sites(host, args, {}, [Candidate(site, cascade, Off(kernel, 1 + 1e-5))])


# What rounding the scores may change


def test_two_keys_of_one_score_by_hand():
    """p = 1/2 each, v = +1 and -1: the output moves by what the scores may be off."""
    q = torch.full((1, 1, 1, 4), 3.0)
    k = torch.full((1, 1, 2, 4), 2.0)
    v = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    cascade = softmax_cascade(SoftmaxAttention(score=QK * 0.25))
    unit = 2.0**-24
    # A product of 4 terms of 6 each, scaled: sqrt(4) * 24 / 4; a score of 6 at the row maximum.
    off = unit * (2 * 24 / 4 + 6 + 0 + 2)
    found = score_rounding(cascade, {"Q": q, "K": k, "V": v})
    assert found == pytest.approx(off, rel=1e-6)
    # Equal values move nothing, whatever the scores.
    assert score_rounding(cascade, {"Q": q, "K": k, "V": v.abs()}) == 0
    # In float64 it is that much less.
    wide = {"Q": q.double(), "K": k.double(), "V": v.double()}
    assert score_rounding(cascade, wide) == pytest.approx(off * 2.0**-29, rel=1e-6)


@pytest.mark.parametrize("limit", [1 << 28, 20_000], ids=["whole", "sliced"])
def test_moved_scores_stay_below_what_they_may_change(limit: int) -> None:
    torch.manual_seed(1)
    inputs = {n: torch.randn(2, 4 if n == "Q" else 2, 33, 16) * 3 for n in "QKV"}
    inputs |= {"M": torch.randn(2, 33), "W": torch.randn(4), "L": torch.randn(4)}
    cascade = softmax_cascade(FORM)
    bound = score_rounding(cascade, inputs, limit)
    assert bound == pytest.approx(score_rounding(cascade, inputs), rel=1e-9)
    wide = {n: t.double() for n, t in inputs.items()}
    exact = oracle(cascade, wide)
    worst = 0.0
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        off = {
            n: wide[n] * (1 + (torch.rand(wide[n].shape, generator=g).double() - 0.5) * 2**-23)
            for n in "QK"
        }
        worst = max(worst, float((oracle(cascade, {**wide, **off}) - exact).abs().max()))
    assert worst < bound < 100 * worst


def test_a_row_that_one_key_decides_moves_by_nothing():
    q = torch.tensor([[[[1000.0]]]])
    k = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    v = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    cascade = softmax_cascade(SoftmaxAttention(score=QK))
    assert score_rounding(cascade, {"Q": q, "K": k, "V": v}) == 0


@pytest.mark.parametrize(
    "policy",
    [
        "int8", "fp8(kind='e5m2', pv=false)", "int8(rotate=true)", "clipped_softmax",
    ],
)  # fmt: skip
def test_huge_scores_are_no_cover_for_a_wrong_kernel(policy: str) -> None:
    """Scores in the hundreds: the right kernel passes, one with a scale wrong by 1e-3 does not.

    A tenth of that is what rounding leaves: float32 holds such a score to 3e-5, and what decides a
    probability is the difference of two of them.
    """
    torch.manual_seed(3)
    q, k = (10 * torch.randn(1, 2, 40, 16) for _ in range(2))
    args = (q, k, torch.randn(1, 2, 40, 16))
    host = canonicalize(capture(Module(PLAIN["sdpa"]), args))
    findings = find(host)
    (site,) = findings.sites
    cascade = rewritten(site, *make_plan(findings, Policy.parse(policy)).steps)
    kernel = lowered(site, cascade).kernel
    (check,) = check_sites(host, args, {}, [Candidate(site, cascade, kernel)])
    assert check.implementation.max_abs <= check.implementation_bound
    off = Scaled(cascade, 1 + 1e-3)
    with pytest.raises(VerifyError, match="more than rounding"):
        check_sites(host, args, {}, [Candidate(site, cascade, off)])


class Scaled:
    """A kernel of the same cascade with its score multiplied: codes stay what they are."""

    name = "scaled"

    def __init__(self, cascade, factor: float) -> None:
        staged = as_staged(cascade)
        form = replace(staged.form, score=staged.form.score * factor)
        self.kernel = lower(staged_cascade(replace(staged, form=form)))

    def emit(self, build, inputs):
        return self.kernel.emit(build, inputs)
