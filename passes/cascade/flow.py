"""A cascade seen along one rank: which Einsums traverse it and which values wait for its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from attn_rewrite.cascade.expr import (
    Call,
    Const,
    Expr,
    Rank,
    Read,
    conjunction,
    conjuncts,
    ranks_of,
    substitute,
    walk,
    where,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, TensorDecl
from attn_rewrite.cascade.unroll import accesses, unrolled
from attn_rewrite.passes.cascade.proof import FusionRefusal

IDENTITY = {
    "add": 0.0, "mul": 1.0, "max": float("-inf"), "min": float("inf"), "or": 0.0, "and": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Flow:
    """Straight-line Einsums of ``cascade`` and what ``rank`` means to each of them.

    An Einsum that iterates the rank is a *map* (its output carries the rank) or a *reduction*.
    """

    cascade: Cascade
    rank: str

    @cached_property
    def einsums(self) -> tuple[Einsum, ...]:
        """Every statement; `straight` has made sure that there are no loops."""
        return tuple(s for s in self.cascade.body if isinstance(s, Einsum))

    @cached_property
    def producer(self) -> Mapping[str, Einsum]:
        """The Einsum that writes each tensor."""
        return {e.out.tensor: e for e in self.einsums}

    @cached_property
    def decls(self) -> Mapping[str, TensorDecl]:
        """Declarations by name."""
        return {t.name: t for t in (*self.cascade.inputs, *self.cascade.tensors)}

    @cached_property
    def complete(self) -> frozenset[str]:
        """Values known only after a traversal of the rank: reductions and what is made of them."""
        found: set[str] = set()
        for e in self.einsums:
            waits = any(r.tensor in found for r in accesses(e)) and not self.iterates(e)
            if self.is_reduction(e) or waits:
                found.add(e.out.tensor)
        return frozenset(found)

    @cached_property
    def dependent(self) -> frozenset[str]:
        """Tensors that carry the rank and depend on a complete value."""
        found: set[str] = set()
        for e in self.einsums:
            late = self.complete | found
            if self.is_map(e) and any(r.tensor in late for r in accesses(e)):
                found.add(e.out.tensor)
        return frozenset(found)

    def iterates(self, e: Einsum) -> bool:
        """Does the Einsum traverse the rank?"""
        return self.rank in iteration_ranks(e)

    def is_map(self, e: Einsum) -> bool:
        """It traverses the rank and its output carries it."""
        return any(self.rank in ranks_of(i) for i in e.out.index)

    def is_reduction(self, e: Einsum) -> bool:
        """It traverses the rank and folds it away."""
        return self.iterates(e) and not self.is_map(e)

    def reductions(self) -> Iterator[Einsum]:
        """Reductions over the rank in program order."""
        return (e for e in self.einsums if self.is_reduction(e))

    def operation(self, e: Einsum) -> str:
        """The operator that folds the rank."""
        return dict(e.reduce).get(self.rank, "add")

    def others_reduced(self, e: Einsum) -> frozenset[str]:
        """Further ranks that the Einsum folds."""
        written = frozenset[str]().union(*(ranks_of(i) for i in e.out.index))
        return iteration_ranks(e) - written - {self.rank}

    def default(self, tensor: str) -> float:
        """The value of points nobody wrote."""
        return self.decls[tensor].default if tensor in self.decls else 0.0

    def states(self, expr: Expr) -> tuple[Read, ...]:
        """Reads of complete values, each once."""
        reads = (n for n in walk(expr) if isinstance(n, Read) and n.tensor in self.complete)
        return tuple(dict.fromkeys(reads))

    def with_einsums(self, einsums: list[Einsum], decls: tuple[TensorDecl, ...] = ()) -> Flow:
        """The same view of other statements."""
        new = replace(self.cascade, body=tuple(einsums), tensors=(*self.cascade.tensors, *decls))
        return Flow(new, self.rank)

    def fresh(self, name: str) -> str:
        """``name``, or the first of ``name2``, ``name3`` ... that no tensor has."""
        return fresh_name(name, {*self.decls, *self.producer})


def fresh_name(name: str, taken: set[str]) -> str:
    """``name`` with the least number that makes it new."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}{number}"
    return found


