"""Pass counting: the known answers of the paper's cascades, written by hand from `ir` nodes."""

from __future__ import annotations

import pytest
import sympy

from attn_rewrite.cascade.count import (
    count_passes,
    live_footprint,
    operation_counts,
    pass_analysis,
    rank_symbol,
)
from attn_rewrite.cascade.expr import Const, Expr, Extent, Rank, Read, call
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, TensorDecl
from attn_rewrite.cascade.named import NAMED
from attn_rewrite.cascade.operations import WORD, total_operations
from attn_rewrite.cascade.text import parse
from attn_rewrite.errors import CascadeError

K, M, P, E, F, M1, M0, N = (Rank(n) for n in ("k", "m", "p", "e", "f", "m1", "m0", "n"))


def t(name: str, *index: Expr | int) -> Read:
    return Read(name, tuple(Const(i) if isinstance(i, int) else i for i in index))


def cascade(
    *body: Einsum | Loop, inputs: dict[str, str], ranks: str, outputs: str, parts=None
) -> Cascade:
    parts = parts or {}
    return Cascade(
        "test",
        tuple(RankDecl(r, parts=parts.get(r, ())) for r in ranks.split()),
        tuple(TensorDecl(n, tuple(r.split())) for n, r in inputs.items()),
        body,
        tuple(outputs.split()),
    )


MAX_M, QKV = (("m", "max"),), {"Q": "e p", "K": "e m", "V": "f m"}
qk, gm, sn, sd, a, av = (
    t("QK", M, P),
    t("GM", P),
    t("SN", M, P),
    t("SD", P),
    t("A", M, P),
    t("AV", F, P),
)
q, k, v, snv = t("Q", E, P), t("K", E, M), t("V", F, M), t("SNV", F, P)
SCORES = (
    Einsum(qk, q * k),
    Einsum(gm, qk, MAX_M),
    Einsum(sn, call("exp", qk - gm)),
    Einsum(sd, sn),
)
UNSTABLE = (Einsum(qk, q * k), Einsum(sn, call("exp", qk)), Einsum(sd, sn))
NORMALISE = (Einsum(a, sn / sd), Einsum(av, a * v))
DEFERRED = (Einsum(snv, sn * v), Einsum(av, snv / sd))


def attention(*body: Einsum, outputs: str = "AV") -> Cascade:
    return cascade(*body, inputs=QKV, ranks="m p e f", outputs=outputs)


def pedagogical(which: int) -> Cascade:
    y, z, x, ak, bk = t("Y"), t("Z"), t("X"), t("A", K), t("B", K)
    bodies = {
        1: (Einsum(y, ak * bk), Einsum(z, y * ak)),
        2: (Einsum(y, ak * bk), Einsum(x, ak), Einsum(z, y * x)),
    }
    if which != 3:
        return cascade(*bodies[which], inputs={"A": "k", "B": "k"}, ranks="k", outputs="Z")
    ry, rz, ry1, rz1 = t("RY", K), t("RZ", K), t("RY", K + 1), t("RZ", K + 1)
    loop = Loop(
        "k",
        (Einsum(t("RY", 0), Const(0.0)), Einsum(t("RZ", 0), Const(0.0))),
        (Einsum(ry1, ry + ak * bk), Einsum(rz1, rz * ry1 / ry + ry1 * ak)),
    )
    last = Einsum(z, t("RZ", Extent("k")))
    return cascade(loop, last, inputs={"A": "k", "B": "k"}, ranks="k", outputs="Z")


PARTS = {"m": ("m1", "m0")}
FLAT = M1 * Extent("m0") + M0
bqk, lm, sln, sld = t("BQK", M1, M0, P), t("LM", M1, P), t("SLN", M1, M0, P), t("SLD", M1, P)
bk, bv = t("BK", E, M1, M0), t("BV", F, M1, M0)
TILES = (Einsum(bk, t("K", E, FLAT)), Einsum(bv, t("V", F, FLAT)))


