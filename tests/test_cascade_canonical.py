"""Equality of cascades up to names and order, differences, and pictures."""

from __future__ import annotations

import random
import re

import pytest
import torch

from attn_rewrite.cascade import NAMED, interpret, parse
from attn_rewrite.cascade.canonical import diff, equivalent, normal_form
from attn_rewrite.cascade.expr import Call, Expr, Rank, transform
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, Statement
from attn_rewrite.cascade.rename import Names

COMMUTATIVE = {"add", "mul", "max", "min", "and", "or", "eq", "ne"}
MIRROR = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def shuffled(cascade: Cascade, seed: int) -> Cascade:
    """Other names for ranks and intermediates, swapped operands and declarations."""
    r = random.Random(seed)
    kept = {t.name for t in cascade.inputs} | set(cascade.outputs)
    tensors = sorted({e.out.tensor for e in cascade.einsums()} - kept)
    names = [f"n{i}" for i in range(len(tensors))]
    r.shuffle(names)
    ranks = [x.name for x in cascade.ranks]
    others = [f"k{i}" for i in range(len(ranks))]
    r.shuffle(others)
    new = Names(dict(zip(ranks, others, strict=True)), dict(zip(tensors, names, strict=True)))
    cascade = new.cascade(cascade)

    def swap(node: Expr) -> Expr | None:
        if isinstance(node, Call) and r.random() < 0.5:
            if node.op in COMMUTATIVE:
                return Call(node.op, node.args[::-1])
            if node.op in MIRROR:
                return Call(MIRROR[node.op], node.args[::-1])
        return None

    def einsum(e: Einsum) -> Einsum:
        return Einsum(e.out, transform(e.expr, swap), e.reduce, transform(e.guard, swap))

    def statement(s: Statement) -> Statement:
        if isinstance(s, Einsum):
            return einsum(s)
        return Loop(s.rank, tuple(map(einsum, s.init)), tuple(map(einsum, s.body)), s.descending)

    declarations = {n: list(getattr(cascade, n)) for n in ("ranks", "inputs", "tensors")}
    for found in declarations.values():
        r.shuffle(found)
    return Cascade(
        "other",
        tuple(declarations["ranks"]),
        tuple(declarations["inputs"]),
        tuple(map(statement, cascade.body)),
        cascade.outputs,
        tuple(declarations["tensors"]),
    )


@pytest.mark.parametrize("name", list(NAMED))
def test_names_and_operand_order_do_not_matter(name: str):
    cascade = NAMED[name]
    for seed in range(2):
        other = shuffled(cascade, seed)
        assert normal_form(other) == normal_form(cascade)
        assert equivalent(cascade, other)
    assert normal_form(normal_form(cascade)) == normal_form(cascade)


def test_no_two_named_cascades_are_equivalent():
    forms = {normal_form(c) for c in NAMED.values()}
    assert len(forms) == len(NAMED)


def test_the_normal_form_computes_the_same_numbers():
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(s, generator=g) for n, s in {"Q": (3, 4), "K": (3, 7), "V": (2, 7)}.items()}
    for name in ("attention-1pass", "causal", "stick-breaking-1pass", "linear-attention"):
        got, want = (interpret(c, x)["AV"] for c in (normal_form(NAMED[name]), NAMED[name]))
        assert (got - want).abs().max() <= 64 * torch.finfo(torch.float64).eps * want.abs().max()


