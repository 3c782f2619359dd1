"""Random cascades of dependent reductions: what fuses computes the same, what does not says why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from attn_rewrite.cascade import Cascade, count_passes, interpret, parse
from attn_rewrite.cascade.expr import walk
from attn_rewrite.passes.cascade import Fusion, FusionRefusal, fuse_reductions

EPS = torch.finfo(torch.float64).eps
RULES = {
    "normal form", "B (separable)", "chain", "map consumer", "stability", "pass count",
    "S (streaming scan)",
}  # fmt: skip

# Terms of an item and of a state; `#` stands for the state.
ITEMS = ["X[m, p]", "0.5 * X[m, p]", "X[m, p] + c[p]", "tanh(X[m, p])", "X[m, p] * Y[m]"]
STARTS = [
    ("{x}", "max"), ("{x}", "min"), ("{x}", "add"), ("exp({x})", "add"), ("abs({x})", "max"),
    ("max({x}, c[p])", "max"),
]  # fmt: skip
LINKS = [
    ("exp({x} - #)", "add"), ("exp({x} - #)", "max"), ("exp({x} - #) * Y[m]", "add"),
    ("{x} * #", "add"), ("{x} / (1.0 + # * #)", "add"), ("{x} - #", "max"), ("{x} - #", "min"),
    ("({x} - #) * ({x} - #)", "add"), ("({x} - #) * Y[m]", "add"), ("sigmoid({x} - #)", "max"),
    ("where(Y[m] > 0.0, exp({x} - #), 0.0)", "add"), ("exp2({x} - #)", "add"),
    ("relu({x} - #)", "add"), ("sigmoid({x} - #)", "add"), ("clip({x} - #, 0.0, 1.0)", "add"),
    ("round({x} - #)", "add"), ("tanh({x} * #)", "max"), ("{x} * #", "max"), ("{x} / #", "min"),
]  # fmt: skip
POSTS = ["{s}", "{s} + c[p]", "max({s}, c[p])", "0.5 * {s}", "log(1.0 + {s} * {s})"]
# Running values along the items; the last is a window, which no rule streams.
SCANS = ["j <= m", "j < m", "j > m", "abs(j - m) <= 1"]
GUARDS = ["", " where m <= p + 2", " where Y[m] > -0.5"]


@dataclass(frozen=True)
class Drawn:
    """A cascade as text, the tile it is fused with, and the seed of its inputs."""

    text: str
    tile: int
    seed: int


@st.composite
def cascades(draw: st.DrawFn) -> Drawn:
    """A chain of one to three dependent reductions, through posts, maps and guards."""
    guard = draw(st.sampled_from(GUARDS))
    start, op = draw(st.sampled_from(STARTS))
    item = draw(st.sampled_from(ITEMS))
    lines = []
    if draw(st.integers(0, 4)) == 0:
        lines = [
            "Z[m, p] = tanh(X[m, p])",
            f"R[m, p] = Z[j, p] where {draw(st.sampled_from(SCANS))}",
        ]
        item = f"{item} + 0.25 * R[m, p]"
    lines += [f"S0[p] = {start.format(x=item)} :: reduce_m {op}{guard}"]
    states = ["S0"]
    for n in range(1, draw(st.integers(1, 3)) + 1):
        state = draw(st.sampled_from(states))
        post = draw(st.sampled_from(POSTS)).format(s=f"{state}[p]")
        link, op = draw(st.sampled_from(LINKS))
        body = link.format(x=draw(st.sampled_from([item, *ITEMS]))).replace("#", f"T{n}[p]")
        lines.append(f"T{n}[p] = {post}")
        if draw(st.booleans()):
            filtered = guard or draw(st.sampled_from(GUARDS))
            lines.append(f"B{n}[m, p] = {body}{filtered}")
            body = draw(st.sampled_from([f"B{n}[m, p]", f"(1.0 + B{n}[m, p])"]))
        lines.append(f"S{n}[p] = {body} :: reduce_m {op}{guard}")
        states.append(f"S{n}")
    head = ["ranks m, p", "inputs X[m, p], Y[m], c[p]", f"outputs {', '.join(states)}"]
    if draw(st.integers(0, 9)) == 0:
        lines.append(f"OUT[m, p] = X[m, p] - {states[-1]}[p]")
        head[-1] += ", OUT"
    text = "\n".join(("cascade drawn", *head, *lines))
    return Drawn(text, draw(st.sampled_from([1, 3, 4, 32])), draw(st.integers(0, 2**16)))


def inputs(seed: int, noise: float = 0.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=g, dtype=torch.float64)
        return value * (1 + noise * (2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1))

    return {"X": normal(10, 4), "Y": normal(10), "c": normal(4)}


def allowed(cascade: Cascade, seed: int, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far rounding may move each element: measured by moving the inputs by 16 eps."""
    generator_state = torch.Generator().manual_seed(seed)
    spread = {k: 256 * EPS * (1 + v.abs()) for k, v in wanted.items()}
    for _ in range(4):
        factors = {
            k: 1 + 16 * EPS * torch.randn(v.shape, generator=generator_state, dtype=torch.float64)
            for k, v in inputs(seed).items()
        }
        moved = interpret(cascade, {k: v * factors[k] for k, v in inputs(seed).items()})
        spread = {k: torch.maximum(s, 16 * (moved[k] - wanted[k]).abs()) for k, s in spread.items()}
    return spread


