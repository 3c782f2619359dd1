"""Accept or send back: verify every rewritten site, splice what stands, compare the whole model.

The budget of the policy decides here: a site over its bound goes back to exact, and while the whole
model is over its own, the worst site does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attn_rewrite import length_notes, quantisation
from attn_rewrite.budget import Budget
from attn_rewrite.capture import Captured
from attn_rewrite.costs import before_and_after
from attn_rewrite.driver import Decision, Spliced, Stopwatch, lowered, spliced
from attn_rewrite.outputs import compare_outputs
from attn_rewrite.passes.keep import Keep
from attn_rewrite.passes.transform import Exactness
from attn_rewrite.plan import Plan, Step, approximate_parts
from attn_rewrite.report import ErrorMeasure, Report, SiteReport
from attn_rewrite.saved import versions
from attn_rewrite.site import Findings, Refusal
from attn_rewrite.tracing import buffers_kept
from attn_rewrite.verify import Candidate, SiteCheck, check_sites, worst_site

if TYPE_CHECKING:
    from attn_rewrite.site import Site


@dataclass(frozen=True, eq=False)
class Outcome:
    """The rewritten graph with the plan that it follows and the report on it."""

    graph: fx.GraphModule
    plan: Plan
    report: Report


def accept(
    captured: Captured,
    host: fx.GraphModule,
    findings: Findings,
    plan: Plan,
    decisions: list[Decision],
    budget: Budget | None,
    watch: Stopwatch,
    *,
    verify: bool,
) -> Outcome:
    """Verify ``decisions`` on the captured inputs, splice, and report.

    ``host`` is the (canonicalised) graph the sites were found in.
    """
    checks: dict[str, SiteCheck] = {}
    if verify:
        with watch.stage("verify"):
            checks = _check(captured, host, decisions, plan, budget)
    decisions = [_after(d, checks.get(d.site.name)) for d in decisions]
    plan = plan.without([n for n, c in checks.items() if c.verdict == "reverted"])
    plan = _keeping(plan, {n for n, c in checks.items() if c.verdict == "kept"})
    with watch.stage("splice"):
        made = spliced(captured, decisions)
    end_to_end: dict[str, ErrorMeasure] = {}
    if verify:
        with watch.stage("end to end"):
            end_to_end, made, plan, checks, decisions = _whole(
                captured, host, made, plan, checks, decisions, budget
            )
    with watch.stage("cost"):
        sites = tuple(_site_report(d, plan, checks.get(d.site.name), budget) for d in decisions)
    known = {s.name for s in findings.sites}
    report = Report(
        sites=sites,
        refusals=(*findings.refusals, *(r for r in plan.refusals if r.site not in known)),
        end_to_end=end_to_end,
        timings=dict(watch.seconds),
        versions=versions(),
        notes=(
            *captured.notes,
            *_notes(findings, checks, verify),
            *length_notes.notes(decisions),
            *quantisation.notes(decisions, plan),
        ),
        budget="" if budget is None else str(budget),
        gathers=_gathers(made),
    )
    return Outcome(made.graph, plan, report)


def _gathers(made: Spliced) -> dict[str, int]:
    """Gathers of reordered tokens, where there are any."""
    if not made.before.total:
        return {}
    return {
        "at_sites": made.before.total, "left": made.after.activations,
        "of_tables": made.after.tables,
    }  # fmt: skip


def _check(
    captured: Captured,
    host: fx.GraphModule,
    decisions: list[Decision],
    plan: Plan,
    budget: Budget | None,
) -> dict[str, SiteCheck]:
    candidates = []
    for item in decisions:
        if item.kernel is None or item.cascade is None:
            if item.site.refusals:  # left as it is: what it was raised to is claimed all the same
                candidates.append(Candidate(item.site, item.site.cascade, None))
            continue
        exact = None
        if item.cascade is not item.site.cascade:
            exact = lowered(item.site, item.site.cascade, item.backend).kernel
        parts = approximate_parts(item.site, plan.of(item.site.name))
        candidates.append(
            Candidate(item.site, item.cascade, item.kernel, exact, item.tables, parts)
        )
    if not candidates:
        return {}
    args, kwargs = _inputs(captured)
    bound = None if budget is None else budget.site
    return {c.site: c for c in check_sites(host, args, kwargs, candidates, bound=bound)}


def _inputs(captured: Captured) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs; in-place models must not write into the caller's tensors."""
    from torch.utils import _pytree as pytree

    def own(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        own, (captured.args, captured.kwargs)
    )
    return copied


