"""Choosing a scheme for each head by measuring it: one half of the inputs chooses, one confirms.

The error of a head is that of its attention output on the model's own activations, both cascades in
float64: what quantisation itself costs, whichever backend runs it. The reference is the cascade
that stands before the quantising transform of a policy, so the errors of ``window(...) | int8`` are
not mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from attn_rewrite import block_calibration
from attn_rewrite.budget import METRICS, Bound
from attn_rewrite.calls import CallForm
from attn_rewrite.cascade.staged import StagedAttention, shares_scales
from attn_rewrite.chunked import oracle
from attn_rewrite.errors import PolicyError
from attn_rewrite.measuring import measure
from attn_rewrite.passes.keep import Exact
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.calibrated import Calibrated
from attn_rewrite.passes.transform import Transform, spans_text
from attn_rewrite.plan import Plan, Step, expected_tiles, rewritten
from attn_rewrite.policy import Policy
from attn_rewrite.region import boundary
from attn_rewrite.report import ErrorMeasure
from attn_rewrite.site import Refusal, Site
from attn_rewrite.verify import Walk, canonical_inputs, flat_inputs

if TYPE_CHECKING:
    from torch import nn

    from attn_rewrite.capture import Captured
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Findings

# What a head must keep where the user gives no budget (SageAttention, section 4.5).
DEFAULT = Bound("cosine", 0.998)
Call = tuple[tuple[Any, ...], dict[str, Any]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs and how the run is watched and kept.

    ``inputs`` is a mapping of arguments to tensors, one row a call, or a list of calls.  ``state``
    is a folder for what `paro` measures: memory stays that of one Site, and an interrupted run goes
    on from there.  ``progress`` is called with (done, all, what) after every Site of every call.
    """

    inputs: Any
    state: str | Path | None = None
    progress: Progress | None = None

    @classmethod
    def of(cls, value: Any) -> Calibration:
        """``value``, or the inputs that it is."""
        return value if isinstance(value, cls) else cls(value)


@dataclass(frozen=True)
class _Trying(Calibrated):
    """Stands for `calibrated` while a plan is made: the first scheme that applies at all."""

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        results = [scheme.rewrite(staged, site, heads) for scheme in self.schemes()]
        return next((r for r in results if not isinstance(r, Refusal)), results[0])


def tentative(policy: Policy) -> Policy:
    """``policy`` as a plan can be made of it before anything was measured."""
    policy = block_calibration.tentative(policy)
    rules = [
        replace(
            rule,
            apply=tuple(_Trying(t.tiers) if isinstance(t, Calibrated) else t for t in rule.apply),
        )
        for rule in policy.rules
    ]
    return Policy(rules, policy.budget)


def needs_calibration(policy: Policy) -> bool:
    """Does a rule name `calibrated` or `paro`?"""
    return block_calibration.names_paro(policy) or any(
        isinstance(t, Calibrated) for rule in policy.rules for t in rule.apply
    )


def calls_of(
    calibration: Any, captured: Captured, model: nn.Module | None, *, least: int = 2
) -> tuple[Call, ...]:
    """Calls of the model, ``least`` at least, from what the user gave.

    A mapping of arguments to tensors is cut into calls along the first dimension of all tensors;
    a sequence has one call an entry: a mapping of keyword arguments, a tuple of positional ones, or
    one tensor.  Raises `PolicyError`.
    """
    entries = _rows(calibration) if isinstance(calibration, Mapping) else calibration
    if isinstance(entries, Tensor | str) or not isinstance(entries, Iterable):
        raise PolicyError(
            f"calibration is {type(calibration).__name__}, expected a mapping of arguments to "
            "tensors, or a list of calls"
        )
    form = None if model is None else CallForm.of(model, captured.args, captured.kwargs)
    calls = tuple(_call(entry, form) for entry in entries)
    if len(calls) < least:
        halves = ": one half chooses, the other confirms" if least > 1 else ""
        count = f"{len(calls)} call{'s' * (len(calls) != 1)}"
        raise PolicyError(f"calibration has {count}, expected {least} at least{halves}")
    return calls