def two_pass(deferred: bool) -> Cascade:
    plm, a2 = t("PLM", M1, P), t("A", M1, M0, P)
    head = (
        *TILES,
        Einsum(bqk, q * bk),
        Einsum(lm, bqk, (("m0", "max"),)),
        Einsum(gm, lm, (("m1", "max"),)),
        Einsum(sln, call("exp", bqk - lm)),
        Einsum(sld, sln),
        Einsum(plm, call("exp", lm - gm)),
        Einsum(sd, sld * plm),
    )
    plain = (Einsum(a2, sln * plm / sd), Einsum(av, a2 * bv))
    late = (Einsum(snv, sln * plm * bv), Einsum(av, snv / sd))
    body = (*head, *(late if deferred else plain))
    return cascade(*body, inputs=QKV, ranks="m m1 m0 p e f", outputs="AV", parts=PARTS)


def one_pass() -> Cascade:
    """Cascade 5 of the paper."""

    def state(name: str, *rest: Expr) -> tuple[Read, Read, Read, Read]:
        return tuple(t(name, *rest, i, P) for i in (Const(0), M1, M1 + 1, Extent("m1")))

    rm0, rm, rm1, _ = state("RM")
    rd0, rd, rd1, rd_end = state("RD")
    rv0, rv, rv1, rv_end = state("RNV", F)
    slnv, prm, spd, spnv = (
        t("SLNV", F, M1, P),
        t("PRM", M1, P),
        t("SPD", M1, P),
        t("SPNV", F, M1, P),
    )
    init = (Einsum(rm0, Const(float("-inf"))), Einsum(rd0, Const(0.0)), Einsum(rv0, Const(0.0)))
    body = (
        Einsum(bqk, q * bk),
        Einsum(lm, bqk, (("m0", "max"),)),
        Einsum(rm1, call("max", rm, lm)),
        Einsum(sln, call("exp", bqk - rm1)),
        Einsum(sld, sln),
        Einsum(slnv, sln * bv),
        Einsum(prm, call("exp", rm - rm1)),
        Einsum(spd, rd * prm),
        Einsum(rd1, sld + spd),
        Einsum(spnv, rv * prm),
        Einsum(rv1, slnv + spnv),
    )
    last = Einsum(av, rv_end / rd_end)
    return cascade(
        *TILES,
        Loop("m1", init, body),
        last,
        inputs=QKV,
        ranks="m m1 m0 p e f",
        outputs="AV",
        parts=PARTS,
    )


THREE = attention(*SCORES, *NORMALISE)
OVER_QUERIES = attention(
    Einsum(qk, q * k),
    Einsum(t("CM", M), qk, (("p", "max"),)),
    Einsum(sn, call("exp", qk - t("CM", M))),
    Einsum(t("CD", M), sn),
    Einsum(a, sn / t("CD", M)),
    Einsum(av, a * v),
)


@pytest.mark.parametrize(
    ("built", "rank", "passes"),
    [
        (pedagogical(1), "k", 2),
        (pedagogical(2), "k", 1),
        (pedagogical(3), "k", 1),
        (THREE, "m", 3),
        (THREE, "p", 1),
        (THREE, "e", 1),
        (attention(*SCORES, *DEFERRED), "m", 2),
        (attention(*UNSTABLE, *NORMALISE), "m", 2),
        (attention(*UNSTABLE, *DEFERRED), "m", 1),
        (two_pass(False), "m", 2),
        (two_pass(True), "m", 2),
        (one_pass(), "m", 1),
        (one_pass(), "m0", 2),
        (attention(Einsum(qk, q * k), Einsum(a, call("sigmoid", qk)), Einsum(av, a * v)), "m", 1),
        (OVER_QUERIES, "p", 3),
        (OVER_QUERIES, "m", 1),
    ],
)
def test_known_answers(built: Cascade, rank: str, passes: int) -> None:
    assert count_passes(built, rank) == passes


def test_three_pass_details() -> None:
    found = pass_analysis(THREE, "kv")
    assert found.rank == "m"
    assert found.pass_of == {"QK": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "AV": 3}
    assert {n: found.tensor_passes[n] for n in ("K", "QK", "SN", "V")} == {
        "K": 3,
        "QK": 3,
        "SN": 2,
        "V": 1,
    }
    assert set(found.barriers) == {("GM", "SN"), ("SD", "A")}
    assert found.live == ("QK", "SN")