def _after(item: Decision, check: SiteCheck | None) -> Decision:
    """What a check makes of a decision."""
    if check is None or check.verdict in ("accepted", "raised"):
        return item
    if check.verdict == "kept":
        return Decision(item.site, refusal=check.refusals[0])
    return lowered(item.site, item.site.cascade, item.backend)


Whole = tuple[dict[str, ErrorMeasure], Spliced, Plan, dict[str, SiteCheck], list[Decision]]


def _whole(
    captured: Captured,
    host: fx.GraphModule,
    made: Spliced,
    plan: Plan,
    checks: dict[str, SiteCheck],
    decisions: list[Decision],
    budget: Budget | None,
) -> Whole:
    """Compare the models; send the worst site back while the whole is over its bound."""
    if made.graph is captured.graph:
        return {}, made, plan, checks, decisions
    original = _run(captured.graph, captured)
    while True:
        errors = compare_outputs(original, _run(made.graph, captured))
        bound = None if budget is None else budget.end_to_end
        if bound is None or all(bound.allows(e) for e in errors.values()):
            return errors, made, plan, checks, decisions
        left = {
            n: c.approximation
            for n, c in checks.items()
            if c.approximation is not None and c.verdict == "accepted"
        }
        worst = worst_site(left, bound)
        if worst is None:
            return errors, made, plan, checks, decisions
        gone = replace(checks[worst], verdict="reverted")
        decisions = [_after(d, gone) if d.site.name == worst else d for d in decisions]
        plan = plan.without([worst])
        again = [d for d in decisions if d.site.name == worst]
        exact = _check(captured, host, again, plan, None)
        checks = {**checks, worst: _merged(gone, exact.get(worst))}
        made = spliced(captured, decisions)


def _notes(findings: Findings, checks: Mapping[str, SiteCheck], verify: bool) -> tuple[str, ...]:
    if not findings.sites:
        near = len(findings.refusals)
        return (f"no attention was found ({near} near misses, each with its reason)",)
    if not verify:
        return ("not verified: verify=False was asked for",)
    return tuple(f"{name}: {check.note}" for name, check in checks.items() if check.note)


def _merged(gone: SiteCheck, exact: SiteCheck | None) -> SiteCheck:
    """The check of a site sent back: what its approximation cost, and how exact it is now."""
    if exact is None:
        return replace(gone, implementation=None, implementation_bound=None)
    return replace(
        gone,
        implementation=exact.implementation,
        implementation_bound=exact.implementation_bound,
        lse=exact.lse,
        seconds=gone.seconds + exact.seconds,
    )


def _keeping(plan: Plan, names: set[str]) -> Plan:
    """The plan with the steps of sites that verification kept replaced by ``keep``."""
    if not names:
        return plan
    steps = [s for s in plan.steps if s.site not in names]
    kept = [Step(n, (Keep(),), note="verification kept it") for n in sorted(names)]
    return replace(plan, steps=(*steps, *kept))


def _run(graph: fx.GraphModule, captured: Captured) -> Any:
    """Run with the same random numbers and the same buffers each time."""
    args, kwargs = _inputs(captured)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), buffers_kept(graph):
        torch.manual_seed(0)
        return graph(*args, **kwargs)


def _site_report(
    item: Decision, plan: Plan, check: SiteCheck | None, budget: Budget | None
) -> SiteReport:
    site = item.site
    steps = plan.of(site.name)
    refusals = [r for r in plan.refusals if r.site == site.name]
    refusals += [r for r in (item.refusal,) if r is not None and r not in refusals]
    approximate = (
        any(s.exactness is Exactness.APPROXIMATE for s in steps) and item.kernel is not None
    )
    measured: Mapping[str, Any] = {}
    if check is not None and check.verdict not in ("kept", "raised"):
        measured = {
            "implementation": check.implementation,
            "implementation_bound": check.implementation_bound,
            "approximation": check.approximation,
            "parts": check.parts,
            "lse": check.lse,
            "reverted": check.verdict == "reverted",
            "seconds": check.seconds,
        }
    before, after = before_and_after(site, item)
    return SiteReport(
        name=site.name,
        facts=site.facts(),
        steps=tuple(s.label for s in steps),
        kernel=None if item.kernel is None else item.kernel.name,
        exactness=plan.exactness_of(site.name).value,
        refusals=tuple(_named(r, site) for r in refusals),
        unbudgeted=approximate and budget is None,
        cost_before=before,
        cost_after=after,
        **measured,
    )


def _named(refusal: Refusal, site: Site) -> Refusal:
    return replace(refusal, site=site.name)
