"""Talking heads, sums of maps and softmaxes of the keys: raised to exactly what is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import attn_rewrite as ar
from attn_rewrite.apply import Replacement, splice
from attn_rewrite.backends.torch.lower import lower
from attn_rewrite.cascade import count_passes, fuse_reductions, interpret, parse
from attn_rewrite.cascade.cost import site_cost
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.graph import EagerBuilder
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.cascade import Fusion
from attn_rewrite.passes.find import find
from attn_rewrite.passes.find.anchor import is_anchor
from attn_rewrite.region import in_float64
from attn_rewrite.site import Findings, Site
from attn_rewrite.target import TARGETS
from attn_rewrite.verify import (
    Candidate,
    canonical_inputs,
    canonical_output,
    check_raising,
    check_sites,
)
from tests.mixed_spellings import (
    HEADS,
    LENGTH,
    LINEAR,
    SUMMED,
    TALKING,
    WIDTH,
    Capped,
    DifferenceOfHalves,
    DifferenceOfSharedKeys,
    DifferenceStacked,
    EinsumAfter,
    EinsumBefore,
    GatedSum,
    Heads,
    KeySoftmaxScaled,
    LinearBoth,
    Masked,
    MoreHeads,
    UpcastDropped,
    causal,
    over_heads,
)
from tests.test_find_spellings import AUTO, capture

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Values(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


@dataclass(frozen=True, eq=False)
class Case:
    """A module in float64, its findings, and the value of every node on one input."""

    graph: fx.GraphModule
    found: Findings
    values: dict[fx.Node, object]
    x: Tensor

    @property
    def site(self) -> Site:
        (site,) = self.found.sites
        return site

    @property
    def inputs(self) -> dict[str, Tensor]:
        return canonical_inputs(self.site, self.values)

    @property
    def wanted(self) -> Tensor:
        """The Site's output, its nodes run in float64, without dropout."""
        return canonical_output(
            self.site, self.values, in_float64(self.site, self.values)[self.site.output.node]
        )


@cache
def case(kind: type[nn.Module]) -> Case:
    torch.manual_seed(0)
    module, x = kind().double(), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    graph = canonicalize(capture(module, (x,)))
    run = Values(graph)
    run.run(x)
    return Case(graph, find(graph), run.values, x)


