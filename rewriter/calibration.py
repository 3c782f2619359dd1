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
from attn_rewrite.budget import Bound
from attn_rewrite.calls import CallForm
from attn_rewrite.cascade.staged import StagedAttention
from attn_rewrite.errors import PolicyError
from attn_rewrite.head_trials import ChosenSchemes, HeadTrial
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.calibrated import Calibrated
from attn_rewrite.plan import Plan, Step
from attn_rewrite.policy import Policy
from attn_rewrite.region import boundary
from attn_rewrite.site import Refusal, Site
from attn_rewrite.tracing import buffers_kept
from attn_rewrite.verify import canonical_inputs
from attn_rewrite.walk import Walk, flat_inputs

if TYPE_CHECKING:
    from torch import nn

    from attn_rewrite.capture import Captured
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
        (site.name, step.heads): HeadTrial(site, step, plan)
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
    host: fx.GraphModule, trials: list[HeadTrial], calls: Sequence[Call], bound: Bound
) -> None:
    """Measure what was chosen where heads share a scale: it is another one without some of them.

    Heads that are over the bound then fall out, until those that are left are not.
    """
    split = len(calls) - len(calls) // 2
    while trials:
        checks = [ChosenSchemes.of(trial, bound) for trial in trials]
        for number, (args, kwargs) in enumerate(calls):
            observe(host, checks, args, kwargs, held_out=number >= split)
        trials = [c.trial for c in checks if c.drop(bound)]


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
        with torch.no_grad(), buffers_kept(host):
            walk = Walk(host, _Collector(by_output, held_out))
            walk.run(*flat, enable_io_processing=False)
    except (RuntimeError, AssertionError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PolicyError(f"a calibration call does not fit the captured model: {first}") from error
