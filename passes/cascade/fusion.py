"""Fuse dependent reductions: derive the one-pass form of a cascade, with proofs.

The procedure: defer what is constant along the rank, then take the reductions in order; one whose
body splits into items and states is either deferred (if its state factor is no range guard) or
corrected on the fly, provided that the correction is bounded; one that does not split is tried for
monotone and finite-rank deferral; what is left stays in a later pass, with the reason.  A fold over
all earlier or all later items becomes a running value and decides the direction of the traversal.

Sources: Nayak et al., MICRO 2024 (deferral, iterative correction); Neptune (Zhao et al., PLDI
2026), Lemma 4.3 and Theorem 4.1 (repair function); RedFuser (Tang et al., ASPLOS 2026;
separability test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_rewrite.cascade.count import count_passes
from attn_rewrite.cascade.expr import Expr
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.cascade.unroll import accesses
from attn_rewrite.passes.cascade.deferral import Deferred, deferred, replaced
from attn_rewrite.passes.cascade.flow import Flow, flow_of, pruned
from attn_rewrite.passes.cascade.merging import merge_cascade
from attn_rewrite.passes.cascade.online import emit, loop_members
from attn_rewrite.passes.cascade.placement import Placed, place
from attn_rewrite.passes.cascade.proof import Fusion, FusionRefusal, Proof
from attn_rewrite.passes.cascade.scans import Scan, direction_of, scans_of
from attn_rewrite.passes.cascade.staging import fused_after_stages
from attn_rewrite.passes.cascade.steps import Step
from attn_rewrite.site import Refusal


@dataclass(frozen=True)
class _Options:
    tile: int | None = None
    lazy: float | None = None
    local_rounding: bool = False
    statistics_only: bool = False


@dataclass(frozen=True)
class _Plan:
    """The cascade after deferrals, the reductions for the loop, and what was found."""

    flow: Flow
    steps: Mapping[str, Step]
    proofs: tuple[Proof, ...]
    refusals: tuple[FusionRefusal, ...]


def fuse_reductions(
    cascade: Cascade,
    rank: str,
    *,
    tile: int | None = None,
    lazy: float | None = None,
    reference: Expr | float | str | None = None,
    local_rounding: bool = False,
) -> Fusion | Refusal:
    """Derive a cascade with fewer passes over ``rank`` and prove that it computes the same.

    ``tile`` is the extent of a tile (None: whoever runs the cascade chooses).  ``lazy`` rescales
    only when the running maximum is more than that ahead of its reference.  ``reference`` replaces
    the running maximum by an a-priori bound of the scores: an expression, a number, or ``"auto"``
    to derive one.  ``local_rounding`` (approximate) lets rounding act at the running state.

    Reassociated (approximate with ``local_rounding``).  Where one pass is impossible the statistics
    are merged into one pass and ``Fusion.refusals`` say what remains; where the count cannot fall
    the `Refusal` names the rule that failed.  A cascade of one pass comes back as it is, without
    proofs.  Raises `ValueError` for an unknown rank, a tile below 1 or a negative ``lazy``.
    """
    _check(tile, lazy)
    before = count_passes(cascade, rank)
    if before <= 1:
        return Fusion(cascade, (), cascade.rank(rank), before, before)
    staged = fused_after_stages(
        cascade,
        rank,
        lambda rest: fuse_reductions(
            rest, rank, tile=tile, lazy=lazy, reference=reference, local_rounding=local_rounding
        ),
    )
    if staged is not None:
        return staged
    flow = _streamed(cascade, rank)
    if isinstance(flow, FusionRefusal):
        return flow
    if reference is not None:
        return _at_reference(cascade, flow, rank, reference)
    options = _Options(tile, lazy, local_rounding)
    return _finished(cascade, rank, before, _plan(flow, options), options)


def merge_statistics_pass(
    cascade: Cascade, rank: str, *, tile: int | None = None
) -> Fusion | Refusal:
    """Merge the reductions that others wait for into one pass; leave the last consumers alone.

    The fall-back where one pass is impossible: statistics in one pass, emission in another.
    Reassociated; refusals and errors as `fuse_reductions`.
    """
    _check(tile, None)
    before = count_passes(cascade, rank)
    flow = _streamed(cascade, rank)
    if isinstance(flow, FusionRefusal):
        return flow
    options = _Options(tile, statistics_only=True)
    return _finished(cascade, rank, before, _plan(flow, options), options)


def _streamed(cascade: Cascade, rank: str) -> Flow | FusionRefusal:
    """The flow along ``rank``, every read of it in step or a scan."""
    flow = flow_of(cascade, rank)
    if isinstance(flow, FusionRefusal):
        return flow
    scans = scans_of(flow)
    return scans if isinstance(scans, FusionRefusal) else flow


def _check(tile: int | None, lazy: float | None) -> None:
    if tile is not None and tile < 1:
        raise ValueError(f"a tile has at least 1 coordinate, got {tile}")
    if lazy is not None and not lazy >= 0:
        raise ValueError(f"lazy is how far the maximum may run ahead, at least 0, got {lazy}")


def _at_reference(
    cascade: Cascade, flow: Flow, rank: str, reference: Expr | float | str
) -> Fusion | Refusal:
    from attn_rewrite.passes.cascade.bounding import at_bound

    bounded = at_bound(flow, reference)
    if isinstance(bounded, FusionRefusal):
        return bounded
    rest = fuse_reductions(bounded.cascade, rank)
    if isinstance(rest, Refusal):
        return rest
    before, after = count_passes(cascade, rank), rest.passes
    proofs = (*bounded.proofs, *rest.proofs)
    return Fusion(rest.cascade, proofs, rest.rank, before, after, rest.refusals)


def _finished(
    cascade: Cascade, rank: str, before: int, plan: _Plan, options: _Options
) -> Fusion | Refusal:
    name = cascade.rank(rank)
    scans = _scans(plan)
    if isinstance(scans, FusionRefusal):
        return scans
    if not scans and not any(s.correction is not None for s in plan.steps.values()):
        new = pruned(plan.flow.cascade)
        after = count_passes(new, rank)
        if after >= before:
            return _nothing(cascade, rank, before, plan)
        return Fusion(new, plan.proofs, name, before, after, plan.refusals)
    emitted = emit(plan.flow, plan.steps, options.tile, options.lazy, scans)
    after = count_passes(emitted.cascade, rank)
    if after >= before:
        return _nothing(cascade, rank, before, plan)
    proofs = (*(s.proof(plan.flow.rank) for s in scans.values()), *plan.proofs)
    if scans:  # every part needs what came before it: no split-K
        return Fusion(emitted.cascade, proofs, name, before, after, plan.refusals)
    return Fusion(
        emitted.cascade, proofs, name, before, after, plan.refusals,
        emitted.partial, merge_cascade(plan.flow, plan.steps), emitted.finish,
    )  # fmt: skip


def _scans(plan: _Plan) -> Mapping[str, Scan] | FusionRefusal:
    """The scans that the loop runs; refused where they need both directions."""
    found = scans_of(plan.flow)
    if isinstance(found, FusionRefusal):
        return found
    members = loop_members(plan.flow, plan.steps)
    inside = {name: scan for name, scan in found.items() if name in members}
    refused = direction_of(inside)
    return refused if isinstance(refused, FusionRefusal) else inside


def _nothing(cascade: Cascade, rank: str, before: int, plan: _Plan) -> FusionRefusal:
    if plan.refusals:
        return plan.refusals[0]
    reason = f"{cascade.name} keeps its {before} passes over {rank}: no rule lowers the count"
    return FusionRefusal("no-fewer-passes", reason, rule="pass count")


def _plan(flow: Flow, options: _Options) -> _Plan:
    """Take the reductions in order until each is placed; after a deferral start over."""
    proofs: list[Proof] = []
    if not options.statistics_only:
        flow, found = deferred(flow)
        proofs += found
    while True:
        plan = _round(flow, options)
        if not isinstance(plan, Deferred):
            return _Plan(plan.flow, plan.steps, (*proofs, *plan.proofs), plan.refusals)
        proofs.append(plan.proof)
        flow, found = deferred(replaced(flow, _source(flow, plan), plan))
        proofs += found


def _source(flow: Flow, change: Deferred) -> Einsum:
    return flow.producer[change.einsums[-1].out.tensor]


def _round(flow: Flow, options: _Options) -> _Plan | Deferred:
    """One placement of all reductions, or the first deferral that changes the cascade."""
    steps: dict[str, Step] = {}
    refusals: list[FusionRefusal] = []
    proofs: list[Proof] = []
    for e in flow.reductions():
        if options.statistics_only and not _is_statistic(flow, e):
            continue
        result = place(flow, e, steps, options.local_rounding)
        if isinstance(result, Deferred):
            if not options.statistics_only:
                return result
        elif isinstance(result, Placed):
            steps[e.out.tensor] = result.step
            proofs += result.proofs
        else:
            refusals.append(result)
    return _Plan(flow, steps, tuple(proofs), (*refusals, *_map_consumers(flow)))


def _is_statistic(flow: Flow, e: Einsum) -> bool:
    """Does an Einsum that traverses the rank wait for this reduction?"""
    made = {e.out.tensor}
    for other in flow.einsums:
        if made.isdisjoint(r.tensor for r in accesses(other)):
            continue
        if flow.iterates(other):
            return True
        made.add(other.out.tensor)
    return False


def _map_consumers(flow: Flow) -> list[FusionRefusal]:
    """Outputs that carry the rank and depend on a complete value: no rewrite can stream them."""
    return [
        FusionRefusal(
            "map-consumer",
            f"{flow.producer[name].out} carries rank {flow.rank} and needs a value that is "
            "complete only after a whole traversal: it takes one pass more than its statistics",
            rule="map consumer",
            tensor=name,
        )
        for name in flow.cascade.outputs
        if name in flow.dependent
    ]