def named(kinds: tuple[type[nn.Module], ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda k: k.__name__)


@named((*TALKING, *SUMMED, *LINEAR))
def test_the_cascade_is_exactly_what_is_computed(kind: type[nn.Module]) -> None:
    here = case(kind)
    result = interpret(here.site.cascade, here.inputs)["AV"]
    torch.testing.assert_close(result, here.wanted, **EXACT)
    assert check_raising(here.site, here.values, result)[1] is None
    assert parse(str(here.site.cascade)) == here.site.cascade


@named((*TALKING, *SUMMED, *LINEAR))
def test_the_cascade_lowers_to_plain_operators(kind: type[nn.Module]) -> None:
    here = case(kind)
    kernel = lower(here.site.cascade)
    assert kernel.name == "dense"
    result = kernel.emit(EagerBuilder(), list(here.inputs.values()))
    torch.testing.assert_close(result, here.wanted, **EXACT)


@named((*TALKING, *SUMMED, *LINEAR))
def test_one_pass_is_derived(kind: type[nn.Module]) -> None:
    """Rows 13 and 14 of the table of variants: one pass, whatever scale, bias or mask there is."""
    here = case(kind)
    assert count_passes(here.site.cascade, "kv") in (3, 4)  # 4: the rows are normalised again
    fused = fuse_reductions(here.site.cascade, "kv", tile=4)
    assert isinstance(fused, Fusion), fused
    assert (fused.passes, fused.refusals) == (1, ())
    torch.testing.assert_close(interpret(fused.cascade, here.inputs)["AV"], here.wanted, **EXACT)


@pytest.mark.parametrize(
    ("kinds", "code", "family"),
    [
        (TALKING, "talking-heads", "softmax"),
        (SUMMED, "probabilities-summed", "softmax"),
        (LINEAR, "linear-attention", "linear"),
    ],
)
def test_family(kinds: tuple[type[nn.Module], ...], code: str, family: str) -> None:
    for kind in kinds:
        site = case(kind).site
        assert (site.family, site.kind, [r.code for r in site.refusals]) == (family, "self", [code])
        width = WIDTH // 2 if kind is DifferenceOfHalves else WIDTH
        assert (site.q_len, site.kv_len, site.d_qk * site.hq) == (LENGTH, LENGTH, width)
        sizes = {"b": 2, **site.extents()}
        assert sizes.keys() >= {r.name for r in site.cascade.ranks}
        cost = site_cost(site.cascade, sizes, TARGETS["a100"], dtype="float16")
        assert cost.passes == count_passes(site.cascade, "kv")


def states(fused: Fusion) -> dict[str, int]:
    """Rank counts of what the loop carries, the position in the loop left out."""
    (loop,) = (s for s in fused.cascade.body if not isinstance(s, Einsum))
    return {e.out.tensor: len(e.out.index) - 1 for e in loop.init}


def test_state_of_the_derived_loops() -> None:
    """Differential attention carries everything twice, talking heads a product for every pair of
    heads."""
    double = fuse_reductions(case(DifferenceOfHalves).site.cascade, "kv")
    assert sorted(states(double).values()) == [
        3,
        3,
        3,
        3,
        4,
        4,
    ]  # GM, SD twice [b h q], sums with f
    mixed = fuse_reductions(case(EinsumAfter).site.cascade, "kv")
    assert sorted(states(mixed).values()) == [3, 3, 5]  # the last is [b, i, q, f, h]


def test_facts() -> None:
    shared = case(DifferenceOfSharedKeys).site
    assert (shared.hq, shared.hkv) == (4, 2)
    assert "K[b, h // 2, kv, d]" in str(shared.cascade)
    stacked = case(DifferenceStacked).site
    assert (stacked.hq, stacked.d_qk, stacked.d_v) == (2 * HEADS, 2, 4)
    assert "A[b, i * 2, q, kv]" in str(stacked.cascade)
    assert case(MoreHeads).site.extents() | {"i": 6, "j": 2} == case(MoreHeads).site.extents()
    assert (case(LinearBoth).site.scale, stacked.scale) == (0.5, pytest.approx(2**-0.5))
    assert [case(k).site.causal for k in (Masked, Capped, DifferenceOfHalves, GatedSum)] == [
        True, True, True, False,
    ]  # fmt: skip
    guards = {str(e.guard) for e in case(Masked).site.cascade.einsums()}
    assert any("kv <= q" in g and "M" in g for g in guards)


def test_every_softmax_of_a_site_is_listed_once() -> None:
    here = case(DifferenceOfHalves)
    assert here.found.refusals == ()
    assert sum(is_anchor(n) for n in here.site.nodes) == 2
    names = {t.name for t in here.site.cascade.inputs}
    assert names == {"Q", "K", "Q2", "K2", "V", "M0"}  # M0 is lambda
    # The rows of a sum that are normalised again belong to the Site; the table's softmax does not.
    for kind in SUMMED[:2]:
        assert [r.code for r in case(kind).found.refusals] == ["no-score-product"]


def test_equivalent_spellings_have_one_cascade() -> None:
    assert case(EinsumAfter).site.cascade == case(kinds_by_name("MatmulAfter")).site.cascade
    assert case(EinsumAfter).site.cascade == case(kinds_by_name("TensordotAfter")).site.cascade


def kinds_by_name(name: str) -> type[nn.Module]:
    return next(k for k in TALKING if k.__name__ == name)


@named((EinsumBefore, GatedSum, Masked, DifferenceStacked, KeySoftmaxScaled))
def test_dynamic_lengths(kind: type[nn.Module]) -> None:
    """The graph is captured at one length and run at another, as one key and as one query too."""
    fixed = kind in (GatedSum, Masked, KeySoftmaxScaled)  # tables and masks of one length
    module = kind().double()
    shapes = {"x": {0: AUTO} if fixed else {0: AUTO, 1: AUTO}}
    graph = torch.export.export(
        module.eval(), (torch.randn(2, LENGTH, WIDTH, dtype=torch.float64),), dynamic_shapes=shapes
    ).module()
    graph = canonicalize(graph)
    (site,) = find(graph).sites
    for length in (LENGTH,) if fixed else (2, 7):
        run = Values(graph)
        run.run(torch.randn(2, length, WIDTH, dtype=torch.float64))
        inputs = canonical_inputs(site, run.values)
        wanted = canonical_output(site, run.values, run.values[site.output.node])
        torch.testing.assert_close(interpret(site.cascade, inputs)["AV"], wanted, **EXACT)


@named((LinearBoth, DifferenceStacked, GatedSum, KeySoftmaxScaled))
def test_the_lowered_cascade_takes_the_place_of_the_site(kind: type[nn.Module]) -> None:
    here = case(kind)
    kernel = lower(here.site.cascade)
    spliced = splice(here.graph, [Replacement(here.site, kernel)])
    assert not any(is_anchor(n) and n.name == here.site.anchor.name for n in spliced.graph.nodes)
    torch.testing.assert_close(spliced(here.x), here.graph(here.x), **EXACT)


class OneQuery(Heads):
    """A decoding step."""

    def attend(self, q, k, v, x):
        return over_heads(self.mix, self.scores(q[:, :, -1:], k)).softmax(-1) @ v


class TwoOutputs(Heads):
    """The difference is taken behind the products with V."""

    def attend(self, q, k, v, x):
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        first = causal(self.scores(q1, k1)).softmax(-1) @ v
        return first - self.lam * (causal(self.scores(q2, k2)).softmax(-1) @ v)


def test_one_query() -> None:
    here = case(OneQuery)
    assert (here.site.q_len, here.site.kv_len) == (1, LENGTH)
    result = interpret(here.site.cascade, here.inputs)["AV"]
    torch.testing.assert_close(result, here.wanted, **EXACT)


def test_a_difference_of_outputs_is_two_sites() -> None:
    found = case(TwoOutputs).found
    assert [(s.rewritable, s.causal) for s in found.sites] == [(True, True)] * 2
    module, x = TwoOutputs(), torch.randn(2, LENGTH, WIDTH)
    fast = ar.optimize(module.eval(), "exact", (x,))
    assert [s.kernel for s in fast.report.sites] == ["sdpa", "sdpa"]
    torch.testing.assert_close(fast(x), module(x), rtol=1e-5, atol=1e-6)


# Dropout


class OneDropout(Heads):
    def attend(self, q, k, v, x):
        p = F.dropout(self.scores(q, k).softmax(-1), 0.1, True)
        return over_heads(self.mix, p) @ v


class TwoDropouts(Heads):
    def attend(self, q, k, v, x):
        p = F.dropout(self.scores(q, k).softmax(-1), 0.1, True)
        return F.dropout(over_heads(self.mix, p), 0.2, True) @ v


def test_dropout_is_a_fact() -> None:
    assert case(UpcastDropped).site.dropout == 0.0  # not training
    here = case(OneDropout)
    assert here.site.dropout == 0.1
    result = interpret(here.site.cascade, here.inputs)["AV"]
    torch.testing.assert_close(result, here.wanted, **EXACT)
    assert case(TwoDropouts).found.sites == ()


# Decoys


class MixQueries(Heads):
    """The weights mix positions."""

    def attend(self, q, k, v, x):
        table = self.distances[0, 0]
        return torch.einsum("bhqk,qp->bhpk", self.scores(q, k).softmax(-1), table) @ v


class Squared(Heads):
    def attend(self, q, k, v, x):
        return over_heads(self.mix, self.scores(q, k).softmax(-1) ** 2) @ v


class ThreeByThree(Heads):
    """A convolution over neighbouring queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(HEADS, HEADS, 3, padding=1)

    def attend(self, q, k, v, x):
        return self.kernel(self.scores(q, k).softmax(-1)) @ v


class NormalisedHeads(Heads):
    """A norm over the heads is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HEADS)

    def attend(self, q, k, v, x):
        return over_heads(self.norm, over_heads(self.mix, self.scores(q, k).softmax(-1))) @ v


