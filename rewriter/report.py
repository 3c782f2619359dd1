"""What was done and what it cost, for every Site and for the whole model; JSON in and out.

The console table is made of the same values as ``report.json``: both show `Report.to_json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from rich.console import Console

Facts = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class ErrorMeasure:
    """Error of a tensor against a reference, measured in float64.

    ``cosine``, ``relative_l1`` and ``rmse`` are those of the flattened tensors, ``max_abs`` is the
    largest difference, ``max_reference`` the largest reference.  ``rows_excluded`` rows, where the
    reference is NaN, are in none of them.
    """

    cosine: float
    relative_l1: float
    rmse: float
    max_abs: float
    max_reference: float
    rows_excluded: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities as text."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ErrorMeasure:
        """The inverse of `to_json`."""
        values = {name: float(value) for name, value in data.items() if name != "rows_excluded"}
        return cls(**values, rows_excluded=int(data["rows_excluded"]))


@dataclass(frozen=True)
class LseErrors:
    """Errors of a Site's log-sum-exp, as those of its output: the kernel's against the float64
    value of the same cascade, at most ``bound``, and the rewritten cascade's against the original
    one (infinite where rows lose all their keys: -inf)."""

    implementation: ErrorMeasure
    bound: float
    approximation: ErrorMeasure | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "implementation": self.implementation.to_json(),
            "bound": _plain(self.bound),
            "approximation": _json(self.approximation),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LseErrors:
        """The inverse of `to_json`."""
        more = data["approximation"]
        return cls(
            ErrorMeasure.from_json(data["implementation"]),
            float(data["bound"]),
            more and ErrorMeasure.from_json(more),
        )


@dataclass(frozen=True)
class WorkCost:
    """Work of one Site for the measured inputs: operations, bytes moved, score tiles.

    ``tiles`` is (executed, total): executed, not planned.
    """

    flops: float
    bytes: float
    tiles: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tiles = None
        if self.tiles is not None:
            tiles = {"executed": self.tiles[0], "total": self.tiles[1]}
        return {"flops": _plain(self.flops), "bytes": _plain(self.bytes), "tiles": tiles}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorkCost:
        """The inverse of `to_json`."""
        tiles = data["tiles"]
        pair = None if tiles is None else (int(tiles["executed"]), int(tiles["total"]))
        return cls(float(data["flops"]), float(data["bytes"]), pair)


@dataclass(frozen=True)
class SiteReport:
    """What happened to one Site.

    ``steps`` are pipelines as text (with their heads), ``kernel`` the name of what computes it now
    (None: the original nodes), ``exactness`` the weakest promise among the steps.
    ``implementation`` is the error of the kernel against the float64 oracle of the *same* rewritten
    cascade, at most ``implementation_bound``; ``approximation`` that of the rewritten against the
    original cascade, None where they are equal.  ``unbudgeted``: approximated without a budget.
    ``reverted``: a budget, or values that are not finite, sent the Site back to exact, and
    ``approximation`` is what was measured before that.  ``parts`` has, for a pipeline of several
    approximate transforms, what each of them adds to the error.  ``lse`` has the errors of its
    log-sum-exp, where that is used.  ``seconds`` were spent on verifying it.
    """

    name: str
    facts: Facts = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    kernel: str | None = None
    exactness: str = "exact"
    refusals: tuple[Refusal, ...] = ()
    implementation: ErrorMeasure | None = None
    implementation_bound: float | None = None
    approximation: ErrorMeasure | None = None
    parts: tuple[tuple[str, ErrorMeasure], ...] = ()
    unbudgeted: bool = False
    reverted: bool = False
    cost_before: WorkCost | None = None
    cost_after: WorkCost | None = None
    seconds: float = 0.0
    lse: LseErrors | None = None

    @property
    def status(self) -> str:
        """``kept``, ``refused``, ``reverted``, ``unbudgeted`` or ``rewritten``."""
        if self.reverted:
            return "reverted"
        if self.kernel is None:
            return "refused" if self.refusals else "kept"
        return "unbudgeted" if self.unbudgeted else "rewritten"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "status": self.status,
            "facts": {k: _plain(v) for k, v in self.facts.items()},
            "steps": list(self.steps),
            "kernel": self.kernel,
            "exactness": self.exactness,
            "refusals": [r.to_json() for r in self.refusals],
            "implementation": _json(self.implementation),
            "implementation_bound": _plain(self.implementation_bound),
            "approximation": _json(self.approximation),
            "parts": [{"step": step, "error": error.to_json()} for step, error in self.parts],
            "unbudgeted": self.unbudgeted,
            "reverted": self.reverted,
            "cost_before": _json(self.cost_before),
            "cost_after": _json(self.cost_after),
            "seconds": self.seconds,
            **({} if self.lse is None else {"lse": self.lse.to_json()}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiteReport:
        """The inverse of `to_json`."""
        values = {k: v for k, v in data.items() if k != "status"}
        for name in ("implementation", "approximation"):
            values[name] = values[name] and ErrorMeasure.from_json(values[name])
        values["lse"] = values.get("lse") and LseErrors.from_json(values["lse"])
        for name in ("cost_before", "cost_after"):
            values[name] = values[name] and WorkCost.from_json(values[name])
        if values["implementation_bound"] is not None:
            values["implementation_bound"] = float(values["implementation_bound"])
        values["parts"] = tuple(
            (part["step"], ErrorMeasure.from_json(part["error"])) for part in values["parts"]
        )
        values["steps"] = tuple(values["steps"])
        values["refusals"] = tuple(Refusal(**r) for r in values["refusals"])
        return cls(**values)


@dataclass(frozen=True)
class Report:
    """Everything a rewrite says about itself.

    ``refusals`` belong to no Site (near misses, rules without effect); those of a Site are in it.
    ``end_to_end`` is the error of each floating output of the rewritten model against the original
    in the same dtype; ``timings`` seconds per stage; ``inputs`` ``"user's"`` or a sentence on what
    was generated; ``budget`` the user's bounds as text.  ``gathers`` counts how often tokens are
    brought into another order: ``at_sites`` with every Site by itself, ``left`` of activations and
    ``of_tables`` (position tables) once they were moved together; empty where nothing is reordered.
    """

    sites: tuple[SiteReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    end_to_end: Mapping[str, ErrorMeasure] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: str = "user's"
    notes: tuple[str, ...] = ()
    budget: str = ""
    gathers: Mapping[str, int] = field(default_factory=dict)

    def site(self, name: str) -> SiteReport:
        """The report of one Site (`KeyError` if there is none of that name)."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(
            f"no site {name!r}; there are: {', '.join(s.name for s in self.sites) or 'none'}"
        )

    def __str__(self) -> str:
        """The console table as plain text, 120 characters wide."""
        import io

        from rich.console import Console

        text = io.StringIO()
        render(self, Console(file=text, width=120, no_color=True))
        return text.getvalue().rstrip()

    def all_refusals(self) -> tuple[Refusal, ...]:
        """Those of the Sites and those of no Site, each once."""
        found = (*(r for s in self.sites for r in s.refusals), *self.refusals)
        return tuple(dict.fromkeys(found))

    def to_json(self) -> dict[str, Any]:
        """Plain values, one key per field."""
        return {
            "sites": [s.to_json() for s in self.sites],
            "refusals": [r.to_json() for r in self.refusals],
            "end_to_end": {name: error.to_json() for name, error in self.end_to_end.items()},
            "timings": dict(self.timings),
            "versions": dict(self.versions),
            "inputs": self.inputs,
            "notes": list(self.notes),
            "budget": self.budget,
            "gathers": dict(self.gathers),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`."""
        return cls(
            sites=tuple(SiteReport.from_json(s) for s in data["sites"]),
            refusals=tuple(Refusal(**r) for r in data["refusals"]),
            end_to_end={k: ErrorMeasure.from_json(v) for k, v in data["end_to_end"].items()},
            timings=dict(data["timings"]),
            versions=dict(data["versions"]),
            inputs=data.get("inputs", ""),
            notes=tuple(data.get("notes", ())),
            budget=data.get("budget", ""),
            gathers=dict(data.get("gathers", {})),
        )


def _plain(value: Any) -> Any:
    """JSON has no infinities: they are written as text, which ``float`` reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: ErrorMeasure | WorkCost | None) -> dict[str, Any] | None:
    return None if value is None else value.to_json()


COLUMNS = ("site", "kind", "steps", "kernel", "status", "impl. error / bound", "approx. error",
           "tiles", "flops", "bytes")  # fmt: skip


def site_row(site: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one Site (as in ``report.json``) in the console table, by `COLUMNS`."""
    facts, before, after = site["facts"], site["cost_before"], site["cost_after"]
    kind = f"{facts.get('kind', '')}{' causal' if facts.get('causal') else ''}"
    return (
        site["name"],
        kind,
        "; ".join(site["steps"]) or "-",
        site["kernel"] or "-",
        site["status"],
        _implementation(site),
        _approximation(site["approximation"]),
        _tiles(after or before),
        _change(before, after, "flops"),
        _change(before, after, "bytes"),
    )


def number(value: float | str | None) -> str:
    """A measured number to three digits."""
    return "-" if value is None else f"{float(value):.3g}"


def _implementation(site: Mapping[str, Any]) -> str:
    measured = site["implementation"]
    if measured is None:
        return "-"
    return f"{number(measured['max_abs'])} / {number(site['implementation_bound'])}"


def _approximation(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "-"
    return f"cos {float(measured['cosine']):.6f}, L1 {number(measured['relative_l1'])}"


def _tiles(cost: Mapping[str, Any] | None) -> str:
    if cost is None or cost["tiles"] is None:
        return "-"
    return f"{cost['tiles']['executed']}/{cost['tiles']['total']}"


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, what: str) -> str:
    parts = [number(cost[what]) for cost in (before, after) if cost is not None]
    return " -> ".join(parts) or "-"


def render(report: Report, console: Console) -> None:
    """Print the Sites as a table, every Refusal, the end-to-end error and the time per stage."""
    from rich.table import Table
    from rich.text import Text

    data = report.to_json()
    count = len(data["sites"])
    inputs = data["inputs"].removeprefix("inputs are ").removeprefix("inputs ")
    table = Table(title=f"{count} attention site{'' if count == 1 else 's'}; inputs: {inputs}")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for site in data["sites"]:
        table.add_row(*(Text(cell) for cell in site_row(site)))
    if data["sites"]:
        console.print(table)
    for refusal in report.all_refusals():
        console.print(Text(f"refused: {refusal}"))
    for name, error in data["end_to_end"].items():
        line = f"max {number(error['max_abs'])}, rmse {number(error['rmse'])}"
        console.print(Text(f"end to end, {name}: {_approximation(error)}, {line}"))
    if data["budget"]:
        console.print(Text(f"budget: {data['budget']}"))
    if data["gathers"]:
        found = data["gathers"]
        line = f"tokens are reordered {found['left']} times, and {found['of_tables']} tables of "
        console.print(Text(f"{line}theirs; {found['at_sites']} times with every site by itself"))
    for note in data["notes"]:
        console.print(Text(note))
    if data["timings"]:
        times = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in data["timings"].items())
        console.print(Text(f"time: {times}"))
