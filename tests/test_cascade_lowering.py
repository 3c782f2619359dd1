"""Any cascade as plain torch operators: what the oracle says, named ones and others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_rewrite.cascade import (
    NAMED,
    Cascade,
    fuse_reductions,
    interpret,
    lower_cascade_to_callable,
    parse,
    partition_rank,
)
from attn_rewrite.passes.cascade import Fusion

SIZES = {"p": 5, "m": 11, "e": 3, "f": 2, "h": 4, "g": 4, "d": 15, "s": 3, "pb": 3, "mb": 4, "k": 6}
SMALL = {"size": 4, "sinks": 2, "keep": 0.75, "alpha": 1.5, "zeta": 1.1, "gamma": -0.1, "power": 2}


def inputs_of(cascade: Cascade, seed: int = 0) -> dict[str, Tensor]:
    """Small values of the declared types; positive where a prefix sum is divided by."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {**SIZES, "g": 2} if cascade.name == "grouped-queries" else SIZES
    found: dict[str, Tensor] = {}
    for t in cascade.inputs:
        shape = [sizes[r] for r in t.ranks]
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if t.name in SMALL:
            value = torch.tensor(SMALL[t.name], dtype=torch.float64)
        if t.dtype == "bool":
            value = value > -0.5
        elif t.dtype.startswith("i"):
            value = (value * 20).round().to(torch.int64) if t.name not in SMALL else value.long()
        found[t.name] = value.abs() + 0.5 if cascade.name.startswith("dependent") else value
    return found


def same(cascade: Cascade, inputs: dict[str, Tensor]) -> None:
    wanted = interpret(cascade, inputs)
    found = lower_cascade_to_callable(cascade)(inputs)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name].to(value.dtype), value, rtol=1e-9, atol=1e-9, equal_nan=True
        )


@pytest.mark.parametrize("name", NAMED)
def test_named_cascades(name: str) -> None:
    """Eleven keys: no tile size but 1 and 11 divides them."""
    cascade = NAMED[name]
    same(cascade, inputs_of(cascade))


@pytest.mark.parametrize("tile", [1, 3, 4, 11, 16])
def test_derived_and_split_cascades_with_a_cut_tile(tile: int) -> None:
    plain = NAMED["causal"]
    inputs = inputs_of(plain)
    derived = fuse_reductions(plain, "m", tile=tile)
    assert isinstance(derived, Fusion)
    same(derived.cascade, inputs)
    split = partition_rank(plain, "m", tile)
    assert isinstance(split, Cascade)
    same(split, inputs)


def test_a_rank_that_is_split_twice() -> None:
    """The last tile of a tile is cut as well, and what lies beyond counts for nothing."""
    cascade = parse(
        "ranks m (m1, m0), m1, m0 = 4 (m01, m00), m01, m00 = 3\ninputs X[m]\noutputs S, C\n"
        "B[m1, m01, m00] = X[m1 * #m0 + m01 * #m00 + m00]\n"
        "S = exp(B[m1, m01, m00])\n"
        "C = 1.0 + 0.0 * B[m1, m01, m00]\n"
    )
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    wanted = {"S": x.exp().sum(), "C": torch.tensor(11.0, dtype=torch.float64)}
    for found in (interpret(cascade, {"X": x}), lower_cascade_to_callable(cascade)({"X": x})):
        torch.testing.assert_close(found, wanted)


def test_whole_numbers_first_do_not_narrow_what_is_computed() -> None:
    cascade = parse("inputs N[k], X[k]\noutput Y\nY = N[k] * X[k]\n")
    x = torch.tensor([1e-9, 1.0], dtype=torch.float64)
    result = lower_cascade_to_callable(cascade)({"N": torch.tensor([1, 1]), "X": x})["Y"]
    assert result.dtype == torch.float64
    assert float(result) == pytest.approx(1 + 1e-9, abs=1e-15)


def test_a_rank_may_read_a_part_of_a_tensor() -> None:
    """Two halves of one tensor by a rank that is half as long."""
    cascade = parse("ranks i = 2\ninputs X[h]\noutput Y\nY[i] = X[i] - X[i + 2]\n")
    x = torch.arange(4.0, dtype=torch.float64) ** 2
    result = lower_cascade_to_callable(cascade)({"X": x})["Y"]
    torch.testing.assert_close(result, x[:2] - x[2:])
