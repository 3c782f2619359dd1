"""Every attention in the model libraries is found, and the exact rewrite keeps the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.zoo.bench import Bench
from tests.zoo.choice import chosen
from tests.zoo.exceptions import EXCEPTIONS
from tests.zoo.results import record, shown, write
from tests.zoo.rows import Result


def _check(result: Result) -> None:
    if result.stage in ("build", "absent"):
        # Listed in the table and left out of the rate: there is no model to find attention in.
        pytest.skip(f"cannot be built or run here: {result.problem[:120]}")
    assert result.stage != "failed", result.problem
    assert result.exact, f"error and bound: {result.errors}"
    assert result.complete, _why(result)


def _why(result: Result) -> str:
    reasons = "; ".join(f"[{code}] {reason} at {where}" for code, reason, where in result.refused)
    why = result.problem or reasons or "no reason given"
    return f"found {result.found} of {result.expected}: {why}"


def _in_turns(names: list[str]) -> list[tuple[str, str]]:
    """Each row with one of the types; the spellings of an architecture get both."""
    ends = [name.rpartition("/")[0] for name in names]
    places = list(dict.fromkeys(ends))
    types = ("float32", "bfloat16")
    return [
        (name, types[(places.index(end) + ends[:i].count(end)) % 2])
        for i, (name, end) in enumerate(zip(names, ends, strict=True))
    ]


def _every_third(names: list[str]) -> list[ParameterSet]:
    """The others run with the whole zoo."""
    return [pytest.param(n, marks=[pytest.mark.zoo] * bool(i % 3)) for i, n in enumerate(names)]


@pytest.mark.parametrize("name", _every_third(chosen("fast")))
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), _in_turns(chosen("slow")))
def test_slow_row(bench: Bench, name: str, dtype: str) -> None:
    """In one type and at the sizes of the inputs, which are traced sooner than unknown ones."""
    if reason := EXCEPTIONS.get(name.split("/")[1]):
        pytest.skip(f"not found in full: {reason}")
    _check(bench.examine(name, (dtype,), fixed=True))


@pytest.mark.zoo
@pytest.mark.parametrize("name", chosen("all"))
def test_row_of_any_size(bench: Bench, name: str) -> None:
    """With dynamic sizes, as users capture; these results are those of the table."""
    result = bench.examine(name, ("float32", "bfloat16"))
    record(result)
    if (reason := EXCEPTIONS.get(name.split("/")[1])) is None:
        _check(result)
    elif result.stage not in ("build", "absent"):
        assert not result.complete, f"it works now: take it out of the exceptions ({reason})"


def test_the_table_keeps_the_lines_of_rows_that_were_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    first = Result("timm/a:b/sdpa", expected=2, found=2, errors={"float32": (1.0, 2.0)})
    second = Result("timm/c:d/sdpa", expected=3, found=1)
    write([first, second], path)
    before = path.read_text()
    assert "| timm | 2 | 1 | 50.0% | 3 / 5 | 1 of 1 | 0 |" in before
    write([], path)
    assert path.read_text() == before
    again = Result("timm/c:d/sdpa", expected=3, found=3, errors={"float32": (2.001, 2.0)})
    build = Result("timm/e:f/eager", stage="build", problem="ImportError: no x | y")
    write([again, build], path)
    assert "| timm | 2 | 2 | 100.0% | 5 / 5 | 1 of 2 | 1 |" in path.read_text()
    write([Result("timm/c:d/sdpa", stage="absent"), build], path)
    assert "| timm | 1 | 1 | 100.0% | 2 / 2 | 1 of 1 | 1 |" in path.read_text()


def test_a_row_with_more_sites_than_attentions_is_not_in_full(tmp_path: Path) -> None:
    write([Result("timm/a:b/sdpa", expected=1, found=2)], tmp_path / "table.md")
    assert "| timm | 1 | 0 | 0.0% | 1 / 1 | 0 of 0 | 0 |" in (tmp_path / "table.md").read_text()


def test_every_row_is_run_by_one_test() -> None:
    names = [name for speed in ("fast", "all") for name in chosen(speed)]
    assert len(names) == len(set(names))
    assert {"torch", "transformers", "diffusers", "timm"} == {
        name.partition("/")[0] for name in chosen("slow")
    }
