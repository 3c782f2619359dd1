"""Writes through views: what is read after a write is never taken for what was there before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import attn_rewrite as ar
from attn_rewrite.capture import capture_model
from attn_rewrite.driver import Stopwatch, decide, spliced
from attn_rewrite.graph import op_name
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import Findings, find
from attn_rewrite.policy import Policy

Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def whole(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s[:, :, 0:, 0:] = s[:, :, 0:, 0:] + b
    return s.softmax(-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s += b
    return s.softmax(-1) @ v


def added_to_a_view(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = (q.flatten(0, 1) @ k.flatten(0, 1).transpose(-2, -1)).unflatten(0, q.shape[:2])
    s += b
    return s.softmax(-1) @ v


def part(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s[:, :, 1:, 1:] = s[:, :, 1:, 1:] + b[:, :, 1:, 1:]
    return s.softmax(-1) @ v


def column(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s[:, :, :, 0] = 2.0
    return s.softmax(-1) @ v


def through_another_view(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    flat = s.view(-1)
    flat.mul_(0.5)
    return s.softmax(-1) @ v


def an_older_view(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    turned = s.transpose(-2, -1)
    s.add_(b)
    return turned.transpose(-2, -1).softmax(-1) @ v


def mask_by_parts(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    m = torch.zeros(q.shape[2], k.shape[2])
    m[:, 3:] = float("-inf")
    return (q @ k.transpose(-2, -1) + m).softmax(-1) @ v


def mask_by_indices(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    m = torch.zeros(q.shape[2], k.shape[2])
    m[:, torch.tensor([0, 2])] = -5.0
    return (q @ k.transpose(-2, -1) + m).softmax(-1) @ v


def probabilities(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    p = (q @ k.transpose(-2, -1)).softmax(-1)
    p[:, :, :, 1] = 0.0
    return p @ v


def written_twice(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1)
    s[:, :1] = s[:, :1] * 3.0
    s[:, :, 0] = b[:, :, 0]
    return s.softmax(-1) @ v


def values(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    w = v * 1.0
    out = (q @ k.transpose(-2, -1)).softmax(-1)
    w[:, :, 0] = 7.0
    return out @ w


def mask_out(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    m = torch.zeros(q.shape[2], k.shape[2])
    torch.add(m, 1.5, out=m)
    m[:, :2] -= 3
    return (q @ k.mT + m).softmax(-1) @ v


def scores_out(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT
    torch.mul(s, 0.25, out=s)
    return s.softmax(-1) @ v


def a_list(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT
    torch._foreach_mul_([s], 0.25)
    return s.softmax(-1) @ v


def another_shape(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT
    t = s.view(-1, 8, 8)
    t.unsqueeze_(0)
    s.add_(b)
    return s.softmax(-1) @ v + t.sum()


def behind_no_dropout(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT
    t = torch.nn.functional.dropout(s, 0.1, False)  # s itself, which the schema does not say
    t += b
    return s.softmax(-1) @ v


def cloned_mask(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    m = b.clone()
    m[..., :3] = -9.0
    return (q @ k.mT + m).softmax(-1) @ v


def cast_mask(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    m = b.to(torch.float64).float()
    m[..., :3].add_(-9.0)
    return (q @ k.mT + m).softmax(-1) @ v


def mask_of_the_caller(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    b[..., :3] = -9.0
    return (q @ k.mT + b).softmax(-1) @ v


def cache_of_the_caller(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    k.index_copy_(2, torch.tensor([3]), q[:, :, :1])
    return (q @ k.mT).softmax(-1) @ v


def halves_of_old(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT
    left, right = s.split(4, -1)
    s.mul_(0.1)
    return torch.cat([left, right], -1).softmax(-1) @ v


def one_memory(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    q, k, v = torch.cat([q, k, v], -1).split(q.shape[-1], -1)
    turned = k.mT
    q.mul_(0.3)
    return (q @ turned).softmax(-1) @ v


def queries_meanwhile(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT
    q.mul_(0.5)
    return s.softmax(-1) @ v


def bias_meanwhile(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    s = q @ k.mT + b
    b.zero_()
    return s.softmax(-1) @ v


def values_meanwhile(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1)
    v[:, :, 0] = 3.0
    return p @ v


FOUND: tuple[Attention, ...] = (
    whole, added, added_to_a_view, mask_by_parts, mask_by_indices, mask_out, cloned_mask, cast_mask,
    mask_of_the_caller, cache_of_the_caller, one_memory, values, values_meanwhile,
)  # fmt: skip
REFUSED: dict[Attention, str] = {
    part: "no-score-product",
    column: "no-score-product",
    written_twice: "no-score-product",
    an_older_view: "no-score-product",
    scores_out: "no-score-product",
    a_list: "no-score-product",
    another_shape: "no-score-product",
    behind_no_dropout: "no-score-product",
    halves_of_old: "no-score-product",
    queries_meanwhile: "written-meanwhile",
    bias_meanwhile: "written-meanwhile",
}
ALL = (*FOUND, *REFUSED, through_another_view, probabilities)


class Module(torch.nn.Module):
    def __init__(self, body: Attention) -> None:
        super().__init__()
        self.body = body

    def forward(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return self.body(q, k, v, b)


def _inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4, generator=generator) for _ in range(3))
    return q, k, v, torch.randn(2, 3, 8, 8, generator=generator)


def _found(body: Attention, dynamic: dict[str, object] | None = None) -> Findings:
    captured = capture_model(Module(body), _inputs(), {}, dynamic_shapes=dynamic)
    return find(canonicalize(captured.graph))


def _reads_the_sum(body: Attention) -> bool:
    """Whether the captured softmax reads the addition: a newer PyTorch (2.15) sees one tensor."""
    graph = capture_model(Module(body), _inputs(), {}, dynamic_shapes=None).graph.graph
    (softmax,) = (n for n in graph.nodes if op_name(n) == "softmax")
    return op_name(softmax.args[0]) == "add_"


@pytest.mark.parametrize("dynamic", [None, {}], ids=["dynamic", "static"])
@pytest.mark.parametrize("body", ALL, ids=lambda f: f.__name__)
def test_a_write_is_never_lost(body: Attention, dynamic: dict[str, object] | None) -> None:
    """Found or refused, the canonical graph and the rewritten one compute what the author wrote,
    and leave in the caller's tensors what the author left."""
    captured = capture_model(Module(body), _inputs(), {}, dynamic_shapes=dynamic)
    left = _inputs()
    expected = body(*left)
    canonical = canonicalize(captured.graph)
    torch.testing.assert_close(canonical(*_inputs()), expected)
    _, decisions = decide(find(canonical), Policy.parse("exact"), None, Stopwatch())
    inputs = _inputs()
    torch.testing.assert_close(spliced(captured, decisions).graph(*inputs), expected)
    assert all(map(torch.equal, inputs, left))


