"""A spatial accelerator with a 2-D and a 1-D array, and what one Einsum costs on each.

The cycles of an Einsum on a tile are counted on the Einsum itself: its operations per point, times
the coordinates of every rank that is not spread over the array.  Nothing here knows attention.

Source: Nayak et al., "FuseMax", MICRO 2024 (arXiv 2406.10491), sections V and VI-A; unit costs and
energies per action from its artifact (github.com/FPSG-UIUC/micro24-fusemax-artifact).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction

from attn_rewrite.cascade.expr import Call, Expr, Rank, walk
from attn_rewrite.cascade.ir import Einsum


@dataclass(frozen=True)
class UnitCycles:
    """Cycles one processing element spends on one operation.

    ``exp`` is 6 on FuseMax, which evaluates it as six dependent multiply-accumulates, and 1 on an
    array with a pipelined unit.  ``sub`` counts the subtraction in front of it.
    """

    mac: int = 1
    mul: int = 1
    add: int = 1
    sub: int = 1
    max: int = 1
    div: int = 1
    exp: int = 6


@dataclass(frozen=True)
class UnitEnergy:
    """Energy of one action in pJ, 45 nm; ``dram`` is one access of ``dram_bytes`` bytes."""

    mac: float = 17.1645
    mul: float = 17.1645
    add: float = 8.34
    sub: float = 8.34
    max: float = 0.028
    div: float = 36.25
    exp: float = 6 * 17.1645
    dram: float = 249.6
    dram_bytes: int = 8


@dataclass(frozen=True)
class Accelerator:
    """Hardware: ``array`` x ``array`` PEs, ``vector`` 1-D PEs, one buffer, one DRAM channel.

    ``bandwidth`` is in bytes/s, ``clock`` in Hz, ``buffer`` in bytes, ``value_bytes`` per element.
    ``vector=None`` stands for as many 1-D PEs as the array has columns.

    Raises:
        ValueError: a size or rate is not positive.
    """

    name: str = "fusemax"
    array: int = 256
    vector: int | None = None
    clock: float = 940e6
    bandwidth: float = 400.0 * 2**30
    buffer: int = 16 * 2**20
    value_bytes: int = 2
    cycles: UnitCycles = field(default=UnitCycles())
    energy: UnitEnergy = field(default=UnitEnergy())

    def __post_init__(self) -> None:
        sizes = ("array", "clock", "bandwidth", "buffer", "value_bytes")
        for name in (*sizes, *(("vector",) if self.vector is not None else ())):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(
                    f"accelerator {self.name}: {name} is {value}; give a positive number"
                )

    @property
    def lanes(self) -> int:
        """Number of 1-D PEs."""
        return self.array if self.vector is None else self.vector

    def point_cycles(self, einsum: Einsum) -> int:
        """Cycles of one PE on one point of ``einsum``."""
        return sum(n * int(getattr(self.cycles, op)) for op, n in operations(einsum).items())

    def tile_cycles(self, einsum: Einsum, tile: Mapping[str, int | Fraction], on: str) -> Fraction:
        """Cycles of ``einsum`` on one tile of extents ``tile``, on array ``"2d"`` or ``"1d"``.

        The 2-D array spreads ranks m0 and p0 over its rows and columns, the 1-D array p0 over its
        lanes; other ranks run in time.
        """
        spatial = {"2d": ("m0", "p0"), "1d": ("p0",)}[on]
        steps = Fraction(1) if on == "2d" else Fraction(self.array, self.lanes)
        for rank in iterated(einsum):
            if rank not in spatial:
                steps *= tile[rank]
        return self.point_cycles(einsum) * steps


_REDUCTIONS = {"add": "add", "max": "max", "min": "max", "mul": "mul"}
_UNITS = frozenset(f.name for f in fields(UnitCycles))


def iterated(einsum: Einsum) -> tuple[str, ...]:
    """Ranks of the iteration space, in order of first appearance."""
    accesses = (einsum.out, *einsum.reads())
    names = [n.name for a in accesses for i in a.index for n in walk(i) if isinstance(n, Rank)]
    return tuple(dict.fromkeys(names))


def operations(einsum: Einsum) -> Counter[str]:
    """Operations per point by unit: a product that is summed is one ``mac``.

    Raises:
        ValueError: an operator that the model has no unit for.
    """
    # Index expressions address memory; only the map expression computes.
    counts = Counter(_computed(einsum.expr))
    kept = {n.name for i in einsum.out.index for n in walk(i) if isinstance(n, Rank)}
    named = dict(einsum.reduce)
    for rank in iterated(einsum):
        if rank not in kept:
            counts[_REDUCTIONS[named.get(rank, "add")]] += 1
    fused = min(counts["mul"], counts["add"]) if _is_product(einsum.expr) else 0
    counts.subtract({"mul": fused, "add": fused})
    counts["mac"] += fused
    counts = +counts
    if unknown := set(counts) - _UNITS:
        raise ValueError(f"no unit computes {', '.join(sorted(unknown))} in {einsum.out.tensor}")
    return counts


def _computed(expr: Expr) -> list[str]:
    if not isinstance(expr, Call):
        return []
    return [expr.op, *(op for a in expr.args for op in _computed(a))]


def _is_product(expr: Expr) -> bool:
    return isinstance(expr, Call) and expr.op == "mul"
