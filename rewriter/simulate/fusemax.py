"""Closed-form latency, utilisation, DRAM traffic and energy of attention on an accelerator.

One tile is `array` keys by `array` queries.  Its cycles are counted on the Einsums of the cascade,
and the time is the larger of computing every tile and moving every byte.

Against the results published with the paper: exact (1e-12) for every latency and DRAM traffic but
those of ``unfused``, which come within 0.3 %.

Source: Nayak et al., "FuseMax", MICRO 2024 (arXiv 2406.10491), section VI; how blocks combine from
its artifact (github.com/FPSG-UIUC/micro24-fusemax-artifact).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from attn_rewrite.simulate.accelerator import Accelerator
from attn_rewrite.simulate.designs import Design, named
from attn_rewrite.simulate.energy import attention_energy
from attn_rewrite.simulate.traffic import Tiles, dram_traffic, tiles_of
from attn_rewrite.simulate.workload import Workload


@dataclass(frozen=True)
class Result:
    """One design on one workload, for one layer.

    ``util_2d`` and ``util_1d`` are the fractions of the time the arrays are busy; ``bound`` is
    ``"compute"`` or ``"memory"``.  ``energy_pj`` is None where no closed form exists, ``linear_s``
    (the linear layers) where the workload does not size them.
    """

    design: str
    workload: Workload
    latency_s: float
    util_2d: float
    util_1d: float
    dram_bytes: int
    bound: str
    energy_pj: float | None
    linear_s: float | None

    @property
    def end_to_end_s(self) -> float | None:
        """Attention and linear layers, seconds."""
        return None if self.linear_s is None else self.latency_s + self.linear_s

    def to_json(self) -> dict[str, str | float | None]:
        """Plain values under stable keys."""
        keys = "design latency_s util_2d util_1d dram_bytes energy_pj bound linear_s end_to_end_s"
        values = {key: getattr(self, key) for key in keys.split()}
        w = self.workload
        return {
            "workload": w.name,
            "batch": w.batch,
            "q_len": w.q_len,
            "kv_len": w.kv_len,
            **values,
        }


def evaluate(workload: Workload, design: Design | str) -> Result:
    """Model ``workload`` on ``design``; lengths are rounded up to whole tiles.

    Raises:
        ValueError: no such design, or its buffer does not hold one row of tiles.
    """
    design = named(design)
    hardware = design.hardware
    tiles = tiles_of(workload, hardware)
    phases = phase_cycles(workload, design)
    traffic = dram_traffic(workload, design)
    spans = [p.span for p in phases] if not design.fused else [_sum(p.span for p in phases)]
    compute = [_seconds(tiles, span, hardware) for span in spans]
    memory = [moved / hardware.bandwidth for moved in traffic]
    latency = sum(max(c, m) for c, m in zip(compute, memory, strict=True))
    return Result(
        design=design.name,
        workload=workload,
        latency_s=latency,
        util_2d=_seconds(tiles, _sum(p.matrix for p in phases), hardware) / latency,
        util_1d=_seconds(tiles, _sum(p.vector for p in phases), hardware) / latency,
        dram_bytes=sum(traffic),
        bound="memory" if sum(memory) > sum(compute) else "compute",
        energy_pj=attention_energy(workload, design),
        linear_s=linear_latency(workload, hardware),
    )


@dataclass(frozen=True)
class PhaseCycles:
    """Cycles per tile of one phase: busy on each array, and from start to end."""

    matrix: Fraction
    vector: Fraction
    span: Fraction


def phase_cycles(workload: Workload, design: Design) -> tuple[PhaseCycles, ...]:
    """Cycles per tile of every phase of ``design``, in order."""
    cycles = einsum_cycles(workload, design)
    found = []
    for phase in design.phases:
        matrix, vector = (_sum(cycles[n] for n in names) for names in (phase.matrix, phase.vector))
        # The running maximum is known only after the array has drained, one cycle per column.
        drain = design.hardware.array if phase.stall else 0
        found.append(PhaseCycles(matrix, vector, max(matrix, vector) + drain))
    return tuple(found)


def einsum_cycles(workload: Workload, design: Design) -> Mapping[str, Fraction]:
    """Cycles per tile of every Einsum of ``design``, by output, counted on the Einsum."""
    hardware = design.hardware
    on = {n: a for p in design.phases for a, names in p.arrays().items() for n in names}
    tile = {"e": workload.d_qk, "f": workload.d_v, "m0": hardware.array, "m1": 1}
    per_row = Fraction(1, tiles_of(workload, hardware).keys)
    return {
        name: hardware.tile_cycles(einsum, tile, on[name])
        * (per_row if name in design.once_per_row else 1)
        for name, einsum in design.einsums().items()
    }


def linear_latency(workload: Workload, hardware: Accelerator) -> float | None:
    """Seconds of the linear layers of one layer (normalisation and activation left out)."""
    gemms = workload.gemms()
    if gemms is None:
        return None
    return sum(_gemm_latency(m, k, n, hardware) for m, k, n in gemms)


def _gemm_latency(m: int, k: int, n: int, hardware: Accelerator) -> float:
    compute = m * k * n / (hardware.array**2 * hardware.clock)
    moved = hardware.value_bytes * (m * k + k * n + m * n)
    return max(compute, moved / hardware.bandwidth)


def _seconds(tiles: Tiles, cycles: Fraction, hardware: Accelerator) -> float:
    return float(tiles.count * cycles) / hardware.clock


def _sum(values: Iterable[Fraction]) -> Fraction:
    return sum(values, Fraction(0))
