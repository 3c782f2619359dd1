"""The yardstick of rewritten attention: right in float64, and no cover for a kernel's bug."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, H, Q, Read, call
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.chunked import oracle
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
