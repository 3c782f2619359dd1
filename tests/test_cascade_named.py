"""Every named cascade against its dense formula, written here in plain float64 torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_rewrite.cascade import (
    NAMED,
    count_passes,
    fuse_reductions,
    interpret,
    live_footprint,
    parse,
    pass_analysis,
)

H, G, P, M, E, F = 4, 2, 7, 11, 5, 3
EPS = torch.finfo(torch.float64).eps

Tensors = dict[str, Tensor]
Case = tuple[Tensors, Tensors]  # inputs, expected outputs
CASES: dict[str, Callable[[torch.Generator], Case]] = {}


def case(*names: str) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    def register(function: Callable[..., Case]) -> Callable[..., Case]:
        for name in names:
            CASES[name] = function
        return function

    return register


def draw(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def qkv(
    g: torch.Generator, heads: tuple[int, ...] = (), kv: tuple[int, ...] | None = None
) -> Tensors:
    kv = heads if kv is None else kv
    return {"Q": draw(g, *heads, E, P), "K": draw(g, *kv, E, M), "V": draw(g, *kv, F, M)}


def scores(x: Tensors) -> Tensor:
    """QK with queries as rows: [..., p, m]."""
    return x["Q"].mT @ x["K"]


def out(weights: Tensor, v: Tensor) -> Tensor:
    """[..., p, m] and V[..., f, m] -> AV[..., f, p]."""
    return (weights @ v.mT).mT


def attend(s: Tensor, v: Tensor) -> Tensors:
    """Softmax over the last axis; a row without keys gives 0."""
    return {"AV": out(torch.softmax(s, -1).nan_to_num(0.0), v)}


def distance() -> Tensor:
    """p - m."""
    return torch.arange(P)[:, None] - torch.arange(M)[None, :]


def masked(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, -math.inf)


@case(
    "attention-3pass",
    "attention-3pass-deferred",
    "attention-2pass",
    "attention-2pass-deferred",
    "attention-1pass",
    "attention-unstable",
    "attention-unstable-deferred",
)
def plain(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, attend(scores(x), x["V"])


@case("dependent-sums", "dependent-sums-deferred", "dependent-sums-iterative")
def dependent_sums(g: torch.Generator) -> Case:
    # Positive, so that no prefix of the first sum is 0 (the iterative form divides by them).
    a, b = draw(g, M).abs() + 0.1, draw(g, M).abs() + 0.1
    return {"A": a, "B": b}, {"Z": (a @ b) * a.sum()}


@case("causal")
def causal(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, attend(masked(scores(x), distance() >= 0), x["V"])


@case("window")
def window(g: torch.Generator) -> Case:
    x = qkv(g)
    keep = (distance() >= 0) & (distance() < 3)
    return {**x, "size": torch.tensor(3)}, attend(masked(scores(x), keep), x["V"])


@case("window-with-sinks")
def window_with_sinks(g: torch.Generator) -> Case:
    x = qkv(g)
    keep = (distance() >= 0) & ((distance() < 2) | (torch.arange(M) < 1))
    given = {**x, "size": torch.tensor(2), "sinks": torch.tensor(1)}
    return given, attend(masked(scores(x), keep), x["V"])


@case("block-sparse")
def block_sparse(g: torch.Generator) -> Case:
    x = qkv(g)
    blocks = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool)  # the second block row is empty
    keep = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)[:P, :M]
    given = {**x, "blocks": blocks, "size": torch.tensor(4)}
    return given, attend(masked(scores(x), keep), x["V"])


@case("scaled")
def scaled(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, attend(scores(x) / math.sqrt(E), x["V"])


@case("alibi")
def alibi(g: torch.Generator) -> Case:
    x, slope = qkv(g, (H,)), draw(g, H)
    s = scores(x) - slope[:, None, None] * distance()
    return {**x, "slope": slope}, attend(s, x["V"])


@case("relative-bias")
def relative_bias(g: torch.Generator) -> Case:
    x, bias = qkv(g), draw(g, P + M - 1)
    return {**x, "bias": bias}, attend(scores(x) + bias[P - 1 - distance()], x["V"])


@case("softcap")
def softcap(g: torch.Generator) -> Case:
    x = qkv(g)
    return {**x, "cap": torch.tensor(1.5)}, attend(1.5 * torch.tanh(scores(x) / 1.5), x["V"])


@case("qk-norm")
def qk_norm(g: torch.Generator) -> Case:
    x = qkv(g)
    cosine = torch.cosine_similarity(x["Q"].mT[:, None], x["K"].mT[None], dim=-1)
    return {**x, "temperature": torch.tensor(4.0)}, attend(4.0 * cosine, x["V"])


@case("grouped-queries")
def grouped_queries(g: torch.Generator) -> Case:
    x = qkv(g, (H,), (G,))
    k, v = (x[n].repeat_interleave(H // G, 0) for n in "KV")
    return x, attend(x["Q"].mT @ k, v)


def with_sink(s: Tensor, logit: Tensor, v: Tensor) -> Tensors:
    """Softmax over the keys and one more logit, whose probability is dropped."""
    column = logit.expand(*s.shape[:-1], 1)
    return {"AV": out(torch.softmax(torch.cat([s, column], -1), -1)[..., :-1], v)}


@case("softmax1")
def softmax1(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, with_sink(scores(x), torch.zeros(1, dtype=torch.float64), x["V"])


@case("sink")
def sink(g: torch.Generator) -> Case:
    x, logit = qkv(g, (H,)), 3 * draw(g, H)
    return {**x, "logit": logit}, with_sink(scores(x), logit[:, None, None], x["V"])


@case("sigmoid")
def sigmoid(g: torch.Generator) -> Case:
    x, bias = qkv(g), torch.tensor(-math.log(M), dtype=torch.float64)
    return {**x, "bias": bias}, {"AV": out(torch.sigmoid(scores(x) + bias), x["V"])}


@case("relu-power")
def relu_power(g: torch.Generator) -> Case:
    x = qkv(g)
    return {**x, "power": torch.tensor(2.0)}, {"AV": out(scores(x).clamp(min=0).square(), x["V"])}


@case("relu-power-normalised")
def relu_power_normalised(g: torch.Generator) -> Case:
    x = qkv(g)
    x["Q"][:, 2] = 0.0  # a row whose weights are all 0 attends to nothing
    w = scores(x).clamp(min=0) ** 3
    w = (w / w.sum(-1, keepdim=True)).nan_to_num(0.0)
    return {**x, "power": torch.tensor(3.0)}, {"AV": out(w, x["V"])}


@case("gated")
def gated(g: torch.Generator) -> Case:
    x, gate = qkv(g), draw(g, F, P)
    return {**x, "gate": gate}, {"AV": attend(scores(x), x["V"])["AV"] * gate.sigmoid()}


@case("urpe")
def urpe(g: torch.Generator) -> Case:
    x, c = qkv(g), draw(g, P + M - 1)
    return {**x, "C": c}, {"AV": out(scores(x).softmax(-1) * c[P - 1 - distance()], x["V"])}


@case("dropout")
def dropout(g: torch.Generator) -> Case:
    x, kept = qkv(g), torch.rand(M, P, generator=g) < 0.7
    a = scores(x).softmax(-1) * kept.mT / 0.75
    return {**x, "kept": kept, "keep": torch.tensor(0.75)}, {"AV": out(a, x["V"])}


@case("differential")
def differential(g: torch.Generator) -> Case:
    x = {n: draw(g, E, P if n[0] == "Q" else M) for n in ("Q1", "K1", "Q2", "K2")}
    v = draw(g, F, M)
    first, second = ((x["Q" + i].mT @ x["K" + i]).softmax(-1) for i in "12")
    return {**x, "V": v, "lam": torch.tensor(0.25)}, {"AV": out(first - 0.25 * second, v)}


@case("talking-heads")
def talking_heads(g: torch.Generator) -> Case:
    x = {**qkv(g, (H,)), "V": draw(g, G, F, M), "W": draw(g, G, H)}
    mixed = torch.einsum("gh,hpm->gpm", x["W"], scores(x).softmax(-1))
    return x, {"AV": out(mixed, x["V"])}


@case("talking-heads-before-softmax")
def talking_heads_before(g: torch.Generator) -> Case:
    x = {**qkv(g, (H,)), "V": draw(g, G, F, M), "W": draw(g, G, H)}
    return x, attend(torch.einsum("gh,hpm->gpm", x["W"], scores(x)), x["V"])


@case("clipped-softmax")
def clipped_softmax(g: torch.Generator) -> Case:
    x = qkv(g)
    a = (1.05 * scores(x).softmax(-1) - 0.02).clamp(0, 1)
    zeta, gamma = torch.tensor(1.03, dtype=torch.float64), torch.tensor(-0.02, dtype=torch.float64)
    return {**x, "zeta": zeta, "gamma": gamma}, {"AV": out(a, x["V"])}


def sparsemax_rows(s: Tensor) -> Tensor:
    """Sorting definition of Martins and Astudillo (2016), algorithm 1."""
    z = s.sort(-1, descending=True).values
    sums, k = z.cumsum(-1), torch.arange(1, s.shape[-1] + 1)
    support = (1 + k * z > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, support - 1) - 1) / support
    return (s - tau).clamp(min=0)


@case("sparsemax")
def sparsemax(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, {"AV": out(sparsemax_rows(scores(x)), x["V"])}


def entmax_rows(s: Tensor, alpha: float) -> Tensor:
    """Bisection on the threshold until it cannot move in float64."""
    x, power = (alpha - 1) * s, 1 / (alpha - 1)
    low, high = x.amax(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        more = ((x - tau).clamp(min=0) ** power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(more, tau, low), torch.where(more, high, tau)
    return (x - low).clamp(min=0) ** power


@case("entmax")
def entmax(g: torch.Generator) -> Case:
    x = qkv(g)
    return {**x, "alpha": torch.tensor(1.5)}, {"AV": out(entmax_rows(scores(x), 1.5), x["V"])}


def features(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


@case("linear-attention")
def linear(g: torch.Generator) -> Case:
    x = qkv(g)
    w = features(x["Q"]).mT @ features(x["K"])
    return x, {"AV": out(w / w.sum(-1, keepdim=True), x["V"])}


@case("linear-attention-causal")
def linear_causal(g: torch.Generator) -> Case:
    x = {**qkv(g), "Q": draw(g, E, M)}
    w = (features(x["Q"]).mT @ features(x["K"])).tril()
    return x, {"AV": out(w / w.sum(-1, keepdim=True), x["V"])}


@case("stick-breaking", "stick-breaking-1pass")
def stick_breaking(g: torch.Generator) -> Case:
    x = qkv(g)
    b, a = scores(x).sigmoid(), torch.zeros(P, M, dtype=torch.float64)
    for p in range(P):
        rest = 1.0
        for m in range(min(p, M - 1), -1, -1):
            a[p, m] = b[p, m] * rest
            rest = rest * (1 - b[p, m])
    return x, {"AV": out(a, x["V"])}


@case("softmax-over-queries")
def softmax_over_queries(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, {"AV": out(scores(x).softmax(-2), x["V"])}


@case("slot-attention")
def slot_attention(g: torch.Generator) -> Case:
    x = qkv(g)
    a = scores(x).softmax(-2)
    return x, {"AV": out(a / a.sum(-1, keepdim=True), x["V"])}


@case("quantised-p")
def quantised_p(g: torch.Generator) -> Case:
    x = qkv(g)
    s = scores(x)
    n = (s - s.amax(-1, keepdim=True)).exp()
    return x, {"AV": out((n * 127).round() / (127 * n.sum(-1, keepdim=True)), x["V"])}


@case("quantised-p-row-scale")
def quantised_p_row_scale(g: torch.Generator) -> Case:
    x = qkv(g)
    a = scores(x).softmax(-1)
    top = a.amax(-1, keepdim=True)
    return x, {"AV": out((a * 127 / top).round() * top / 127, x["V"])}


@case("quantised-qkv")
def quantised_qkv(g: torch.Generator) -> Case:
    x = {
        n: torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)
        for n, shape in {"Q": (E, P), "K": (E, M), "V": (F, M)}.items()
    }
    qs, ks, vs = (draw(g, n).abs() / 127 for n in (P, M, F))
    q, k, v = x["Q"] * qs, x["K"] * ks, x["V"] * vs[:, None]
    return {**x, "QS": qs, "KS": ks, "VS": vs}, attend(q.mT @ k, v)


@case("attention-weights")
def attention_weights(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, {**attend(scores(x), x["V"]), "A": scores(x).softmax(-1).mT}


@case("log-probabilities")
def log_probabilities(g: torch.Generator) -> Case:
    x = qkv(g)
    x.pop("V")
    return {**x, "V": draw(g, F, M)}, {"LP": scores(x).log_softmax(-1).mT}


@case("lse")
def lse(g: torch.Generator) -> Case:
    x = qkv(g)
    return x, {**attend(scores(x), x["V"]), "LSE": scores(x).logsumexp(-1)}


@case("lse-merge")
def lse_merge(g: torch.Generator) -> Case:
    x = qkv(g)
    s, cuts = scores(x), ((0, 4), (4, 5), (5, M))
    parts = [(s[:, a:b], x["V"][:, a:b]) for a, b in cuts]
    given = {
        "O": torch.stack([out(t.softmax(-1), v) for t, v in parts]),
        "L": torch.stack([t.logsumexp(-1) for t, _ in parts]),
    }
    return given, {**attend(s, x["V"]), "LSE": s.logsumexp(-1)}


def bound(inputs: Tensors, expected: Tensor) -> float:
    """First-order rounding in float64: the error of a score goes through exp, then sums."""
    q, k = (
        max([4.0, *(v.abs().max().item() for n, v in inputs.items() if n in names)])
        for names in (("Q", "Q1", "Q2"), ("K", "K1", "K2"))
    )
    score = 16.0 * E if "QS" in inputs else E * q * k  # scaled integers are draws below 4, too
    return EPS * (E * score + 2 * (M + P) + 8) * max(1.0, expected.abs().max().item())


def test_every_named_cascade_has_a_dense_formula():
    assert set(CASES) == set(NAMED)


@pytest.mark.parametrize("name", list(NAMED))
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_its_dense_formula(name: str, seed: int):
    inputs, expected = CASES[name](torch.Generator().manual_seed(seed))
    result = interpret(NAMED[name], inputs)
    assert set(result) == set(expected)
    for output, want in expected.items():
        assert result[output].shape == want.shape
        error = (result[output] - want).abs().max().item()
        assert error <= bound(inputs, want), f"{output}: {error}"


@pytest.mark.parametrize("name", list(NAMED))
def test_prints_and_parses_back(name: str):
    assert NAMED[name].name == name
    assert parse(str(NAMED[name])) == NAMED[name]


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
@pytest.mark.parametrize("name", ["attention-3pass", "attention-2pass", "attention-1pass"])
def test_stable_forms_bear_large_scores(name: str, scale: float):
    x = qkv(torch.Generator().manual_seed(5))
    x["Q"] *= scale
    want = attend(scores(x), x["V"])["AV"]
    assert (interpret(NAMED[name], x)["AV"] - want).abs().max() <= bound(x, want)


@pytest.mark.parametrize(
    ("name", "rank", "passes"),
    [
        ("sigmoid", "m", 1),
        ("linear-attention", "m", 1),
        ("linear-attention-causal", "m", 1),
        ("stick-breaking-1pass", "m", 1),
        ("softmax-over-queries", "p", 3),
        ("softmax-over-queries", "m", 1),
        ("sparsemax", "m", 18),
        ("entmax", "m", 26),
    ],
)
def test_pass_counts_of_the_specification(name: str, rank: str, passes: int):
    assert count_passes(NAMED[name], rank) == passes


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(KeyError, match="attention-1pass"):
        NAMED["attention-1-pass"]
    assert "attention-1-pass" not in NAMED
    assert len(NAMED) == len(list(NAMED))


def test_the_library_parses_once():
    assert NAMED["causal"] is NAMED["causal"]


@pytest.mark.parametrize("call", [count_passes, fuse_reductions, live_footprint, pass_analysis])
def test_a_name_is_not_a_cascade(call) -> None:
    with pytest.raises(TypeError, match=r"expected a Cascade, got str .*use parse\(text\)"):
        call("attention-3pass", "m")
    with pytest.raises(TypeError, match="expected a Cascade"):
        interpret("attention-3pass", {})
