"""Deferral: factors that do not change along the rank leave the reduction and act once at its end.

Theorem D of the derivation: if the body is ``sum_k G_k(x) H_k(s)``, accumulate ``T_k = sum G_k``
and finish with ``sum_k T_k H_k(s)``.  One term is the division deferral of FuseMax (Nayak et al.,
MICRO 2024, section IV-D).  A *range guard* stays: deferring ``exp(-GM)`` would accumulate
``exp(QK)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from attn_rewrite.cascade.expr import (
    TRUE,
    Call,
    Const,
    Expr,
    Rank,
    Read,
    call,
    conjunction,
    conjuncts,
    ranks_of,
    substitute,
    walk,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.passes.cascade.algebra import Term, from_sympy, symbols_for, to_sympy
from attn_rewrite.passes.cascade.flow import (
    IDENTITY,
    Flow,
    flow_of,
    inlined,
    inlined_states,
    iteration_ranks,
    pruned,
)
from attn_rewrite.passes.cascade.proof import Fusion, FusionRefusal, Proof
from attn_rewrite.passes.cascade.separability import is_range_guard, leaves_of, moves_along
from attn_rewrite.site import Refusal

_MOST_TERMS = 6  # a finite rank beyond this costs more accumulators than a second pass


@dataclass(frozen=True)
class Part:
    """A factor (or term) of a body; ``inverse`` parts divide (or are subtracted)."""

    expr: Expr
    inverse: bool = False


@dataclass(frozen=True)
class Deferred:
    """Einsums that replace a reduction, declarations of their tensors, and the proof."""

    einsums: tuple[Einsum, ...]
    decls: tuple[TensorDecl, ...]
    proof: Proof


def defer_scalar(cascade: Cascade, rank: str) -> Fusion | Refusal:
    """Move every factor that is constant along ``rank`` behind the reduction it scales.

    Reassociated: the same mathematics, other rounding.  Refused (``nothing-to-defer``) if no
    reduction over ``rank`` has such a factor; range guards never move.
    """
    from attn_rewrite.cascade.count import count_passes

    flow = flow_of(cascade, rank)
    if isinstance(flow, Refusal):
        return flow
    new, proofs = deferred(flow)
    if not proofs:
        reason = (
            f"no reduction of {cascade.name} over {rank} has a factor that is constant along it"
        )
        return FusionRefusal("nothing-to-defer", reason, rule="D (deferral)")
    result = pruned(new.cascade)
    before, after = count_passes(cascade, rank), count_passes(result, rank)
    return Fusion(result, proofs, cascade.rank(rank), before, after)


def deferred(flow: Flow) -> tuple[Flow, tuple[Proof, ...]]:
    """Apply `hoisted` until nothing moves."""
    proofs: list[Proof] = []
    while True:
        for e in flow.reductions():
            change = hoisted(flow, e)
            if change is not None:
                proofs.append(change.proof)
                flow = replaced(flow, e, change)
                break
        else:
            return flow, tuple(proofs)


def replaced(flow: Flow, e: Einsum, change: Deferred) -> Flow:
    """The flow with the Einsums of ``change`` in the place of ``e``."""
    body: list[Einsum] = []
    for old in flow.einsums:
        body.extend(change.einsums if old is e else (old,))
    return flow.with_einsums(body, change.decls)


def hoisted(flow: Flow, e: Einsum) -> Deferred | None:
    """Split ``e``: a reduction of its moving parts, then an Einsum that applies the constant ones.

    Ranks that the constant parts carry and ``e`` sums are summed afterwards; so are ranks that a
    state inside a range guard carries, because its correction differs along them.
    """
    op = flow.operation(e)
    if op not in _FAMILY or (flow.default(e.out.tensor) != IDENTITY[op] and e.guard != TRUE):
        return None
    e, parts = _exposed(flow, e)
    still = [p for p in parts if _is_constant(flow, p.expr)]
    moving = [p for p in parts if p not in still]
    kept = _ranks_kept(flow, e, still, moving)
    if (not still and not kept) or not moving:
        return None
    if kept and any(o != "add" for _, o in e.reduce):
        return None
    rest = joined(moving, op)
    return _two_steps(flow, e, rest, still, kept)


# A reduction and the operator that distributes over it, with its inverse.
_FAMILY = {
    "add": ("mul", "div"), "max": ("add", "sub"), "min": ("add", "sub"), "or": ("and", ""),
}  # fmt: skip


def _exposed(flow: Flow, e: Einsum) -> tuple[Einsum, list[Part]]:
    """``e`` with those producers inlined that hide a constant part, and its parts."""
    op = flow.operation(e)
    while True:
        parts = parts_of(e.expr, op)
        for part in parts:
            if not isinstance(part.expr, Read) or part.expr.tensor not in flow.dependent:
                continue
            opened = inlined(flow, e, part.expr)
            if opened is not None and _hides(flow, part.expr, op):
                e = opened
                break
        else:
            return e, parts


def _hides(flow: Flow, read: Read, op: str) -> bool:
    """Does the producer of a map hold a part that is constant along the rank, at any depth?"""
    made = flow.producer[read.tensor]
    local = iteration_ranks(made) - {i.name for i in made.out.index if isinstance(i, Rank)}
    if local and flow.states(made.expr):
        return True
    for part in parts_of(made.expr, op):
        if _is_constant(flow, part.expr):
            return True
        inner = part.expr
        if isinstance(inner, Read) and inner.tensor in flow.dependent and _hides(flow, inner, op):
            return True
    return bool(local) and any(
        isinstance(n, Read) and n.tensor in flow.dependent for n in walk(made.expr)
    )


def parts_of(expr: Expr, op: str, inverse: bool = False) -> list[Part]:
    """The factors of what ``op`` folds (the terms, for an extremum)."""
    join, unjoin = _FAMILY.get(op, ("", ""))
    match expr:
        case Call(name, (a, b)) if name == join:
            return [*parts_of(a, op, inverse), *parts_of(b, op, inverse)]
        case Call(name, (a, b)) if name == unjoin:
            return [*parts_of(a, op, inverse), *parts_of(b, op, not inverse)]
        case Call("neg", (a,)) if op == "add":
            return [Part(Const(-1.0)), *parts_of(a, op, inverse)]
        case Call("neg", (a,)) if join == "add":
            return parts_of(a, op, not inverse)
        case Call("reciprocal", (a,)) if op == "add":
            return parts_of(a, op, not inverse)
    return [Part(expr, inverse)]


def _is_constant(flow: Flow, expr: Expr) -> bool:
    """Constant along the rank, made of complete values, and not a range guard."""
    return (
        not moves_along(expr, flow.rank)
        and bool(flow.states(expr))
        and not is_range_guard(expr, flow.complete)
    )


def _ranks_kept(
    flow: Flow, e: Einsum, still: Sequence[Part], moving: Sequence[Part]
) -> frozenset[str]:
    found = frozenset[str]().union(*(ranks_of(p.expr) for p in still))
    for part in moving:
        found |= _state_ranks(flow, part.expr)
    return found & flow.others_reduced(e)


def _state_ranks(flow: Flow, expr: Expr) -> frozenset[str]:
    """Ranks along which the states that ``expr`` depends on differ, through dependent maps."""
    found = frozenset[str]().union(*(ranks_of(s) for s in flow.states(expr)))
    for read in walk(expr):
        if isinstance(read, Read) and read.tensor in flow.dependent:
            made = flow.producer[read.tensor]
            names = [i.name for i in made.out.index if isinstance(i, Rank)]
            inside = _state_ranks(flow, made.expr)
            for name, index in zip(names, read.index, strict=True):
                found |= ranks_of(index) if name in inside else frozenset()
    return found


def joined(parts: Sequence[Part], op: str) -> Expr:
    """The inverse of `parts_of`."""
    join, unjoin = _FAMILY[op]
    ahead = [p for p in parts if not p.inverse]
    result = ahead[0].expr if ahead else Const(1.0 if op == "add" else 0.0)
    for part in ahead[1:]:
        result = call(join, result, part.expr)
    for part in parts:
        if part.inverse:
            result = call(unjoin, result, part.expr)
    return result


def _two_steps(
    flow: Flow, e: Einsum, rest: Expr, still: Sequence[Part], kept: frozenset[str]
) -> Deferred:
    op = flow.operation(e)
    partial = accumulator(flow, e, rest, kept)
    applied = joined([Part(partial.out), *still], op)
    last = Einsum(
        e.out, applied, tuple((r, "add") for r in sorted(kept)), _row_guard(flow, e, kept)
    )
    factor = joined(still, op) if still else Const(1.0)
    states = tuple(dict.fromkeys(s.tensor for p in still for s in flow.states(p.expr)))
    rule = "D (deferral)" if still else "D (sums exchanged)"
    action = _FAMILY[op][0]
    conditions = (f"{partial.out.tensor} accumulates G; {e.out.tensor} = {applied} afterwards",)
    proof = Proof(rule, e.out.tensor, flow.rank, states, rest, factor, action, None, conditions)
    return Deferred((partial, last), declared(partial, op), proof)


def accumulator(flow: Flow, e: Einsum, rest: Expr, kept: frozenset[str] = frozenset()) -> Einsum:
    """The reduction of ``rest`` in the place of ``e``; its output carries ``kept`` as well."""
    op = flow.operation(e)
    extra = tuple(Rank(r) for r in sorted(kept))
    names = [n.tensor for n in walk(rest) if isinstance(n, Read)]
    short = "".join(dict.fromkeys(names)) if len(names) > 1 else f"{e.out.tensor}N"
    name = flow.fresh(short if len(short) <= 8 else f"{e.out.tensor}N")
    reduce = tuple((r, o) for r, o in e.reduce if r not in kept)
    if flow.rank not in ranks_of(rest) and flow.rank not in dict(reduce):
        reduce = ((flow.rank, op), *reduce)  # a constant is summed over the points of the rank
    return Einsum(Read(name, (*e.out.index, *extra)), rest, reduce, e.guard)


def declared(partial: Einsum, op: str) -> tuple[TensorDecl, ...]:
    """The declaration of an accumulator; none where the default 0 is the identity already."""
    if IDENTITY[op] == 0.0:
        return ()
    ranks = tuple(i.name for i in partial.out.index if isinstance(i, Rank))
    return (TensorDecl(partial.out.tensor, ranks, IDENTITY[op]),)


def _row_guard(flow: Flow, e: Einsum, kept: frozenset[str]) -> Expr:
    """Terms of the guard that still make sense once the rank is gone."""
    here = frozenset[str](kept).union(*(ranks_of(i) for i in e.out.index))
    return conjunction(tuple(t for t in conjuncts(e.guard) if ranks_of(t) and ranks_of(t) <= here))


def deferred_terms(flow: Flow, e: Einsum) -> Deferred | None:
    """Finite-rank deferral: a sum whose body expands into terms ``G_k(x) * H_k(s)``, K > 1.

    Terms with the same ``H`` share an accumulator.  A term may keep a separable range guard in its
    ``G``; its accumulator is then fused by correction.  None where the body does not expand so.
    """
    if flow.operation(e) != "add" or (flow.default(e.out.tensor) != 0 and e.guard != TRUE):
        return None
    whole = inlined_states(flow, e)
    if isinstance(whole, FusionRefusal) or flow.states(whole.guard):
        return None
    body = leaves_of(whole.expr, flow.rank, flow.complete)
    symbols = symbols_for(body.leaves)
    term = to_sympy(body.expr, symbols)
    expanded = sympy.expand(term, power_exp=False, power_base=False, log=False)
    states = {symbols[s] for s in body.state}
    groups = _groups(sympy.Add.make_args(expanded), states, {symbols[x] for x in body.items})
    if groups is None or not 1 < len(groups) <= _MOST_TERMS:
        return None
    leaves = {symbol: leaf for leaf, symbol in symbols.items()}
    pairs = [
        (from_sympy(factor, leaves), from_sympy(sympy.Add(*group), leaves))
        for (factor, _), group in groups.items()
    ]
    return _many_steps(flow, whole, e, pairs)


def _groups(
    terms: Sequence[Term], states: set[sympy.Symbol], items: set[sympy.Symbol]
) -> dict[tuple[Term, Term], list[Term]] | None:
    """Terms by state factor and by what states their range guards hold.

    None if a state is mixed with items outside an exponential.
    """
    groups: dict[tuple[Term, Term], list[Term]] = {}
    for term in terms:
        still, moving, guards = [], [], []
        for factor in sympy.Mul.make_args(term):
            stateful = bool(factor.free_symbols & states)
            if stateful and not factor.has(sympy.exp):
                if factor.free_symbols & items:
                    return None
                still.append(factor)
                continue
            moving.append(factor)
            guards += _guard_states(factor, states) if stateful else []
        key = (sympy.Mul(*still), sympy.Add(*guards))
        groups.setdefault(key, []).append(sympy.Mul(*moving))
    return groups


def _guard_states(factor: Term, states: set[sympy.Symbol]) -> list[Term]:
    """The terms of an exponent that hold states: sums with different ones do not separate."""
    if not isinstance(factor, sympy.exp):
        return [factor]
    parts = sympy.Add.make_args(sympy.expand(factor.exp))
    return [p for p in parts if p.free_symbols & states]


def _many_steps(
    flow: Flow, whole: Einsum, e: Einsum, pairs: Sequence[tuple[Expr, Expr]]
) -> Deferred:
    """An accumulator for each (factor, body), then the sum of what the factors make of them."""
    partials: list[Einsum] = []
    taken = flow
    for _, rest in pairs:
        partials.append(accumulator(taken, whole, rest))
        taken = taken.with_einsums([*taken.einsums, partials[-1]])
    total: Expr | None = None
    for partial, (factor, _) in zip(partials, pairs, strict=True):
        one = factor == Const(1) or factor == Const(1.0)
        product = partial.out if one else partial.out * factor
        total = product if total is None else total + product
    assert total is not None
    last = Einsum(e.out, total, (), _row_guard(flow, whole, frozenset()))
    states = tuple(dict.fromkeys(s.tensor for s in flow.states(whole.expr)))
    terms = " + ".join(f"({rest}) * ({factor})" for factor, rest in pairs)
    proof = Proof(
        f"D (finite rank, K={len(partials)})", e.out.tensor, flow.rank, states,
        G=whole.expr, H=Const(1.0), side_conditions=(f"body = {terms}",), cancellation_risk=True,
    )  # fmt: skip
    return Deferred((*partials, last), (), proof)


def monotone_deferral(flow: Flow, e: Einsum, whole: Einsum, direction: str) -> Deferred | None:
    """``max F(x, s) = F(max x, s)`` where F rises with its only item (``min x`` where it falls)."""
    body = leaves_of(whole.expr, flow.rank, flow.complete)
    op = flow.operation(e)
    if len(body.items) != 1 or op not in ("max", "min") or whole.guard != TRUE:
        return None
    inner = op if direction == "up" else {"max": "min", "min": "max"}[op]
    (item,) = body.items
    others = {r: dict(whole.reduce).get(r, "add") for r in flow.others_reduced(whole)}
    # Ranks along which states or constants differ are folded after F has been applied.
    kept = others.keys() & ranks_of(substitute(whole.expr, {item: Const(0.0)}))
    if others.keys() - kept - ranks_of(item) or set(others.values()) - {op}:
        return None
    reduce = tuple((r, inner) for r, _ in whole.reduce if r not in kept)
    partial = replace(accumulator(flow, whole, item, frozenset(kept)), reduce=reduce)
    later = tuple((r, op) for r in sorted(kept))
    last = Einsum(e.out, substitute(whole.expr, {item: partial.out}), later)
    states = tuple(dict.fromkeys(s.tensor for s in flow.states(whole.expr)))
    proof = Proof(
        "D (monotone)", e.out.tensor, flow.rank, states, item, whole.expr,
        side_conditions=(f"the body {'rises' if direction == 'up' else 'falls'} with {item}",),
    )  # fmt: skip
    return Deferred((partial, last), declared(partial, inner), proof)
