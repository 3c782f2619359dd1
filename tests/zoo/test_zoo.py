"""Every attention in the model libraries is found, and the exact rewrite keeps the numbers."""

from __future__ import annotations

import pytest

from tests.zoo.bench import Bench
from tests.zoo.choice import chosen
from tests.zoo.exceptions import EXCEPTIONS
from tests.zoo.results import record, shown
from tests.zoo.rows import Result


def _check(bench: Bench, name: str, dtypes: tuple[str, ...]) -> None:
    result = bench.examine(name, dtypes)
    record(result)
    if result.stage in ("build", "absent"):
        # Listed in the table and left out of the rate: there is no model to find attention in.
        pytest.skip(f"cannot be built or run here: {result.problem[:120]}")
    known = EXCEPTIONS.get(name.split("/")[1])
    if known is not None:
        assert not result.complete, f"it works now: take it out of the exceptions ({known})"
        return
    assert result.stage != "failed", result.problem
    assert result.exact, f"error and bound: {result.errors}"
    assert result.complete, _why(result)


def _why(result: Result) -> str:
    reasons = "; ".join(f"[{code}] {reason} at {where}" for code, reason, where in result.refused)
    why = result.problem or reasons or "no reason given"
    return f"found {result.found} of {result.expected}: {why}"


@pytest.mark.parametrize("name", chosen("fast"))
def test_row(bench: Bench, name: str) -> None:
    result = bench.examine(name)
    record(result)
    assert not result.problem, result.problem
    assert result.exact, f"error and bound: {result.errors}"
    assert result.complete, _why(result)


def test_the_table_is_large_enough() -> None:
    """What the fast rows are taken from: a table that lost its rows would take the tests along."""
    assert len(chosen("fast")) == 30
    assert len({n.split("/")[1] for n in shown("transformers")}) >= 60


@pytest.mark.zoo
@pytest.mark.parametrize("name", chosen("slow"))
def test_slow_row(bench: Bench, name: str) -> None:
    _check(bench, name, ("float32", "bfloat16"))
