"""Attention whose log-sum-exp is used, rewritten: output and log-sum-exp over the kept keys only."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_rewrite as ar
from attn_rewrite import Rule, Where, export_onnx
from attn_rewrite.backends.torch import fused, lower
from attn_rewrite.backends.torch import kernel as kernel_module
from attn_rewrite.backends.torch import tiles as tiles_module
from attn_rewrite.backends.torch.ops import tiled_attention, tiled_attention_lse
from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import KV, H, eq
from attn_rewrite.compile_backend import Session
from attn_rewrite.compile_backend import attn_rewrite as backend
from attn_rewrite.errors import LowerError, VerifyError
from attn_rewrite.passes.sparse.window import Window
from attn_rewrite.plan import Plan, Step
from attn_rewrite.report import Report
from attn_rewrite.site import Refusal
from tests.fused_rows import fused_rows
from tests.test_torch_backend import GUARDS, SHAPES, attention, keep_of, operands

INF = math.inf


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax and log-sum-exp in float64, written out; a row without keys has 0 and -inf."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    top = s.masked_fill(~keep, -INF).amax(-1, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    weights = (s - top).exp() * keep
    total = weights.sum(-1, keepdim=True)
    safe = torch.where(total == 0, 1.0, total)
    out = torch.einsum("bhqk,bhkf->bhqf", weights / safe, v)
    return out, torch.where(total == 0, -INF, top + safe.log())[..., 0]


def plain(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What eager PyTorch computes in float32 or wider, for its rounding errors."""
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.mT * scale).masked_fill(~keep, -INF)
    return s.softmax(-1).nan_to_num(0.0) @ v, s.logsumexp(-1)


def assert_equal(got: Any, want: Any, own: Any = None) -> None:
    """Within max(2 x the error of a plain evaluation, 4 eps x max|reference|); equal infinities."""
    for i, (x, reference) in enumerate(zip(got, want, strict=True)):
        x, reference = torch.as_tensor(x), torch.as_tensor(reference)
        assert x.shape == reference.shape
        finite = reference.isfinite()
        assert torch.equal(x.isneginf(), reference.isneginf())
        largest = reference[finite].abs().max().item() if finite.any() else 0.0
        allowed = 4 * torch.finfo(x.dtype).eps * largest
        if own is not None and finite.any():
            allowed = max(allowed, 2 * (own[i].double() - reference)[finite].abs().max().item())
        error = (x.double() - reference)[finite].abs().max().item() if finite.any() else 0.0
        assert error <= allowed, (i, error, allowed)


# The operator


