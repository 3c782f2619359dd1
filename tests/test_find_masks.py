"""Masks by meaning: what the finder raises is evaluated against the module at several lengths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from attn_rewrite.cascade import interpret
from attn_rewrite.graph import EagerBuilder, arrange, extents, restore
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from tests.test_find_spellings import DYNAMIC, Module, capture

LENGTHS = (1, 2, 5, 9, 12)


def _positions(q: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.arange(q.shape[2])
    return n[:, None], n[None, :]


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    s = q @ k.mT / math.sqrt(q.shape[-1])
    return s.masked_fill(~keep, -math.inf).softmax(-1) @ v


def window(q, k, v):
    i, j = _positions(q)
    return _attend(q, k, v, (j <= i) & (i - j < 4))


def window_by_triangles(q, k, v):
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    return _attend(q, k, v, torch.logical_and(ones.tril(), ones.triu(-3)))


def window_added(q, k, v):
    i, j = _positions(q)
    s = q @ k.mT / math.sqrt(q.shape[-1])
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill((j > i) | (j <= i - 4), -math.inf)
    return (s + bias).softmax(-1) @ v


def symmetric_window(q, k, v):
    i, j = _positions(q)
    return _attend(q, k, v, (i - j).abs() <= 2)


def chunked(q, k, v):
    i, j = _positions(q)
    return _attend(q, k, v, (i // 4 == j // 4) & (j <= i))


def block_diagonal(q, k, v):
    i, j = _positions(q)
    return _attend(
        q, k, v, torch.div(i, 3, rounding_mode="floor") == torch.div(j, 3, rounding_mode="floor")
    )


def prefix(q, k, v):
    i, j = _positions(q)
    return _attend(q, k, v, (j <= i) | (j < 3))


def strided(q, k, v):
    i, j = _positions(q)
    return _attend(q, k, v, ((i - j) % 3 == 0) & (j <= i))


def sinks_and_window(q, k, v):
    i, j = _positions(q)
    return _attend(q, k, v, (j <= i) & ((i - j < 3) | (j < 2)))


def window_on_a_grid(q, k, v):
    n = torch.arange(q.shape[2])
    j, i = torch.meshgrid(n, n, indexing="xy")
    return _attend(q, k, v, torch.less_equal(j, i) & torch.greater(j, i - 4))


def counted_window(q, k, v):
    """Positions by a running sum of ones, and a window as a difference of two triangles."""
    ones = torch.ones(q.shape[2], q.shape[2])
    seen = ones.cumsum(-1) <= ones.cumsum(-2)
    return _attend(q, k, v, seen ^ (ones.cumsum(-1) <= ones.cumsum(-2) - 4))


def masked_exponentials(q, k, v):
    i, j = _positions(q)
    e = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) * ((j <= i) & (i - j < 4)).to(q.dtype)
    return (e / e.sum(-1, keepdim=True)) @ v


def renormalised(q, k, v):
    i, j = _positions(q)
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).masked_fill((j > i) | (i - j > 3), 0.0)
    return (p / p.sum(-1, keepdim=True)) @ v


def denominator_sink(q, k, v):
    e = torch.exp(_attend_scores(q, k))
    return (e / (e.sum(-1, keepdim=True) + 1.0)) @ v


def _attend_scores(q: Tensor, k: Tensor) -> Tensor:
    i, j = _positions(q)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(j > i, -math.inf)


def vmapped(q, k, v):
    def keep(i, j):
        return (j <= i) & (i - j < 4)

    n = torch.arange(q.shape[2])
    return _attend(q, k, v, torch.vmap(torch.vmap(keep, (None, 0)), (0, None))(n, n))


def alibi(q, k, v):
    i, j = _positions(q)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1)
    s = q @ k.mT / math.sqrt(q.shape[-1]) + slopes * (j - i)
    return s.masked_fill(j > i, -math.inf).softmax(-1) @ v


def soft_cap(q, k, v):
    i, j = _positions(q)
    s = 5.0 * torch.tanh(q @ k.mT / 5.0)
    return torch.where(j <= i, s, -math.inf).softmax(-1) @ v


def vmapped_documents(q, k, v, mask):
    ids = (mask == 0).cumsum(-1)

    def keep(b, i, j):
        read = torch.ops.aten.index.Tensor  # ids[b, i] asks for numbers, which vmap has not
        return (read(ids, [b, i]) == read(ids, [b, j])) & (j <= i)

    n, b = torch.arange(q.shape[2]), torch.arange(q.shape[0])
    over_keys = torch.vmap(keep, (None, None, 0))
    every = torch.vmap(torch.vmap(over_keys, (None, 0, None)), (0, None, None))
    return _attend(q, k, v, every(b, n, n)[:, None])


STRUCTURAL = (
    window, window_by_triangles, window_added, symmetric_window, chunked, block_diagonal, prefix,
    strided,
    sinks_and_window, window_on_a_grid, counted_window, masked_exponentials, renormalised,
    denominator_sink, vmapped, alibi, soft_cap,
)  # fmt: skip


def padding(q, k, v, mask):
    return _attend(q, k, v, mask[:, None, None, :].bool())


def causal_padding(q, k, v, mask):
    i, j = _positions(q)
    return _attend(q, k, v, (j <= i) & mask.bool()[:, None, None, :])


def additive_padding(q, k, v, mask):
    s = q @ k.mT / math.sqrt(q.shape[-1])
    return (s + (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min).softmax(
        -1
    ) @ v


def cumulated_padding(q, k, v, mask):
    """Keys before the first padding token, by a running product."""
    return _attend(
        q, k, v, (mask.cumsum(-1) == torch.arange(1, mask.shape[1] + 1))[:, None, None, :]
    )


def documents(q, k, v, mask):
    """Document ids from separators: attention stays within a document."""
    ids = (mask == 0).cumsum(-1)
    i, j = _positions(q)
    return _attend(q, k, v, (ids[:, None, :, None] == ids[:, None, None, :]) & (j <= i))


DATA = (padding, causal_padding, additive_padding, cumulated_padding, documents, vmapped_documents)


def _mask(length: int) -> Tensor:
    """1 = keep; the first key of every row is kept, so no row is empty."""
    rows = torch.ones(2, length, dtype=torch.long)
    rows[1, max(1, length - 2) :] = 0
    return rows


class _Values(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _raised(site, host: fx.GraphModule, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(value of the raised cascade by the oracle, value the graph computes), in the site's
    layout."""
    run = _Values(host)
    run.run(*args)
    build = EagerBuilder()
    values = {n: (o, run.values[o.node]) for n, o in site.inputs.items()}
    sizes = extents(build, values)
    inputs = {n: arrange(build, o, v, site.groups(n), sizes) for n, (o, v) in values.items()}
    result = interpret(site.cascade, inputs)["AV"]
    return restore(build, result, site.groups("AV"), site.output, sizes), run.values[
        site.output.node
    ]