class UsedTwice(Heads):
    def attend(self, q, k, v, x):
        p = over_heads(self.mix, self.scores(q, k).softmax(-1))
        return p @ v + p @ k


class StraightThrough(Heads):
    """A hard choice with the gradient of a soft one."""

    def attend(self, q, k, v, x):
        p = self.scores(q, k).softmax(-1)
        hard = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
        return (hard - p.detach() + p) @ v


class OnlyAnEpsilon(Heads):
    """A number is added, not a map."""

    def attend(self, q, k, v, x):
        p = self.scores(q, k).softmax(-1) + 1e-6
        return (p / p.sum(-1, keepdim=True)) @ v


class ClippedKeys(Heads):
    """A softmax of the keys that is not used linearly."""

    def attend(self, q, k, v, x):
        return q @ ((k.softmax(2) ** 2).mT @ v)


@named(
    (
        MixQueries, Squared, ThreeByThree, NormalisedHeads, UsedTwice, StraightThrough,
        OnlyAnEpsilon, ClippedKeys,
    )
)  # fmt: skip
def test_decoys(kind: type[nn.Module]) -> None:
    found = case(kind).found
    assert found.sites == ()
    assert found.refusals
    assert all(r.code and r.reason and r.node for r in found.refusals)


class LearnedQuery(Heads):
    """Weights in the place of the queries: pooling, not a mixing of heads."""

    def attend(self, q, k, v, x):
        y = self.scores(q, k).softmax(-1) @ v  # keys that are a product themselves
        return torch.einsum("qd,bhkd->bhqk", self.square, y).softmax(-1) @ y


