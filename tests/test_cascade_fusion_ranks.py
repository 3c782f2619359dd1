"""Reductions over a rank beside others that are folded too: two ranks in one Einsum, in any mix."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from attn_rewrite.cascade import Cascade, count_passes, fuse_reductions, interpret, parse
from attn_rewrite.passes.cascade import Fusion
from attn_rewrite.site import Refusal

SIZES = {"n": 7, "k": 3, "j": 4}
INPUTS = {"X": ("n",), "Y": ("n",), "W": ("n", "k"), "C": ("k",), "P": ("k", "n")}


def draw(cascade: Cascade, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        t.name: scale
        * torch.randn([SIZES[r] for r in t.ranks], generator=generator, dtype=torch.float64)
        for t in cascade.inputs
    }


def check(text: str, rule: str) -> Fusion:
    """One pass over n by ``rule``, and the same values."""
    cascade = parse(text)
    result = fuse_reductions(cascade, "n", tile=2)
    assert isinstance(result, Fusion), result
    assert result.passes == 1 < count_passes(cascade, "n")
    assert rule in {p.rule for p in result.proofs}
    same(cascade, result.cascade)
    return result


def same(cascade: Cascade, other: Cascade) -> None:
    for scale in (1.0, 30.0):
        inputs = draw(cascade, 3, scale)
        for name, wanted in interpret(cascade, inputs).items():
            found = interpret(other, inputs)[name]
            finite = wanted[wanted.isfinite()]
            largest = max(float(finite.abs().max()), 1e-3) if finite.numel() else 1.0
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-9 * largest, equal_nan=True)


def test_a_monotone_body_keeps_the_ranks_along_which_its_state_differs() -> None:
    """The maximum of k is taken after each has had its own divisor."""
    result = check(
        "inputs P[k, n]\noutput Y\n"
        "T[k] = P[k, n] :: reduce_n max\n"
        "Y = P[k, n] / (1.5 + T[k] * T[k]) :: reduce_n max, reduce_k max\n",
        "D (monotone)",
    )
    last = result.cascade.producer("Y")
    assert last is not None
    assert last.reduce == (("k", "max"),)


def test_terms_that_fold_ranks_of_their_own_are_summed_apart() -> None:
    """Mixed heads with a bias: one term folds k, the other does not."""
    check(
        "inputs P[k, n], W[j, k], C[j], X[n]\noutput Y\n"
        "SD[k] = P[k, n] * P[k, n]\n"
        "A[k, n] = P[k, n] / SD[k]\n"
        "M[j, n] = W[j, k] * A[k, n]\n"
        "B[j, n] = M[j, n] - C[j]\n"
        "Y[j] = B[j, n] * X[n]\n",
        "linearity",
    )


# Cascades at random


def program(seed: int) -> str:
    """A cascade of three to six Einsums over n and k; later ones read earlier ones."""
    rng = random.Random(seed)
    tensors = list(INPUTS.items())
    decls, body = [], []
    for number in range(rng.randint(3, 6)):
        expr = _expression(rng, [_read(*rng.choice(tensors)) for _ in range(rng.randint(1, 3))])
        ranks = [r for r in ("n", "k") if re.search(rf"[\[ ]{r}[\],]", expr)]
        guard = rng.choice(["", "", "", "", " where n > 1"]) if "n" in ranks else ""
        name, out = f"T{number}", tuple(ranks)
        fold = ""
        if "n" in ranks and rng.random() < 0.55:
            out = tuple(r for r in ranks if r != "n" and rng.random() < 0.7)
            op = rng.choice(["add", "add", "add", "max", "min"])
            fold = " :: " + ", ".join(f"reduce_{r} {op}" for r in ranks if r not in out)
            if op != "add":
                empty = "-inf" if op == "max" else "inf"
                decls.append(f"tensor {_read(name, out)} default {empty}")
        body.append(f"{_read(name, out)} = {expr}{fold}{guard}")
        tensors.append((name, out))
    used = [_read(n, r) for n, r in INPUTS.items() if f"{n}[" in " ".join(body)]
    head = ["ranks n, k", f"inputs {', '.join(used)}", *decls, f"output {tensors[-1][0]}"]
    return "\n".join([*head, *body]) + "\n"


def _read(name: str, ranks: tuple[str, ...]) -> str:
    return f"{name}[{', '.join(ranks)}]"


def _expression(rng: random.Random, reads: list[str]) -> str:
    expr = reads[0]
    for read in reads[1:]:
        form = rng.choice(["{} * {}", "{} + {}", "{} - {}", "{} * {}", "{} / (1.5 + {} * {})"])
        expr = f"({form.format(expr, *[read] * (form.count('{}') - 1))})"
    wrapped = rng.choice(["{}"] * 6 + ["exp(0.3 * {})"] * 3 + ["tanh({})", "relu({})"])
    return wrapped.format(expr)


def test_random_cascades_over_two_ranks() -> None:
    """Whatever is fused computes the same; of those with several passes a third or more is."""
    found: Counter[str] = Counter()
    for seed in range(120):
        cascade = parse(program(seed))
        result = fuse_reductions(cascade, "n", tile=1 + seed % 3)
        if isinstance(result, Refusal):
            assert result.reason
            found["refused"] += 1
        elif result.passes < result.passes_before:
            same(cascade, result.cascade)
            found["fused"] += 1
    assert found["fused"] > 0.3 * (found["fused"] + found["refused"]), found


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 400))
def test_more_random_cascades_over_two_ranks(start: int) -> None:
    for seed in range(start, start + 400):
        cascade = parse(program(seed))
        result = fuse_reductions(cascade, "n", tile=1 + seed % 3)
        if isinstance(result, Fusion) and result.passes < result.passes_before:
            same(cascade, result.cascade)
