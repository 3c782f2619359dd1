"""Widths of 1, distances, sinks, grouped heads, `flex_attention`; masks that are not causal, maps
that depend on themselves, attention inside `torch.vmap`."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_rewrite as ar
from attn_rewrite.compile_backend import Session, attn_rewrite
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.site import UNKNOWN_OFFSET
from attn_rewrite.sizes import same_size
from tests.test_find_masks import _raised
from tests.test_find_spellings import DYNAMIC, Module, capture, findings

SHAPE = (2, 4, 6, 8)


def _agrees(function, shapes, dynamic=None):
    """The one site of ``function``, whose raised cascade equals what the graph computes."""
    torch.manual_seed(0)
    args = tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
    host = canonicalize(capture(Module(function), args, dynamic))
    (site,) = find(host).sites
    value, own = _raised(site, host, args)
    torch.testing.assert_close(value, own, rtol=0, atol=1e-12)
    expected = function(*args)
    torch.testing.assert_close(own.reshape_as(expected), expected, rtol=0, atol=1e-12)
    return site


def _matmul(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def _broadcast(q, k, v):
    return (q * k.mT).softmax(-1) @ v


def _no_width(q, k, v):
    a = (q[..., 0][..., :, None] * k[..., 0][..., None, :]).softmax(-1)
    return (a * v[..., 0][..., None, :]).sum(-1)


def _sums(q, k, v):
    s = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1)
    return (s.softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(3)


@pytest.mark.parametrize("dynamic", [None, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [_matmul, _broadcast, _no_width, _sums])
def test_width_one(function, dynamic) -> None:
    site = _agrees(function, [(2, 4, 6, 1)] * 3, dynamic)
    assert (site.hq, site.hkv, site.d_qk, site.d_v) == (4, 4, 1, 1)


def _end_of_a_bias(q, k, v):
    bias = torch.arange(64).view(1, 1, 64).sin() * torch.ones(4, 1, 1)
    end = bias[:, max(0, 1 - q.shape[2]) :, max(0, 64 - k.shape[2]) :]
    return (q @ k.mT + end).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [None, DYNAMIC], ids=["static", "dynamic"])
def test_a_bias_cut_to_its_last_row_broadcasts(dynamic) -> None:
    """One row, but of a size that is written as 1 - max(0, 1 - length), as in MPT."""
    _agrees(_end_of_a_bias, [(2, 4, 6, 8)] * 3, dynamic)


def test_sizes_with_a_bound_are_compared_for_every_length() -> None:
    length = sympy.Symbol("s", positive=True, integer=True)
    any_size = sympy.Symbol("n", integer=True)
    assert same_size(1 - sympy.Max(0, 1 - length), 1)
    assert same_size(sympy.Min(length, 3 * length), length)
    assert not same_size(64 - sympy.Max(0, 64 - length), length)
    assert not same_size(sympy.Max(2, length), length)
    assert not same_size(sympy.Max(0, 1 - any_size), 0)


def _cdist(q, k, v):
    return (-torch.cdist(q, k).pow(2) / 2).softmax(-1) @ v


def _differences(q, k, v):
    return (-(q.unsqueeze(3) - k.unsqueeze(2)).square().sum(-1) / 2).softmax(-1) @ v


def _cosine(q, k, v):
    return (F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) * 10).softmax(-1) @ v


def _scaled_by_a_tensor(q, k, v):
    a = torch.einsum("bhid,bhjd,->bhij", q, k, torch.full((), 0.5, dtype=q.dtype))
    return torch.einsum("bhij,bhjd->bhid", a.softmax(-1), v)


def _projected_in_the_product(q, k, v):
    out = torch.eye(8, dtype=q.dtype).view(8, 8).expand(4, 8, 8)
    return torch.einsum("bhij,bhjd,hde->bhie", (q @ k.mT).softmax(-1), v, out)


@pytest.mark.parametrize(
    "function", [_cdist, _differences, _cosine, _scaled_by_a_tensor, _projected_in_the_product]
)
def test_scores_and_values_of_other_products(function) -> None:
    site = _agrees(function, [SHAPE] * 3, DYNAMIC)
    assert (site.hq, site.d_qk, site.d_v, site.causal) == (4, 8, 8, False)


def _padded_sink(q, k, v):
    return F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v


def _stable_off_by_one(q, k, v):
    s = q @ k.mT
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - m).exp()
    return (e / (e.sum(-1, keepdim=True) + (-m).exp())) @ v


@pytest.mark.parametrize("function", [_padded_sink, _stable_off_by_one])
def test_sinks_of_zero(function) -> None:
    site = _agrees(function, [SHAPE] * 3)
    assert "max(LM[b, h, q], 0.0)" in str(site.cascade.producer("GM").expr)


def _cast_with_its_sink(q, k, v):
    s = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1).double()
    return s.softmax(-1)[..., :-1] @ v


def _shifted_and_cast_with_its_sink(q, k, v):
    s = torch.cat([q.sum(-1, keepdim=True), q @ k.mT], -1)
    s = (s - s.amax(-1, keepdim=True)).double()
    return s.softmax(-1)[..., 1:] @ v


@pytest.mark.parametrize("function", [_cast_with_its_sink, _shifted_and_cast_with_its_sink])
@pytest.mark.parametrize("dynamic", [None, DYNAMIC], ids=["static", "dynamic"])
def test_sinks_that_are_cast_with_the_scores(function, dynamic) -> None:
    site = _agrees(function, [SHAPE] * 3, dynamic)
    assert "M0" in str(site.cascade.producer("GM").expr)


def test_tiled_heads_are_shared() -> None:
    def attend(q, k, v):
        k, v = (torch.tile(x.unsqueeze(2), (1, 1, 3, 1, 1)).flatten(1, 2) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    site = _agrees(attend, [(2, 6, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)])
    assert (site.hq, site.hkv) == (6, 2)


@pytest.mark.parametrize(("diagonal", "causal"), [(-1, True), (0, True), (1, False), (3, False)])
def test_a_mask_that_shows_the_future_is_not_causal(diagonal: int, causal: bool) -> None:
    def attend(q, k, v):
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(diagonal)
        return (q @ k.mT).masked_fill(~keep, -1e4).softmax(-1) @ v

    site = _agrees(attend, [SHAPE] * 3)
    assert (site.causal, site.offset) == (causal, "0")
    assert _agrees(attend, [SHAPE] * 3, DYNAMIC).causal == causal  # of two lengths, or of one


def _top_keys(q, k, v):
    p = (q @ k.mT).softmax(-1)
    p = p * (p >= p.topk(3, -1).values[..., -1:])
    return (p / p.sum(-1, keepdim=True)) @ v


def _own_average(q, k, v):
    s = q @ k.mT
    return (s.softmax(-1) * (s > s.mean(-1, keepdim=True))) @ v


@pytest.mark.parametrize("function", [_top_keys, _own_average])
def test_a_mask_made_of_the_scores_is_refused(function) -> None:
    found = findings(function)
    assert not found.sites
    (refusal,) = (r for r in found.refusals if r.code == "score-dependent-mask")
    assert refusal.reason
    assert refusal.node
    assert refusal.source


def test_attention_inside_vmap_is_refused() -> None:
    def one(q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v

    def attend(q, k, v):
        return torch.vmap(torch.vmap(one))(q, k, v)

    args = tuple(torch.randn(SHAPE) for _ in range(3))
    found = findings(attend, args)
    assert [r.code for r in found.refusals] == ["inside-vmap"]
    model = ar.optimize(Module(attend), "exact", args)  # nothing is rewritten, and it still runs
    torch.testing.assert_close(model(*args), attend(*args))


# flex_attention


def _bias_and_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.exp2(-(torch.arange(4) + 1.0))
    blocks = create_block_mask(
        lambda b, h, i, j: (i >= j) & (i - j < 4), None, None, q.shape[2], k.shape[2], device="cpu"
    )
    return flex_attention(
        q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=blocks
    )


def _capped_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :2], v[:, :2]

    def cap(s, b, h, i, j):
        return 20 * torch.tanh(s / 20) + (j - i) * torch.exp2(-(h + 1.0))

    return flex_attention(q, k, v, score_mod=cap, enable_gqa=True, scale=0.3)


@pytest.mark.parametrize(
    ("function", "heads", "causal", "guard"),
    [
        (_bias_and_window, 4, True, "(kv <= q) & (q <= kv + 3)"),
        (_capped_groups, 2, False, "true"),
    ],
)
def test_flex_attention(function, heads: int, causal: bool, guard: str) -> None:
    torch.manual_seed(0)
    args = tuple(torch.randn(2, 4, 32, 16) for _ in range(3))
    model = ar.optimize(Module(function), "exact", args)
    (site,) = model.sites
    assert (site.hkv, site.causal) == (heads, causal)
    assert str(site.cascade.producer("S").guard) == guard
    assert model.report.sites[0].kernel
    torch.testing.assert_close(model(*args), function(*args), rtol=0, atol=1e-5)


def test_flex_attention_just_in_time() -> None:
    torch._dynamo.reset()
    args = tuple(torch.randn(2, 4, 32, 16) for _ in range(3))
    session = Session()
    options = {"policy": "exact", "compiler": "aot_eager", "session": session}
    compiled = torch.compile(Module(_bias_and_window), backend=attn_rewrite, options=options)
    torch.testing.assert_close(compiled(*args), _bias_and_window(*args), rtol=0, atol=1e-5)
    assert [s.causal for s in session.sites] == [True]
    assert all(k for g in session.graphs for k in g.kernels.values())


class _ScoresWithoutAutocast(nn.Module):
    """The product in full precision whatever is on outside, the softmax after it (GPT-2)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        with torch.autocast("cpu", enabled=False):
            scores = torch.matmul(q.float(), k.float().mT) * 0.25
        return scores.masked_fill(~keep, -1e9).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_a_region_without_autocast(dtype: torch.dtype) -> None:
    model = _ScoresWithoutAutocast().eval()
    args = tuple(torch.randn(SHAPE, dtype=dtype) for _ in range(3))
    module = ar.optimize(model, "exact", args)
    (site,) = module.sites
    assert (site.causal, site.hq, site.d_qk) == (True, 4, 8)
    assert module.report.sites[0].kernel
    exact = _ScoresWithoutAutocast()(*(x.float() for x in args)).double()
    own = (model(*args).double() - exact).abs().max()
    bound = max(2 * own, 4 * torch.finfo(dtype).eps * exact.abs().max())
    assert (module(*args).double() - exact).abs().max() <= bound


