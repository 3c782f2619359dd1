"""How much error a user allows: a bound per Site, and one for the outputs of the whole model.

A budget as text is a list of bounds, ``cosine>=0.999`` for both scopes, or
``site: cosine>=0.999, end_to_end: relative_l1<=0.01`` one by one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from attn_rewrite.errors import PolicyError

# Metric -> (sign of the comparison, smallest and largest value that makes sense as a limit).
METRICS: Mapping[str, tuple[str, float, float]] = {
    "cosine": (">=", -1.0, 1.0),
    "relative_l1": ("<=", 0.0, math.inf),
    "rmse": ("<=", 0.0, math.inf),
    "max_abs": ("<=", 0.0, math.inf),
}
SCOPES = ("site", "end_to_end")


class Measured(Protocol):
    """What a bound is compared with (`attn_rewrite.report.ErrorMeasure`)."""

    @property
    def cosine(self) -> float:
        """Cosine similarity of the flattened tensors."""

    @property
    def relative_l1(self) -> float:
        """Sum of absolute differences over sum of absolute references."""

    @property
    def rmse(self) -> float:
        """Root of the mean squared difference."""

    @property
    def max_abs(self) -> float:
        """Largest absolute difference."""


def suggest(word: str, known: Any) -> str:
    """``; did you mean 'x'?`` for the nearest known name, else the list of names."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names) or 'none'}"


@dataclass(frozen=True)
class Bound:
    """A limit on one metric: ``cosine>=0.999`` or ``rmse<=0.01``."""

    metric: str
    limit: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise PolicyError(
                f"budget: unknown metric {self.metric!r}{suggest(self.metric, METRICS)}"
            )
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float):
            raise PolicyError(f"budget: the limit of {self.metric} is {self.limit!r}, not a number")
        _, low, high = METRICS[self.metric]
        if not (low <= self.limit <= high) or math.isinf(self.limit):
            wanted = (
                f"a finite number of at least {low:g}"
                if high == math.inf
                else f"{low:g} to {high:g}"
            )
            raise PolicyError(
                f"budget: {self.metric} is limited to {self.limit!r}, expected {wanted}"
            )

    def allows(self, measure: Measured) -> bool:
        """Whether a measured error is within the bound (NaN never is)."""
        value: float = getattr(measure, self.metric)
        return value >= self.limit if METRICS[self.metric][0] == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.metric}{METRICS[self.metric][0]}{self.limit!r}"

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read ``metric>=number`` or ``metric<=number`` (`PolicyError` when it is neither)."""
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<|==|=)\s*(\S+)\s*", text)
        if match is None:
            raise PolicyError(f"budget {text!r} is not a bound; write for example cosine>=0.999")
        metric, sign, number = match.groups()
        try:
            bound = cls(metric, float(number))
        except ValueError as error:
            if isinstance(error, PolicyError):
                raise
            raise PolicyError(f"budget {text!r}: {number!r} is not a number") from None
        if sign != METRICS[metric][0]:
            raise PolicyError(
                f"budget {text!r}: {metric} is bounded as {metric}{METRICS[metric][0]}..."
            )
        return bound


@dataclass(frozen=True)
class Budget:
    """The bounds of the user; None where nothing is asked."""

    site: Bound | None = None
    end_to_end: Bound | None = None

    def __str__(self) -> str:
        if self.site == self.end_to_end:
            return str(self.site) if self.site else ""
        given = ((scope, getattr(self, scope)) for scope in SCOPES)
        return ", ".join(f"{scope}: {bound}" for scope, bound in given if bound)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read bounds separated by commas (`PolicyError` with the offending part)."""
        found: dict[str, Bound] = {}
        for part in text.split(","):
            scope, colon, bound = part.partition(":")
            scope = scope.strip()
            if colon and scope not in SCOPES:
                raise PolicyError(f"budget: unknown scope {scope!r}{suggest(scope, SCOPES)}")
            for name in (scope,) if colon else SCOPES:
                if name in found:
                    raise PolicyError(f"budget {text!r} bounds {name} twice")
                found[name] = Bound.parse(bound if colon else part)
        return cls(**found)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Budget:
        """Read the ``[budget]`` table of a policy file.

        ``site`` and ``end_to_end`` are bounds as text, or numbers for the metric ``metric``.
        """
        unknown = [key for key in table if key not in ("metric", *SCOPES)]
        if unknown:
            raise PolicyError(
                f"[budget]: unknown key {unknown[0]!r}{suggest(unknown[0], ('metric', *SCOPES))}"
            )
        found: dict[str, Bound] = {}
        for scope in SCOPES:
            value = table.get(scope)
            if isinstance(value, str):
                found[scope] = Bound.parse(value)
            elif value is not None and "metric" not in table:
                raise PolicyError(f'[budget]: {scope} = {value} needs metric = "...", or a text')
            elif value is not None:
                found[scope] = Bound(str(table["metric"]), value)
        if not found:
            raise PolicyError('[budget] bounds nothing; write for example site = "cosine>=0.999"')
        return cls(**found)