def check_fusion(drawn: Drawn, cascade: Cascade, result: Fusion) -> None:
    assert result.passes == count_passes(result.cascade, "m") < result.passes_before
    assert result.proofs
    wanted = interpret(cascade, inputs(drawn.seed))
    found = interpret(result.cascade, inputs(drawn.seed))
    bound = allowed(cascade, drawn.seed, wanted)
    for name, value in wanted.items():
        finite = value.isfinite()
        assert torch.equal(found[name][~finite].nan_to_num(), value[~finite].nan_to_num())
        gap = (found[name] - value).abs()[finite]
        assert bool((gap <= bound[name][finite]).all()), f"{name}: {gap.max()}\n{result.text}"


def check_refusal(refusal: FusionRefusal) -> None:
    assert refusal.rule in RULES, refusal
    assert refusal.reason
    if refusal.code == "not-separable":
        numbers = refusal.counterexample
        assert numbers is not None
        scale = max(abs(numbers.left), abs(numbers.right))
        assert abs(numbers.left - numbers.right) > 1e-9 * scale


def test_random_cascades_fuse_or_say_why() -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=120, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cascades())
    def run(drawn: Drawn) -> None:
        cascade = parse(drawn.text)
        if count_passes(cascade, "m") < 2:
            return  # different tensors in each traversal: nothing to fuse
        result = fuse_reductions(cascade, "m", tile=drawn.tile)
        if isinstance(result, Fusion):
            outcomes["fused"] += 1
            outcomes["one pass"] += result.passes == 1
            outcomes["corrected"] += any(p.correction is not None for p in result.proofs)
            check_fusion(drawn, cascade, result)
            for refusal in result.refusals:
                check_refusal(refusal)
        else:
            assert isinstance(result, FusionRefusal)
            outcomes["refused"] += 1
            check_refusal(result)

    run()
    drawn = outcomes["fused"] + outcomes["refused"]
    assert drawn >= 80, outcomes
    assert outcomes["fused"] >= 0.3 * drawn, outcomes
    # Not only factors that move out: a fair share carries corrected states, or comes to one pass.
    assert min(outcomes["corrected"], outcomes["one pass"]) >= 0.25 * outcomes["fused"], outcomes
    assert outcomes["refused"] >= 0.2 * drawn, outcomes


def test_every_template_is_a_cascade() -> None:
    """The grammar itself parses, so that no family of draws drops out unseen."""
    for link, op in LINKS:
        body = link.format(x="X[m, p]").replace("#", "S[p]")
        text = f"S[p] = X[m, p] :: reduce_m max\nT[p] = {body} :: reduce_m {op}"
        einsum = parse(text).producer("T")
        assert einsum is not None
        assert any(getattr(n, "tensor", "") == "S" for n in walk(einsum.expr))