def test_a_region_without_autocast_inside_of_one_with_it_is_refused() -> None:
    """There a kernel outside of the region would compute in the lower precision."""

    class Around(_ScoresWithoutAutocast):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(q + 1, k, v)

    found = ar.find_attention(Around().eval(), tuple(torch.randn(SHAPE) for _ in range(3)))
    assert not found.sites
    assert [r.code for r in found.refusals] == ["no-score-product"]


class _Cached(nn.Module):
    """Projections of ``x`` [2, n, 8], and a cache of six keys [2, 2, 6, 4] that ``join`` uses."""

    def __init__(self, join) -> None:
        super().__init__()
        self.qkv, self.join = nn.Linear(8, 24), join

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in parts)
        return (q @ self.join(keys, k).mT).softmax(-1) @ torch.cat([values, v], 2)


def _rotated_behind_the_cache(past, new):
    k = torch.cat([past, new], 2)
    angles = torch.arange(k.shape[2])[:, None] * 0.1
    turned = torch.cat([-k[..., 2:], k[..., :2]], -1)
    return k * angles.cos() + turned * angles.sin()


def _in_another_order_behind_the_cache(past, new):
    return (torch.cat([past.transpose(1, 2), new.transpose(1, 2)], 1) / 3).transpose(1, 2)


def _before_the_cache(past, new):
    return torch.cat([new, past], 2)


@pytest.mark.parametrize(
    ("join", "queries", "offset", "causal"),
    [
        (_rotated_behind_the_cache, 3, "#kv - #q", False),
        (_rotated_behind_the_cache, 1, "#kv - 1", True),
        (_in_another_order_behind_the_cache, 3, "#kv - #q", False),
        (_before_the_cache, 3, UNKNOWN_OFFSET, False),
    ],
)
def test_keys_made_of_a_cache_row_by_row(join, queries, offset, causal) -> None:
    past = torch.randn(2, 2, 6, 4)
    (site,) = findings(_Cached(join), (torch.randn(2, queries, 8), past, past)).sites
    assert (site.kind, site.offset, site.causal) == ("self", offset, causal)