def test_a_learned_query_over_a_product_is_no_mixing() -> None:
    sites = case(LearnedQuery).found.sites
    assert [s.refusals for s in sites] == [(), ()]


# Verification


def broken(cascade: Cascade) -> Cascade:
    """Probabilities a thousandth too large."""
    body = (
        replace(s, expr=s.expr * 1.001) if isinstance(s, Einsum) and s.out.tensor == "A" else s
        for s in cascade.body
    )
    return cascade.with_body(*body)


def test_raising_is_verified_without_a_kernel() -> None:
    here = case(LinearBoth)
    (good,) = check_sites(
        here.graph, (here.x,), None, [Candidate(here.site, here.site.cascade, None)]
    )
    assert (good.verdict, good.refusals) == ("raised", ())
    assert good.raising.max_abs < 1e-12
    wrong = replace(here.site, cascade=broken(here.site.cascade))
    (bad,) = check_sites(here.graph, (here.x,), None, [Candidate(wrong, wrong.cascade, None)])
    assert bad.verdict == "kept"
    assert [r.code for r in bad.refusals] == ["raise-mismatch"]


def test_optimize_checks_what_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Site that is not rewritten keeps its nodes and says so; a wrong cascade would be seen."""
    from attn_rewrite import driver

    module, x = LinearBoth().eval(), torch.randn(2, LENGTH, WIDTH)
    fast = ar.optimize(module, "exact", (x,))
    (site,) = fast.report.sites
    assert (site.status, [r.code for r in site.refusals]) == ("refused", ["talking-heads"])
    assert torch.equal(fast(x), module(x))

    def wrong(graph: fx.GraphModule) -> Findings:
        found = find(graph)
        sites = tuple(replace(s, cascade=broken(s.cascade)) for s in found.sites)
        return Findings(sites, found.refusals)

    monkeypatch.setattr(driver, "find", wrong)
    (site,) = ar.optimize(module, "exact", (x,)).report.sites
    assert [r.code for r in site.refusals] == ["talking-heads", "raise-mismatch"]
