"""Deriving one-pass cascades: verdicts, proofs, counterexamples, values against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import sympy
import torch
from torch import Tensor

from attn_rewrite.backends.torch import lower_cascade_to_callable
from attn_rewrite.cascade import NAMED, Cascade, count_passes, interpret, live_footprint, parse
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.count import operation_counts, rank_symbol
from attn_rewrite.cascade.expr import Expr, Rank, Read, call
from attn_rewrite.cascade.ir import Loop, TensorDecl
from attn_rewrite.cascade.operations import total_operations
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.passes.cascade import (
    Counterexample,
    Fusion,
    FusionRefusal,
    defer_scalar,
    fuse_reductions,
    merge_statistics_pass,
    partition_rank,
)
from attn_rewrite.passes.cascade.algebra import evaluate
from attn_rewrite.passes.cascade.separability import (
    NotProved,
    Separation,
    is_range_guard,
    leaves_of,
    new_state,
    separate,
)
from attn_rewrite.site import Refusal

EPS = torch.finfo(torch.float64).eps
Tensors = dict[str, Tensor]


def fused(cascade: Cascade, rank: str = "m", **options: object) -> Fusion:
    result = fuse_reductions(cascade, rank, **options)
    assert isinstance(result, Fusion), str(result)
    return result


def refused(cascade: Cascade, rank: str = "m", **options: object) -> FusionRefusal:
    result = fuse_reductions(cascade, rank, **options)
    assert isinstance(result, FusionRefusal), str(result)
    return result


def of(cascade: Cascade, tensors: Mapping[str, Tensor]) -> Tensors:
    """The inputs that the cascade has."""
    return {t.name: tensors[t.name] for t in cascade.inputs}


def assert_close(actual: Tensors, wanted: Tensors, *, steps: int = 64) -> None:
    """Equal up to the rounding of ``steps`` operations on values of the size of the result."""
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(1.0, float(value[value.isfinite()].abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=steps * EPS * scale, equal_nan=True
        )


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


# --- Verdicts of section 9: passes after fusion, and the refusal that explains what is left

VERDICTS: dict[str, tuple[str, int, int, str]] = {
    "attention-3pass": ("m", 3, 1, ""),
    "attention-3pass-deferred": ("m", 2, 1, ""),
    "attention-2pass": ("m", 2, 1, ""),
    "attention-2pass-deferred": ("m", 2, 1, ""),
    "attention-1pass": ("m", 1, 1, ""),
    "attention-unstable": ("m", 2, 1, ""),
    "attention-unstable-deferred": ("m", 1, 1, ""),
    "dependent-sums": ("k", 2, 1, ""),
    "dependent-sums-deferred": ("k", 1, 1, ""),
    "dependent-sums-iterative": ("k", 1, 1, ""),
    "causal": ("m", 3, 1, ""),
    "window": ("m", 3, 1, ""),
    "window-with-sinks": ("m", 3, 1, ""),
    "block-sparse": ("m", 3, 1, ""),
    "scaled": ("m", 3, 1, ""),
    "alibi": ("m", 3, 1, ""),
    "relative-bias": ("m", 3, 1, ""),
    "softcap": ("m", 3, 1, ""),
    "qk-norm": ("m", 3, 1, ""),
    "grouped-queries": ("m", 3, 1, ""),
    "softmax1": ("m", 3, 1, ""),
    "sink": ("m", 3, 1, ""),
    "sigmoid": ("m", 1, 1, ""),
    "relu-power": ("m", 1, 1, ""),
    "relu-power-normalised": ("m", 2, 1, ""),
    "gated": ("m", 3, 1, ""),
    "urpe": ("m", 3, 1, ""),
    "dropout": ("m", 3, 1, ""),
    "differential": ("m", 3, 1, ""),
    "talking-heads": ("m", 3, 1, ""),
    "talking-heads-before-softmax": ("m", 3, 1, ""),
    "clipped-softmax": ("m", 3, 2, "not-separable"),
    "sparsemax": ("m", 18, 18, "not-separable"),
    "entmax": ("m", 26, 26, "not-separable"),
    "linear-attention": ("m", 1, 1, ""),
    "linear-attention-causal": ("m", 1, 1, ""),
    "stick-breaking": ("m", 2, 1, ""),
    "stick-breaking-1pass": ("m", 1, 1, ""),
    "softmax-over-queries": ("p", 3, 2, "map-consumer"),
    "slot-attention": ("p", 3, 2, "map-consumer"),
    "quantised-p": ("m", 2, 2, "not-separable"),
    "quantised-p-row-scale": ("m", 4, 2, "not-separable"),
    "quantised-qkv": ("m", 3, 1, ""),
    "attention-weights": ("m", 3, 2, "map-consumer"),
    "log-probabilities": ("m", 3, 2, "map-consumer"),
    "lse": ("m", 3, 1, ""),
}
# The texts whose verdict is not a fusion over keys or queries, and why.
ELSEWHERE = {
    "lse-merge": "has no key rank: it joins two partial results",
}


def test_every_named_cascade_has_a_verdict() -> None:
    assert {*VERDICTS, *ELSEWHERE} == set(NAMED)


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    rank, before, after, code = VERDICTS[name]
    cascade = NAMED[name]
    assert count_passes(cascade, rank) == before
    result = fuse_reductions(cascade, rank)
    if isinstance(result, Refusal):
        assert before == after
        assert result.code == code
        return
    assert result.passes == count_passes(result.cascade, rank) == after
    assert {r.code for r in result.refusals} == ({code} if code else set())
    if before == after:
        assert result.cascade is cascade
    if after == 1:
        assert live_footprint(result.cascade, rank) == ()


@pytest.mark.parametrize("name", ["softmax-over-queries", "slot-attention"])
def test_softmax_over_queries_is_one_pass_over_keys(name: str) -> None:
    assert count_passes(NAMED[name], "m") == 1


SIZES = {"p": 5, "m": 11, "e": 4, "f": 3, "h": 4, "g": 2, "k": 7, "d": 15, "pb": 3, "mb": 6}
FIXED = {"keep": 0.8, "cap": 2.0, "power": 2.0, "temperature": 3.0, "size": 2, "sinks": 1}


def named_inputs(cascade: Cascade, seed: int = 0) -> Tensors:
    sizes = {**SIZES, "g": 4} if cascade.name.startswith("talking") else SIZES
    found: Tensors = {}
    for n, t in enumerate(cascade.inputs):
        shape = [sizes[r] for r in t.ranks]
        value = draw(1000 * seed + n, *shape)
        if t.name in FIXED:
            value = torch.full(shape, FIXED[t.name], dtype=torch.float64)
        found[t.name] = value > -0.5 if t.dtype == "bool" else value
        if t.dtype.startswith("i"):
            found[t.name] = (value * 3).round().to(torch.int64) if shape else value.to(torch.int64)
    return found


FALLING = [n for n, (_, before, after, _) in VERDICTS.items() if after < before]


@pytest.mark.parametrize("name", FALLING)
def test_fused_equals_original(name: str) -> None:
    """Tiles of one, cut at the end, and (lazily rescaled) larger than the rank."""
    rank, cascade = VERDICTS[name][0], NAMED[name]
    x = named_inputs(cascade)
    wanted = interpret(cascade, x)
    for options in ({"tile": 1}, {"tile": 4}, {"tile": 64, "lazy": 1.0}):
        result = fused(cascade, rank, **options)
        assert_close(interpret(result.cascade, x), wanted)
        assert parse(str(result.cascade)) == result.cascade


@pytest.mark.parametrize("name", FALLING)
def test_states_of_parts_merge(name: str) -> None:
    """Split-K: states of two parts of the keys, merged and finished, are the whole."""
    rank, cascade = VERDICTS[name][0], NAMED[name]
    result = fused(cascade, rank)
    by_position = {"causal", "window", "window-with-sinks", "alibi", "relative-bias", "urpe"}
    if result.partial is None or result.passes > 1 or name in {*by_position, "block-sparse"}:
        return  # nothing is carried, a second pass follows, or positions start at 0 in each part
    if rank not in {r for t in result.partial.inputs for r in t.ranks}:
        raise AssertionError(f"{name}: no input of the partial cascade has rank {rank}")
    x = named_inputs(cascade)
    states = {}
    for side, part in (("a", slice(None, 4)), ("b", slice(4, None))):
        cut = {
            t.name: x[t.name][tuple(part if r == rank else slice(None) for r in t.ranks)]
            for t in result.partial.inputs
        }
        found = interpret(result.partial, cut)
        states.update({f"{state}_{side}": value for state, value in found.items()})
    assert result.merge is not None
    assert result.finish is not None
    merged = interpret(result.merge, of(result.merge, {**x, **states}))
    actual = interpret(result.finish, of(result.finish, {**x, **merged}))
    assert_close(actual, interpret(cascade, x))


# --- The derivation itself


def test_derived_attention_has_the_operations_of_flash_attention() -> None:
    """The table of section 2.7, last column: the derived cascade is cascade 5."""
    m1, m0, p, e, f = (rank_symbol(r) for r in ("m1", "m0", "p", "e", "f"))
    costs = total_operations(operation_counts(fused(NAMED["attention-3pass"]).cascade))
    tiled = {rank_symbol("m"): m1 * m0}
    assert {k: sympy.expand(v.subs(tiled)) for k, v in costs.items()} == {
        "mac": sympy.expand((e + f) * m1 * m0 * p),
        "max": m1 * m0 * p + m1 * p,
        "exp": m1 * m0 * p + m1 * p,
        "add": sympy.expand(m1 * m0 * p + m1 * p + f * m1 * p),
        "mul": m1 * p + f * m1 * p,
        "div": f * p,
        "other": 0,
    }


def test_derivation_reads_well(golden: Callable[[str, str], None]) -> None:
    golden("cascade/attention-3pass.txt", fused(NAMED["attention-3pass"]).text + "\n")
    golden("cascade/clipped-softmax.txt", fused(NAMED["clipped-softmax"]).text + "\n")
    golden("cascade/sink-lazy.txt", fused(NAMED["sink"], tile=128, lazy=8.0).text + "\n")
    golden("cascade/stick-breaking.txt", fused(NAMED["stick-breaking"]).text + "\n")
    golden("cascade/sink-merge.txt", f"{fused(NAMED['sink']).merge}\n")


def test_proof_names_what_it_used() -> None:
    deferral, first, second = fused(NAMED["attention-3pass"]).proofs
    assert (deferral.rule, deferral.tensor, deferral.upstream) == ("D (deferral)", "AV", ("SD",))
    assert deferral.correction is None
    assert (first.tensor, second.tensor) == ("SD", "SNV")
    assert str(first.correction) == "exp(GM[p] - GM'[p])"
    assert any("range guard" in c for c in first.side_conditions)
    assert any(c.startswith("in range") for c in first.side_conditions)


def test_range_guard_is_never_deferred() -> None:
    """Deferring exp(-GM) would accumulate exp(QK), even where it is written as a factor."""
    text = """
        GM[p] = X[m, p] :: reduce_m max
        T[p] = exp(X[m, p]) * exp(0.0 - GM[p])
        """
    assert isinstance(defer_scalar(parse(text), "m"), Refusal)
    result = fused(parse(text))
    assert result.proofs[0].correction is not None
    x = {"X": torch.tensor([[-3.0, 2.0], [1.0, 1.5], [0.5, -1.0]], dtype=torch.float64)}
    assert_close(interpret(result.cascade, x), interpret(parse(text), x))


def test_defer_scalar_moves_the_division_only() -> None:
    result = defer_scalar(NAMED["attention-3pass"], "m")
    assert isinstance(result, Fusion)
    assert (result.passes_before, result.passes) == (3, 2)
    assert live_footprint(result.cascade, "m") == ("QK",)
    assert str(result.cascade) == str(NAMED["attention-3pass-deferred"]).replace("-deferred", "", 1)


def test_statistics_pass_leaves_the_emission_alone() -> None:
    result = merge_statistics_pass(NAMED["attention-3pass"], "m", tile=4)
    assert isinstance(result, Fusion)
    assert (result.passes_before, result.passes) == (3, 2)
    x = named_inputs(NAMED["attention-3pass"])
    assert_close(interpret(result.cascade, x), interpret(NAMED["attention-3pass"], x))


@pytest.mark.parametrize("tile", [1, 4, 11, 100, None])
def test_partition_changes_neither_values_nor_passes(tile: int | None) -> None:
    for name in ("attention-3pass", "causal", "clipped-softmax", "attention-weights"):
        split = partition_rank(NAMED[name], "m", tile)
        assert isinstance(split, Cascade)
        assert count_passes(split, "m") == count_passes(NAMED[name], "m")
        x = named_inputs(NAMED[name])
        assert_close(interpret(split, x), interpret(NAMED[name], x))


def test_partition_twice_is_refused_and_a_tile_needs_a_coordinate() -> None:
    assert isinstance(partition_rank(NAMED["attention-2pass"], "m", 4), Refusal)
    with pytest.raises(ValueError, match="at least 1"):
        partition_rank(NAMED["attention-3pass"], "m", 0)
    with pytest.raises(ValueError, match="at least 1"):
        fuse_reductions(NAMED["attention-3pass"], "m", tile=0)


def test_one_pass_comes_back_as_it_is() -> None:
    result = fused(NAMED["sigmoid"])
    assert result.cascade is NAMED["sigmoid"]
    assert result.proofs == ()


# --- The separability table of section 8.2

M = Rank("m")
X, V, S, D = Read("X", (M,)), Read("V", (M,)), Read("S"), Read("D")
STATES = frozenset({"S", "D"})
NORMALISED = call("exp", X - S) / D


@pytest.mark.parametrize(
    ("body", "action", "correction"),
    [
        (call("exp", X - S), "mul", "exp(S[] - S'[])"),
        (call("exp", X - S) * V, "mul", "exp(S[] - S'[])"),
        (NORMALISED * V, "mul", "D[] * exp(S[] - S'[]) / D'[]"),
        (call("exp2", (X - S) * 0.125) * V, "mul", "exp2(S[] / 8 - S'[] / 8)"),
        (X**2 / D, "mul", "D[] / D'[]"),
        (X - S, "add", "S[] - S'[]"),
        (call("sqrt", NORMALISED), "mul", "sqrt(D[]) * exp(S[] / 2 - S'[] / 2) / sqrt(D'[])"),
        ((X - S) ** 2, "mul", None),
        (call("clip", 1.1 * NORMALISED - 0.1, 0.0, 1.0) * V, "mul", None),
        (call("max", X - S, 0.0) * V, "mul", None),
        (call("sigmoid", X - S) * V, "mul", None),
        (call("exp", X / S), "mul", None),
        ((X - S) * V, "mul", None),
        (call("round", X / D), "mul", None),
        (call("cast_i8", call("exp", X - S) * 127.0), "mul", None),
        (call("cast_bf16", call("exp", X - S)), "mul", None),
        (X * S, "add", None),
    ],
)
def test_separability_table(body: Expr, action: str, correction: str | None) -> None:
    found = separate(leaves_of(body, "m", STATES, frozenset({D})), action)
    if correction is None:
        assert isinstance(found, Counterexample)
        assert refutes(body, found)
        return
    assert isinstance(found, Separation)
    assert str(found.correction) == correction
    assert_correction(body, found)


def refutes(body: Expr, found: Counterexample) -> bool:
    """Recompute both sides of the identity at the numbers of the counterexample."""
    first, second = ({parse_expr(k): v for k, v in side} for side in (found.first, found.second))
    items = {k for k in first if any(n == M for n in _nodes(k))}
    crossed = {k: (second if k in items else first).get(k, first[k]) for k in first}
    crossed_back = {k: (first if k in items else second).get(k, first[k]) for k in first}
    both = {**first, **second}
    values = [evaluate(body, point) for point in (first, both, crossed, crossed_back)]
    left, right = (
        (values[0] * values[1], values[2] * values[3])
        if found.action == "mul"
        else (values[0] + values[1], values[2] + values[3])
    )
    assert left == pytest.approx(found.left)
    assert right == pytest.approx(found.right)
    return abs(left - right) > 1e-6


def _nodes(expr: Expr) -> list[Expr]:
    return [expr, *(n for c in expr.children for n in _nodes(c))]


def assert_correction(body: Expr, found: Separation) -> None:
    """F at old states, corrected, is F at new states."""
    old = {X: 0.7, V: -1.3, S: 0.4, D: 1.7}
    new = {X: 0.7, V: -1.3, S: 1.1, D: 2.9}
    moved = evaluate(found.correction, {**old, new_state(S): new[S], new_state(D): new[D]})
    at = evaluate(body, old)
    assert (at * moved if found.action == "mul" else at + moved) == pytest.approx(
        evaluate(body, new), rel=1e-14
    )
    g, h = evaluate(found.G, old), evaluate(found.H, old)
    assert (g * h if found.action == "mul" else g + h) == pytest.approx(at, rel=1e-14)


def test_indicator_of_items_does_not_hide_the_state() -> None:
    body = call("where", V > 0.0, call("exp", X - S), 0.0)
    assert isinstance(separate(leaves_of(body, "m", STATES), "mul"), Separation)


def test_range_guards_are_exponentials_of_states() -> None:
    assert is_range_guard(call("exp", -S), STATES)
    assert is_range_guard(1.0 / call("exp2", S), STATES)
    assert not is_range_guard(1.0 / S, STATES)
    assert not is_range_guard(call("exp", X), STATES)


def test_numbers_that_agree_are_not_a_proof() -> None:
    """The clamp binds nowhere near the probes; only algebra tells that it may bind."""
    found = separate(leaves_of(call("exp", call("max", X - S, -100.0)), "m", STATES), "mul")
    assert isinstance(found, NotProved)


# --- Rules beyond softmax, each on the smallest cascade that needs it


def check(text: str, inputs: Tensors, rule: str, passes: int = 1) -> Fusion:
    cascade = parse(text)
    result = fused(cascade, tile=3)
    assert any(p.rule.startswith(rule) for p in result.proofs), result.text
    assert result.passes == passes
    assert_close(interpret(result.cascade, inputs), interpret(cascade, inputs))
    return result


XMP = {"X": draw(1, 8, 3)}


def test_variance_defers_with_three_terms() -> None:
    text = """
        N = one[m]
        SUM[p] = X[m, p]
        MEAN[p] = SUM[p] / N
        VAR[p] = (X[m, p] - MEAN[p]) ** 2
        """
    result = check(text, {**XMP, "one": torch.ones(8).double()}, "D (finite rank, K=3)")
    assert next(p for p in result.proofs if "finite" in p.rule).cancellation_risk
    assert "cancellation risk" in result.text


def test_mixed_softmaxes_split_into_terms() -> None:
    """A difference of two attention maps multiplied by one V: two accumulators."""
    text = """
        G1[p] = X[m, p] :: reduce_m max
        S1[m, p] = exp(X[m, p] - G1[p])
        D1[p] = S1[m, p]
        G2[p] = Y[m, p] :: reduce_m max
        S2[m, p] = exp(Y[m, p] - G2[p])
        D2[p] = S2[m, p]
        A[m, p] = S1[m, p] / D1[p] - lam * S2[m, p] / D2[p]
        AV[f, p] = A[m, p] * V[f, m]
        """
    x = {**XMP, "Y": draw(2, 8, 3), "V": draw(3, 2, 8), "lam": torch.tensor(0.4).double()}
    check(text, x, "D (finite rank, K=2)")


def test_maximum_of_a_rising_body_needs_no_correction() -> None:
    text = """
        GM[p] = X[m, p] :: reduce_m max
        PEAK[p] = sigmoid(X[m, p] - GM[p]) :: reduce_m max
        LOW[p] = sigmoid(GM[p] - X[m, p]) :: reduce_m max
        """
    check(text, XMP, "D (monotone)")


def test_shifted_maximum_defers_the_shift() -> None:
    text = """
        GM[p] = X[m, p] :: reduce_m max
        T[p] = 2.0 * X[m, p] - GM[p] :: reduce_m min
        """
    check(text, XMP, "D (deferral)")


def test_minimum_upstream_is_corrected_too() -> None:
    text = """
        LOW[p] = X[m, p] :: reduce_m min
        T[p] = exp(LOW[p] - X[m, p]) * Y[m, p]
        """
    x = {"X": draw(1, 8, 3, scale=400.0), "Y": draw(2, 8, 3)}
    result = check(text, x, "B (separable")
    assert str(result.proofs[-1].correction) == "exp(LOW'[p] - LOW[p])"


def test_powers_of_a_product_are_repaired_by_inversion() -> None:
    text = """
        input X[m] sign positive
        S = X[m]
        T = X[m] ** S :: reduce_m mul
        """
    result = check(text, {"X": draw(1, 6).abs() / 2 + 0.1}, "C (inversion)")
    assert "h(t u) = h(t) h(u)" in result.text


def test_log_normaliser_in_the_exponent_is_opened() -> None:
    """exp(x - LSE): the sum inside LSE defers, its maximum stays a range guard."""
    text = """
        GM[p] = X[m, p] :: reduce_m max
        SN[m, p] = exp(X[m, p] - GM[p])
        SD[p] = SN[m, p]
        LSE[p] = GM[p] + log(SD[p])
        T[p] = exp(X[m, p] - LSE[p]) * Y[m, p]
        """
    x = {"X": draw(1, 8, 3, scale=300.0), "Y": draw(2, 8, 3)}
    check(text, x, "B (separable")


def test_running_sum_in_an_exponent_is_unstable() -> None:
    text = """
        S[p] = X[m, p]
        T[p] = exp(X[m, p] - S[p])
        """
    found = refused(parse(text))
    assert (found.code, found.rule) == ("unstable-correction", "stability")
    assert "not monotone" in found.reason


def test_a_sum_of_positive_terms_is_monotone() -> None:
    text = """
        S[p] = exp(X[m, p])
        T[p] = exp(X[m, p] - S[p])
        """
    check(text, XMP, "B (separable")


def test_two_traversals_of_different_tensors_are_one_pass() -> None:
    """Passes are counted per fiber (section 3.1): X and Y are traversed once each."""
    text = "S[p] = X[m, p]\nT[p] = exp(Y[m, p] - S[p])"
    assert count_passes(parse(text), "m") == 1
    assert live_footprint(parse(text), "m") == ()


def test_upstream_through_zero_defers_instead_of_dividing() -> None:
    """Cascade 1: an iterative correction would divide by prefixes of Y, which may vanish."""
    result = fused(NAMED["dependent-sums"], "k")
    assert [p.rule for p in result.proofs] == ["D (deferral)"]
    x = {"A": torch.tensor([1.0, -1.0, 3.0]).double(), "B": torch.tensor([2.0, 2.0, 5.0]).double()}
    assert_close(interpret(result.cascade, x), interpret(NAMED["dependent-sums"], x))


def test_a_filtered_map_counts_with_its_default() -> None:
    """Outside its guard A is 0, so the sum still gets Y there."""
    text = """
        GM[p] = X[m, p] :: reduce_m max
        A[m, p] = exp(X[m, p] - GM[p]) where m <= p
        T[p] = (1.0 + A[m, p]) * Y[m]
        """
    check(text, {"X": draw(1, 8, 3, scale=300), "Y": draw(2, 8)}, "D (finite rank, K=")


def test_a_factor_of_unknown_sign_does_not_leave_a_maximum() -> None:
    text = """
        S[p] = X[m, p]
        T[p] = X[m, p] * S[p] :: reduce_m max
        """
    found = refused(parse(text))
    assert (found.code, found.rule) == ("unproved-sign", "stability")
    positive = text.replace("S[p] = X[m, p]", "S[p] = exp(X[m, p])")
    check(positive, XMP, "D (deferral)")


def test_correction_that_differs_along_a_folded_rank() -> None:
    """Heads mixed after their softmax: the accumulators keep the head whose maximum they have."""
    text = """
        GM[h, p] = X[h, m, p] :: reduce_m max
        T[p] = exp(X[h, m, p] - GM[h, p]) * W[h]
        """
    result = check(text, {"X": draw(1, 3, 8, 2, scale=300), "W": draw(2, 3)}, "B (separable")
    assert any(p.rule == "D (sums exchanged)" for p in result.proofs)


# --- Scans: a value per item, folded from one side

DECAYED = """
    QK[m, p] = Q[e, p] * K[e, m]
    LF[m] = log(sigmoid(G[m]))
    {scan}
    S[m, p] = QK[m, p] + C[m]
    GM[p] = S[m, p] :: reduce_m max
    SN[m, p] = exp(S[m, p] - GM[p])
    SD[p] = SN[m, p]
    AV[f, p] = SN[m, p] * V[f, m] / SD[p]
    """


def test_stick_breaking_streams_from_the_last_key() -> None:
    result = fused(NAMED["stick-breaking"])
    loop = next(s for s in result.cascade.body if isinstance(s, Loop))
    assert loop.descending
    assert [p.rule for p in result.proofs] == ["S (streaming scan)"]
    assert "streams descending: the fold of all j > m is known when item m comes" in result.text
    assert result.partial is result.merge is result.finish is None
    x = named_inputs(NAMED["stick-breaking"])
    wanted = interpret(NAMED["stick-breaking-1pass"], x)
    assert_close(interpret(result.cascade, x), wanted, steps=256)
    assert_close(lower_cascade_to_callable(result.cascade)(x), wanted, steps=256)


@pytest.mark.parametrize("keys", [1, 2, 7])
@pytest.mark.parametrize(
    ("scan", "mask"),
    [
        ("C[m] = LF[j] where j < m", lambda j, m: j < m),
        ("C[m] = LF[j] where m >= j", lambda j, m: j <= m),
        ("C[m] = LF[j] where j > m", lambda j, m: j > m),
        ("C[m] = LF[j] where (m <= j) & (j < 5)", lambda j, m: (m <= j) & (j < 5)),
        ("C[m] = LF[j] where (j < m) & (m > 2)", lambda j, m: (j < m) & (m > 2)),
    ],
)
def test_decays_over_positions_stream(scan: str, mask: Callable, keys: int) -> None:
    """A sum of log-decays in the score (forgetting attention), then an online softmax."""
    cascade = parse(DECAYED.format(scan=scan))
    assert count_passes(cascade, "m") == 4
    x = {"Q": draw(1, 2, 3), "K": draw(2, 2, keys), "V": draw(3, 4, keys), "G": draw(4, keys)}
    j, m = torch.arange(keys)[:, None], torch.arange(keys)[None, :]
    decay = torch.where(mask(j, m), torch.nn.functional.logsigmoid(x["G"])[:, None], 0.0).sum(0)
    wanted = x["V"] @ torch.softmax((x["K"].T @ x["Q"]) + decay[:, None], 0)
    for options in ({"tile": 1}, {"tile": 3}, {"tile": 64, "lazy": 2.0}, {}):
        result = fused(cascade, **options)
        assert (result.passes, result.refusals) == (1, ())
        assert_close(interpret(result.cascade, x), {"AV": wanted})
        assert parse(str(result.cascade)) == result.cascade


def test_scans_of_scans_and_of_maxima() -> None:
    chained = parse(DECAYED.format(scan="C1[m] = LF[j] where j < m\nC[m] = C1[i] where i <= m"))
    running = parse(
        DECAYED.format(scan="tensor C[m] default -inf\nC[m] = LF[j] :: reduce_j max where j <= m")
    )
    x = {"Q": draw(1, 2, 3), "K": draw(2, 2, 7), "V": draw(3, 4, 7), "G": draw(4, 7)}
    for cascade in (chained, running):
        result = fused(cascade, tile=3)
        assert result.passes == 1
        assert_close(interpret(result.cascade, x), interpret(cascade, x))


@pytest.mark.parametrize(
    ("scan", "why"),
    [
        ("C[m] = LF[j] where abs(j - m) <= 2", "out of step"),
        ("C[m] = LF[j] where (j < m) & (j > m - 3)", "a window of j"),
        ("C[m] = LF[j] * LF[m] where j < m", "one value per j"),
        ("tensor C[m] default 1.0\nC[m] = LF[j] where j < m", "another default than 0.0"),
        ("N = LF[m]\nC[m] = LF[j] / N where j < m", "complete only after a whole traversal"),
        ("C[m] = LF[0]", "out of step"),
        ("B[m] = LF[j] where j < m\nA[m] = LF[j] where j > m\nC[m] = A[m] + B[m]", "later items"),
    ],
)
def test_what_is_no_scan_is_refused(scan: str, why: str) -> None:
    found = refused(parse(DECAYED.format(scan=scan)))
    assert (found.code, found.rule) == ("not-a-scan", "S (streaming scan)")
    assert why in found.reason


# --- Refusals


@pytest.mark.parametrize(
    ("text", "code", "rule"),
    [
        ("GM[p] = X[m,p] :: reduce_m max\nT[p] = exp(X[m,p] - GM[p]) where X[m,p] >= GM[p] - 1.0",
         "not-separable", "B (separable)"),
        ("GM[p] = abs(X[m,p]) :: reduce_m max\nT[p] = round(X[m,p] / GM[p] * 127.0)",
         "not-separable", "B (separable)"),
        ("GM[p] = X[m,p] :: reduce_m max\nT[p] = cast_i8(exp(X[m,p] - GM[p]) * 127.0)",
         "not-separable", "B (separable)"),
        ("GM[p] = X[m,p] :: reduce_m max\nA[m,p] = X[m,p] - GM[p]",
         "map-consumer", "map consumer"),
        ("GM[p] = X[m,p] :: reduce_m max\nT[p] = X[m,p] - GM[p] :: reduce_m mul",
         "no-action", "B (separable)"),
        ("GM[p] = X[m,p] :: reduce_m max\nS[m,p] = X[m,p] - GM[p]\nT[p] = S[m - 1, p] where m >= 1",
         "not-normal-form", "normal form"),
    ],
)  # fmt: skip
def test_refusals_name_their_rule(text: str, code: str, rule: str) -> None:
    found = refused(parse(text))
    assert (found.code, found.rule) == (code, rule)
    if code == "not-separable":
        assert found.counterexample is not None
        assert str(found.counterexample) in found.reason
        assert found.to_json()["counterexample"]["left"] == found.counterexample.left
        assert abs(found.counterexample.left - found.counterexample.right) > 0


def test_what_waits_for_a_refused_reduction_is_not_fused() -> None:
    text = """
        GM[p] = X[m, p] :: reduce_m max
        T[p] = relu(X[m, p] - GM[p] + 1.0)
        U[p] = exp(X[m, p] - GM[p] - T[p])
        W[p] = exp(X[m, p] - GM[p])
        OUT[p] = U[p] + W[p]
        """
    cascade = parse(text)
    assert count_passes(cascade, "m") == 3
    found = refused(cascade)
    assert (found.code, found.tensor) == ("not-separable", "T")


def test_rounding_may_act_at_the_running_state_when_asked() -> None:
    """Quantised probabilities with a fixed scale: one pass, with an error of half a step."""
    cascade = NAMED["quantised-p"]
    result = fused(cascade, local_rounding=True, tile=4)
    assert result.passes == 1
    assert any("approximate" in c for p in result.proofs for c in p.side_conditions)
    x = named_inputs(cascade)
    exact, found = interpret(NAMED["attention-3pass"], x)["AV"], interpret(result.cascade, x)["AV"]
    # Half a step of 1/127 for each term, before the division by a sum of at least 1.
    bound = 11 * 0.5 / 127 * float(x["V"].abs().max())
    assert 0 < float((found - exact).abs().max()) <= bound


# --- A-priori references


def test_softcap_bounds_its_own_scores() -> None:
    result = fused(NAMED["softcap"], reference="auto")
    assert result.passes == 1
    assert not any("reduce_m max" in line for line in str(result.cascade).splitlines())
    assert "loop" not in str(result.cascade)
    x = named_inputs(NAMED["softcap"])
    assert_close(interpret(result.cascade, x), interpret(NAMED["softcap"], x))


@pytest.mark.parametrize("name", ["qk-norm", "sink", "softmax1", "lse", "gated", "window"])
def test_promised_reference_gives_the_same_values(name: str) -> None:
    result = fused(NAMED[name], reference=6.0)
    assert result.passes == 1
    x = named_inputs(NAMED[name])
    assert_close(interpret(result.cascade, x), interpret(NAMED[name], x))
    assert result.proofs[0].rule == "constant reference"


def test_reference_needs_a_bound_and_an_invariant_output() -> None:
    assert refused(NAMED["attention-3pass"], reference="auto").code == "no-bound"
    shown = "outputs AV, GM\n"
    text = str(NAMED["attention-3pass"]).replace("output AV", shown.strip())
    assert refused(parse(text), reference=6.0).code == "not-invariant"
    assert refused(NAMED["dependent-sums"], "k", reference=1.0).code == "no-reference"


# --- Raised sites: batched cascades with guards, weights, sinks and shared heads

B, H, HKV, QL, KVL, DH, FH = 2, 4, 2, 5, 13, 4, 3
WEIGHT = TensorDecl("DROP", ("b", "h", "q", "kv"))
BIAS = TensorDecl("BIAS", ("h", "q", "kv"))
SINK = TensorDecl("SINK", ("h",))
KEEP = TensorDecl("KEEP", ("b", "kv"), dtype="bool")
SITES = {
    "plain": SoftmaxAttention(score=QK * 0.5),
    "causal grouped": SoftmaxAttention(guard=parse_expr("q - kv >= 0"), group=2),
    "cached window, sink, weight": SoftmaxAttention(
        score=parse_expr("tanh(QK[b, h, q, kv] * 0.1) * 10.0 + BIAS[h, q, kv]"),
        guard=parse_expr("(q + 8 - kv >= 0) & (q + 8 - kv < 3)"),
        weight=parse_expr("DROP[b, h, q, kv]"),
        sink=parse_expr("SINK[h]"),
        group=2,
        reads=(BIAS, WEIGHT, SINK),
    ),
    "masked prefix": SoftmaxAttention(
        score=parse_expr("where(KEEP[b, kv], QK[b, h, q, kv], -inf)"), reads=(KEEP,)
    ),
    "empty rows": SoftmaxAttention(guard=parse_expr("(kv < 4) & (q >= 2) & (kv >= q - 2)")),
    "finfo mask": SoftmaxAttention(score=parse_expr("QK[b, h, q, kv] + where(kv < q, -3e38, 0.0)")),
}


def site_inputs(form: SoftmaxAttention, scale: float) -> Tensors:
    heads = H // form.group
    x = {
        "Q": draw(1, B, H, QL, DH, scale=scale),
        "K": draw(2, B, heads, KVL, DH, scale=scale),
        "V": draw(3, B, heads, KVL, FH),
        "DROP": draw(4, B, H, QL, KVL),
        "BIAS": draw(5, H, QL, KVL),
        "SINK": draw(6, H),
        "KEEP": torch.ones(B, KVL, dtype=torch.bool),
    }
    x["KEEP"][0, :7] = False  # whole tiles of -inf before the first kept key
    x["KEEP"][1, 6:] = False  # and after the last
    return x


def dense(form: SoftmaxAttention, x: Tensors) -> Tensor:
    """The formula, by hand in float64: scores, masked softmax with sink, weights, product."""
    k, v = (x[n].repeat_interleave(form.group, 1) for n in ("K", "V"))
    qk = x["Q"] @ k.mT
    q, kv = torch.arange(QL)[:, None], torch.arange(KVL)[None, :]
    distance = q - kv
    table: dict[str, tuple[Tensor, Tensor]] = {
        "plain": (qk * 0.5, distance == distance),
        "causal grouped": (qk, distance >= 0),
        "cached window, sink, weight": (
            torch.tanh(qk * 0.1) * 10 + x["BIAS"], (distance + 8 >= 0) & (distance + 8 < 3)
        ),
        "masked prefix": (qk, x["KEEP"][:, None, None, :]),
        "empty rows": (qk, (kv < 4) & (q >= 2) & (kv >= q - 2)),
        "finfo mask": (qk + torch.where(kv < q, -3e38, 0.0), distance == distance),
    }  # fmt: skip
    name = next(n for n, f in SITES.items() if f is form)
    s, keep = table[name]
    s = s.masked_fill(~keep, -math.inf)
    if form.sink is not None:
        s = torch.cat([s, x["SINK"].view(1, H, 1, 1).expand(B, H, QL, 1)], -1)
    weights = torch.softmax(s, -1).nan_to_num(0.0)[..., :KVL]
    return (weights * x["DROP"] if form.weight is not None else weights) @ v


@pytest.mark.parametrize("scale", [1.0, 70.0], ids=["usual", "scores of 1e4"])
@pytest.mark.parametrize("name", SITES)
def test_raised_sites_fuse(name: str, scale: float) -> None:
    form = SITES[name]
    cascade, x = softmax_cascade(form), site_inputs(form, scale)
    given, wanted = of(cascade, x), dense(form, x)
    reference = interpret(cascade, given)["AV"]
    allowed = max(2 * float((reference - wanted).abs().max()), 4 * EPS * float(wanted.abs().max()))
    for rank, options in (("kv", {}), ("m", {"tile": 4}), ("kv", {"tile": 1, "lazy": 8.0})):
        result = fused(cascade, rank, **options)
        assert (result.passes_before, result.passes, result.refusals) == (3, 1, ())
        found = interpret(result.cascade, given)["AV"]
        assert torch.isfinite(found).all()
        assert float((found - wanted).abs().max()) <= allowed


def test_lazy_reference_is_exact_and_lags() -> None:
    """The reference follows the maximum only when it is more than tau behind."""
    result = fused(NAMED["lse"], tile=1, lazy=8.0)
    scores = torch.tensor([[-5.0], [0.0], [2.0], [9.0], [30.0], [31.0]]).double()
    x = {"Q": torch.ones(1, 1).double(), "K": scores.T, "V": draw(0, 3, 6)}
    found = interpret(result.cascade, x, also=("FGM",))
    assert found["FGM"][:, 0].tolist() == [-math.inf, -5.0, -5.0, -5.0, 9.0, 30.0, 30.0]
    wanted = interpret(NAMED["lse"], x)
    assert_close({k: found[k] for k in wanted}, wanted)
    with pytest.raises(ValueError, match="at least 0"):
        fuse_reductions(NAMED["lse"], "m", lazy=-1.0)


def test_terms_outside_their_reference_survive_an_infinite_prefix() -> None:
    """The state is -inf while terms are not 0: their past must not be thrown away."""
    text = """
        GM[p] = X[m, p] :: reduce_m max
        T[p] = exp(Y[m, p] - GM[p]) * where(isneginf(X[m, p]), 1.0, 2.0)
        """
    cascade = parse(text)
    result = fused(cascade, tile=1)
    assert any("range not proved" in c for p in result.proofs for c in p.side_conditions)
    x = {"X": draw(1, 6, 2), "Y": draw(2, 6, 2)}
    x["X"][:3] = -math.inf
    assert_close(interpret(result.cascade, x), interpret(cascade, x))
