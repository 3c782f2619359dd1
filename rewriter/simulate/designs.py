"""The five designs FuseMax is evaluated with: hardware, a cascade, and a binding to two arrays.

=================  ===================================================================
``unfused``        scores, softmax and values run one after another through DRAM
``flat``           the three-pass cascade fused on rows of scores (FLAT, as corrected)
``cascade``        the one-pass cascade on FLAT's arrays
``architecture``   the one-pass cascade on FuseMax's PEs, one tile after another
``fusemax``        the same with the tiles interleaved on both arrays (+Binding)
=================  ===================================================================

Source: Nayak et al., "FuseMax", MICRO 2024 (arXiv 2406.10491), sections IV, V and VI-A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_rewrite.cascade.expr import Expr, Extent, Rank, Read, call
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.simulate.accelerator import Accelerator, UnitCycles, UnitEnergy

_E, _F, _M0, _M1, _P0 = (Rank(name) for name in ("e", "f", "m0", "m1", "p0"))


def _einsums(*statements: Einsum) -> dict[str, Einsum]:
    return {s.out.tensor: s for s in statements}


def three_pass() -> dict[str, Einsum]:
    """Three-pass attention on one tile, by output (cascade 4)."""
    point, row = (_M0, _P0), (_P0,)
    qk, sn, a = (Read(t, point) for t in ("QK", "SN", "A"))
    gm, sd = Read("GM", row), Read("SD", row)
    return _einsums(
        Einsum(qk, Read("Q", (_E, _P0)) * Read("K", (_E, _M0))),
        Einsum(gm, qk, (("m0", "max"),)),
        Einsum(sn, call("exp", qk - gm)),
        Einsum(sd, sn),
        Einsum(a, sn / sd),
        Einsum(Read("AV", (_F, _P0)), a * Read("V", (_F, _M0))),
    )


def one_pass() -> dict[str, Einsum]:
    """One-pass attention on one tile, by output (cascade 5); AV runs once per row of tiles."""
    point, now, after = (_M1, _M0, _P0), (_M1, _P0), (_M1 + 1, _P0)
    qk, sln = Read("BQK", point), Read("SLN", point)
    lm, sld, prm, spd = (Read(t, now) for t in ("LM", "SLD", "PRM", "SPD"))
    slnv, spnv = (Read(t, (_F, *now)) for t in ("SLNV", "SPNV"))

    def total(tensor: str, at: Expr) -> Read:
        return Read(tensor, (at, _P0)) if tensor != "RNV" else Read(tensor, (_F, at, _P0))

    rm, rm_next = Read("RM", now), Read("RM", after)
    return _einsums(
        Einsum(qk, Read("Q", (_E, _P0)) * Read("BK", (_E, _M1, _M0))),
        Einsum(lm, qk, (("m0", "max"),)),
        Einsum(rm_next, call("max", rm, lm)),
        Einsum(sln, call("exp", qk - rm_next)),
        Einsum(sld, sln),
        Einsum(slnv, sln * Read("BV", (_F, _M1, _M0))),
        Einsum(prm, call("exp", rm - rm_next)),
        Einsum(spd, total("RD", _M1) * prm),
        Einsum(total("RD", _M1 + 1), sld + spd),
        Einsum(spnv, total("RNV", _M1) * prm),
        Einsum(total("RNV", _M1 + 1), slnv + spnv),
        Einsum(Read("AV", (_F, _P0)), total("RNV", Extent("m1")) / total("RD", Extent("m1"))),
    )


@dataclass(frozen=True)
class Phase:
    """Einsums that run side by side on the two arrays; ``stall`` waits for the array to drain."""

    matrix: tuple[str, ...] = ()
    vector: tuple[str, ...] = ()
    stall: bool = False

    def arrays(self) -> dict[str, tuple[str, ...]]:
        """Einsums by array."""
        return {"2d": self.matrix, "1d": self.vector}


@dataclass(frozen=True)
class Design:
    """Hardware, cascade (``"one-pass"`` or ``"three-pass"``) and binding.

    ``scores_on_chip`` counts the score tensors that stay in the buffer beside the running state;
    ``fused=False`` sends every intermediate tensor through DRAM, phase by phase.
    """

    name: str
    hardware: Accelerator
    cascade: str
    phases: tuple[Phase, ...]
    scores_on_chip: int = 0
    fused: bool = True
    energy_closed_form: bool = False

    @property
    def once_per_row(self) -> frozenset[str]:
        """Einsums that run once per row of tiles: the last division of the one-pass cascade."""
        return frozenset({"AV"}) if self.cascade == "one-pass" else frozenset()

    def einsums(self) -> Mapping[str, Einsum]:
        """The Einsums of one tile, by output."""
        return one_pass() if self.cascade == "one-pass" else three_pass()


_SOFTMAX = ("GM", "SN", "SD", "A")
_FLAT_ENERGY = UnitEnergy(exp=94.65)
# FLAT's softmax pipelines the subtraction into its exponential unit, so it takes no cycle there.
_FLAT = Accelerator("flat", buffer=32 * 2**20, cycles=UnitCycles(exp=1, sub=0), energy=_FLAT_ENERGY)
_FLAT_ONE_PASS = Accelerator("flat-16MiB", cycles=UnitCycles(exp=1), energy=_FLAT_ENERGY)
_ONE_PASS_VECTOR = ("LM", "SLN", "SLD", "RM", "PRM", "SPD", "RD", "SPNV", "RNV", "AV")

DESIGNS: Mapping[str, Design] = {
    d.name: d
    for d in (
        Design(
            "unfused",
            _FLAT,
            "three-pass",
            (Phase(("QK",)), Phase(vector=_SOFTMAX), Phase(("AV",))),
            fused=False,
        ),
        Design("flat", _FLAT, "three-pass", (Phase(("QK", "AV"), _SOFTMAX),)),
        Design(
            "cascade",
            _FLAT_ONE_PASS,
            "one-pass",
            (Phase(("BQK", "SLNV"), _ONE_PASS_VECTOR),),
            scores_on_chip=2,
        ),
        Design(
            "architecture",
            Accelerator(),
            "one-pass",
            energy_closed_form=True,
            phases=(
                Phase(("BQK", "LM"), ("RD", "AV")),
                Phase(vector=("RM",), stall=True),
                Phase(("SLN", "SLD"), ("PRM", "SPD")),
                Phase(("SLNV",), ("SPNV", "RNV")),
            ),
        ),
        Design(
            "fusemax",
            Accelerator(),
            "one-pass",
            energy_closed_form=True,
            phases=(
                Phase(("BQK", "LM"), ("RD", "RNV", "AV")),
                Phase(vector=("RM",)),
                Phase(("SLN", "SLD"), ("PRM", "SPD")),
                Phase(("SLNV",), ("SPNV",)),
            ),
        ),
    )
}


def named(design: Design | str) -> Design:
    """The design called ``design``; designs pass through.

    Raises:
        ValueError: no design has that name.
    """
    if isinstance(design, Design):
        return design
    if design not in DESIGNS:
        raise ValueError(f"no design is called {design!r}; choose from {', '.join(DESIGNS)}")
    return DESIGNS[design]
