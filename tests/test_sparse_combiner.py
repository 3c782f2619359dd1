"""Combiner: its cascades against the definition, row by row; known answers; models; refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attn_rewrite as ar
from attn_rewrite.backends.torch.lower import lower
from attn_rewrite.cascade import interpret
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, Q, Read, call, where
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.text import parse
from attn_rewrite.errors import PolicyError
from attn_rewrite.graph import EagerBuilder
from attn_rewrite.plan import make_plan
from attn_rewrite.policy import Policy
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal, Site
from tests.sites import findings, make_site

Split = Callable[[int], tuple[list[int], list[list[int]]]]  # query -> direct tokens, groups


def segments(length: int, size: int, causal: bool) -> Split:
    def split(i: int) -> tuple[list[int], list[list[int]]]:
        parts = [list(range(a, min(a + size, length))) for a in range(0, length, size)]
        own = i // size
        near = [j for j in parts[own] if j <= i or not causal]
        far = parts[:own] if causal else parts[:own] + parts[own + 1 :]
        return near, far

    return split


def powers(i: int) -> tuple[list[int], list[list[int]]]:
    groups, end, size = [], i, 1
    while end:
        if end % (2 * size):
            groups.append(list(range(end - size, end)))
            end -= size
        size *= 2
    return [i], groups


def cross(rows: int, columns: int, causal: bool) -> Split:
    def split(i: int) -> tuple[list[int], list[list[int]]]:
        y, x = divmod(i, columns)
        others = [u for u in range(rows) if (u < y if causal else u != y)]
        line = [w for w in range(columns) if w <= x or not causal]
        near = [u * columns + x for u in others] + [y * columns + w for w in line]
        far = [[u * columns + w for u in others] for w in range(columns) if w != x]
        return near, [g for g in far if g]

    return split


def definition(x: dict[str, Tensor], split: Split, scale: float) -> Tensor:
    """The two softmaxes of section 5, one query after the other, in float64."""
    q, k, v = (x[n].double() for n in "QKV")
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, h in ((b, h) for b in range(len(q)) for h in range(q.shape[1])):
        qs, ks, vs = q[b, h], k[b, h // group], v[b, h // group]
        summaries: dict[tuple[int, ...], Tensor] = {}
        for i in range(q.shape[2]):
            near, far = split(i)
            keys, given = list(ks[near]), list(vs[near])
            for members in far:
                if tuple(members) not in summaries:
                    inside = torch.softmax(scale * ks[members] @ qs[members].amax(0), 0)
                    summaries[tuple(members)] = inside @ vs[members]
                keys.append(ks[members].amax(0))
                given.append(summaries[tuple(members)])
            p = torch.softmax(scale * torch.stack(keys) @ qs[i], 0)
            out[b, h, i] = p @ torch.stack(given)
    return out


def site_of(length: int, causal: bool = True, group: int = 1, **facts: Any) -> Site:
    return make_site(
        hq=2 * group, hkv=2, q_len=length, kv_len=length, causal=causal, **facts
    )  # fmt: skip


def combined(policy: str, site: Site) -> Cascade:
    (transform,) = parse_pipeline(policy)
    assert transform.admits(site) is None
    result = transform.apply(site.cascade, site)
    assert isinstance(result, Cascade), result
    return result


def operands(
    length: int, group: int = 1, d: int = 3, f: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length * 31 + group)
    shapes = {"Q": (2, 2 * group, length, d), "K": (2, 2, length, d), "V": (2, 2, length, f)}
    return {
        n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in shapes.items()
    }


def run(cascade: Cascade, x: dict[str, Tensor]) -> Tensor:
    kernel = lower(cascade)
    assert not isinstance(kernel, Refusal), kernel
    result: Tensor = kernel.emit(EagerBuilder(), list(x.values()))
    return result


def weights(policy: str, length: int, causal: bool = True) -> Tensor:
    """The weight of every token for every query where all queries are zero, as [q, kv]."""
    cascade = combined(policy, make_site(hq=1, hkv=1, q_len=length, kv_len=length, causal=causal))
    x = {
        "Q": torch.zeros(1, 1, length, 1), "K": torch.randn(1, 1, length, 1),
        "V": torch.eye(length)[None, None],
    }  # fmt: skip
    return interpret(cascade, x)["AV"][0, 0]


def logits(policy: str, length: int, names: tuple[str, ...]) -> int:
    """How many scores the cascade keeps for one head."""
    cascade = combined(policy, make_site(hq=1, hkv=1, q_len=length, kv_len=length, causal=True))
    x = {n: torch.ones(1, 1, length, 1) for n in "QKV"}
    found = interpret(cascade, x, also=names)
    return sum(int((found[n] > -math.inf).sum()) for n in names)


# Known answers: structured-sparse CB-1


@pytest.mark.parametrize(
    ("length", "segment", "count"), [(16, 4, 64), (1024, 32, 32_768), (4096, 64, 262_144)]
)
def test_logits_of_fixed_segments(length: int, segment: int, count: int) -> None:
    assert logits(f"combiner(segment={segment})", length, ("DS", "GS")) == count


@pytest.mark.parametrize(("length", "count"), [(16, 48), (1024, 6144)])
def test_logits_of_powers(length: int, count: int) -> None:
    levels = tuple(f"S{n}" for n in range((length - 1).bit_length()))
    assert logits("combiner(kind='logsparse')", length, ("DS", *levels)) == count


def test_groups_of_powers() -> None:
    found = weights("combiner(kind='logsparse')", 16)
    for query, groups in {
        5: [[5], [4], [0, 1, 2, 3]],
        7: [[7], [6], [4, 5], [0, 1, 2, 3]],
        8: [[8], list(range(8))],
        0: [[0]],
    }.items():
        want = torch.zeros(16, dtype=torch.float64)
        for members in groups:
            want[members] = 1 / len(groups) / len(members)
        torch.testing.assert_close(found[query], want)


@pytest.mark.parametrize(("length", "segment"), [(16, 4), (11, 3)])
def test_zero_queries_share_their_weight_among_tokens_and_segments(
    length: int, segment: int
) -> None:
    found = weights(f"combiner(segment={segment})", length)
    for i in range(length):
        share = 1 / (i % segment + 1 + i // segment)
        before = i // segment * segment
        want = torch.zeros(length, dtype=torch.float64)
        want[:before] = share / segment
        want[before : i + 1] = share
        torch.testing.assert_close(found[i], want)


# Against the definition

FORMS: list[tuple[str, bool, Callable[[int, int], tuple[int, Split]]]] = [
    ("combiner(segment={b})", True, lambda a, b: (a, segments(a, b, True))),
    ("combiner(segment={b})", False, lambda a, b: (a, segments(a, b, False))),
    ("combiner(kind='logsparse')", True, lambda a, b: (a, powers)),
    ("combiner(kind='axial', layout='grid={a}x{b}')", True,
     lambda a, b: (a * b, cross(a, b, True))),
    ("combiner(kind='axial', layout='grid={a}x{b}')", False,
     lambda a, b: (a * b, cross(a, b, False))),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "causal", "shape"), FORMS)
@given(a=st.integers(1, 9), b=st.integers(1, 5), group=st.sampled_from([1, 2]))
@settings(max_examples=12, deadline=None)
def test_the_definition(
    policy: str,
    causal: bool,
    shape: Callable[[int, int], tuple[int, Split]],
    a: int,
    b: int,
    group: int,
) -> None:
    length, split = shape(a, b)
    cascade = combined(policy.format(a=a, b=b), site_of(length, causal, group))
    x = operands(length, group)
    want = definition(x, split, 0.5)
    torch.testing.assert_close(interpret(cascade, x)["AV"], want, rtol=0, atol=1e-14)
    torch.testing.assert_close(run(cascade, x), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("policy", "causal", "shape"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_low_precision(
    policy: str,
    causal: bool,
    shape: Callable[[int, int], tuple[int, Split]],
    dtype: torch.dtype,
    size: float,
) -> None:
    length, split = shape(6, 5)
    cascade = combined(policy.format(a=6, b=5), site_of(length, causal, 2))
    x = operands(length, 2, dtype=dtype)
    x["Q"] = (x["Q"] * (size if dtype != torch.float16 else min(size, 1e3))).to(dtype)
    want = definition(x, split, 0.5)
    # What rounding the operands of the scores costs: scores are about |q| |k| eps apart.
    work = torch.finfo(torch.float32).eps
    spread = 0.5 * (x["Q"].double().abs().amax() * x["K"].double().abs().amax() * 3).item()
    allowed = 4 * torch.finfo(dtype).eps + 4 * work * spread
    error = (run(cascade, x).double() - want).abs().max().item()
    assert error <= allowed * x["V"].double().abs().max().item()


@pytest.mark.parametrize(("policy", "causal", "shape"), FORMS)
def test_strided_operands_give_the_same(
    policy: str, causal: bool, shape: Callable[[int, int], tuple[int, Split]]
) -> None:
    length, _ = shape(5, 4)
    cascade = combined(policy.format(a=5, b=4), site_of(length, causal))
    x = operands(length)
    apart = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in x.items()}
    torch.testing.assert_close(run(cascade, x), run(cascade, apart), rtol=0, atol=0)


@pytest.mark.parametrize(("policy", "causal", "shape"), FORMS)
def test_constant_values_come_back_and_the_future_is_not_seen(
    policy: str, causal: bool, shape: Callable[[int, int], tuple[int, Split]]
) -> None:
    length, _ = shape(6, 4)
    cascade = combined(policy.format(a=6, b=4), site_of(length, causal))
    x = operands(length)
    ones = run(cascade, {**x, "V": torch.ones_like(x["V"])})
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-14)
    other = {n: t.clone() for n, t in x.items()}
    for t in other.values():
        t[:, :, length // 2 :] += 3.0
    before, after = run(cascade, x), run(cascade, other)
    assert torch.equal(before[:, :, : length // 2], after[:, :, : length // 2]) == causal


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes, views without memory of their own left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize(
    ("policy", "causal"),
    [
        ("combiner(segment=32)", True), ("combiner(segment=32)", False),
        ("combiner(kind='logsparse')", True),
        ("combiner(kind='axial', layout='grid=32x32')", True),
        ("combiner(kind='axial', layout='grid=32x32')", False),
    ],
)  # fmt: skip
def test_nothing_as_large_as_a_map_of_pairs_is_ever_made(policy: str, causal: bool) -> None:
    length, depth = 1024, 8
    site = make_site(hq=1, hkv=1, q_len=length, kv_len=length, causal=causal)
    x = {n: torch.randn(1, 1, length, depth) for n in "QKV"}
    with Largest() as largest:
        run(combined(policy, site), x)
    assert largest.elements <= length * 2 * 32  # L sqrt L, not L squared


@pytest.mark.parametrize(
    "policy",
    ["combiner(segment=4)", "combiner(kind='logsparse')",
     "combiner(kind='axial', layout='grid=4x4')"],
)  # fmt: skip
def test_golden(golden: Callable[[str, str], None], policy: str) -> None:
    site = make_site(causal=True, q_len=16, kv_len=16)
    name = policy.partition("(")[2].split("'")[1] if "kind" in policy else "fixed"
    after = combined(policy, site)
    golden(f"sparse/combiner-{name}.txt", f"{site.cascade}\n\n-- {policy}\n\n{after}\n")
    assert parse(str(after)) == after


# Policies


@pytest.mark.parametrize(
    ("facts", "policy", "code"),
    [
        ({"kind": "cross"}, "combiner", "combiner-cross"),
        ({"kind": "pooling"}, "combiner", "combiner-pooling"),
        ({"family": "linear"}, "combiner", "combiner-linear"),
        ({"q_len": 1, "offset": "31"}, "combiner", "combiner-lengths"),
        ({"causal": False}, "combiner(kind='logsparse')", "combiner-not-causal"),
        ({"dropout": 0.1}, "combiner", "combiner-dropout"),
        ({}, "combiner(kind='axial')", "layout-unknown"),
        ({}, "combiner(kind='axial', layout='grid=4x9')", "layout-misfit"),
        ({}, "combiner | combiner", "combiner-combiner"),
        ({}, "combiner | window(size=4)", "window-combiner"),
        ({}, "combiner | int8", "quantise-combiner"),
        ({}, "window(size=4) | combiner", "combiner-pairs"),
        ({}, "int8 | combiner", "combiner-form"),
        ({}, "reorder(order='wh', layout='grid=4x8') | combiner", "combiner-form"),
    ],
)
def test_refusals(facts: dict[str, Any], policy: str, code: str) -> None:
    plan = make_plan(findings(make_site(**{"causal": True, **facts})), Policy.parse(policy))
    assert [r.code for r in plan.refusals] == [code]
    assert "\n" not in plan.refusals[0].reason


def test_heads_cannot_differ() -> None:
    (transform,) = parse_pipeline("combiner")
    site = make_site(causal=True)
    refused = transform.apply_to_heads(site.cascade, site, (0, 1))
    assert isinstance(refused, Refusal)
    assert refused.code == "heads-differ"


@pytest.mark.parametrize(
    "policy",
    ["combiner(kind='strided')", "combiner(segment=0)", "combiner(kind='axial', segment=4)",
     "combiner(layout='grid=4x4')", "combiner(kind='axial', layout='grid=2x3x4')",
     "combiner(kind='axial', layout='grid=4x4,text=2')", "combiner(kind='axial', layout='grid')"],
)  # fmt: skip
def test_policy_errors(policy: str) -> None:
    with pytest.raises(PolicyError):
        parse_pipeline(policy)


def test_masks_that_are_terms_of_the_score() -> None:
    """A causal mask that is added is the causal mask; a bias of pairs is refused."""
    (transform,) = parse_pipeline("combiner(segment=4)")
    lowest = torch.finfo(torch.float32).min
    added = SoftmaxAttention(score=QK * 0.5 + where(call("le", KV, Q), 0.0, lowest))
    site = make_site(causal=True, cascade=softmax_cascade(added))
    plain = make_site(causal=True)
    assert transform.apply(site.cascade, site) == transform.apply(plain.cascade, plain)
    bias = Read("T", (Q, KV))
    declared = (TensorDecl("T", ("q", "kv")),)
    for form in (
        SoftmaxAttention(score=QK * 0.5 + bias, reads=declared),
        SoftmaxAttention(score=QK * 0.5 - call("abs", Q - KV)),
        SoftmaxAttention(score=QK * 0.5, guard=bias, reads=declared),
        SoftmaxAttention(score=QK * 0.5, guard=call("lt", KV, 9)),
    ):
        refused = transform.apply(softmax_cascade(form), make_site())
        assert isinstance(refused, Refusal)
        assert refused.code == "combiner-pairs"


# Models


class Attention(nn.Module):
    """Layers with shared key heads."""

    def __init__(self, causal: bool, layers: int = 1) -> None:
        super().__init__()
        self.causal = causal
        self.projections = nn.ModuleList(nn.Linear(32, 64) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.projections:
            q, k, v = projection(x).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), 1)
            a = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, enable_gqa=True
            )
            x = x + a.transpose(1, 2).flatten(2)
        return x


def by_hand(model: Attention, x: Tensor, split: Split) -> Tensor:
    for projection in model.projections:
        q, k, v = projection(x).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), 1)
        a = definition({"Q": q, "K": k, "V": v}, split, 8**-0.5)
        x = x + a.transpose(1, 2).flatten(2).to(x.dtype)
    return x


@pytest.mark.parametrize("causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_lengths_the_examples_did_not_have(causal: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Attention(causal).eval()
    fast = ar.optimize(model, "combiner(segment=6)", (torch.randn(2, 24, 32),))
    sites = fast.report.sites
    assert [s.kernel for s in sites] == ["dense"]
    assert all(s.unbudgeted and s.exactness == "approximate" for s in sites)
    assert all(s.approximation is not None and s.cost_after is not None for s in sites)
    assert all(s.cost_after.tiles is None for s in sites if s.cost_after is not None)
    ar.save(fast, tmp_path / "out")
    again = ar.load(tmp_path / "out")
    for length in (24, 7, 31):  # whole segments, and parts of one
        x = torch.randn(3, length, 32)
        want = by_hand(model, x, segments(length, 6, causal))
        for one in (fast, again):
            torch.testing.assert_close(one(x), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("policy", "split"),
    [
        ("combiner(kind='logsparse')", powers),
        ("combiner(kind='axial', layout='grid=4x6')", cross(4, 6, True)),
    ],
)
def test_forms_of_one_length(policy: str, split: Split) -> None:
    torch.manual_seed(0)
    model, x = Attention(True).eval(), torch.randn(2, 24, 32)
    fast = ar.optimize(model, policy, (x,), dynamic_shapes={})
    torch.testing.assert_close(fast(x), by_hand(model, x, split), rtol=0, atol=2e-5)
    again = ar.optimize(model, "exact", (x,), plan=fast.plan, dynamic_shapes={})
    assert torch.equal(again(x), fast(x))
    dynamic = ar.optimize(model, "combiner(kind='logsparse')", (x,))
    assert {r.code for r in dynamic.report.all_refusals()} == {"combiner-dynamic"}


def test_gradients() -> None:
    torch.manual_seed(0)
    model = Attention(True)
    x = torch.randn(1, 12, 32, requires_grad=True)
    fast = ar.optimize(model, "combiner(segment=4)", (x.detach(),), dynamic_shapes={}, verify=False)
    (found,) = torch.autograd.grad(fast(x).square().sum(), x)
    step = 1e-3 * torch.randn_like(x)
    rise = by_hand(model, (x + step).detach(), segments(12, 4, True)).square().sum()
    fall = by_hand(model, (x - step).detach(), segments(12, 4, True)).square().sum()
    assert ((rise - fall) / 2).item() == pytest.approx((found * step).sum().item(), rel=2e-2)


def test_budget_sends_a_site_back() -> None:
    torch.manual_seed(0)
    model, x = Attention(True).eval(), torch.randn(2, 24, 32)
    kept = ar.optimize(model, "combiner(segment=4)", (x,), budget="cosine>=0.9999999")
    assert all(s.reverted for s in kept.report.sites)
    torch.testing.assert_close(kept(x), model(x), rtol=0, atol=1e-5)