def _agrees(function: Callable[..., Tensor], with_mask: bool) -> str:
    torch.manual_seed(0)
    example = [torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3)]
    shapes = DYNAMIC
    if with_mask:
        example.append(_mask(6))
        shapes = {"args": (*DYNAMIC["args"], DYNAMIC["args"][0] | {1: torch.export.Dim.AUTO})}
        shapes["args"][3].pop(2)
    host = canonicalize(capture(Module(function), tuple(example), shapes))
    found = find(host)
    (site,) = found.sites
    for length in LENGTHS if not with_mask else LENGTHS[1:]:
        args = [torch.randn(2, 4, length, 8, dtype=torch.float64) for _ in range(3)]
        args += [_mask(length)] if with_mask else []
        value, own = _raised(site, host, tuple(args))
        torch.testing.assert_close(
            value,
            own,
            rtol=0,
            atol=4 * torch.finfo(torch.float64).eps * float(own.abs().max()) * length,
        )
        torch.testing.assert_close(own, function(*args), rtol=0, atol=1e-12)
    score = site.cascade.producer("S")
    return f"{score.expr} where {score.guard}"


@pytest.mark.parametrize("function", STRUCTURAL, ids=lambda f: f.__name__)
def test_structural_mask(function: Callable[..., Tensor]) -> None:
    """A mask of positions alone is an expression: nothing is read as a tensor (but learned
    slopes)."""
    text = _agrees(function, with_mask=False)
    reads = [
        word for word in text.replace("(", " ").split() if word.startswith("M") and "[" in word
    ]
    assert [r for r in reads if not r.startswith("M0[h]")] == [], text


def test_spellings_of_a_window_have_one_normal_form() -> None:
    texts = {
        _agrees(f, with_mask=False).partition(" where ")[2]
        for f in (window, window_by_triangles, vmapped)
    }
    assert len(texts) == 1, texts


@pytest.mark.parametrize("function", DATA, ids=lambda f: f.__name__)
def test_mask_from_data(function: Callable[..., Tensor]) -> None:
    """The part that depends on data stays a read, at most [b, kv] (and [b, q]) large."""
    text = _agrees(function, with_mask=True)
    assert "M0[b" in text
    if function in (causal_padding, documents, vmapped_documents):
        assert "kv <= q" in text
