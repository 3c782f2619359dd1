"""Writes through views: what is read after a write is never taken for what was there before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attn_rewrite.capture import capture_model
from attn_rewrite.driver import Stopwatch, decide, spliced
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


ALL: tuple[Attention, ...] = (
    whole, added, added_to_a_view, part, column, through_another_view, an_older_view,
    mask_by_parts, mask_by_indices, probabilities, written_twice, values,
)  # fmt: skip


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


@pytest.mark.parametrize("dynamic", [None, {}], ids=["dynamic", "static"])
@pytest.mark.parametrize("body", ALL, ids=lambda f: f.__name__)
def test_a_write_is_never_lost(body: Attention, dynamic: dict[str, object] | None) -> None:
    """Found or refused, the canonical graph and the rewritten one compute what the author wrote."""
    captured = capture_model(Module(body), _inputs(), {}, dynamic_shapes=dynamic)
    expected = body(*_inputs())
    canonical = canonicalize(captured.graph)
    torch.testing.assert_close(canonical(*_inputs()), expected)
    findings = find(canonical)
    assert findings.sites or findings.refusals
    _, decisions = decide(findings, Policy.parse("exact"), None, Stopwatch())
    torch.testing.assert_close(spliced(captured, decisions)(*_inputs()), expected)


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


@pytest.mark.parametrize("body", [part, column, written_twice], ids=lambda f: f.__name__)
def test_scores_written_in_part_are_not_found(body: Attention) -> None:
    """No expression says which scores were replaced: a refusal, not a site without the write."""
    findings = _found(body)
    assert not findings.sites
    assert findings.refusals
