"""The schemes that are tried on one Site: how they are measured, and which head gets which.

The error of a head is that of its attention output, both cascades in float64; heads that share a
key head are decided together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_rewrite.budget import METRICS, Bound
from attn_rewrite.cascade.staged import shares_scales
from attn_rewrite.chunked import oracle
from attn_rewrite.measuring import measure
from attn_rewrite.passes.keep import Exact
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.calibrated import Calibrated
from attn_rewrite.passes.transform import Transform, spans_text
from attn_rewrite.plan import Plan, Step, expected_tiles, rewritten
from attn_rewrite.report import ErrorMeasure
from attn_rewrite.site import Refusal, Site

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade


@dataclass(eq=False)
class HeadTrial:
    """The schemes that are tried on one Site, and the errors of its heads so far.

    ``errors[tier][head]`` has one measure a call; ``held[i]`` says whether call i confirms;
    ``dropped`` are schemes and heads that did not stand together.
    """

    site: Site
    step: Step
    plan: Plan
    held: list[bool] = field(default_factory=list)
    errors: list[list[list[ErrorMeasure]]] = field(default_factory=list)
    dropped: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        at = next(i for i, t in enumerate(self.step.transforms) if isinstance(t, Quantisation))
        self.before, self.after = self.step.transforms[:at], self.step.transforms[at + 1 :]
        one = self.step.transforms[at]
        assert isinstance(one, Quantisation)
        self.tiers = one.schemes() if isinstance(one, Calibrated) else (one,)
        self.reference = self._cascade(())
        self.cascades = [self._cascade((tier,)) for tier in self.tiers]
        self.tables = self._tables()
        self.errors = [[[] for _ in range(self.site.hq)] for _ in self.tiers]

    def _cascade(self, scheme: tuple[Transform, ...]) -> Cascade | Refusal:
        """What every head computes under a scheme (the heads of the step are picked later)."""
        transforms = (*self.before, *scheme, *self.after) or (Exact(),)
        return rewritten(self.site, replace(self.step, transforms=transforms, heads=None))

    def _tables(self) -> dict[str, Tensor]:
        """What the reference reads of the plan's tables."""
        if isinstance(self.reference, Refusal):
            return {}
        found = self.plan.tables_of(self.site, self.reference)
        if isinstance(found, Refusal):
            self.reference = found
            return {}
        return {n: torch.from_numpy(t) for n, t in found.items()}

    def see(self, inputs: Mapping[str, Tensor], held_out: bool) -> None:
        """Measure every scheme on one call."""
        self.held.append(held_out)
        if isinstance(self.reference, Refusal):
            return
        inputs = {**inputs, **self.tables}
        wanted = oracle(self.reference, inputs)
        for tier, cascade in enumerate(self.cascades):
            if isinstance(cascade, Refusal):
                continue
            found = oracle(cascade, inputs)
            for head in range(self.site.hq):
                self.errors[tier][head].append(measure(found[:, head], wanted[:, head]))

    def choose(self, bound: Bound) -> tuple[list[Step], Refusal | None]:
        """One step for each scheme that heads were given, and which heads fell out."""
        taken: dict[int, list[int]] = {}
        for head, tier in self.chosen(bound).items():
            taken.setdefault(tier, []).append(head)
        steps = [
            self._step(tier, heads, len(taken) > 1, bound) for tier, heads in sorted(taken.items())
        ]
        return steps, self._fallen(taken.get(len(self.tiers), []), bound)

    def chosen(self, bound: Bound) -> dict[int, int]:
        """The scheme of each head by number; heads that share a key head have one."""
        size = self.site.hq // self.site.hkv
        every = range(self.site.hq) if self.step.heads is None else self.step.heads
        found: dict[int, int] = {}
        for first in sorted({h - h % size for h in every}):
            group = [h for h in range(first, first + size) if h in set(every)]
            found |= dict.fromkeys(group, self._tier(group, bound))
        return found

    def shares(self) -> bool:
        """Does a scheme have a scale for several heads, which hangs on who else has it?"""
        return any(not isinstance(c, Refusal) and shares_scales(c) for c in self.cascades)

    def _tier(self, group: list[int], bound: Bound) -> int:
        """The first scheme that suits all heads of a group; past the last if none does."""
        for tier in range(len(self.tiers)):
            if self.dropped & {(tier, head) for head in group}:
                continue
            found = [m for head in group for m in self.errors[tier][head]]
            if found and all(map(bound.allows, found)):
                return tier
        return len(self.tiers)

    def _step(self, tier: int, heads: list[int], partly: bool, bound: Bound) -> Step:
        fallen = tier == len(self.tiers)
        scheme = () if fallen else (self.tiers[tier],)
        transforms = (*self.before, *scheme, *self.after) or (Exact(),)
        chosen = tuple(sorted(heads)) if partly else self.step.heads
        note = "calibration left these heads in floating point"
        if not fallen:
            fit, held = (_worst(self._of(tier, heads, h), bound) for h in (False, True))
            note = f"calibrated: worst {bound.metric} {fit:.6g}, held out {held:.6g}"
        step = replace(self.step, transforms=transforms, heads=chosen, note=note)
        result = rewritten(self.site, replace(step, heads=None))
        tables = {n: t.numpy() for n, t in self.tables.items()}
        tiles = None
        if not isinstance(result, Refusal):
            tiles = expected_tiles(self.site, result, tables=tables)
        return replace(step, tiles=tiles)

    def _of(self, tier: int, heads: list[int], held_out: bool) -> list[ErrorMeasure]:
        return [
            m
            for head in heads
            for m, held in zip(self.errors[tier][head], self.held, strict=True)
            if held == held_out
        ]

    def _fallen(self, heads: list[int], bound: Bound) -> Refusal | None:
        """Which heads stay in floating point, and how close the most exact scheme came."""
        if not heads:
            return None
        last = len(self.tiers) - 1
        refused = self.cascades[last]
        if isinstance(refused, Refusal):
            return replace(refused, site=self.site.name)
        found = [m for head in heads for m in self.errors[last][head]]
        three = ", ".join(
            f"{name} {_worst(found, Bound(name, bound.limit if name == bound.metric else 1.0)):.4g}"
            for name in ("cosine", "relative_l1", "rmse")
        )
        reason = (
            f"heads {spans_text(tuple(heads))} of {self.site.hq} stay in floating point: at worst "
            f"{self.tiers[last]} gives {three}, wanted {bound}"
        )
        anchor = str(self.site.anchor or "")
        return Refusal("calibration", reason, anchor, self.site.source, self.site.name)