def test_pedagogical_tensors_differ() -> None:
    assert pass_analysis(pedagogical(1), "k").tensor_passes == {"A": 2, "B": 1}


def test_deferral_leaves_only_the_scores_live() -> None:
    assert live_footprint(attention(*SCORES, *DEFERRED), "m") == ("QK",)


def test_one_pass_has_no_live_fiber() -> None:
    found = pass_analysis(one_pass(), "m")
    assert found.live == ()
    assert found.barriers == ()
    assert set(found.pass_of.values()) == {1}


def test_levels_of_summaries_do_not_count() -> None:
    """PLM and SD touch data of the size of M1 only: levels 1 and 3, hence two passes."""
    found = pass_analysis(two_pass(False), "m")
    assert set(found.pass_of.values()) == {1, 3}
    assert "PLM" not in found.pass_of
    assert set(pass_analysis(two_pass(True), "m").pass_of.values()) == {1, 2}


@pytest.mark.parametrize("steps", [1, 4])
def test_newton_steps_of_entmax_add_a_pass_each(steps: int) -> None:
    tau, tau1 = t("TAU", N, P), t("TAU", N + 1, P)
    support, total = t("X", N, M, P), t("G", N, P)
    newton = Loop(
        "n",
        (Einsum(t("TAU", 0, P), gm - 1.0),),
        (
            Einsum(support, call("max", qk - tau, 0.0)),
            Einsum(total, support),
            Einsum(tau1, tau + total - 1.0),
        ),
    )
    last = (Einsum(a, call("max", qk - t("TAU", Extent("n"), P), 0.0)), Einsum(av, a * v))
    built = Cascade(
        "entmax",
        (RankDecl("m"), RankDecl("p"), RankDecl("e"), RankDecl("f"), RankDecl("n", size=steps)),
        tuple(TensorDecl(n, tuple(r.split())) for n, r in QKV.items()),
        (*SCORES[:2], newton, *last),
        ("AV",),
    )
    assert count_passes(built, "m") == steps + 2


def test_a_descending_scan_is_one_pass() -> None:
    """Stick-breaking sums over later keys: a descending loop streams, an ascending one cannot."""
    beta, carry = t("B", M, P), t("RS", M, P)
    body = (
        Einsum(qk, q * k),
        Einsum(beta, call("sigmoid", qk)),
        Einsum(carry, t("RS", M + 1, P) + call("log", 1.0 - beta)),
        Einsum(a, beta * call("exp", t("RS", M + 1, P))),
    )
    init = (Einsum(t("RS", Extent("m"), P), Const(0.0)),)
    fine = cascade(
        Loop("m", init, body, descending=True),
        Einsum(av, a * v),
        inputs=QKV,
        ranks="m p e f",
        outputs="AV",
    )
    assert count_passes(fine, "m") == 1
    wrong = cascade(
        Loop("m", init, body), Einsum(av, a * v), inputs=QKV, ranks="m p e f", outputs="AV"
    )
    with pytest.raises(CascadeError, match="RS"):
        count_passes(wrong, "m")


def test_cycle_is_named() -> None:
    x, y = t("X", M), t("Y")
    broken = cascade(
        Einsum(x, t("K", E, M) * y), Einsum(y, x), inputs={"K": "e m"}, ranks="m e", outputs="Y"
    )
    with pytest.raises(CascadeError, match=r"Y -> X -> Y|X -> Y -> X"):
        count_passes(broken, "m")


def test_cycle_within_one_step_is_rejected() -> None:
    x, y = t("X", M), t("Y", M)
    broken = cascade(Einsum(x, y + 1.0), Einsum(y, x * 2.0), inputs={}, ranks="m", outputs="Y")
    with pytest.raises(CascadeError, match="comes first"):
        count_passes(broken, "m")


