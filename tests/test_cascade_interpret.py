"""The float64 oracle: Einsums point by point, index maps, loops, extents and errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_rewrite.cascade import NAMED, interpret, parse
from attn_rewrite.cascade import fold as fold_module
from attn_rewrite.cascade.attention import SoftmaxAttention, restrict, softmax_cascade
from attn_rewrite.cascade.expr import KV, TRUE, Call, Const, Expr, Q, Rank, Read, call
from attn_rewrite.cascade.extents import extents
from attn_rewrite.cascade.ir import Cascade, Einsum, RankDecl, TensorDecl
from attn_rewrite.errors import CascadeError

EPS = torch.finfo(torch.float64).eps
INF = math.inf


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(text: str, sizes: dict[str, int] | None = None, **inputs: Tensor | float) -> Tensor:
    """The only output of a cascade given as text."""
    (result,) = interpret(parse(text), inputs, sizes).values()
    return result


# One Einsum against a scalar evaluation point by point, written without torch operations.

EXTENT = {"i": 3, "j": 4, "k": 2}
IDENTITY = {"add": 0.0, "mul": 1.0, "max": -INF, "min": INF}
FOLD = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "max": max, "min": min}


SCALAR = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "div": lambda a, b: a / b if b != 0 else 0.0,
    "mod": lambda a, b: a % b,
    "le": lambda a, b: a <= b,
    "and": lambda a, b: a and b,
    "where": lambda c, a, b: a if c else b,
}


def scalar(expr: Expr, at: dict[str, int], inputs: dict[str, Tensor]) -> float:
    match expr:
        case Const(value):
            return value
        case Rank(name):
            return at[name]
        case Read(tensor, index):
            return float(inputs[tensor][tuple(int(scalar(i, at, inputs)) for i in index)])
        case Call("exp", (Call("sub", (a, b)),)):
            left, right = scalar(a, at, inputs), scalar(b, at, inputs)
            return 0.0 if left == -INF else math.exp(left - right)
        case Call(op, args):
            values = [scalar(a, at, inputs) for a in args]
    return SCALAR[op](*values)


def touched(expr: Expr, at: dict[str, int], inputs: dict[str, Tensor]) -> bool:
    """No divisor of the outermost product is 0."""
    match expr:
        case Call("mul", (a, b)):
            return touched(a, at, inputs) and touched(b, at, inputs)
        case Call("div", (a, b)):
            return touched(a, at, inputs) and scalar(b, at, inputs) != 0
    return True


def by_points(e: Einsum, inputs: dict[str, Tensor], default: float) -> Tensor:
    """The definition: every touched point lands on its output, the rest keeps the default."""
    out = [i.name for i in e.out.index]
    ((rank, op),) = e.reduce
    result = torch.full([EXTENT[r] for r in out], default, dtype=torch.float64)
    ranks = sorted({"i", "j", "k"})
    for place in itertools.product(*(range(EXTENT[r]) for r in out)):
        totals: dict[int, float] = {}
        for rest in itertools.product(*(range(EXTENT[r]) for r in ranks)):
            at = dict(zip(ranks, rest, strict=True))
            if tuple(at[r] for r in out) != place or not scalar(e.guard, at, inputs):
                continue
            if not touched(e.expr, at, inputs):
                continue
            # Ranks that are not listed are summed before the listed one is folded.
            totals[at[rank]] = totals.get(at[rank], 0.0) + scalar(e.expr, at, inputs)
        if totals:
            value = IDENTITY[op]
            for total in totals.values():
                value = FOLD[op](value, total)
            result[place] = value
    return result


RI, RJ, RK = (Rank(r) for r in "ijk")
READS = st.sampled_from(
    [
        Read("X", (RI, RJ)),
        Read("X", (RJ % 3, RJ)),
        Read("Y", (RJ, RK)),
        Read("Y", (RI + 1, RK)),
        Read("Z", (RK,)),
        Read("Z", (Const(1),)),
    ]
)
LEAVES = st.one_of(READS, st.sampled_from([Const(0.5), Const(2), RI, RK]))
# Exponents of leaves only: nested ones overflow.  An empty score (-inf) weighs nothing, whatever
# is subtracted from it.
SCORES = st.one_of(LEAVES, st.just(Const(-INF)))
EXPONENTIALS = st.builds(lambda a, b: call("exp", a - b), SCORES, LEAVES)


def binary(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    ops = st.sampled_from(["mul", "add", "max", "div"])
    return st.builds(lambda op, a, b: call(op, a, b), ops, inner, inner)


def choice(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.builds(lambda a, b: call("where", a <= b, a, b), inner, inner)


VALUES = st.recursive(
    LEAVES | EXPONENTIALS, lambda inner: binary(inner) | choice(inner), max_leaves=5
)


@settings(max_examples=150, deadline=None)
@given(
    expr=VALUES,
    out=st.permutations("ijk").flatmap(lambda p: st.integers(0, 2).map(lambda n: p[:n])),
    op=st.sampled_from(sorted(FOLD)),
    guard=st.sampled_from(
        [TRUE, RJ <= RI, RI + RJ <= 2, RK <= -1, call("le", Read("Z", (RK,)), 0.0)]
    ),
    default=st.sampled_from([0.0, -INF, 7.0]),
    seed=st.integers(0, 3),
)
def test_an_einsum_is_what_its_points_say(expr, out, op, guard, default, seed):
    g = torch.Generator().manual_seed(seed)
    # Small integers, so that 0 divides often and sums are exact.
    inputs = {
        name: torch.randint(-2, 3, shape, generator=g).to(torch.float64)
        for name, shape in {"X": (3, 4), "Y": (4, 2), "Z": (2,)}.items()
    }
    rank = next(r for r in "ijk" if r not in out)
    # Every rank is iterated, so that the point-wise definition and the cascade have the same space.
    whole = guard & (RI + RJ + RK <= 99)
    einsum = Einsum(Read("O", tuple(Rank(r) for r in out)), expr, ((rank, op),), whole)
    cascade = Cascade(
        "points",
        tuple(RankDecl(r, n) for r, n in EXTENT.items()),
        (TensorDecl("X", ("i", "j")), TensorDecl("Y", ("j", "k")), TensorDecl("Z", ("k",))),
        (einsum,),
        ("O",),
        (TensorDecl("O", tuple(out), default),),
    )
    want = by_points(einsum, inputs, default)
    got = interpret(cascade, inputs)["O"]
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite])
    assert (got[finite] - want[finite]).abs().le(64 * EPS * want[finite].abs().clamp(min=1)).all()


# Softmax attention in both dialects

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 13), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, m0=st.integers(1, 15), size=st.integers(0, 4), start=st.integers(-6, 9))
def test_the_one_pass_form_with_a_window_bears_empty_tiles_and_rows(shape, m0, size, start):
    p, m, e, f = shape
    g = torch.Generator().manual_seed(p * 100 + m)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((e, p), (e, m), (f, m)))
    text = str(NAMED["attention-1pass"])
    # The window starts anywhere, so whole prefixes of tiles and whole rows may be empty.
    keep = f"(m1 * #m0 + m0 - p >= {start}) & (m1 * #m0 + m0 - p < {start + size})"
    for einsum in (
        "LM[m1, p] = BQK[m1, m0, p] :: reduce_m0 max",
        "BQK[m1, m0, p] - RM[m1 + 1, p])",
    ):
        assert einsum in text
        text = text.replace(einsum, f"{einsum} where {keep}")
    got = interpret(parse(text), {"Q": q, "K": k, "V": v}, {"m0": m0})["AV"]
    distance = torch.arange(m)[None] - torch.arange(p)[:, None]
    scores = (q.mT @ k).masked_fill((distance < start) | (distance >= start + size), -INF)
    want = (scores.softmax(-1).nan_to_num(0.0) @ v.mT).mT
    assert (got - want).abs().max() <= 200 * EPS * max(1.0, v.abs().max().item())


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graph_dialect_against_dense_softmax(group: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(group)
    q = torch.randn(2, 6, 5, 4, generator=g).to(dtype)
    k, v = (torch.randn(2, 6 // group, 9, n, generator=g).to(dtype) for n in (4, 3))
    cascade = softmax_cascade(
        SoftmaxAttention(score=Read("QK", (Rank("b"), Rank("h"), Q, KV)) * 0.5, group=group)
    )
    got = interpret(restrict(cascade, KV <= Q), {"Q": q, "K": k, "V": v})["AV"]
    q, k, v = (x.double().repeat_interleave(n, 1) for x, n in ((q, 1), (k, group), (v, group)))
    scores = (q @ k.mT * 0.5).masked_fill(~torch.ones(5, 9, dtype=torch.bool).tril(), -INF)
    assert got.dtype == torch.float64
    assert (got - scores.softmax(-1) @ v).abs().max() <= 64 * EPS


def test_an_empty_row_gives_zero_and_lse_minus_infinity():
    lse = NAMED["lse"]
    keep = Rank("m") <= Rank("p") - 2
    pairs = ("GM", "SN")
    body = (replace(e, guard=keep) if e.out.tensor in pairs else e for e in lse.einsums())
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 4), (3, 5), (2, 5)))
    result = interpret(lse.with_body(*body), {"Q": q, "K": k, "V": v})
    assert torch.equal(result["AV"][:, :2], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(result["LSE"][:2], t(-INF, -INF))
    scores = (q.mT @ k).masked_fill(~torch.ones(4, 5, dtype=torch.bool).tril(-2), -INF)[2:]
    assert (result["LSE"][2:] - scores.logsumexp(-1)).abs().max() <= 64 * EPS
    assert (result["AV"][:, 2:] - (scores.softmax(-1) @ v.mT).mT).abs().max() <= 64 * EPS


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_filtered_points_are_never_seen(bad: float):
    text = "ranks q, m\nS[q] = A[q, m] * B[m] where m <= q"
    a, b = torch.ones(3, 4, dtype=torch.float64), t(1.0, 2.0, 3.0, bad)
    assert torch.equal(run(text, A=a, B=b), t(1.0, 3.0, 6.0))


def test_an_additive_mask_of_minus_infinity_is_an_empty_score():
    cascade = softmax_cascade(
        SoftmaxAttention(
            score=Read("QK", (Rank("b"), Rank("h"), Q, KV)) + Read("MASK", (Q, KV)),
            reads=(TensorDecl("MASK", ("q", "kv")),),
        )
    )
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, 3, 2, generator=g) for _ in range(3))
    mask = torch.zeros(3, 3).masked_fill(
        torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]]).bool(), -INF
    )
    got = interpret(cascade, {"Q": q, "K": k, "V": v, "MASK": mask})["AV"]
    scores = q.double() @ k.double().mT + mask
    assert torch.equal(got[0, 0, 1], torch.zeros(2, dtype=torch.float64))
    want = (scores.softmax(-1) @ v.double())[..., [0, 2], :]
    assert (got[..., [0, 2], :] - want).abs().max() <= 64 * EPS


# Index expressions

X = torch.arange(12, dtype=torch.float64).reshape(3, 4)


def test_index_maps_gather():
    assert torch.equal(run("Y[j, i] = X[i, j]", X=X), X.mT)
    assert torch.equal(
        run("Y[h] = X[h // 2, 1]", {"h": 5}, X=X),
        X[[0, 0, 1, 1, 2], 1],
    )
    assert torch.equal(
        run("Y[i] = X[i, P[i]]\n", X=X, P=torch.tensor([3, 0, 2])), t(3.0, 4.0, 10.0)
    )
    assert torch.equal(run("ranks i, j\ninput X[i, j]\nY[i] = X[i, i]", X=X), X.diagonal()[:3])
    assert torch.equal(run("ranks i, j\nY[i] = X[i, #j - 1]\ninput X[i, j]", X=X), X[:, -1])


def test_index_maps_scatter():
    permuted = run(
        "ranks i, j\ntensor Y[i, j]\nY[P[i], j] = X[i, j]", X=X, P=torch.tensor([2, 0, 1])
    )
    assert torch.equal(permuted, X[[1, 2, 0]])
    assert torch.equal(run("Y[i, j // 2] = X[i, j]", X=X), X.reshape(3, 2, 2).sum(-1))
    assert torch.equal(run("Y[i, j // 2] = X[i, j] :: reduce_j max", X=X), X[:, 1::2])
    assert torch.equal(run("Y[j + 1] = X[0, j] where j > 1", X=X), t(0.0, 0.0, 0.0, 2.0, 3.0))
    assert torch.equal(
        run("ranks i, j\nY[i, i] = X[i, i]\ninput X[i, j]", X=X), X[:, :3].diagonal().diag()
    )


def test_shifted_reads_and_writes():
    a = t(1.0, 2.0, 3.0, 4.0)
    assert run("Y[i - 1] = A[i] where i > 0\ntensor Y[i]", A=a).tolist() == [2.0, 3.0, 4.0, 0.0]
    assert run("Y[i] = A[i - 1] + A[i] where i > 0", A=a).tolist() == [0.0, 3.0, 5.0, 7.0]
    assert run("Y[i] = A[i + 1] - A[i] where i + 1 < #i", A=a).tolist() == [1.0, 1.0, 1.0, 0.0]


def test_an_empty_divisor_leaves_the_default():
    text = "tensor Y[i] default 7\nY[i] = A[i, k] / B[i] * C[k]"
    got = run(text, A=torch.ones(2, 3), B=t(2.0, 0.0), C=t(1.0, 2.0, 3.0))
    assert got.tolist() == [3.0, 7.0]


def test_a_second_write_keeps_what_it_does_not_touch():
    got = run("ranks i, j\nY[i, j] = X[i, j]\nY[i, 1] = -1.0 where i > 0\noutput Y", X=X)
    want = X.clone()
    want[1:, 1] = -1
    assert torch.equal(got, want)


def test_a_prefix_sum_by_filter_and_by_iteration():
    a = t(1.0, 2.0, 3.0, 4.0)
    assert torch.equal(
        run("rank i = 4\nS[i + 1] = A[k : k <= i]", A=a), t(0.0, 1.0, 3.0, 6.0, 10.0)
    )
    text = "init: S[0] = 0\nbody: S[i+1] = S[i] + A[i]\nstop: i >= #i\noutput S"
    assert torch.equal(run(text, A=a), t(0.0, 1.0, 3.0, 6.0, 10.0))
    text = "loop i descending:\ninit: S[#i] = 0\nbody: S[i] = S[i+1] + A[i]\nstop: i < 0\noutput S"
    assert torch.equal(run(text, A=a), t(10.0, 9.0, 7.0, 4.0, 0.0))


def test_a_partition_of_three_levels_covers_a_ragged_rank():
    text = """
        ranks m (m2, mx), mx (m1, m0), m2, m1, m0
        input A[m]
        BA[m2, m1, m0] = A[m2 * #mx + (m1 * #m0 + m0)]
        S = BA[m2, m1, m0] + 1
    """
    for sizes in ({"m1": 2, "m0": 3}, {"mx": 5, "m0": 2}, {"m2": 2, "m0": 4}, {}):
        assert run(text, sizes, A=torch.ones(11)).item() == 22.0


# Values


@pytest.mark.parametrize(
    ("expr", "want"),
    [
        ("cast_f16(1 + 0.0001)", 1.0),
        ("cast_bf16(1 + 0.01)", 1.0078125),
        ("cast_f32(0.1)", float(torch.tensor(0.1, dtype=torch.float32))),
        ("cast_i8(300.7)", 127.0),
        ("cast_i8(-2.9)", -2.0),
        ("cast_i8(-999)", -128.0),
        ("cast_i64(inf)", float(2**63 - 1024)),
        ("cast_bool(-3) + 1", 2.0),
        ("round(2.5) + round(3.5)", 6.0),
        ("7 // 2 + -7 // 2", -1.0),
        ("-7 % 3", 2.0),
        ("2 ** 3", 8.0),
        ("2 ** -1", 0.5),
        ("1 / 3", 1 / 3),
        ("1 / 0", 0.0),
        ("where(1 / 0 == 0, 5, 6)", 5.0),
        ("exp(-inf - -inf)", 0.0),
        ("exp2(-inf - -inf) + exp2(3 - 1)", 4.0),
        ("log(0)", -INF),
        ("max(3, 2.5) + min(1, true)", 4.0),
        ("clip(5, 0, 1.5)", 1.5),
        ("isneginf(-inf) + not(2)", 1.0),
        ("abs(-3) + sign(-2) + relu(-1) + floor(1.5) + ceil(1.5)", 5.0),
        ("sigmoid(0) + tanh(0) + erf(0) + gelu(0) + silu(0)", 0.5),
        ("softplus(1000)", 1000.0),
        ("sqrt(4) * rsqrt(4) * reciprocal(2)", 0.5),
        ("(true and 3) + (0 or 2 > 1)", 2.0),
        ("log1p(0) + sin(0) + cos(0)", 1.0),
    ],
)
def test_operators(expr: str, want: float):
    assert run(f"Y = 0.0 + ({expr})").item() == want


def test_declared_types_hold_integers_and_truths():
    assert run("tensor Y[i] dtype i32\nY[i] = A[i] * 1.5", A=t(1.0, 3.0)).tolist() == [1, 4]
    got = run("tensor Y[i] dtype bool\nY[i] = A[i] - 1", A=t(1.0, 3.0))
    assert got.dtype == torch.bool
    assert got.tolist() == [False, True]
    # A declared float type is what a kernel may hold; the oracle does not round to it.
    assert run("tensor Y[i] dtype f16\nY[i] = A[i]", A=t(1.0001)).item() == 1.0001


def test_reads_guarded_by_a_condition_may_lie_outside():
    a = t(1.0, 2.0, 3.0)
    assert run("Y[i] = where(i > 0, A[i - 1], 9.0)\ninput A[i]", A=a).tolist() == [9.0, 1.0, 2.0]
    assert run("ranks i\ninput A[i]\nY[i] = A[i] where (i > 0) & (A[i - 1] > 1)", A=a).tolist() == [
        0,
        0,
        3,
    ]
    with pytest.raises(
        CascadeError, match=r"A\[i - 1\] is read at i - 1 = -1, outside its extent 3"
    ):
        run("Y[i] = A[i - 1]\ninput A[i]", A=a)


def test_large_einsums_are_cut_without_changing_a_value(monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(17, 5, generator=g), torch.randn(9, 5, generator=g)
    text = "D[i, j] = (X[i, k] - Y[j, k]) ** 2 where j <= i"
    whole = run(text, X=x, Y=y)
    monkeypatch.setattr(fold_module, "CHUNK", 60)
    assert torch.equal(run(text, X=x, Y=y), whole)
    want = (x.double()[:, None] - y.double()).square().sum(-1) * torch.ones(17, 9).tril()
    assert (whole - want).abs().max() <= 64 * EPS * want.max()


def test_ranks_of_no_extent_give_defaults():
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert torch.equal(run("Y[j] = A[i, j]", A=empty), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(run("Y[j] = A[i, j] :: reduce_i max", A=empty), t(-INF, -INF, -INF))
    assert run("Y[i, j] = A[i, j] * 2", A=empty).shape == (0, 3)
    assert run("Y[j, i] = A[i + 0, j]\ninput A[i, j]", A=empty).shape == (3, 0)


def test_intermediates_can_be_asked_for():
    cascade = parse("B[i] = A[i] + 1; C = B[i]")
    result = interpret(cascade, {"A": t(1.0, 2.0)}, also=["B"])
    assert torch.equal(result["B"], t(2.0, 3.0))
    with pytest.raises(CascadeError, match="no tensor D"):
        interpret(cascade, {"A": t(1.0)}, also=["D"])


# Extents and errors


def test_extents_follow_shapes_declarations_and_splits():
    cascade = parse(
        "ranks m (m1, m0), m1, m0\ninput A[m]\nB[m1, m0] = A[m1 * #m0 + m0]; C = B[m1, m0]"
    )
    assert extents(cascade, {"A": (10,)}, {"m0": 4}) == {"m": 10, "m0": 4, "m1": 3}
    assert extents(cascade, {"A": (10,)}, {"m1": 2}) == {"m": 10, "m0": 5, "m1": 2}
    assert extents(cascade, {"A": (10,)}) == {"m": 10, "m0": 4, "m1": 3}
    assert extents(softmax_cascade(SoftmaxAttention()), {}, dict.fromkeys("bhpmdf", 2))["kv"] == 2


@pytest.mark.parametrize(
    ("text", "shapes", "sizes", "what"),
    [
        ("Y[i] = A[i] + B[i]", {"A": 3, "B": 4}, {}, "extent 3 by input A, but 4 by input B"),
        ("Y[i] = A[i]", {"A": 3}, {"i": 2}, "rank i has extent 2 by sizes, but 3 by input A"),
        ("rank i = 5\nY[i] = A[i]", {"A": 3}, {}, "5 by its declaration, but 3 by input A"),
        ("Y[i, j] = A[i]", {"A": 3}, {}, "no input has rank j; give its extent with sizes="),
        ("Y[i] = A[i]", {"A": 3}, {"k": 2}, "has no rank 'k'"),
        ("Y[i] = A[i]", {}, {}, "needs input A; its inputs are A"),
        ("Y[i] = A[i]", {"A": 3, "C": 3}, {}, "has no input C"),
        ("input A[i, j]\nY[i] = A[i, 0]", {"A": 3}, {}, r"input A has shape \[3\]; expected 2 dim"),
        ("Y[i] = Z[i] + A[i]\nZ[i] = A[i]", {"A": 3}, {}, r"Z\[i\] is read before anything"),
        ("input A[i]\nY[i] = A[i, 0]", {"A": 3}, {}, r"A\[i, 0\] has 2 indices, but A has 1 ranks"),
        ("Y[i] = A[i]\nY[i, 0] = A[i]", {"A": 3}, {}, r"Y\[i, 0\] has 2 indices, but Y has 1 ranks"),
        ("Y[A[i]] = A[i]", {"A": 3}, {}, "declare the ranks of Y"),
        (
            "ranks m (m1, m0)\ninput A[m]\nY[m1, m0] = A[m1 * #m0 + m0]",
            {"A": 9},
            {"m1": 2, "m0": 4},
            "does not cover rank m of extent 9",
        ),
    ],
)  # fmt: skip
def test_bad_inputs_are_one_clear_sentence(text, shapes, sizes, what):
    with pytest.raises((CascadeError, ValueError), match=what):
        interpret(parse(text), {n: torch.ones(s) for n, s in shapes.items()}, sizes)