@pytest.mark.parametrize("body", FOUND, ids=lambda f: f.__name__)
def test_found_beside_a_write(body: Attention) -> None:
    findings = _found(body)
    assert len(findings.sites) == 1
    assert not findings.refusals


@pytest.mark.parametrize(
    ("body", "code"), REFUSED.items(), ids=lambda f: getattr(f, "__name__", "")
)
def test_refused_with_the_reason(body: Attention, code: str) -> None:
    """No expression says what was replaced, or a kernel would read what was written too late."""
    findings = _found(body)
    if body is behind_no_dropout and _reads_the_sum(body):
        assert len(findings.sites) == 1
        return
    assert not findings.sites
    assert [r.code for r in findings.refusals] == [code]


def test_just_in_time() -> None:
    for body in ALL:
        torch._dynamo.reset()
        compiled = torch.compile(
            body, backend="attn_rewrite", options={"policy": "exact", "compiler": "eager"}
        )
        left, inputs = _inputs(), _inputs()
        torch.testing.assert_close(compiled(*inputs), body(*left), msg=body.__name__)
        assert all(map(torch.equal, inputs, left)), body.__name__


def test_what_is_replaced_leaves_no_work_behind() -> None:
    """Scores that were written in place are not computed beside the kernel."""
    captured = capture_model(Module(added), _inputs(), {}, dynamic_shapes=None)
    _, decisions = decide(
        find(canonicalize(captured.graph)), Policy.parse("exact"), None, Stopwatch()
    )
    graph = spliced(captured, decisions).graph
    names = {n.target for m in graph.modules() if isinstance(m, torch.fx.GraphModule)
             for n in m.graph.nodes}  # fmt: skip
    assert torch.ops.aten.scaled_dot_product_attention.default in names
    assert not names & {torch.ops.aten.matmul.default, torch.ops.aten.add_.Tensor}


@pytest.mark.parametrize("dynamic", [None, {}], ids=["dynamic", "static"])
@pytest.mark.parametrize("body", [whole, added, added_to_a_view], ids=lambda f: f.__name__)
def test_a_bias_that_is_written_is_a_bias(
    body: Attention, dynamic: dict[str, object] | None
) -> None:
    """The same cascade as with the bias added out of place."""

    def plain(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) + b).softmax(-1) @ v

    (site,), (other,) = _found(body, dynamic).sites, _found(plain, dynamic).sites
    assert site.cascade == other.cascade


def test_a_copy_that_does_not_fit_stays() -> None:
    """A buffer that is assigned anew in the first call is exported as a copy that cannot be made;
    the attention beside it is found all the same."""

    class Assigned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1, 1, 1, 3))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.table.shape[1] != q.shape[2]:
                self.table = torch.ones(1, q.shape[2], k.shape[2], 3)
            return (q @ k.mT + self.table[..., 0]).softmax(-1) @ v

    args = tuple(torch.randn(2, 4, 6, 8) for _ in range(3))
    found = ar.find_attention(Assigned().eval(), args)
    assert len(found.sites) == 1


class Stateful(nn.Module):
    """Reads a buffer that it changes for the next call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("keep", torch.ones(6, 6, dtype=torch.bool).tril())
        self.register_buffer("heads", torch.tensor([0, 0, 1, 1]))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "heads":
            k, v = k[:, :2][:, self.heads], v[:, :2][:, self.heads]
        scores = q @ k.mT * (self.scale if self.kind == "scale" else 0.5)
        if self.kind == "mask":
            scores = scores.masked_fill(~self.keep, -torch.inf)
        out = scores.softmax(-1) @ v
        self.keep[:, 0].fill_(True)
        self.keep[1].copy_(~self.keep[1])
        self.keep[:, 0].fill_(True)
        self.heads.copy_(1 - self.heads)
        self.scale.mul_(3)
        return out


@pytest.mark.parametrize("kind", ["mask", "heads", "scale"])
def test_a_buffer_that_changes_after_it_was_read_is_no_constant(kind: str) -> None:
    torch.manual_seed(0)
    args = tuple(torch.randn(2, 4, 6, 8) for _ in range(3))
    original, model = Stateful(kind).eval(), Stateful(kind).eval()
    rewritten = ar.optimize(model, "exact", args)
    assert [s.status for s in rewritten.report.sites] == ["rewritten"]
    (site,) = ar.find_attention(Stateful(kind).eval(), args).sites
    assert (site.causal, site.hkv) == (False, 4)
    outs = []
    for _ in range(3):
        outs.append(original(*args))
        torch.testing.assert_close(rewritten(*args), outs[-1])
    assert not torch.allclose(outs[0], outs[1])
