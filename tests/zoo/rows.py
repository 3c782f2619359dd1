"""A row of the zoo: how its model is made, and what was found of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Build = Callable[[], tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]]


class NotOfferedError(Exception):
    """The library has no such spelling of an architecture: there is no row."""


@dataclass(frozen=True)
class Row:
    """One model of one library in one spelling; ``build`` gives (model, args, kwargs)."""

    library: str
    architecture: str
    spelling: str
    build: Build = dataclasses.field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Unique name, usable as a test id."""
        return f"{self.library}/{self.architecture}/{self.spelling}"


@dataclass
class Result:
    """What came of a row.

    ``stage`` is where it ended: ``absent`` (the library has no such spelling), ``build`` (it
    cannot make or run it here), ``capture`` or ``done``.  ``refused`` are (code, reason, source
    line) of anchors that are no Site; ``errors`` are (error of the rewritten model, bound) by dtype, against float64.  ``just_in_time`` says why
    the model is not one graph where it was captured by the other front end.
    """

    row: str
    stage: str = "done"
    expected: int = 0
    factorised: int = 0
    found: int = 0
    rewritten: int = 0
    families: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    kept: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    problem: str = ""
    just_in_time: str = ""
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Every expected attention was found and nothing else, but for factorised attention."""
        enough = self.expected <= self.found <= self.expected + self.factorised
        return self.stage == "done" and enough

    @property
    def exact(self) -> bool:
        """The rewritten model is within the bound in every type it was run in."""
        return not self.problem and all(error <= bound for error, bound in self.errors.values())