def test_guards_that_read_a_statistic_wait_for_it() -> None:
    """A top-k threshold in the guard is a dependence like any other."""
    thresholded = attention(
        Einsum(qk, q * k), Einsum(gm, qk, MAX_M), Einsum(snv, qk * v, (), qk >= gm), outputs="SNV"
    )
    assert count_passes(thresholded, "m") == 2


def test_a_gathered_intermediate_needs_all_of_it() -> None:
    table = t("T", M)
    built = attention(
        Einsum(qk, q * k), Einsum(sn, t("QK", table, P) * 2.0), Einsum(snv, sn * v), outputs="SNV"
    )
    assert count_passes(built, "m") == 2
    inputs_only = attention(Einsum(qk, q * t("K", E, table)), Einsum(snv, qk * v), outputs="SNV")
    assert count_passes(inputs_only, "m") == 1


def test_unknown_rank_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no rank 'zz'"):
        count_passes(THREE, "zz")


def extents(*names: str) -> list[sympy.Symbol]:
    return [rank_symbol(n) for n in names]


def test_operation_table() -> None:
    m, p, e, f, m1, m0 = extents("m", "p", "e", "f", "m1", "m0")
    three = total_operations(operation_counts(THREE))
    assert three == {
        "mac": sympy.expand((e + f) * m * p), "max": m * p, "exp": m * p, "add": m * p,
        "mul": 0, "div": m * p, "other": 0,
    }  # fmt: skip
    deferred = total_operations(operation_counts(attention(*SCORES, *DEFERRED)))
    assert deferred == {**three, "div": f * p}
    tiled = m1 * m0
    assert total_operations(operation_counts(one_pass())) == {
        "mac": sympy.expand((e + f) * tiled * p),
        "max": tiled * p + m1 * p,
        "exp": tiled * p + m1 * p,
        "add": tiled * p + m1 * p + f * m1 * p,
        "mul": m1 * p + f * m1 * p,
        "div": f * p,
        "other": 0,
    }


def test_bytes_follow_the_declared_ranks() -> None:
    m, p, e, f = extents("m", "p", "e", "f")
    word = sympy.Symbol("word", positive=True, integer=True)
    cost = {c.tensor: c for c in operation_counts(THREE)}
    assert sympy.expand(cost["QK"].bytes_read - word * (e * p + e * m)) == 0
    assert cost["QK"].bytes_written == word * m * p
    assert sympy.expand(cost["AV"].bytes_read - word * (m * p + f * m)) == 0


def test_a_solver_step_repeats_its_work_and_its_reads() -> None:
    """A Newton step of sparsemax reads the scores again; a stored mean of inputs does not."""
    m, n, p = extents("m", "n", "p")
    cost = {c.tensor: c for c in operation_counts(NAMED["sparsemax"])}
    assert cost["R"].operations["add"] == 2 * m * n * p  # subtract and sum, in every step
    assert sympy.expand(cost["R"].bytes_read - (m * n * p + n * p) * WORD) == 0
    assert cost["R"].bytes_written == n * p * WORD
    # The same solver with a threshold that each step overwrites.
    text = """
        loop n:
          init:
            TAU[p] = 0.0
          body:
            MEAN = c[k]
            R[p] = relu(X[m, p] - TAU[p])
            TAU[p] = TAU[p] + R[p] - 1.0 * MEAN
          stop: n >= #n
        Y[p] = 1.0 * TAU[p]
        """
    cost = {c.tensor: c for c in operation_counts(parse(text))}
    assert cost["R"].operations["add"] == 2 * m * n * p
    assert sympy.expand(cost["R"].bytes_read - (m * n * p + n * p) * WORD) == 0
    assert cost["TAU"].bytes_written == n * p * WORD
    assert cost["MEAN"].operations["add"] == rank_symbol("k")


def test_a_streamed_operand_is_read_once() -> None:
    """The steps of cascade 5 walk through the keys; they do not read all of them again."""
    cost = {c.tensor: c for c in operation_counts(NAMED["attention-1pass"])}
    m1, m0, p, e = extents("m1", "m0", "p", "e")
    assert sympy.expand(cost["BQK"].bytes_read - (e * m1 * m0 + e * p) * WORD) == 0
