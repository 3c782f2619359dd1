"""Worked cascades of quantised and reordered attention: types with scales, index maps, defaults.

Each is written as text, printed and read back, interpreted against a dense formula by hand, renamed,
compared, fused to one pass and run as plain torch operators.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_rewrite.backends.torch import lower_cascade_to_callable
from attn_rewrite.cascade import Cascade, count_passes, fuse_reductions, interpret, parse
from attn_rewrite.cascade.canonical import diff, equivalent
from attn_rewrite.passes.cascade import Fusion

P, M, E, F = 6, 10, 4, 3
EPS = torch.finfo(torch.float64).eps
Tensors = dict[str, Tensor]

SOFTMAX = """
GM[p] = S[m, p] :: reduce_m max
SN[m, p] = exp(S[m, p] - GM[p])
SD[p] = SN[m, p]
AV[f, p] = SN[m, p] * {v} / SD[p]
"""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(seed: int, *shape: int) -> Tensor:
    return torch.randint(
        -127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )


def attention(scores: Tensor, v: Tensor) -> Tensor:
    """AV[f, p] of scores [m, p] and values [f, m], float64."""
    return v.double() @ torch.softmax(scores.double(), 0)


# Scales of blocks of four queries and five keys: their ranks are read at p // 4 and m // 5.
BLOCK_SCALES = """
cascade int8-blocks
input Q[e, p] dtype i8 scale QS
input K[e, m] dtype i8 scale KS
input V[f, m]
input QS[pb] sign positive
input KS[mb] sign positive
tensor DOT[m, p] dtype i32
tensor GM[p] default -inf
output AV
DOT[m, p] = Q[e, p] * K[e, m]
S[m, p] = DOT[m, p] * QS[p // 4] * KS[m // 5] / sqrt(#e)
""" + SOFTMAX.format(v="V[f, m]")

# The same keys in tiles: a scale for each outer coordinate of the partition.
TILE_SCALES = """
cascade int8-tiles
ranks p, m (m1, m0), m1, m0 = 4, e, f
input Q[e, p] dtype i8 scale QS
input K[e, m] dtype i8 scale KS
input V[f, m] dtype i8 scale VS
inputs QS[p], KS[m1], VS[m1, f]
tensor DOT[m1, m0, p] dtype i32
tensor GM[p] default -inf
output AV
DOT[m1, m0, p] = Q[e, p] * K[e, m1 * #m0 + m0]
S[m1, m0, p] = DOT[m1, m0, p] * QS[p] * KS[m1]
LM[m1, p] = S[m1, m0, p] :: reduce_m0 max
GM[p] = LM[m1, p] :: reduce_m1 max
SN[m1, m0, p] = exp(S[m1, m0, p] - GM[p])
SD[p] = SN[m1, m0, p]
AV[f, p] = SN[m1, m0, p] * V[f, m1 * #m0 + m0] * VS[m1, f] / SD[p]
"""

# Keys and values in another order, masked by the positions they come from.
PERMUTED = """
cascade permuted
ranks p, m, e, f
inputs Q[e, p], K[e, m], V[f, m]
input order[m] dtype i64
tensor GM[p] default -inf
tensor S[m, p] default -inf
output AV
QK[m, p] = Q[e, p] * K[e, order[m]]
S[m, p] = QK[m, p] where order[m] <= p
""" + SOFTMAX.format(v="V[f, order[m]]")

# Keys every second place from the third on, an affine map.
STRIDED = """
cascade strided
ranks p, m = 4, e, f, n
inputs Q[e, p], K[e, n], V[f, n]
tensor GM[p] default -inf
output AV
S[m, p] = Q[e, p] * K[e, 2 * m + 2]
""" + SOFTMAX.format(v="V[f, 2 * m + 2]")

# Empty scores have a value of their own: a filtered key counts as a score of -1.
DEFAULTED = """
cascade defaulted
ranks p, m, e, f
inputs Q[e, p], K[e, m], V[f, m]
tensor S[m, p] default -1.0
tensor GM[p] default -inf
output AV
QK[m, p] = Q[e, p] * K[e, m]
S[m, p] = QK[m, p] where m <= p
""" + SOFTMAX.format(v="V[f, m]")


def block_scales() -> tuple[Tensors, Tensor]:
    x = {"Q": codes(1, E, P), "K": codes(2, E, M), "V": draw(3, F, M)}
    x |= {"QS": draw(4, 2).abs() / 100, "KS": draw(5, 2).abs() / 100}
    q = x["Q"].double() * x["QS"].repeat_interleave(4)[:P]
    k = x["K"].double() * x["KS"].repeat_interleave(5)
    return x, attention(k.T @ q / E**0.5, x["V"])


def tile_scales() -> tuple[Tensors, Tensor]:
    x = {"Q": codes(1, E, P), "K": codes(2, E, M), "V": codes(3, F, M)}
    x |= {"QS": draw(4, P) / 100, "KS": draw(5, 3) / 100, "VS": draw(6, 3, F)}
    q = x["Q"].double() * x["QS"]
    k = x["K"].double() * x["KS"].repeat_interleave(4)[:M]
    v = x["V"].double() * x["VS"].repeat_interleave(4, 0)[:M].T
    return x, attention(k.T @ q, v)


def permuted() -> tuple[Tensors, Tensor]:
    x = {"Q": draw(1, E, P), "K": draw(2, E, M), "V": draw(3, F, M)}
    x["order"] = torch.randperm(M, generator=torch.Generator().manual_seed(4))
    keep = torch.arange(M)[:, None] <= torch.arange(P)
    return x, attention((x["K"].T @ x["Q"]).masked_fill(~keep, -torch.inf), x["V"])


def strided() -> tuple[Tensors, Tensor]:
    x = {"Q": draw(1, E, P), "K": draw(2, E, M), "V": draw(3, F, M)}
    picked = torch.tensor([2, 4, 6, 8])
    return x, attention(x["K"][:, picked].T @ x["Q"], x["V"][:, picked])


def defaulted() -> tuple[Tensors, Tensor]:
    x = {"Q": draw(1, E, P), "K": draw(2, E, M), "V": draw(3, F, M)}
    keep = torch.arange(M)[:, None] <= torch.arange(P)
    return x, attention((x["K"].T @ x["Q"]).masked_fill(~keep, -1.0), x["V"])


CASES: dict[str, tuple[str, Callable[[], tuple[Tensors, Tensor]]]] = {
    "block scales": (BLOCK_SCALES, block_scales),
    "tile scales": (TILE_SCALES, tile_scales),
    "permuted": (PERMUTED, permuted),
    "strided": (STRIDED, strided),
    "defaulted": (DEFAULTED, defaulted),
}


def close(found: Tensor, wanted: Tensor, eps: float = EPS) -> None:
    bound = 64 * eps * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("name", CASES)
def test_text_round_trip_and_oracle(name: str) -> None:
    text, case = CASES[name]
    cascade, (x, wanted) = parse(text), case()
    assert parse(str(cascade)) == cascade
    close(interpret(cascade, x)["AV"], wanted)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_form_equals_it(name: str) -> None:
    text, case = CASES[name]
    cascade, (x, wanted) = parse(text), case()
    assert count_passes(cascade, "m") > 1
    for tile in (1, 3, 64):
        result = fuse_reductions(cascade, "m", tile=tile)
        assert isinstance(result, Fusion), str(result)
        assert (result.passes, result.refusals) == (1, ())
        assert parse(str(result.cascade)) == result.cascade
        close(interpret(result.cascade, x)["AV"], wanted)


@pytest.mark.parametrize("name", CASES)
def test_it_runs_as_torch_operators(name: str) -> None:
    text, case = CASES[name]
    x, wanted = case()
    eps = torch.finfo(torch.float32).eps  # codes come first, so the arithmetic is float32
    close(lower_cascade_to_callable(parse(text))(x)["AV"], wanted, eps)


@pytest.mark.parametrize("name", CASES)
def test_other_names_are_the_same_cascade(name: str) -> None:
    cascade = parse(CASES[name][0])
    renamed = parse(CASES[name][0].replace("SN[", "W[").replace("[p]", "[row]").replace(
        "p]", "row]").replace("p //", "row //").replace("<= p", "<= row").replace(
        "ranks p", "ranks row"))  # fmt: skip
    assert renamed != cascade
    assert equivalent(renamed, cascade)
    assert "the same up to names" in diff(cascade, renamed)


def changed(old: str, new: str, cascade: str = PERMUTED) -> str:
    assert old in cascade
    return diff(parse(cascade), parse(cascade.replace(old, new)))


@pytest.mark.parametrize(
    ("cascade", "old", "new", "lines"),
    [
        (PERMUTED, "V[f, order[m]]", "V[f, m]",
         ["- AV[f, p] = SN[m, p] * V[f, order[m]] / SD[p]", "+ AV[f, p] = SN[m, p] * V[f, m] / SD[p]"]),
        (BLOCK_SCALES, "m // 5", "m // 2", ["KS[m // 2]"]),
        (BLOCK_SCALES, "input K[e, m] dtype i8 scale KS", "input K[e, m] dtype bf16 scale KS",
         ["- input K[e, m] dtype i8 scale KS", "+ input K[e, m] dtype bf16 scale KS"]),
        (DEFAULTED, "default -1.0", "default -2.0", ["+ tensor S[m, p] default -2.0"]),
        (STRIDED, "K[e, 2 * m + 2]", "K[e, 2 * m + 1]", ["+ S[m, p] = Q[e, p] * K[e, 2 * m + 1]"]),
    ],
)  # fmt: skip
def test_a_difference_is_one_line(cascade: str, old: str, new: str, lines: list[str]) -> None:
    text = changed(old, new, cascade)
    assert not equivalent(parse(cascade), parse(cascade.replace(old, new)))
    for line in lines:
        assert line in text
    assert sum(t[:2] in ("+ ", "- ") for t in text.splitlines()) == 2


def test_populate_through_a_table_puts_queries_back() -> None:
    """Queries were reordered; their results go to the places they came from."""
    cascade = parse("""
        inputs O[f, p]
        input place[p] dtype i64
        tensor AV[f, p]
        output AV
        AV[f, place[p]] = O[f, p]
        """)
    assert parse(str(cascade)) == cascade
    place = torch.tensor([2, 0, 3, 1])
    x = {"O": draw(1, 2, 4), "place": place}
    assert torch.equal(interpret(cascade, x)["AV"][:, place], x["O"])


def test_points_that_land_together_are_folded() -> None:
    """A histogram by populate: the largest score of each block of three keys."""
    cascade = parse("""
        inputs X[m]
        tensor TOP[mb] default -inf
        TOP[m // 3] = X[m] :: reduce_m max
        """)
    x = torch.tensor([1.0, 5.0, 2.0, -1.0, -4.0, -2.0, 7.0])
    assert interpret(cascade, {"X": x}, {"mb": 3})["TOP"].tolist() == [5.0, -1.0, 7.0]


def test_merges_decide_which_points_are_touched() -> None:
    """Products touch common points, sums all of either, quotients those where the divisor is."""
    a, b = torch.tensor([2.0, 0.0, 3.0]), torch.tensor([4.0, 5.0, 0.0])
    for text, wanted in {
        "Z[k] = A[k] x B[k] :: map_k x(intersect)": [8.0, 0.0, 0.0],
        "Z[k] = A[k] + B[k] :: map_k +(union)": [6.0, 5.0, 3.0],
        "Z[k] = A[k] / B[k] :: map_k /(right)": [0.5, 0.0, 0.0],
        "Z[k] = exp(A[k] - B[k]) :: map_k -(1)": [2.718281828459045**-2, 2.718281828459045**-5,
                                                  2.718281828459045**3],
    }.items():  # fmt: skip
        close(
            interpret(parse(text), {"A": a, "B": b})["Z"], torch.tensor(wanted, dtype=torch.float64)
        )


def test_untouched_points_keep_the_default() -> None:
    cascade: Cascade = parse("tensor Z[k] default 7.0\nZ[k] = A[k] / B[k] where k > 0")
    x = {"A": torch.tensor([1.0, 6.0, 1.0]), "B": torch.tensor([1.0, 2.0, 0.0])}
    assert interpret(cascade, x)["Z"].tolist() == [7.0, 3.0, 7.0]