def _rows(tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = {n: t.shape[0] for n, t in tensors.items() if isinstance(t, Tensor) and t.ndim}
    if not sizes or len(set(sizes.values())) > 1:
        raise PolicyError(
            f"calibration has tensors of {sizes or 'no'} rows, expected one first dimension for all"
        )
    count = next(iter(sizes.values()))
    return [
        {n: t[i : i + 1] if n in sizes else t for n, t in tensors.items()} for i in range(count)
    ]


def _call(entry: Any, form: CallForm | None) -> Call:
    if isinstance(entry, Mapping):
        args, kwargs = (), dict(entry)
    else:
        args, kwargs = (tuple(entry) if isinstance(entry, list | tuple) else (entry,)), {}
    if form is None:
        return args, kwargs
    try:
        return form.bind(args, kwargs)
    except TypeError as error:
        raise PolicyError(f"a calibration call does not fit the model: {error}") from None


def calibrated_plan(
    host: fx.GraphModule, findings: Findings, plan: Plan, calls: Sequence[Call], bound: Bound | None
) -> Plan:
    """``plan`` with every quantising step replaced by the cheapest scheme of each head.

    ``host`` is the graph the Sites were found in.  Heads that no scheme suits keep what stands
    before it in the pipeline, and a Refusal lists them.
    """
    wanted = DEFAULT if bound is None else bound
    trials = {
        (site.name, step.heads): _Trial(site, step, plan)
        for site in findings.sites
        for step in plan.of(site.name)
        if any(isinstance(t, Quantisation) for t in step.transforms)
    }
    if not trials:
        return plan
    split = len(calls) - len(calls) // 2
    for number, (args, kwargs) in enumerate(calls):
        observe(host, list(trials.values()), args, kwargs, held_out=number >= split)
    _confirm(host, [t for t in trials.values() if t.shares()], calls, wanted)
    steps: list[Step] = []
    refusals = list(plan.refusals)
    for step in plan.steps:
        trial = trials.get((step.site, step.heads))
        if trial is None or step != trial.step:
            steps.append(step)
            continue
        chosen, refusal = trial.choose(wanted)
        steps += chosen
        refusals += [] if refusal is None else [refusal]
    return replace(plan, steps=tuple(steps), refusals=tuple(refusals))


def _confirm(
    host: fx.GraphModule, trials: list[_Trial], calls: Sequence[Call], bound: Bound
) -> None:
    """Measure what was chosen where heads share a scale: it is another one without some of them.

    Heads that are over the bound then fall out, until those that are left are not.
    """
    split = len(calls) - len(calls) // 2
    while trials:
        checks = [_Chosen.of(trial, bound) for trial in trials]
        for number, (args, kwargs) in enumerate(calls):
            observe(host, checks, args, kwargs, held_out=number >= split)
        trials = [c.trial for c in checks if c.drop(bound)]


@dataclass(eq=False)
class _Trial:
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
class _Chosen:
    """The schemes chosen for the heads of one Site, measured together."""

    trial: _Trial
    cascade: Cascade | Refusal
    tiers: dict[int, int]
    errors: list[list[ErrorMeasure]]

    @classmethod
    def of(cls, trial: _Trial, bound: Bound) -> _Chosen:
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


class Trial(Protocol):
    """Who is shown the operands of a Site, call by call."""

    @property
    def site(self) -> Site:
        """The Site."""

    def see(self, inputs: Mapping[str, Tensor], held_out: bool) -> None:
        """The operands of one call by cascade input name; ``held_out``: it only confirms."""


@dataclass(eq=False)
class _Collector:
    """Shows each trial the operands of its Site while the graph runs."""

    trials: dict[fx.Node, list[Trial]]
    held_out: bool
    done: set[fx.Node] = field(default_factory=set)

    @property
    def sites(self) -> Mapping[fx.Node, Sequence[Site]]:
        """The Sites by output node."""
        return {node: [t.site for t in trials] for node, trials in self.trials.items()}

    @property
    def graphs(self) -> set[fx.Graph]:
        """The graphs that hold them."""
        return {node.graph for node in self.trials}

    def computed(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Measure the schemes of the Sites whose output is ``node``, once a call."""
        if node in self.done:
            return
        self.done.add(node)
        for trial in self.trials[node]:
            values = {n: env[n] for n in boundary(trial.site)}
            trial.see(canonical_inputs(trial.site, values), self.held_out)


def observe(
    host: fx.GraphModule,
    trials: Sequence[Trial],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    held_out: bool,
) -> None:
    """Run one call and show every trial its Site; `PolicyError` for a call that does not fit."""
    by_output: dict[fx.Node, list[Trial]] = {}
    for trial in trials:
        by_output.setdefault(trial.site.output.node, []).append(trial)
    try:
        flat = flat_inputs(host, args, kwargs)
        with torch.no_grad():
            walk = Walk(host, _Collector(by_output, held_out))
            walk.run(*flat, enable_io_processing=False)
    except (RuntimeError, AssertionError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PolicyError(f"a calibration call does not fit the captured model: {first}") from error
