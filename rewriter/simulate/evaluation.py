"""The evaluation of the FuseMax paper: every model, length and design, and the averages over them.

Averages are arithmetic means of ratios, as the paper takes them.

Source: Nayak et al., "FuseMax", MICRO 2024 (arXiv 2406.10491), section VI.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attn_rewrite.simulate.designs import DESIGNS
from attn_rewrite.simulate.fusemax import Result, evaluate
from attn_rewrite.simulate.workload import LENGTHS, MODELS, Workload, at_length

#: Energy of FuseMax over that of another design, as published: (attention, end to end).
PUBLISHED_ENERGY: Mapping[str, tuple[float, float]] = {
    "flat": (0.79, 0.83),
    "unfused": (0.77, 0.82),
}
#: What is said instead of an energy ratio.
ENERGY_STATEMENT = (
    "The energy of flat, cascade and unfused has no closed form: 11 to 25 % of it is register and "
    "buffer traffic that depends on the mapping. Published: fusemax takes 79 % of flat's and 77 % "
    "of unfused's energy on attention, 83 % and 82 % end to end."
)


@dataclass(frozen=True)
class Evaluation:
    """Results of every design on the same workloads, in the same order."""

    workloads: tuple[Workload, ...]
    results: Mapping[str, tuple[Result, ...]]

    def speedup(self, design: str, over: str, *, end_to_end: bool = False) -> tuple[float, ...]:
        """How many times faster ``design`` is than ``over``, per workload.

        Raises:
            ValueError: ``end_to_end`` for a workload whose linear layers are not known.
        """
        pairs = zip(self.results[over], self.results[design], strict=True)
        return tuple(_time(a, end_to_end) / _time(b, end_to_end) for a, b in pairs)

    def mean_speedup(self, design: str, over: str, *, end_to_end: bool = False) -> float:
        """Arithmetic mean of `speedup` over all workloads."""
        return statistics.mean(self.speedup(design, over, end_to_end=end_to_end))

    def mean_by_length(
        self, design: str, over: str, *, end_to_end: bool = False
    ) -> dict[int, float]:
        """Arithmetic mean of `speedup` over the models, per query length."""
        ratios: dict[int, list[float]] = {}
        speedups = self.speedup(design, over, end_to_end=end_to_end)
        for workload, ratio in zip(self.workloads, speedups, strict=True):
            ratios.setdefault(workload.q_len, []).append(ratio)
        return {length: statistics.mean(values) for length, values in ratios.items()}

    def steps(self) -> dict[str, float]:
        """Mean speed-up over ``flat`` of every other design: what each step of FuseMax adds."""
        return {name: self.mean_speedup(name, "flat") for name in self.results if name != "flat"}

    def to_json(self) -> dict[str, object]:
        """Plain values under stable keys."""
        return {
            "results": [r.to_json() for rows in self.results.values() for r in rows],
            "averages": averages(self),
            "steps_over_flat": self.steps(),
            "energy": ENERGY_STATEMENT,
        }


def _time(result: Result, end_to_end: bool) -> float:
    if not end_to_end:
        return result.latency_s
    if result.end_to_end_s is None:
        raise ValueError(f"the linear layers of {result.workload.name} are not known")
    return result.end_to_end_s


def evaluation(
    models: Iterable[Workload] = tuple(MODELS.values()),
    lengths: Sequence[int] = LENGTHS,
    *,
    batch: int | None = None,
) -> Evaluation:
    """Evaluate every design on ``models`` at ``lengths``."""
    workloads = tuple(at_length(m, n, batch) for m in models for n in lengths)
    return Evaluation(workloads, {d: tuple(evaluate(w, d) for w in workloads) for d in DESIGNS})


def averages(found: Evaluation) -> dict[str, float]:
    """The headline averages: FuseMax over FLAT and over the unfused baseline."""
    return {
        f"{part}_over_{other}": found.mean_speedup("fusemax", other, end_to_end=part != "attention")
        for part in ("attention", "end_to_end")
        for other in ("flat", "unfused")
    }
