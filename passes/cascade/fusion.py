"""Fuse dependent reductions: derive the one-pass form of a cascade, with proofs.

The procedure: defer what is constant along the rank, then take the reductions in order; one whose
body splits into items and states is either deferred (if its state factor is no range guard) or
corrected on the fly, provided that the correction is bounded; one that does not split is tried for
monotone and finite-rank deferral; what is left stays in a later pass, with the reason.

Sources: Nayak et al., MICRO 2024 (deferral, iterative correction); Neptune (Zhao et al., PLDI 2026),
Lemma 4.3 and Theorem 4.1 (repair function); RedFuser (Tang et al., ASPLOS 2026; separability).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attn_rewrite.cascade.count import count_passes
from attn_rewrite.cascade.expr import Const, Expr, call, conjuncts, ranks_of, where
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.passes.cascade.algebra import product_parts
from attn_rewrite.passes.cascade.deferral import (
    Deferred,
    accumulator,
    declared,
    deferred,
    deferred_terms,
    monotone_deferral,
    replaced,
)
from attn_rewrite.passes.cascade.flow import Flow, flow_of, inlined_states, pruned
from attn_rewrite.passes.cascade.merging import merge_cascade
from attn_rewrite.passes.cascade.online import Step, emit, loop_members
from attn_rewrite.passes.cascade.proof import Fusion, FusionRefusal, Proof
from attn_rewrite.passes.cascade.separability import (
    Body,
    Counterexample,
    NotProved,
    Separation,
    is_range_guard,
    leaves_of,
    separate,
)
from attn_rewrite.passes.cascade.stability import direction, range_condition, sign, unstable
from attn_rewrite.site import Refusal

_ACTIONS = {"add": ("mul",), "max": ("add", "mul"), "min": ("add", "mul")}


@dataclass(frozen=True)
class _Plan:
    """The cascade after deferrals, the reductions that may run online, and what was found."""

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
    reference: float | str | None = None,
) -> Fusion | Refusal:
    """Derive a cascade with fewer passes over ``rank`` and prove that it computes the same.

    ``tile`` is the extent of a tile (None: whoever runs the cascade chooses).  ``lazy`` rescales only
    when the running maximum is more than that ahead of its reference.  ``reference`` replaces the
    running maximum by an a-priori bound of the scores: a number, or ``"auto"`` to derive one.

    Reassociated.  Where one pass is impossible the statistics are merged into one pass and the
    refusals say what remains (``Fusion.refusals``); where the count cannot fall, the `Refusal` names
    the rule that failed.  A cascade of one pass comes back as it is, without proofs.
    """
    before = count_passes(cascade, rank)
    if before <= 1:
        return Fusion(cascade, (), cascade.rank(rank), before, before)
    if reference is not None:
        from attn_rewrite.passes.cascade.bounding import fuse_at_reference

        return fuse_at_reference(cascade, rank, reference)
    flow = flow_of(cascade, rank)
    if isinstance(flow, Refusal):
        return flow
    return _finished(cascade, rank, before, _plan(flow), tile, lazy)


def merge_statistics_pass(
    cascade: Cascade, rank: str, *, tile: int | None = None
) -> Fusion | Refusal:
    """Merge the reductions that others wait for into one pass and leave the last consumers alone.

    The fall-back where one pass is impossible: statistics in one pass, emission in another.
    """
    before = count_passes(cascade, rank)
    flow = flow_of(cascade, rank)
    if isinstance(flow, Refusal):
        return flow
    plan = _plan(flow, statistics_only=True)
    return _finished(cascade, rank, before, plan, tile, None)


def _finished(
    cascade: Cascade, rank: str, before: int, plan: _Plan, tile: int | None, lazy: float | None
) -> Fusion | Refusal:
    name = cascade.rank(rank)
    dependent = [s for s in plan.steps.values() if s.correction is not None]
    if not dependent:
        new = pruned(plan.flow.cascade)
        after = count_passes(new, rank)
        if after < before:
            return Fusion(new, plan.proofs, name, before, after, plan.refusals)
        return _nothing(cascade, rank, before, plan)
    emitted = emit(plan.flow, plan.steps, tile, lazy)
    after = count_passes(emitted.cascade, rank)
    if after >= before:
        return _nothing(cascade, rank, before, plan)
    return Fusion(
        emitted.cascade, plan.proofs, name, before, after, plan.refusals,
        emitted.partial, merge_cascade(plan.flow, plan.steps), emitted.finish,
    )  # fmt: skip


def _nothing(cascade: Cascade, rank: str, before: int, plan: _Plan) -> FusionRefusal:
    if plan.refusals:
        return plan.refusals[0]
    return FusionRefusal(
        "no-fewer-passes",
        f"{cascade.name} keeps its {before} passes over {rank}: no rule lowers the count",
        rule="pass count",
    )


def _plan(flow: Flow, statistics_only: bool = False) -> _Plan:
    """Take the reductions in order until each is placed; a deferral starts over."""
    proofs: list[Proof] = []
    if not statistics_only:
        flow, found = deferred(flow)
        proofs += found
    while True:
        steps: dict[str, Step] = {}
        refusals: list[FusionRefusal] = []
        online: list[Proof] = []
        for e in flow.reductions():
            if statistics_only and not _is_statistic(flow, e):
                continue
            result = _place(flow, e, steps)
            if isinstance(result, Deferred) and not statistics_only:
                proofs.append(result.proof)
                flow, more = deferred(replaced(flow, e, result))
                proofs += more
                break
            if isinstance(result, tuple):
                steps[e.out.tensor] = result[0]
                online += result[1]
            elif isinstance(result, FusionRefusal):
                refusals.append(result)
        else:
            refusals += _waiting_maps(flow)
            return _Plan(flow, steps, (*proofs, *online), tuple(refusals))


def _is_statistic(flow: Flow, e: Einsum) -> bool:
    """Does an Einsum that traverses the rank wait for this reduction?"""
    made = {e.out.tensor}
    for other in flow.einsums:
        reads = {r.tensor for r in (*other.reads(),)}
        if reads & made:
            if flow.iterates(other):
                return True
            made.add(other.out.tensor)
    return False


def _waiting_maps(flow: Flow) -> list[FusionRefusal]:
    """Outputs that carry the rank and depend on a complete value: no rewrite can stream them."""
    return [
        FusionRefusal(
            "map-consumer",
            f"{e.out} carries rank {flow.rank} and needs a value that is complete only after a whole "
            "traversal, so it takes one pass more than its statistics",
            rule="map consumer",
            tensor=e.out.tensor,
        )
        for e in flow.einsums
        if e.out.tensor in flow.dependent and _reaches_output(flow, e.out.tensor)
    ]


def _reaches_output(flow: Flow, tensor: str) -> bool:
    """Does an output carry the rank through ``tensor``?"""
    if tensor in flow.cascade.outputs:
        return True
    return any(
        _reaches_output(flow, e.out.tensor)
        for e in flow.einsums
        if flow.is_map(e) and any(r.tensor == tensor for r in e.reads())
    )


_Placed = tuple[Step, tuple[Proof, ...]]


def _place(
    flow: Flow, e: Einsum, steps: Mapping[str, Step]
) -> _Placed | Deferred | FusionRefusal | None:
    """Where a reduction goes: into the loop, behind a deferral, or into a later pass."""
    whole = _over_states(flow, e)
    if isinstance(whole, FusionRefusal):
        return whole
    if flow.states(whole.guard):
        return _guarded_by_state(flow, e, whole)
    if not flow.states(whole.expr):
        return Step(e), ()
    blocked = [s.tensor for s in flow.states(whole.expr) if not _available(flow, s.tensor, steps)]
    if blocked:
        return FusionRefusal(
            "waits",
            f"{e.out.tensor} waits for {blocked[0]}, which is not fused itself",
            rule="chain",
            tensor=e.out.tensor,
        )
    return _separated(flow, e, whole)


def _available(flow: Flow, tensor: str, steps: Mapping[str, Step]) -> bool:
    """Has the value a running form: are all reductions that it is made of in the loop?"""
    if tensor in steps:
        return True
    made = flow.producer[tensor]
    if flow.is_reduction(made):
        return False
    return all(_available(flow, s.tensor, steps) for s in flow.states(made.expr))


def _over_states(flow: Flow, e: Einsum) -> Einsum | FusionRefusal:
    """``e`` over items and states; a state that is not monotone is opened down to its reductions."""
    from attn_rewrite.passes.cascade.opening import opened_states

    whole = inlined_states(flow, e)
    return whole if isinstance(whole, FusionRefusal) else opened_states(flow, whole)


def _guarded_by_state(flow: Flow, e: Einsum, whole: Einsum) -> FusionRefusal:
    """A guard that reads a state is an indicator of it: separable only by accident."""
    terms = [t for t in conjuncts(whole.guard) if flow.states(t)]
    mask = terms[0]
    for term in terms[1:]:
        mask = call("and", mask, term)
    body = _body(flow, where(mask, whole.expr, 0.0))
    found = separate(body, "mul")
    numbers = found if isinstance(found, Counterexample) else None
    return FusionRefusal(
        "not-separable",
        f"the guard {mask} of {e.out.tensor} depends on a value that is complete only later, so which "
        f"items count is not known in time{_evidence(numbers)}",
        rule="B (separable)",
        tensor=e.out.tensor,
        counterexample=numbers,
    )


def _evidence(found: Counterexample | None) -> str:
    return f": {found}" if found is not None else ""


def _body(flow: Flow, expr: Expr) -> Body:
    plain = leaves_of(expr, flow.rank, flow.complete)
    positive = frozenset(leaf for leaf in plain.leaves if sign(flow, leaf) == "positive")
    return replace(plain, positive=positive)


def _separated(flow: Flow, e: Einsum, whole: Einsum) -> _Placed | Deferred | FusionRefusal:
    op = flow.operation(e)
    body = _body(flow, whole.expr)
    failed: Counterexample | NotProved | None = None
    for action in _ACTIONS.get(op, ()):
        found = separate(body, action)
        if isinstance(found, Separation):
            acted = _acted(flow, e, whole, body, found)
            if acted is not None:
                return acted
        elif not isinstance(failed, Counterexample):
            failed = found
    from attn_rewrite.passes.cascade.inversion import repaired

    other = _monotone(flow, e, whole, body) or repaired(flow, e, whole, body)
    if other is not None:
        return other
    terms = deferred_terms(flow, e)
    if terms is not None and _terms_fuse(flow, e, terms):
        return terms
    return _not_separable(flow, e, whole, failed)


def _terms_fuse(flow: Flow, e: Einsum, terms: Deferred) -> bool:
    """Every accumulator of a finite-rank deferral must be free of states or separable itself."""
    new = replaced(flow, e, terms)
    for partial in terms.einsums[:-1]:
        body = _body(new, partial.expr)
        if body.state and not isinstance(separate(body, "mul"), Separation):
            return False
    return True


def _monotone(flow: Flow, e: Einsum, whole: Einsum, body: Body) -> Deferred | None:
    if flow.operation(e) not in ("max", "min"):
        return None
    still: dict[Expr, str] = {
        **dict.fromkeys(body.state, "const"),
        **dict.fromkeys(body.items, "up"),
    }
    way = direction(flow, whole.expr, still)
    return monotone_deferral(flow, e, whole, way) if way in ("up", "down") else None


def _not_separable(
    flow: Flow, e: Einsum, whole: Einsum, failed: Counterexample | NotProved | None
) -> FusionRefusal:
    op, name = flow.operation(e), e.out.tensor
    if failed is None:
        reason = f"no operation is known that distributes over the {op} of {name}"
        return FusionRefusal("no-action", reason, rule="B (separable)", tensor=name)
    if isinstance(failed, NotProved):
        return FusionRefusal(
            "not-proved",
            f"the body {whole.expr} of {name} is not proved separable in "
            f"{', '.join(str(s) for s in flow.states(whole.expr))}",
            rule="B (separable)",
            tensor=name,
        )
    return FusionRefusal(
        "not-separable",
        f"the body {whole.expr} of {name} does not split into items and states{_evidence(failed)}",
        rule="B (separable)",
        tensor=name,
        counterexample=failed,
    )


def _acted(
    flow: Flow, e: Einsum, whole: Einsum, body: Body, found: Separation
) -> _Placed | Deferred | FusionRefusal | None:
    """A proved split becomes a deferral where that is legal, else a correction."""
    op = flow.operation(e)
    if op in ("max", "min") and found.action == "mul" and sign(flow, found.H) != "positive":
        return None  # a negative factor would turn the extremum around
    guards, free = product_parts(found.H, lambda p: is_range_guard(p, flow.complete))
    if found.action == "add" or (free is not None and guards is None):
        return _deferred_split(flow, e, whole, found)
    if free is not None:
        part = _deferred_part(flow, e, whole, body, free)
        if part is not None:
            return part
    return _corrected(flow, e, whole, body, found)


def _deferred_split(flow: Flow, e: Einsum, whole: Einsum, found: Separation) -> Deferred | None:
    """``T = fold G`` and ``out = T * H`` (``T + H``) at the end."""
    out_ranks = frozenset[str]().union(*(ranks_of(i) for i in e.out.index))
    if not ranks_of(found.H) <= out_ranks or flow.default(e.out.tensor) not in _defaults(flow, e):
        return None
    partial = accumulator(flow, whole, found.G)
    last = Einsum(e.out, call(found.action, partial.out, found.H))
    states = tuple(dict.fromkeys(s.tensor for s in flow.states(whole.expr)))
    proof = Proof("D (deferral)", e.out.tensor, flow.rank, states, found.G, found.H, found.action)
    return Deferred((partial, last), declared(partial, flow.operation(e)), proof)


def _defaults(flow: Flow, e: Einsum) -> tuple[float, ...]:
    from attn_rewrite.passes.cascade.flow import IDENTITY

    same = flow.default(e.out.tensor)
    return (IDENTITY[flow.operation(e)],) if conjuncts(e.guard) else (same,)


def _deferred_part(flow: Flow, e: Einsum, whole: Einsum, body: Body, free: Expr) -> Deferred | None:
    """Defer the part of H that is no range guard; the rest of the body keeps the guard."""
    from attn_rewrite.passes.cascade.algebra import divided

    rest = divided(whole.expr, free, body.leaves, body.positive)
    out_ranks = frozenset[str]().union(*(ranks_of(i) for i in e.out.index))
    if rest is None or not ranks_of(free) <= out_ranks:
        return None
    partial = accumulator(flow, whole, rest)
    last = Einsum(e.out, partial.out * free)
    states = tuple(dict.fromkeys(s.tensor for s in flow.states(free)))
    proof = Proof("D (deferral)", e.out.tensor, flow.rank, states, rest, free)
    return Deferred((partial, last), declared(partial, flow.operation(e)), proof)


def _corrected(
    flow: Flow, e: Einsum, whole: Einsum, body: Body, found: Separation
) -> _Placed | FusionRefusal:
    why = unstable(flow, body, found)
    out_ranks = frozenset[str]().union(*(ranks_of(i) for i in e.out.index))
    if why is None and not ranks_of(found.correction) <= out_ranks:
        why = f"the correction {found.correction} differs along a rank that {e.out.tensor} folds"
    if why is not None:
        return FusionRefusal(
            "unstable-correction",
            f"{e.out.tensor} is separable, but {why}",
            rule="stability",
            tensor=e.out.tensor,
        )
    range_text = range_condition(flow, whole, body)
    states = tuple(dict.fromkeys(s.tensor for s in body.state))
    conditions = (
        f"range guard: H = {found.H} stays in the loop, it is not deferred",
        "bounded: 0 < correction <= 1, every state is monotone",
        range_text,
        "an infinite state counts as 0 in the terms; the correction of an empty prefix is 0",
    )
    proof = Proof(
        "B (separable, corrected online)", e.out.tensor, flow.rank, states,
        found.G, found.H, found.action, found.correction, conditions,
    )  # fmt: skip
    bounded = range_text.startswith("in range")
    return Step(e, found.correction, found.action, bounded), (proof,)


__all__ = ["Const", "fuse_reductions", "loop_members", "merge_statistics_pass"]
