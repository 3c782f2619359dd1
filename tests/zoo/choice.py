"""Which rows the suite runs: by place in the registries, not by hand."""

from __future__ import annotations

from tests.zoo.registry import rows
from tests.zoo.results import shown
from tests.zoo.rows import Row

# Of so many consecutive architectures of a registry one is run, in all of its spellings.
_STRIDES = {"torch": 1, "transformers": 6, "diffusers": 1, "timm": 1}
# Rows that every run of the tests makes, from those that the table shows to run.
_FAST = {"torch": 10, "transformers": 20}
# Of so many of the others one is run among the slow tests: more are not done within an hour.
_SLOW = 36


def chosen(speed: str) -> list[str]:
    """Names of the ``fast`` rows, or of ``all`` the others, or of the ``slow`` ones among them."""
    fast = [name for library, count in _FAST.items() for name in _spread(library, count)]
    if speed == "fast":
        return fast
    others = [
        row.name
        for library, stride in _STRIDES.items()
        for place, architecture in enumerate(_architectures(library)[::stride])
        for row in _spellings(library, architecture, place)
        if row.name not in fast
    ]
    return others[::_SLOW] if speed == "slow" else others


def _spellings(library: str, architecture: str, place: int) -> list[Row]:
    """The rows of an architecture; of timm, whose spellings differ in one function that all its
    models share, one or the other by turns."""
    own = [row for row in rows(library).values() if row.architecture == architecture]
    return own[place % len(own) :][:1] if library == "timm" else own


def _spread(library: str, count: int) -> list[str]:
    """``count`` rows at equal distances in the table."""
    names = shown(library)
    return [names[i * len(names) // count] for i in range(count)] if len(names) > count else names


def _architectures(library: str) -> list[str]:
    return list(dict.fromkeys(r.architecture for r in rows(library).values()))