@dataclass(eq=False)
class ChosenSchemes:
    """The schemes chosen for the heads of one Site, measured together."""

    trial: HeadTrial
    cascade: Cascade | Refusal
    tiers: dict[int, int]
    errors: list[list[ErrorMeasure]]

    @classmethod
    def of(cls, trial: HeadTrial, bound: Bound) -> ChosenSchemes:
        """What `choose` says now."""
        steps, _ = trial.choose(bound)
        cascade = rewritten(trial.site, *steps)
        return cls(trial, cascade, trial.chosen(bound), [[] for _ in range(trial.site.hq)])

    @property
    def site(self) -> Site:
        """The Site."""
        return self.trial.site

    def see(self, inputs: Mapping[str, Tensor], held_out: bool) -> None:
        """Measure every head on one call, whichever half it is in."""
        if isinstance(self.cascade, Refusal) or isinstance(self.trial.reference, Refusal):
            return
        held = {**inputs, **self.trial.tables}
        wanted, found = oracle(self.trial.reference, held), oracle(self.cascade, held)
        for head, measures in enumerate(self.errors):
            measures.append(measure(found[:, head], wanted[:, head]))

    def drop(self, bound: Bound) -> bool:
        """Take the schemes off heads that are over the bound; True if there were any."""
        over = {
            (tier, head)
            for head, tier in self.tiers.items()
            if tier < len(self.trial.tiers) and not all(map(bound.allows, self.errors[head]))
        }
        self.trial.dropped |= over
        return bool(over)


def _worst(found: list[ErrorMeasure], bound: Bound) -> float:
    values: list[float] = [getattr(m, bound.metric) for m in found]
    return min(values) if METRICS[bound.metric][0] == ">=" else max(values)
