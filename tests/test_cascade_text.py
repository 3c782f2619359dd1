"""The text notation: printing and parsing are inverse, free text is completed, errors say where."""

from __future__ import annotations

import math
import re
import string
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attn_rewrite.cascade import count_passes, interpret, parse, parse_expr
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, as_softmax, softmax_cascade
from attn_rewrite.cascade.expr import (
    KV,
    OPERATORS,
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    H,
    Q,
    Rank,
    Read,
    call,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, TensorDecl
from attn_rewrite.errors import AttnRewriteError, CascadeError

# Names that need quoting, or look like words of the language, are drawn too.
NAMES = st.one_of(
    st.sampled_from(["q", "kv", "m1", "x", "where", "inf", "not", "stop", "init", "a.b.c", "exp"]),
    st.text(string.ascii_letters + string.digits + "_' -\"#[é\n", min_size=1, max_size=6),
)
NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
)


def expressions(
    ranks: st.SearchStrategy[str], tensors: st.SearchStrategy[Read]
) -> st.SearchStrategy[Expr]:
    leaves = st.one_of(NUMBERS.map(Const), ranks.map(Rank), ranks.map(Extent), tensors)

    def extend(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        def applied(op: str) -> st.SearchStrategy[Expr]:
            args = st.tuples(*[inner] * OPERATORS[op].arity)
            return args.map(lambda a: Call(op, a))

        return st.one_of(
            st.sampled_from(sorted(OPERATORS)).flatmap(applied),
            st.tuples(NAMES, st.lists(inner, max_size=3)).map(lambda r: Read(r[0], tuple(r[1]))),
        )

    return st.recursive(leaves, extend, max_leaves=12)


EXPRESSIONS = expressions(NAMES, NAMES.map(lambda n: Read(n, ())))


@given(EXPRESSIONS)
@example(call("pow", call("pow", Q, 2), 3))
@example(call("pow", Q, call("pow", KV, -3)))
@example(call("pow", Const(-2), Q))
@example(call("neg", Const(3)))
@example(call("sub", Q, call("sub", KV, Const(-1))))
@example(call("lt", call("lt", Q, KV), Const(True)))
@example(call("and", Q < KV, call("or", KV < 3, TRUE)))
@example(call("not", call("and", Q < KV, TRUE)))
@example(call("mul", call("neg", Q), Const(-math.inf)))
@example(call("floordiv", call("mod", Q, 3), call("div", KV, 2.0)))
def test_expressions_print_and_parse_back(expr: Expr):
    assert parse_expr(str(expr)) == expr


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Well-formed cascades: every rank declared, every tensor read is an input or written."""
    ranks = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    tensors = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    inputs, written = tensors[:1], tensors[1:]
    pick = st.sampled_from(ranks)
    counts = {name: draw(st.integers(0, 3)) for name in tensors}
    place = st.one_of(
        pick.map(Rank),
        pick.map(Extent),
        pick.map(lambda r: Rank(r) + 1),
        st.builds(lambda a, b: Rank(a) * Extent(b) + Rank(b), pick, pick),
    )

    def read_of(name: str) -> st.SearchStrategy[Read]:
        return st.tuples(*[place] * counts[name]).map(lambda index: Read(name, index))

    access = st.sampled_from(tensors).flatmap(read_of)
    values = st.recursive(
        st.one_of(access, NUMBERS.map(Const), pick.map(Rank)),
        lambda inner: st.one_of(
            st.builds(lambda a, b: call("mul", a, b), inner, inner),
            st.builds(lambda a, b: call("exp", a - b), inner, inner),
            st.builds(lambda a, b: call("where", a >= b, a, b), inner, inner),
        ),
        max_leaves=6,
    )
    reduce = st.lists(
        st.tuples(pick, st.sampled_from(["add", "max", "min", "mul", "or", "and"])),
        unique_by=lambda r: r[0],
        max_size=2,
    ).map(tuple)
    guard = st.one_of(st.just(TRUE), st.builds(lambda a, b: Rank(a) <= Rank(b) + 2, pick, pick))
    einsums = st.builds(Einsum, st.sampled_from(written).flatmap(read_of), values, reduce, guard)
    block = st.lists(einsums, max_size=2).map(tuple)
    loops = st.builds(Loop, pick, block, block, st.booleans())
    body = draw(st.lists(st.one_of(einsums, loops), max_size=4))
    # Each is written somewhere.
    body += [Einsum(Read(w, (Const(0),) * counts[w]), Const(0.0)) for w in written]
    declaration = st.builds(
        TensorDecl,
        st.just(""),
        st.lists(pick, min_size=3, max_size=3).map(tuple),
        st.sampled_from([0.0, 1.0, -math.inf, 0.25]),
        st.sampled_from(["float", "i8", "bool", "f32"]),
        st.sampled_from(["any", "positive", "nonnegative"]),
        st.one_of(st.none(), NAMES),
    )
    declared = draw(st.lists(st.sampled_from(written), unique=True, max_size=2))

    def declare(name: str) -> TensorDecl:
        d = draw(declaration)
        return TensorDecl(name, d.ranks[: counts[name]], d.default, d.dtype, d.sign, d.scale)

    sizes = [draw(st.one_of(st.none(), st.integers(0, 99))) for _ in ranks]
    parts = draw(st.sampled_from([(), ("outer", "inner")]))
    decls = [
        RankDecl(r, s, parts if i == 0 else ())
        for i, (r, s) in enumerate(zip(ranks, sizes, strict=True))
    ]
    return Cascade(
        draw(st.one_of(st.sampled_from(["attention-3pass", "a", "a b"]), NAMES)),
        tuple(decls),
        tuple(map(declare, inputs)),
        tuple(body),
        tuple(draw(st.lists(st.sampled_from(tensors), unique=True, min_size=1, max_size=2))),
        tuple(map(declare, declared)),
    )


@settings(max_examples=150, deadline=None)
@given(cascades())
def test_cascades_print_and_parse_back(cascade: Cascade):
    assert parse(str(cascade)) == cascade


def test_softmax_attention_prints_and_parses_back():
    form = SoftmaxAttention(
        score=Read("QK", (Rank("b"), H, Q, KV)) * 0.125,
        guard=(Q - KV >= 0) & (Q - KV < 256),
        sink=Read("SINK", (H,)),
        group=2,
        reads=(TensorDecl("SINK", ("h",)),),
    )
    cascade = softmax_cascade(form)
    assert parse(str(cascade)) == cascade


INDICES = st.recursive(
    st.one_of(
        st.sampled_from(["b", "h", "q", "kv", "r0"]).map(Rank),
        st.sampled_from(["q", "kv", "r0", "r2"]).map(Extent),
        st.just(Read("table", (Q,))),
    ),
    lambda inner: st.one_of(
        st.builds(call, st.sampled_from("add sub mul floordiv mod max min".split()), inner, inner),
        st.builds(call, st.sampled_from(["add", "mul", "floordiv"]), inner, st.integers(-9, 9)),
        st.builds(lambda a, b: call("where", a >= b, a, b), inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(INDICES, INDICES, INDICES, st.integers(1, 3))
@example(Q * Extent("kv") + KV, Rank("h") * Extent("q") + Q, Q, 1)
@example(KV + Q * Extent("kv"), Q * Extent("r0") + Rank("r0"), KV, 2)
def test_attention_with_any_index_prints_and_parses_back(
    first: Expr, second: Expr, third: Expr, group: int
):
    """Every rank and tensor is declared, so an index that looks like a partition is none."""
    form = SoftmaxAttention(
        score=QK + Read("bias", (Rank("b"), first)),
        guard=Read("keep", (H, second, KV)) & (Q >= KV),
        weight=Read("factor", (third,)),
        group=group,
        reads=(
            TensorDecl("bias", ("b", "r0")), TensorDecl("keep", ("h", "r1", "kv"), dtype="bool"),
            TensorDecl("factor", ("r2",)), TensorDecl("table", ("q",), dtype="i32"),
        ),
    )  # fmt: skip
    cascade = softmax_cascade(form)
    found = parse(str(cascade))
    assert found == cascade
    assert as_softmax(found) == form


def test_a_flattened_index_of_an_undeclared_tensor_is_a_partition():
    """What declares less means more: here the key rank is inferred from its parts."""
    (whole,) = (r for r in parse("Y[p] = K[p, m1 * #m0 + m0]").ranks if r.parts)
    assert (whole.name, whole.parts) == ("m", ("m1", "m0"))
    text = "ranks p, m1, m0, r\ninput K[p, r]\noutput Y\nY[p] = K[p, m1 * #m0 + m0]"
    assert not any(r.parts for r in parse(text).ranks)


PAPER = """
QK[m,p] = Q[e,p] x K[e,m]                 -- pass 1
GM[p]   = QK[m,p] :: reduce_m max         -- pass 1
SN[m,p] = exp(QK[m,p] - GM[p])            -- pass 2
SD[p]   = SN[m,p]
A[m,p]  = SN[m,p] / SD[p]
AV[f,p] = A[m,p] \N{MULTIPLICATION SIGN} V[f,m]
"""


def test_free_text_is_completed():
    cascade = parse(PAPER)
    assert [(t.name, t.ranks) for t in cascade.inputs] == [
        ("Q", ("e", "p")),
        ("K", ("e", "m")),
        ("V", ("f", "m")),
    ]
    assert cascade.outputs == ("AV",)
    assert {r.name for r in cascade.ranks} == {"p", "m", "e", "f"}
    assert cascade.tensors == (TensorDecl("GM", ("p",), -math.inf),)
    first = cascade.body[0]
    assert isinstance(first, Einsum)
    assert first.expr == Read("Q", (Rank("e"), Rank("p"))) * Read("K", (Rank("e"), Rank("m")))


ONE_PASS = """
init:  BK[e,m1,m0] = K[e, m1*M0+m0]      BV[f,m1,m0] = V[f, m1*M0+m0]
       RM[0,p] = -inf     RD[0,p] = 0     RNV[f,0,p] = 0
body:  BQK[m1,m0,p]   = Q[e,p] x BK[e,m1,m0]
       LM[m1,p]       = BQK[m1,m0,p] :: reduce_m0 max
       RM[m1+1,p]     = max(RM[m1,p], LM[m1,p])
       SLN[m1,m0,p]   = exp(BQK[m1,m0,p] - RM[m1+1,p])
       SLD[m1,p]      = SLN[m1,m0,p]
       SLNV[f,m1,p]   = SLN[m1,m0,p] x BV[f,m1,m0]
       PRM[m1,p]      = exp(RM[m1,p] - RM[m1+1,p])
       SPD[m1,p]      = RD[m1,p] x PRM[m1,p]
       RD[m1+1,p]     = SLD[m1,p] + SPD[m1,p]
       SPNV[f,m1,p]   = RNV[f,m1,p] x PRM[m1,p]
       RNV[f,m1+1,p]  = SLNV[f,m1,p] + SPNV[f,m1,p]
out:   AV[f,p]        = RNV[f,M1,p] / RD[M1,p]
stop:  m1 >= M1
"""


def test_the_one_pass_cascade_reads_as_the_paper_prints_it():
    cascade = parse(ONE_PASS)
    loop, last = cascade.body
    assert isinstance(loop, Loop)
    assert (loop.rank, loop.descending, len(loop.init), len(loop.body)) == ("m1", False, 5, 11)
    assert isinstance(last, Einsum)
    assert last.expr.children[0] == Read("RNV", (Rank("f"), Extent("m1"), Rank("p")))
    assert RankDecl("m", None, ("m1", "m0")) in cascade.ranks
    assert [t.ranks for t in cascade.inputs] == [("e", "m"), ("f", "m"), ("e", "p")]
    assert parse(str(cascade)) == cascade


def test_the_iterative_example_of_the_paper():
    cascade = parse("""
        init: RY[0]=0, RZ[0]=0
        body: RY[i+1] = RY[i] + A[i] x B[i]
              RZ[i+1] = RZ[i] x RY[i+1]/RY[i] + RY[i+1] x A[i]
        out: Z = RZ[K]
        stop when i >= K
    """)
    assert isinstance(cascade.body[0], Loop)
    assert cascade.body[1] == Einsum(Read("Z", ()), Read("RZ", (Extent("i"),)))


def test_filters_may_stand_in_the_index():
    (einsum,) = parse("S[i+1] = A[k : k <= i]").body
    assert einsum == Einsum(
        Read("S", (Rank("i") + 1,)), Read("A", (Rank("k"),)), (), Rank("k") <= Rank("i")
    )


def test_a_filter_belongs_to_its_einsum_only():
    first, second = parse("S[i] = A[k : k <= i]; T[i] = A[k]").body
    assert isinstance(first, Einsum)
    assert isinstance(second, Einsum)
    assert (first.guard, second.guard) == (Rank("k") <= Rank("i"), TRUE)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("0 <= q - kv < 4", "(0 <= q - kv) & (q - kv < 4)"),
        ("q >= kv and not kv == 3 or h < 2", "(q >= kv) & not(kv == 3) | (h < 2)"),
        ("-q ** 2", "neg(q ** 2)"),
        ("2 ** -1", "2 ** (-1)"),
        ("2 ** 3 ** 2", "2 ** (3 ** 2)"),
        ("max(q, kv, 3)", "max(max(q, kv), 3)"),
        ("a - b - c", "(a - b) - c"),
        ("~(q < kv) & true", "not(q < kv) & true"),
        ("q *\n kv", "q * kv"),
        ("2 x q", "2 * q"),
        ("ln(q) + sigma(q)", "log(q) + sigmoid(q)"),
    ],
)
def test_spellings(text: str, same: str):
    assert parse_expr(text) == parse_expr(same)


def test_bare_names_are_ranks_extents_scalars_or_inputs():
    cascade = parse("Y = A[k] * B[k]; Z[k] = Y * A[k] / K + c * k")
    ranks, reads = {"k"}, {"A", "B", "c"}
    assert {r.name for r in cascade.ranks} == ranks
    assert {t.name for t in cascade.inputs} == reads
    second = cascade.body[1]
    assert isinstance(second, Einsum)
    product, shift = second.expr.children
    assert product.children[1] == Extent("k")
    assert product.children[0].children[0] == Read("Y", ())
    assert shift == Read("c", ()) * Rank("k")


def test_a_dimension_without_a_name_gets_a_rank():
    cascade = parse("Y[h, m] = K[h // 2, m] + T[P[m]]")
    assert [(t.name, t.ranks) for t in cascade.inputs] == [
        ("K", ("K_0", "m")),
        ("T", ("T_0",)),
        ("P", ("m",)),
    ]
    assert [r.name for r in cascade.ranks] == ["h", "m", "K_0", "T_0"]


def test_a_scalar_that_is_computed_is_no_extent():
    cascade = parse("M = A[m] :: reduce_m max; Y[m] = A[m] / M")
    last = cascade.body[1]
    assert isinstance(last, Einsum)
    assert last.expr == Read("A", (Rank("m"),)) / Read("M", ())


def test_declared_names_win_over_what_would_be_inferred():
    cascade = parse("ranks m, M\ninput K[m, M]\nY[m] = K[m, M] * M")
    (einsum,) = cascade.body
    assert isinstance(einsum, Einsum)
    assert einsum.expr == Read("K", (Rank("m"), Rank("M"))) * Rank("M")


def test_keywords_may_name_tensors():
    cascade = parse("init[m] = input[m] * 2\nstop = init[m]")
    assert [t.name for t in cascade.inputs] == ["input"]
    assert cascade.outputs == ("stop",)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("A[m = 3", (1, 5), "expected ']'"),
        ("A[m] = B[m] C[m]", (1, 13), "expected an operator, '::', 'where' or the end of the line"),
        ("A[m] = B[m]\nB[m] = exq(m)", (2, 8), "unknown function 'exq'"),
        ("A[m] = $", (1, 8), "found '$'"),
        ("A[m] = B[m] :: reduce_m most", (1, 25), "expected a reduction of m"),
        ("A[m] = B[m] :: m max", (1, 16), "expected 'reduce_rank operator'"),
        ("A[m] = where(m, 1)", (1, 8), "where takes 3 argument(s), found 2"),
        ("A[m] = (B[m] +", (1, 15), "expected an expression"),
        ("A[m] = (B[m]", (1, 13), "expected ')'"),
        ("init: A[0] = 1", (1, 5), "expected 'stop: rank >= #rank'"),
        ("stop: m >= #m", (1, 1), "expected an Einsum over m, a loop"),
        ("loop m:\n A[m] = 1\n stop: k >= #k", (3, 2), "the stop condition of rank m"),
        ("loop m:\n stop: m == 3", (2, 14), "'rank < 0' for a descending rank"),
        ("loop m:\nloop k:", (2, 6), "loops do not nest"),
        ("ranks m = many", (1, 11), "a whole number"),
        ("tensor A[m] default m", (1, 21), "the default of A, a number"),
        ("", (1, 1), "expected a cascade"),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_what_was_expected(text: str, where: tuple[int, int], what: str):
    with pytest.raises(CascadeError) as caught:
        parse(text)
    assert f"line {where[0]}, column {where[1]}: " in str(caught.value)
    assert what in str(caught.value)
    assert isinstance(caught.value, AttnRewriteError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("A[m] = B[m] + B[m, k]", "use one number of ranks"),
        ("ranks m, m\nA[m] = B[m]", "rank m is declared twice"),
        ("input B[m]\ninput B[m]\nA[m] = B[m]", "tensor B is declared twice"),
        ("output C\nA[m] = B[m]", "output C is never written"),
    ],
)
def test_what_cannot_be_inferred_is_said(text: str, what: str):
    with pytest.raises(CascadeError, match=what.replace("(", r"\(")):
        parse(text)


@pytest.mark.parametrize("text", ["q +", "q kv", "A[k : k <= i]", "f(", "q)", ""])
def test_bad_expressions_are_errors(text: str):
    with pytest.raises(CascadeError, match="line 1, column"):
        parse_expr(text)


@given(st.text("abm01[](),:;=+-*/ #x\n\"'<>~.&|", max_size=30))
def test_no_text_breaks_the_parser(text: str):
    try:
        cascade = parse(text)
    except CascadeError:
        return
    assert parse(str(cascade)) == cascade


def test_reading_cascades_imports_nothing_heavy():
    code = (
        "import sys; from attn_rewrite import cascade; cascade.NAMED['attention-1pass'];"
        "print(sorted({'torch', 'sympy', 'networkx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_stay_functions():
    from importlib import import_module

    package = import_module("attn_rewrite.cascade")
    for name in package.__all__:
        import_module("attn_rewrite.cascade.oracle")
        assert getattr(package, name) is getattr(package, name)
    assert callable(package.interpret)
    assert callable(package.parse)
    assert callable(package.fuse_reductions)


# --- What a reader of the paper types

SCORES = """
QK[m,p] = Q[e,p] x K[e,m]
GM[p] = QK[m,p] :: reduce_m max
"""


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ("Z[m,n] = A[k,m] . B[k,n] :: map_k x(intersect) reduce_k +(union)",
         "Z[m, n] = A[k, m] * B[k, n] :: reduce_k add"),
        ("Z[m,n] = A[k,m] \N{MULTIPLICATION SIGN} B[k,n] :: \N{N-ARY LOGICAL AND}_k "
         "\N{MULTIPLICATION SIGN}(\N{INTERSECTION}) \N{N-ARY LOGICAL OR}_k +(\N{UNION})",
         "Z[m, n] = A[k, m] * B[k, n] :: reduce_k add"),
        ("Y = A[k] \N{DOT OPERATOR} B[k]", "Y = A[k] * B[k]"),
        ("A[m,p] = SN[m,p] / SD[p] :: map_p /(right present)", "A[m, p] = SN[m, p] / SD[p]"),
        ("SN[m,p] = exp(QK[m,p] - GM[p]) :: map_p -(1)", "SN[m, p] = exp(QK[m, p] - GM[p])"),
        ("GM[p] = QK[m,p] :: \N{LOGICAL OR}_m max(\N{UNION})", "GM[p] = QK[m, p] :: reduce_m max"),
        ("GM[p] = QK[m,p] :: reduce_m(max)", "GM[p] = QK[m, p] :: reduce_m max"),
        ("GM[p] = QK[m,p] :: reduce(m) max", "GM[p] = QK[m, p] :: reduce_m max"),
        ("GM[p] = QK[m,p] :: reduce_m = max", "GM[p] = QK[m, p] :: reduce_m max"),
        ("GM[p] = QK[m : m <= p, p] :: reduce_m max", "GM[p] = QK[m, p] :: reduce_m max where m <= p"),
        ("S[p] = QK[m : |m-p| <= w, p]", "S[p] = QK[m, p] where abs(m - p) <= w"),
        ("S[p] = X[m, p]^2  # squares", "S[p] = X[m, p] ** 2"),
        ("// the scores\nS[p] = X[m, p] // 2  -- halved", "S[p] = X[m, p] // 2"),
        ("tensor GM[p] default=-inf\nGM[p] = QK[m, p] :: reduce_m max",
         "GM[p] = QK[m, p] :: reduce_m max"),
    ],
)  # fmt: skip
def test_spellings_of_the_paper(spelled: str, plain: str):
    assert parse(spelled) == parse(plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Z[n] = A[k] * B[k,n] :: map_k x(union)", "the merge of map_k, which is intersection"),
        ("Z = A[k] :: reduce_k +(intersect)", "the merge of reduce_k, which is union"),
        ("Z[k] = A[k] * B[k] :: map_k max(union)", "an operator of the expression"),
        ("GM[p] = max_m(QK[m,p])", "a reduction stands behind the expression: ':: reduce_m max'"),
        ("A[m,p] = softmax(QK[m,p])", "write it as the Einsums of its max, exp, sum and division"),
        ("GM[p] = QK[m,p] :: reduce_m max    running max", r"a remark starts with --"),
        ("S[0] = 0 ; stop when i >= K", "expected an Einsum over i, a loop or an init block"),
        ("S[p] = |m - p", "'|' or an operator after the absolute value"),
    ],
)
def test_misspellings_are_one_sentence(text: str, message: str):
    with pytest.raises(CascadeError, match=re.escape(message)) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


ITERATIVE = "init: S[0] = 0\nbody: S[i+1] = S[i] + A[i]\nout: Z = S[#i]\nstop: i >= #i"


@pytest.mark.parametrize(
    "text",
    [
        "S[0]=0 ; S[i+1] = S[i] + A[i] ; Z = S[K] ; stop when i >= K",
        "S[0]=0\nS[i+1] = S[i] + A[i]\nZ = S[K]\nstop i >= K",
        "init: S[0]=0\nS[i+1] = S[i] + A[i]\nZ = S[K]\nstop: i >= K",
        "S[0]=0 ; S[i+1] = S[i] + A[i] ; Z = S[K] ; \N{WHITE DIAMOND} i >= K",
    ],
)
def test_iterative_ranks_need_no_labels(text: str):
    cascade = parse(text)
    assert cascade == parse(ITERATIVE)
    x = torch.tensor([1.0, 2.0, 4.0])
    assert interpret(cascade, {"A": x})["Z"].item() == 7.0
    assert count_passes(cascade, "i") == 1


def test_an_unlabelled_loop_keeps_what_stands_around_it():
    cascade = parse("""
        U = D[j]
        S[0] = U
        S[i+1] = S[i] + A[i]
        Z = S[#i] * U
        stop: i >= #i
        """)
    assert [getattr(s, "rank", str(s)[:1]) for s in cascade.body] == ["U", "i", "Z"]
    x = {"D": torch.tensor([1.0, 2.0]), "A": torch.tensor([4.0, 8.0])}
    assert interpret(cascade, x)["Z"].item() == 45.0


@pytest.mark.parametrize("name", ["m", "M", "kv", "KV"])
def test_ranks_answer_to_their_aliases_and_to_capitals(name: str):
    capitals = SCORES.translate(str.maketrans("pe", "PE")).replace("m]", "M]").replace("[m", "[M")
    small, large = parse(SCORES), parse(capitals.replace("rEducE_m", "reduce_M"))
    assert (small.rank(name), large.rank(name)) == ("m", "M")
    assert count_passes(small, name) == count_passes(large, name) == 1