def iteration_ranks(e: Einsum) -> frozenset[str]:
    """Ranks of the iteration space."""
    parts = (e.expr, e.guard, *e.out.index)
    return frozenset(r for r, _ in e.reduce).union(*(ranks_of(p) for p in parts))


def flow_of(cascade: Cascade, rank: str) -> Flow | FusionRefusal:
    """The flow of ``cascade`` along ``rank``, or why the rules do not apply to its form.

    A rank that is split already is traversed along its outer part.  Solver loops of known extent
    are written out, so that a refusal is about the arithmetic and not about the loop.
    """
    name = cascade.rank(rank)
    parts = next((r.parts for r in cascade.ranks if r.name == name), ())
    used = frozenset[str]().union(*(iteration_ranks(e) for e in cascade.einsums()))
    if parts and name in used and parts[0] in used:
        return _form(cascade, name, f"some Einsums iterate {name} and some its parts")
    level = parts[0] if parts and name not in used else name
    if any(isinstance(s, Loop) and s.rank == level for s in cascade.body):
        return _form(cascade, name, f"rank {level} is iterative already")
    straight = _straight(cascade, level)
    if straight is None:
        return _form(cascade, name, "a loop over another rank has no fixed extent")
    flow = Flow(straight, level)
    return _irregular(flow) or flow


def _form(cascade: Cascade, rank: str, why: str) -> FusionRefusal:
    reason = f"{cascade.name} over {rank}: {why}; the rules need straight-line Einsums"
    return FusionRefusal("not-normal-form", reason, rule="normal form")


def _straight(cascade: Cascade, level: str) -> Cascade | None:
    if not any(isinstance(s, Loop) for s in cascade.body):
        return cascade
    pairs = tuple(unrolled(cascade, frozenset({level})))
    if any(loop is not None for _, loop in pairs):
        return None
    return replace(cascade, body=tuple(_spelled(e) for e, _ in pairs))


def _spelled(e: Einsum) -> Einsum:
    """Step tensors (``TAU@3``) under names that the text form can write."""

    def named(expr: Expr) -> Expr:
        found: dict[Expr, Expr] = {
            r: Read(r.tensor.replace("@", "_").replace(",", "_"), r.index)
            for r in walk(expr)
            if isinstance(r, Read) and "@" in r.tensor
        }
        return substitute(expr, found)

    out = named(e.out)
    assert isinstance(out, Read)
    return Einsum(out, named(e.expr), e.reduce, named(e.guard))


def _irregular(flow: Flow) -> FusionRefusal | None:
    """Refuse accesses that are not one element at one coordinate of the rank."""
    writers: set[str] = set()
    for e in flow.einsums:
        name = e.out.tensor
        if name in writers:
            return _form(flow.cascade, flow.rank, f"{name} is written twice")
        writers.add(name)
        for r in (e.out, *accesses(e)):
            moved = [i for i in r.index if flow.rank in ranks_of(i)]
            if moved and moved != [Rank(flow.rank)] and r.tensor in flow.producer:
                return _form(flow.cascade, flow.rank, f"{r} is not read or written in step")
        if flow.iterates(e) and not all(isinstance(i, Rank) for i in e.out.index):
            return _form(flow.cascade, flow.rank, f"{e.out} has an index that is not a plain rank")
    return None


def absorbs(expr: Expr, read: Read, op: str) -> bool:
    """Does the default of ``read`` (0 for sums) make ``expr`` the identity of ``op``?

    Then a point filtered out of the producer contributes nothing, and its guard may move into
    the reduction.
    """
    if expr == read:
        return True
    match expr:
        case Call("mul", (a, b)) if op == "add":
            return absorbs(a, read, op) or absorbs(b, read, op)
        case Call("div", (a, b)) if op == "add":
            return absorbs(a, read, op) and read not in walk(b)
        case Call("neg", (a,)) if op == "add":
            return absorbs(a, read, op)
        case Call("add" | "sub", (a, b)) if op == "add":
            return absorbs(a, read, op) and absorbs(b, read, op)
        case Call("where", (c, a, b)) if op == "add" and read not in walk(c):
            zero = b == Const(0.0) or b == Const(0)
            return absorbs(a, read, op) and (zero or absorbs(b, read, op))
        case Call("add", (a, b)) if op in ("max", "min"):
            return absorbs(a, read, op) or absorbs(b, read, op)
        case Call("sub", (a, b)) if op in ("max", "min"):
            return absorbs(a, read, op) and read not in walk(b)
    return False


