"""Where one reduction goes: into the loop, behind a deferral, or into a later pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attn_rewrite.cascade.expr import Call, Expr, Read, call, conjuncts, ranks_of, transform, where
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.algebra import divided, product_parts
from attn_rewrite.passes.cascade.deferral import (
    Deferred,
    accumulator,
    declared,
    deferred_terms,
    monotone_deferral,
    replaced,
)
from attn_rewrite.passes.cascade.flow import IDENTITY, Flow, inlined_states
from attn_rewrite.passes.cascade.inversion import repaired
from attn_rewrite.passes.cascade.opening import opened_states
from attn_rewrite.passes.cascade.proof import FusionRefusal, Proof
from attn_rewrite.passes.cascade.separability import (
    Body,
    Counterexample,
    NotProved,
    Separation,
    is_range_guard,
    leaves_of,
    separate,
)
from attn_rewrite.passes.cascade.signs import sign
from attn_rewrite.passes.cascade.splitting import split_sum
from attn_rewrite.passes.cascade.stability import direction, range_condition, unstable
from attn_rewrite.passes.cascade.steps import Step

# The operation that distributes over a reduction, most useful first.
_ACTIONS = {"add": ("mul",), "max": ("add", "mul"), "min": ("add", "mul")}
_ROUNDING = {
    "round", "floor", "ceil", "cast_f32", "cast_f16", "cast_bf16", "cast_f8e4m3", "cast_f8e5m2",
    "cast_i8", "cast_i32",
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """A reduction for the loop, with the proof of its correction if it has one."""

    step: Step
    proofs: tuple[Proof, ...] = ()


Placement = Placed | Deferred | FusionRefusal


def place(
    flow: Flow, e: Einsum, steps: Mapping[str, Step], local_rounding: bool = False
) -> Placement:
    """Place the reduction ``e``; ``steps`` are the reductions that are in the loop already.

    ``local_rounding`` (approximate) lets rounding act at the running state.
    """
    whole = inlined_states(flow, e)
    if isinstance(whole, FusionRefusal):
        return split_sum(flow, e) or whole
    whole = opened_states(flow, whole)
    if flow.states(whole.guard):
        return _guarded_by_state(flow, e, whole)
    if not flow.states(whole.expr):
        return Placed(Step(e))
    for state in flow.states(whole.expr):
        if not _available(flow, state.tensor, steps):
            return _waits(e, state)
    result = _separated(flow, e, whole)
    if isinstance(result, FusionRefusal) and local_rounding:
        return _rounded_locally(flow, e, whole) or result
    return result


def _available(flow: Flow, tensor: str, steps: Mapping[str, Step]) -> bool:
    """Has the value a running form: are all reductions that it is made of in the loop?"""
    if tensor in steps:
        return True
    made = flow.producer[tensor]
    if flow.is_reduction(made):
        return False
    return all(_available(flow, s.tensor, steps) for s in flow.states(made.expr))


def _waits(e: Einsum, state: Read) -> FusionRefusal:
    reason = f"{e.out.tensor} waits for {state.tensor}, which is not fused itself"
    return FusionRefusal("waits", reason, rule="chain", tensor=e.out.tensor)


def _guarded_by_state(flow: Flow, e: Einsum, whole: Einsum) -> FusionRefusal:
    """A guard that reads a state is an indicator of it: separable only by accident."""
    terms = [t for t in conjuncts(whole.guard) if flow.states(t)]
    mask = terms[0]
    for term in terms[1:]:
        mask = call("and", mask, term)
    found = separate(body_of(flow, where(mask, whole.expr, 0.0)), "mul")
    numbers = found if isinstance(found, Counterexample) else None
    return FusionRefusal(
        "not-separable",
        f"the guard {mask} of {e.out.tensor} depends on a value that is complete only later, so "
        f"which items count is not known in time{_evidence(numbers)}",
        rule="B (separable)",
        tensor=e.out.tensor,
        counterexample=numbers,
    )


def _evidence(found: Counterexample | None) -> str:
    return f": {found}" if found is not None else ""


def body_of(flow: Flow, expr: Expr) -> Body:
    """Items, states and constants of ``expr``, with the leaves that are proved positive."""
    plain = leaves_of(expr, flow.rank, flow.complete)
    positive = frozenset(leaf for leaf in plain.leaves if sign(flow, leaf) == "positive")
    return replace(plain, positive=positive)


def _separated(flow: Flow, e: Einsum, whole: Einsum) -> Placement:
    body = body_of(flow, whole.expr)
    failed: Counterexample | NotProved | None = None
    refused: FusionRefusal | None = None
    for action in _ACTIONS.get(flow.operation(e), ()):
        found = separate(body, action)
        if not isinstance(found, Separation):
            failed = failed if isinstance(failed, Counterexample) else found
            continue
        acted = _acted(flow, e, whole, body, found)
        if isinstance(acted, FusionRefusal):
            refused = refused or acted
        elif acted is not None:
            return acted
    other = _monotone(flow, e, whole, body) or repaired(flow, e, whole, body)
    if other is None:
        other = _finite_rank(flow, e)
    return other or refused or _not_separable(flow, e, whole, failed)


def _finite_rank(flow: Flow, e: Einsum) -> Deferred | None:
    """A finite-rank deferral whose accumulators are free of states or separable themselves."""
    terms = deferred_terms(flow, e)
    if terms is None:
        return None
    new = replaced(flow, e, terms)
    for partial in terms.einsums[:-1]:
        body = body_of(new, partial.expr)
        if body.state and not isinstance(separate(body, "mul"), Separation):
            return None
    return terms


def _monotone(flow: Flow, e: Einsum, whole: Einsum, body: Body) -> Deferred | None:
    if flow.operation(e) not in ("max", "min"):
        return None
    known: dict[Expr, str] = {
        **dict.fromkeys(body.state, "const"),
        **dict.fromkeys(body.items, "up"),
    }
    way = direction(flow, whole.expr, known)
    return monotone_deferral(flow, e, whole, way) if way in ("up", "down") else None


def _not_separable(
    flow: Flow, e: Einsum, whole: Einsum, failed: Counterexample | NotProved | None
) -> FusionRefusal:
    name = e.out.tensor
    if failed is None:
        reason = f"no operation is known that distributes over the {flow.operation(e)} of {name}"
        return FusionRefusal("no-action", reason, rule="B (separable)", tensor=name)
    if isinstance(failed, NotProved):
        states = ", ".join(str(s) for s in flow.states(whole.expr))
        reason = f"the body {whole.expr} of {name} is not proved separable in {states}"
        return FusionRefusal("not-proved", reason, rule="B (separable)", tensor=name)
    reason = f"the body {whole.expr} of {name} does not split into items and states"
    return FusionRefusal(
        "not-separable",
        reason + _evidence(failed),
        rule="B (separable)",
        tensor=name,
        counterexample=failed,
    )


def _acted(flow: Flow, e: Einsum, whole: Einsum, body: Body, found: Separation) -> Placement | None:
    """A proved split becomes a deferral where that is legal, else a correction."""
    extremum = flow.operation(e) in ("max", "min")
    if extremum and found.action == "mul" and sign(flow, found.H) != "positive":
        reason = (
            f"{e.out.tensor} is separable, but its factor {found.H} is not proved positive: a "
            "negative one would turn the extremum around"
        )
        return FusionRefusal("unproved-sign", reason, rule="stability", tensor=e.out.tensor)
    guards, free = product_parts(found.H, lambda p: is_range_guard(p, flow.complete))
    if found.action == "add" or guards is None:
        split = _deferred_split(flow, e, whole, found.G, found.H, found.action)
    else:
        rest = divided(whole.expr, free, body.leaves, body.positive) if free is not None else None
        split = _deferred_split(flow, e, whole, rest, free, "mul")
    return split or _corrected(flow, e, whole, body, found)


def _deferred_split(
    flow: Flow, e: Einsum, whole: Einsum, rest: Expr | None, last: Expr | None, action: str
) -> Deferred | None:
    """``T = fold G`` and ``out = T * H`` (``T + H``) at the end; None where that is not legal."""
    if rest is None or last is None:
        return None
    op, default = flow.operation(e), flow.default(e.out.tensor)
    filtered = bool(conjuncts(whole.guard))
    if not ranks_of(last) <= _out_ranks(e) or (filtered and default != IDENTITY[op]):
        return None
    partial = accumulator(flow, whole, rest)
    result = Einsum(e.out, call(action, partial.out, last))
    states = tuple(dict.fromkeys(s.tensor for s in flow.states(last)))
    proof = Proof("D (deferral)", e.out.tensor, flow.rank, states, rest, last, action)
    return Deferred((partial, result), declared(partial, op), proof)


def _out_ranks(e: Einsum) -> frozenset[str]:
    return frozenset[str]().union(*(ranks_of(i) for i in e.out.index))


def _corrected(
    flow: Flow, e: Einsum, whole: Einsum, body: Body, found: Separation
) -> Placed | FusionRefusal:
    why = unstable(flow, body, found)
    if why is None and not ranks_of(found.correction) <= _out_ranks(e):
        why = f"the correction {found.correction} differs along a rank that {e.out.tensor} folds"
    if why is not None:
        reason = f"{e.out.tensor} is separable, but {why}"
        return FusionRefusal("unstable-correction", reason, rule="stability", tensor=e.out.tensor)
    in_range = range_condition(flow, whole)
    states = tuple(dict.fromkeys(s.tensor for s in flow.states(whole.expr)))
    conditions = (
        f"range guard: H = {found.H} stays in the loop, it is not deferred",
        "bounded: 0 < correction <= 1, every state is monotone",
        "in range: the exponent is at most 0 at every running state"
        if in_range
        else "range not proved: the exponent may exceed 0 at a running state",
        "an infinite state counts as 0 in the terms; the correction of an empty prefix is 0",
    )
    proof = Proof(
        "B (separable, corrected online)", e.out.tensor, flow.rank, states,
        found.G, found.H, found.action, found.correction, conditions,
    )  # fmt: skip
    return Placed(Step(e, found.correction, found.action, in_range), (proof,))


def _rounded_locally(flow: Flow, e: Einsum, whole: Einsum) -> Placed | None:
    """The correction that the body has when rounding is left out; rounding stays in the terms."""
    smooth = replace(whole, expr=transform(whole.expr, _unrounded))
    body = body_of(flow, smooth.expr)
    found = separate(body, "mul")
    if smooth == whole or flow.operation(e) != "add" or not isinstance(found, Separation):
        return None
    placed = _corrected(flow, e, smooth, body, found)
    if isinstance(placed, FusionRefusal):
        return None
    note = "approximate: terms are rounded at the running state, then rescaled"
    proofs = tuple(
        replace(p, rule="B (separable up to rounding)", side_conditions=(note, *p.side_conditions))
        for p in placed.proofs
    )
    return Placed(placed.step, proofs)


def _unrounded(node: Expr) -> Expr | None:
    return node.args[0] if isinstance(node, Call) and node.op in _ROUNDING else None