FILTERED = "T = A[i : i > 1]; U = A[i : i > 5]; "


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Y[i] = A[i] - B[i]", "Y[i] = B[i] - A[i]", False),
        ("Y[i] = A[i] + B[i]", "Y[k] = B[k] + A[k]", True),
        ("Y[i] = max(A[i], max(B[i], 1))", "Y[i] = max(max(1, A[i]), B[i])", True),
        ("Y[i] = (A[i] + B[i]) + C[i]", "Y[i] = A[i] + (B[i] + C[i])", False),  # rounds differently
        ("Y[i] = A[i, k]", "Y[i] = A[i, k] :: reduce_k add", True),
        ("Y[i] = A[i, k]", "Y[i] = A[i, k] :: reduce_k max", False),
        ("Y[i] = A[i, k]", "Y[i] = A[k, i]", False),
        ("Y[i] = A[i, k] where k < i", "Y[i] = A[i, k] where i > k", True),
        ("Y[i] = A[i, k] where k < i", "Y[i] = A[i, k] where k <= i", False),
        ("Y[i] = A[i] where i < 3 & i > 1", "Y[i] = A[i]", False),
        ("Y[i] = 1 * A[i]", "Y[i] = 1.0 * A[i]", False),
        ("T = A[i]; U = B[i]; Y = T * U", "X = B[i]; W = A[i]; Y = W * X", True),
        (FILTERED + "Y = T / U", "W = A[k : k > 5]; X = A[k : k > 1]; Y = X / W", True),
        (FILTERED + "Y = T / U", "W = A[k : k > 5]; X = A[k : k > 1]; Y = W / X", False),
        ("T = A[i]; U = B[i]; Y = T / U", "T = B[i]; U = A[i]; Y = T / U", False),
        ("tensor T default 1\nT = A[i] where i > 1; Y = T", "T = A[i] where i > 1; Y = T", False),
        ("rank i = 3\nY[i] = A[i]", "Y[i] = A[i]", False),
        ("Y[i] = A[i]", "Z[i] = A[i]", False),
    ],
)  # fmt: skip
def test_what_equality_sees(left: str, right: str, same: bool):
    assert equivalent(parse(left), parse(right)) is same


def test_diff_of_equal_cascades_is_empty():
    assert diff(NAMED["causal"], NAMED["causal"]) == ""


def test_diff_shows_the_statements_that_changed():
    assert diff(NAMED["attention-3pass"], NAMED["attention-3pass-deferred"]).splitlines() == [
        "cascade attention-3pass -> attention-3pass-deferred",
        "  (8 unchanged)",
        "- A[m, p] = SN[m, p] / SD[p]",
        "- AV[f, p] = A[m, p] * V[f, m]",
        "+ SNV[f, p] = SN[m, p] * V[f, m]",
        "+ AV[f, p] = SNV[f, p] / SD[p]",
    ]


def test_diff_lists_renamings_apart_from_changes():
    text = str(NAMED["attention-3pass"])
    for old, new in (("m", "key"), ("reduce_m", "reduce_key"), ("QK", "SCORE")):
        text = re.sub(rf"\b{old}\b", new, text)
    changed = text.replace("exp(SCORE[key, p] - GM[p])", "exp(SCORE[key, p])")
    assert diff(NAMED["attention-3pass"], parse(text)).splitlines() == [
        "cascade attention-3pass",
        "  key is called m in attention-3pass",
        "  SCORE is called QK in attention-3pass",
        "  the same up to names",
    ]
    lines = diff(NAMED["attention-3pass"], parse(changed)).splitlines()
    assert [line for line in lines if line[0] in "+-"] == [
        "- SN[m, p] = exp(QK[m, p] - GM[p])",
        "+ SN[m, p] = exp(QK[m, p])",
    ]


def test_diff_of_two_names_that_changed_places():
    a = parse("T = A[i]; U = B[i]; Y = T / U")
    b = parse("U = A[i]; T = B[i]; Y = U / T")
    assert "the same up to names" in diff(a, b)
    assert not [line for line in diff(a, b).splitlines() if line[0] in "+-"]


def test_equality_of_expressions_in_a_mask_is_refused() -> None:
    """``==`` compares trees: its truth value in a mask would silently be another mask."""
    q, kv = Rank("q"), Rank("kv")
    for combine in (lambda: (q - kv < 3) | (kv == 0), lambda: (q == kv) & (q >= kv)):
        with pytest.raises(TypeError, match=r"say eq\(a, b\)"):
            combine()