def run(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    guard, mask = GUARDS[name]
    q, k, v = operands(shape, dtype)
    text = str(attention(guard, group=shape[2]))
    keep = keep_of(mask, shape[1], shape[3], shape[4])
    got = tiled_attention_lse(q, k, v, [], text, shape[-1])
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.promote_types(dtype, torch.float32)
    assert_equal(got, dense(q, k, v, keep, 0.3), plain(q, k, v, keep, 0.3))
    assert torch.equal(got[0], tiled_attention(q, k, v, [], text, shape[-1]))


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles(name: str, shape: tuple[int, ...]) -> None:
    run(name, shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    for name in ("window", "per head", "empty prefix"):
        run(name, SHAPES[2], dtype)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[fused.Unit]:
    """Send rows of any size to PyTorch's fused kernel; the units that ran."""
    return fused_rows(monkeypatch)


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("scratch", [1, 300, 1 << 18])
def test_fused_rows_in_pieces(
    name: str, scratch: int, rows: list[fused.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SCRATCH", scratch)
    monkeypatch.setattr(fused, "OUTPUTS", scratch)
    for lanes, shape in ((1, (2, 4, 1, 33, 33, 8, 8, 8)), (3, (2, 4, 2, 40, 57, 8, 8, 8))):
        monkeypatch.setattr(kernel_module, "_lanes", lambda problem, n=lanes: n)
        run(name, shape, torch.float64)
    assert bool(rows) == (name != "nothing")


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(GUARDS)),
    b=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    q_len=st.integers(1, 40),
    kv_len=st.integers(1, 40),
    block=st.sampled_from([1, 3, 16]),
    budget=st.sampled_from([1, 200, 1 << 20]),
)
def test_odd_shapes_and_small_tiles(
    name: str, b: int, heads: int, group: int, q_len: int, kv_len: int, block: int, budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "TILE_ELEMENTS", budget)
        patch.setattr(tiles_module, "_MIN_HEIGHT", 2)
        run(name, (b, heads * group, group, q_len, kv_len, 4, 3, block), torch.float64)


def test_large_scores() -> None:
    guard, mask = GUARDS["window"]
    q, k, v = operands(SHAPES[1])
    q, k, keep = q * 100, k * 100, keep_of(mask, 4, 33, 33)
    assert (q @ k.mT).abs().max() > 1e4
    got = tiled_attention_lse(q, k, v, [], str(attention(guard, QK)), 8)
    assert_equal(got, dense(q, k, v, keep, 1.0), plain(q, k, v, keep, 1.0))


def test_two_halves_merge_to_the_whole() -> None:
    """What a log-sum-exp is for: attention over all keys from attention over two sets of them."""
    q, k, v = operands((2, 4, 2, 40, 57, 8, 6, 8), torch.float64)
    guard, _ = GUARDS["sinks"]
    near, far = (guard & GUARDS["two stripes"][0]), guard & ~GUARDS["two stripes"][0]
    parts = [tiled_attention_lse(q, k, v, [], str(attention(g, group=2)), 8) for g in (near, far)]
    out, lse = tiled_attention_lse(q, k, v, [], str(attention(guard, group=2)), 8)
    both = torch.stack([sums for _, sums in parts])
    share = both.softmax(0)[..., None]
    merged = (torch.stack([o for o, _ in parts]) * share).sum(0)
    torch.testing.assert_close(merged, out, rtol=0, atol=1e-14)
    torch.testing.assert_close(both.logsumexp(0), lse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["window", "per head", "empty prefix"])
def test_gradients_of_both_results(name: str) -> None:
    guard, mask = GUARDS[name]
    shape = (1, 4, 2, 20, 23, 4, 3, 8)
    keep, text = keep_of(mask, 4, 20, 23), str(attention(guard, group=2))
    some = keep.any(-1)
    found = []
    for function in (
        lambda q, k, v: tiled_attention_lse(q, k, v, [], text, 8),
        lambda q, k, v: dense(q, k, v, keep, 0.3),
    ):
        leaves = [t.requires_grad_() for t in operands(shape, torch.float64)]
        out, lse = function(*leaves)
        loss = (out * torch.arange(3)).sum() + (lse[some.expand_as(lse)] ** 2).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_operator_is_well_formed() -> None:
    q, k, v = operands(SHAPES[1])
    given = (q, k, v, [], str(attention(GUARDS["window"][0])), 8)
    torch.library.opcheck(torch.ops.attn_rewrite.tiled_attention_lse.default, given)


def test_a_sink_is_no_score() -> None:
    q, k, v = operands(SHAPES[1])
    cascade = attention(sink=H * 0.5)
    with pytest.raises(ValueError, match="sink"):
        tiled_attention_lse(q, k, v, [], str(cascade), 8)
    refused = lower(cascade, lse=True)
    assert isinstance(refused, Refusal)
    assert refused.code == "logsumexp-used"


# Models


class Flex(nn.Module):
    """FlexAttention that returns both; row 0 of a strictly causal one has no key."""

    def __init__(self, mask: Callable[..., Tensor] | None = None, scale: float = 0.3) -> None:
        super().__init__()
        self.mask, self.scale = mask, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        made = None
        if self.mask is not None:
            sizes = q.shape[2], k.shape[2]
            made = create_block_mask(self.mask, None, None, *sizes, device="cpu")
        return flex_attention(
            q, k, v, block_mask=made, scale=self.scale, enable_gqa=True, return_lse=True
        )


def strict(_b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q > kv


def inputs(n: int, *, heads: tuple[int, int] = (4, 2), b: int = 2, seed: int = 0) -> list[Tensor]:
    sizes = ((heads[0], n, 8), (heads[1], n, 8), (heads[1], n, 6))
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(b, *s, generator=random) for s in sizes]


def distance(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)


def by_head(first: Tensor, rest: Tensor) -> Tensor:
    return torch.stack([first, first, rest, rest])


EVERY = {
    "exact": lambda n: torch.ones(n, n, dtype=torch.bool),
    "window(size=16)": lambda n: (distance(n) <= 8) & (distance(n) >= -7),
    "window(left=3, right=20)": lambda n: (distance(n) <= 3) & (distance(n) >= -20),
    "window(size=8, sinks=3)": lambda n: (
        ((distance(n) <= 4) & (distance(n) >= -3)) | (torch.arange(n) < 3)
    ),
    "chunked(size=24)": lambda n: torch.arange(n)[:, None] // 24 == torch.arange(n) // 24,
}


@pytest.mark.parametrize(
    ("policy", "length"), [*((p, 131) for p in EVERY), ("exact", 2), ("window(size=16)", 7)]
)
def test_policies(policy: str, length: int) -> None:
    given, keep = inputs(length), EVERY[policy](length)
    done = ar.optimize(Flex(), policy, tuple(given), dynamic_shapes={})
    (site,) = done.report.sites
    assert (site.kernel, site.refusals) == ("tiled", ())
    assert site.facts["lse"] is True
    assert site.lse is not None
    assert site.lse.implementation.max_abs <= site.lse.bound
    assert (site.lse.approximation is None) == (policy == "exact")
    assert_equal(done(*given), dense(*given, keep, 0.3), plain(*given, keep, 0.3))


@pytest.mark.parametrize("policy", ["window(size=16)", "exact"])
def test_rows_without_keys(policy: str) -> None:
    """The original mask leaves the first rows empty: 0 and -inf, before and after."""
    n = 75
    given, keep = inputs(n), distance(n) > 0
    if policy != "exact":
        keep = keep & (distance(n) < 16)
    done = ar.optimize(Flex(strict), policy, tuple(given))
    out, lse = done(*given)
    assert lse[..., 0].isneginf().all()
    assert (out[..., 0, :] == 0).all()
    assert_equal((out, lse), dense(*given, keep, 0.3), plain(*given, keep, 0.3))
    assert math.isfinite(done.report.sites[0].lse.approximation.max_abs if policy != "exact" else 0)


def test_heads_with_policies_of_their_own() -> None:
    n = 90
    given = inputs(n, heads=(4, 4))
    rules = [Rule(Where(heads=(0, 1)), "window(size=8)"), Rule(Where(), "chunked(size=30)")]
    done = ar.optimize(Flex(), ar.Policy(rules), tuple(given))
    near = (distance(n) <= 4) & (distance(n) >= -3)
    keep = by_head(near, torch.arange(n)[:, None] // 30 == torch.arange(n) // 30)
    assert_equal(done(*given), dense(*given, keep, 0.3), plain(*given, keep, 0.3))
    assert done.report.sites[0].cost_after.tiles[0] < done.report.sites[0].cost_after.tiles[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    given = [t.to(dtype) for t in inputs(100)]
    done = ar.optimize(Flex(), "window(size=16)", tuple(given))
    out, lse = done(*given)
    keep = EVERY["window(size=16)"](100)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_equal((out, lse), dense(*given, keep, 0.3), plain(*given, keep, 0.3))


def test_long_rows_run_on_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(2, 2, 900, 16, generator=random) for _ in range(3))
    ran = []
    original = fused.FusedKernel.run

    def spy(self: Any, unit: Any, *results: Any) -> None:
        ran.append(unit)
        original(self, unit, *results)

    monkeypatch.setattr(fused.FusedKernel, "run", spy)
    done = ar.optimize(Flex(), "window(size=200)", given, verify=False)
    keep = (distance(900) <= 100) & (distance(900) >= -99)
    assert_equal(done(*given), dense(*given, keep, 0.3), plain(*given, keep, 0.3))
    assert ran
    executed, total = done.report.sites[0].cost_after.tiles
    assert executed < total


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("clipped_softmax", "mapped after the softmax"),
        ("int8(pv=true)", "mapped after the softmax"),
        ("combiner(segment=16)", "no softmax over scores"),
    ],
)
def test_where_it_means_nothing_it_is_refused(policy: str, words: str) -> None:
    given = tuple(inputs(48))
    model = Flex()
    done = ar.optimize(model, policy, given, dynamic_shapes={})
    (site,) = done.report.sites
    assert (site.status, site.kernel) == ("refused", None)
    assert [r.code for r in site.refusals] == ["logsumexp-used"]
    assert words in site.refusals[0].reason
    for got, want in zip(done(*given), model(*given), strict=True):
        assert torch.equal(got, want)


def test_the_row_maximum_of_the_operator_is_refused() -> None:
    program = torch.export.export(Flex(), tuple(inputs(33)))  # on a CPU torch does not give it
    (natural,) = (n for n in program.graph.nodes if math.log(2) in n.args)
    (third,) = (n for n in program.graph.nodes if n.name.startswith("getitem") and n.args[1] == 2)
    natural.args = (third, math.log(2))
    found = ar.find_attention(program)
    assert [(r.code, "row maximum" in r.reason) for r in found.refusals] == [
        ("logsumexp-used", True)
    ]


def test_the_base_two_logarithm_of_the_operator_is_refused() -> None:
    class Raw(Flex):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(2 * x for x in super().forward(q, k, v))

    # What the operator gives is to the base 2; torch multiplies it by ln 2 before it hands it on.
    program = torch.export.export(Raw(), tuple(inputs(33)))
    (natural,) = (n for n in program.graph.nodes if math.log(2) in n.args)
    natural.args = (natural.args[0], 1.0)
    found = ar.find_attention(program)
    assert [(r.code, "base 2" in r.reason) for r in found.refusals] == [("logsumexp-used", True)]


def test_a_wrong_log_sum_exp_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import attn_rewrite.backends.torch.ops as ops

    def off(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel_module.attend_with_lse(*args)
        return out, lse + 1e-4

    monkeypatch.setattr(ops, "attend_with_lse", off)
    with pytest.raises(VerifyError, match="log-sum-exp"):
        ar.optimize(Flex(), "window(size=16)", tuple(inputs(64)))


def test_a_site_that_was_raised_to_another_sum_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_rewrite import lse_check

    right = lse_check.oracle_lse
    monkeypatch.setattr(lse_check, "oracle_lse", lambda *args: right(*args) + 1e-3)
    given = tuple(inputs(40))
    done = ar.optimize(Flex(), "window(size=16)", given)
    (site,) = done.report.sites
    assert [r.code for r in site.refusals] == ["raise-mismatch"]
    assert "log-sum-exp" in site.refusals[0].reason


def test_just_in_time() -> None:
    torch._dynamo.reset()
    given, keep = inputs(64, heads=(4, 4)), EVERY["window(size=16)"](64)
    session = Session()
    options = {"policy": "window(size=16)", "compiler": "aot_eager", "session": session}
    compiled = torch.compile(Flex(), backend=backend, options=options)
    assert_equal(compiled(*given), dense(*given, keep, 0.3), plain(*given, keep, 0.3))
    assert [k for g in session.graphs for k in g.kernels.values()] == ["tiled"]


def test_a_report_has_the_errors_of_both() -> None:
    done = ar.optimize(Flex(), "window(size=16)", tuple(inputs(80)))
    again = Report.from_json(done.report.to_json())
    assert again.sites[0].lse == done.report.sites[0].lse


# Spelled with operators


def spelled(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * 0.3
        if kind == "causal":
            n = q.shape[2]
            scores = scores.masked_fill(torch.ones(n, n).bool().triu(1), -INF)
        if kind in ("plain", "causal"):
            return scores.softmax(-1) @ v, scores.logsumexp(-1)
        if kind == "before the output":
            lse = scores.logsumexp(-1)
            return scores.softmax(-1) @ v, lse + lse.sin() * 0
        if kind == "exponent":
            lse = scores.logsumexp(-1, keepdim=True)
            return (scores - lse).exp() @ v, lse.squeeze(-1)
        if kind == "of float":
            return scores.softmax(-1, dtype=torch.float32) @ v, scores.float().logsumexp(-1)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if kind == "shifted":
            return weights / total @ v, (top + total.log()).squeeze(-1)
        return weights @ v / total, top.squeeze(-1) + total.squeeze(-1).log()

    return attend


class Spelled(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attend = spelled(kind)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(q, k, v)


@pytest.mark.parametrize(
    "kind",
    ["plain", "causal", "before the output", "exponent", "of float", "shifted", "late division"],
)
def test_spellings(kind: str) -> None:
    n = 45
    given, keep = inputs(n, heads=(4, 4)), (distance(n) <= 4) & (distance(n) >= -3)
    if kind == "causal":
        keep = (distance(n) >= 0) & (distance(n) < 8)
    done = ar.optimize(Spelled(kind), "window(size=8)", tuple(given), dynamic_shapes={})
    (site,) = done.report.sites
    assert (site.kernel, site.lse is None) == ("tiled", False)
    assert_equal(done(*given), dense(*given, keep, 0.3), plain(*given, keep, 0.3))
    ops = [str(node.target) for node in done.program.graph.nodes]
    assert not [op for op in ops if "softmax" in op or "logsumexp" in op or "matmul" in op]


def test_a_sum_that_the_values_need_stays() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            scores = q @ k.mT
            lse = scores.logsumexp(-1)
            return scores.softmax(-1) @ (v * lse.mean()), lse

    given = tuple(inputs(20, heads=(4, 4)))
    done = ar.optimize(Model(), "window(size=4)", given, dynamic_shapes={})
    (site,) = done.report.sites
    assert (site.status, site.refusals[0].code) == ("refused", "logsumexp-used")
    assert "before" in site.refusals[0].reason


def test_other_reductions_of_the_scores_are_no_log_sum_exp() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            scores = q @ k.mT
            return scores.softmax(-1) @ v, scores.logsumexp(-2), (scores * 2).logsumexp(-1)

    given = tuple(inputs(20, heads=(4, 4)))
    done = ar.optimize(Model(), "window(size=4)", given, dynamic_shapes={})
    (site,) = done.report.sites
    assert site.kernel
    assert site.lse is None
    for got, want in zip(done(*given)[1:], Model()(*given)[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_a_shift_of_whole_rows_shifts_the_sum() -> None:
    """Softmax cancels it, the log-sum-exp does not."""

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            return flex_attention(
                q, k, v, score_mod=lambda s, b, h, i, _: s - r[b, h, i], scale=0.3, return_lse=True
            )

    given = inputs(30, heads=(4, 4))
    shift = torch.randn(2, 4, 30)
    done = ar.optimize(Model(), "window(size=8)", (*given, shift), dynamic_shapes={})
    keep = (distance(30) <= 4) & (distance(30) >= -3)
    out, lse = dense(*given, keep, 0.3)
    own = plain(*given, keep, 0.3)
    assert_equal(done(*given, shift), (out, lse - shift.double()), (own[0], own[1] - shift))
    assert [s.kernel for s in done.report.sites] == ["tiled"]


# ONNX


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


class Joined(Flex):
    """The same over queries, keys and values side by side, [batch, length, 60]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(*apart(x))


def apart(x: Tensor) -> list[Tensor]:
    sizes = ((4, 8), (2, 8), (2, 6))
    parts = x.split([math.prod(s) for s in sizes], -1)
    return [p.unflatten(-1, s).transpose(1, 2) for p, s in zip(parts, sizes, strict=True)]


def joined(n: int, b: int = 2) -> Tensor:
    return torch.randn(b, n, 60, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def strict_window() -> Any:
    """A window in a strictly causal attention: row 0 is empty; batch and length are dynamic."""
    done = ar.optimize(Joined(strict), "window(size=16)", (joined(150),))
    assert [s.kernel for s in done.report.sites] == ["tiled"]
    return done


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_a_file_gives_both(target: str, strict_window: Any, tmp_path: Path) -> None:
    artifact = export_onnx(strict_window, tmp_path / "m.onnx", target=target)
    (site,) = artifact.sites
    assert (site.form, site.skips) == ("tiles", True)
    assert ("no operator" in site.choice) == (target == "onnxruntime")
    for n, b in ((150, 1), (131, 3), (260, 2)):
        x = joined(n, b)
        given, keep = apart(x), (distance(n) > 0) & (distance(n) < 16)
        found = artifact.run({"x": x.numpy()})
        assert np.isneginf(found["output_1"][..., 0]).all()
        assert (found["output_0"][..., 0, :] == 0).all()
        assert_equal(found.values(), dense(*given, keep, 0.3), plain(*given, keep, 0.3))


def tiled_order() -> Tensor:
    """The place of each token of a grid of 12 x 20 in the order of tiles of 3 x 5."""
    row, column = torch.arange(240) // 20, torch.arange(240) % 20
    return (row // 3 * 4 + column // 5) * 15 + row % 3 * 5 + column % 5


def other_masks(policy: str) -> tuple[Any, Tensor]:
    """A policy and what it keeps of 240 tokens and 4 heads."""
    near, n = (distance(240) <= 4) & (distance(240) >= -3), torch.arange(240)
    if policy == "per head":
        rules = [Rule(Where(heads=(0, 1)), "window(size=8)"), Rule(Where(), "chunked(size=30)")]
        return ar.Policy(rules), by_head(near, n[:, None] // 30 == n // 30)
    if policy.startswith("reorder"):
        apart = tiled_order()[:, None] - tiled_order()
        return policy, (apart <= 15) & (apart >= -14)
    return policy, n[:, None] // 48 == n // 48 if policy != "exact" else n[:, None] == n[:, None]


@pytest.mark.parametrize(
    ("policy", "form"),
    [pytest.param("exact", "dense", marks=pytest.mark.slow), ("chunked(size=48)", "blocks"),
     pytest.param("per head", "blocks", marks=pytest.mark.slow),
     ("reorder(tile=[3, 5], layout='grid=12x20') | window(size=30)", "tiles")],
)  # fmt: skip
def test_files_of_other_forms(policy: str, form: str, tmp_path: Path) -> None:
    given = tuple(inputs(240, heads=(4, 4)))
    chosen, keep = other_masks(policy)
    done = ar.optimize(Flex(), chosen, given, dynamic_shapes={})
    artifact = export_onnx(done, tmp_path / "m.onnx")
    assert [s.form for s in artifact.sites] == [form]
    found = artifact.run(dict(zip("qkv", (t.numpy() for t in given), strict=True)))
    want, own = dense(*given, keep, 0.3), plain(*given, keep, 0.3)
    assert_equal(done(*given), want, own)
    assert_equal(found.values(), want, own)


@pytest.mark.slow
def test_half_types_in_a_file(tmp_path: Path) -> None:
    given = [t.half() for t in inputs(140)]
    done = ar.optimize(Flex(strict), "window(size=16)", tuple(given))
    artifact = export_onnx(done, tmp_path / "m.onnx")
    found = artifact.run(dict(zip("qkv", (t.numpy() for t in given), strict=True)))
    assert [x.dtype for x in found.values()] == [np.float16, np.float32]
    keep = (distance(140) > 0) & (distance(140) < 16)
    assert_equal(found.values(), dense(*given, keep, 0.3), plain(*given, keep, 0.3))


class Operator(nn.Module):
    """The operator itself, under a mask that has no band: every third key."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        text = str(attention(eq(KV % 3, 0), group=2))
        return torch.ops.attn_rewrite.tiled_attention_lse(q, k, v, [], text, 8)


def test_a_mask_without_bands_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    length = torch.export.Dim("length", max=999)
    program = torch.export.export(
        Operator(), tuple(inputs(48)), dynamic_shapes={n: {2: length} for n in "qkv"}
    )
    plan = Plan((Step("attention.0", (Window(size=8),)),))
    with pytest.raises(LowerError, match="fixed lengths") as error:
        export_onnx(SimpleNamespace(program=program, plan=plan), tmp_path / "m.onnx")
    assert [r.code for r in error.value.refusals] == ["onnx-dense-mask"]
    assert not list(tmp_path.iterdir())