def inlined(flow: Flow, e: Einsum, read: Read) -> Einsum | None:
    """``e`` with ``read`` replaced by the expression that made it; None where that changes values.

    A producer that sums another rank may be inlined into a sum in which it is a factor (sums are
    exchanged); its guard moves along when an untouched point contributes nothing, and becomes a
    choice of the default otherwise.
    """
    made = flow.producer.get(read.tensor)
    if made is None or not all(isinstance(i, Rank) for i in made.out.index):
        return None
    names = [i.name for i in made.out.index if isinstance(i, Rank)]
    local = iteration_ranks(made) - set(names)
    op = flow.operation(e)
    once = sum(n == read for n in walk(e.expr)) == 1
    summed = all(dict(made.reduce).get(r, "add") == "add" for r in local) and op == "add" and once
    if local and (not summed or local & iteration_ranks(e) or not absorbs(e.expr, read, op)):
        return None
    at: dict[Expr, Expr] = {Rank(n): i for n, i in zip(names, read.index, strict=True)}
    have = conjuncts(e.guard)
    moved = tuple(t for t in conjuncts(substitute(made.guard, at)) if t not in have)
    neutral = flow.default(read.tensor) == IDENTITY[op] and absorbs(e.expr, read, op)
    value = substitute(made.expr, at)
    if moved and not neutral:
        if local:
            return None
        value = where(conjunction(moved), value, flow.default(read.tensor))
        moved = ()
    expr = substitute(e.expr, {read: value})
    return replace(e, expr=expr, guard=conjunction(have + moved))


def inlined_states(flow: Flow, e: Einsum) -> Einsum | FusionRefusal:
    """``e`` over items and states alone: maps that depend on a state are inlined."""
    while True:
        reads = (n for n in walk(e.expr) if isinstance(n, Read) and n.tensor in flow.dependent)
        read = next(reads, None)
        if read is None:
            return e
        new = inlined(flow, e, read)
        if new is None:
            made = flow.producer[read.tensor]
            return FusionRefusal(
                "opaque-producer",
                f"{e.out.tensor} cannot be written over items and states: {made.out} folds other "
                "ranks or is filtered differently",
                rule="normal form",
                tensor=e.out.tensor,
            )
        e = new


def pruned(cascade: Cascade) -> Cascade:
    """The cascade without statements and declarations that no output needs."""
    needed = set(cascade.outputs)
    kept: list[Einsum | Loop] = []
    for statement in reversed(cascade.body):
        inside = (
            [statement] if isinstance(statement, Einsum) else [*statement.init, *statement.body]
        )
        if not any(e.out.tensor in needed for e in inside):
            continue
        kept.append(statement)
        needed |= {r.tensor for e in inside for r in accesses(e)}
    written = {r.tensor for s in kept for e in _inside(s) for r in (e.out, *accesses(e))}
    tensors = {t.name: t for t in cascade.tensors if t.name in written}
    return replace(cascade, body=tuple(reversed(kept)), tensors=tuple(tensors.values()))


def _inside(statement: Einsum | Loop) -> tuple[Einsum, ...]:
    return (statement,) if isinstance(statement, Einsum) else (*statement.init, *statement.body)


def split_rank(ranks: tuple[RankDecl, ...], rank: str, tile: int | None) -> tuple[RankDecl, ...]:
    """Declarations with ``rank`` split into (outer, inner) of extents (any, ``tile``)."""
    outer, inner = sub_ranks(ranks, rank)
    split = tuple(replace(r, parts=(outer, inner)) if r.name == rank else r for r in ranks)
    return (*split, RankDecl(outer), RankDecl(inner, size=tile))


def sub_ranks(ranks: tuple[RankDecl, ...], rank: str) -> tuple[str, str]:
    """Names for the parts of ``rank``: ``m1`` and ``m0``."""
    taken = {r.name for r in ranks}
    return fresh_name(f"{rank}1", taken), fresh_name(f"{rank}0", taken)
