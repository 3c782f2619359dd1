"""Emission of the one-pass form: a loop over tiles that carries running values.

For a reduction U without states and a dependent reduction D with correction c::

    LU[r1]     = fold u(x) over the tile            RU[r1+1] = RU[r1] (+) LU[r1]
    REFU[r1]   = RU[r1+1], 0 where it is infinite   CU[r1]   = c(RU[r1] -> REFU[r1])
    LD[r1]     = fold g(x, REFU[r1])                PD[r1]   = RD[r1] * CU[r1]
    RD[r1+1]   = LD[r1] (+) PD[r1]

The reference of an empty prefix is 0, because ``-inf - -inf`` is not a number; its correction is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from attn_rewrite.cascade.expr import (
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    eq,
    ranks_of,
    substitute,
    walk,
    where,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, Statement, TensorDecl
from attn_rewrite.cascade.unroll import accesses
from attn_rewrite.passes.cascade.flow import IDENTITY, Flow, pruned, split_rank, sub_ranks
from attn_rewrite.passes.cascade.partitioning import Split
from attn_rewrite.passes.cascade.parts import finish_cascade, forwarded, used_inputs
from attn_rewrite.passes.cascade.separability import new_state
from attn_rewrite.passes.cascade.stability import starts_at


@dataclass(frozen=True)
class Step:
    """A reduction that runs in the loop.

    ``correction`` (None for a reduction without states) re-bases its past; ``bounded`` says that
    its terms vanish while the state is still infinite, so that the correction of that prefix may
    be 0.
    """

    einsum: Einsum
    correction: Expr | None = None
    action: str = "mul"
    bounded: bool = True


def safe(value: Expr, start: float | None) -> Expr:
    """``value``, or 0 while it is still the infinite value it starts from."""
    if start is None:
        return value
    untouched = call("isneginf", value) if start < 0 else eq(value, math.inf)
    return where(untouched, 0.0, value)


def loop_members(flow: Flow, steps: Mapping[str, Step]) -> frozenset[str]:
    """Tensors that the loop computes: the reductions and all that they read along the rank."""
    found: set[str] = set()
    pending = list(steps)
    while pending:
        name = pending.pop()
        made = flow.producer.get(name)
        if name in found or made is None:
            continue
        if not (flow.is_map(made) or name in flow.complete):
            continue
        found.add(name)
        pending.extend(r.tensor for r in accesses(made))
    return frozenset(found)


@dataclass
class _Emitter:
    """Builds the statements of one loop; the fields are what has been emitted so far."""

    flow: Flow
    steps: Mapping[str, Step]
    split: Split
    lazy: float | None
    taken: set[str] = field(default_factory=set)
    init: list[Einsum] = field(default_factory=list)
    body: list[Einsum] = field(default_factory=list)
    decls: list[TensorDecl] = field(default_factory=list)
    tiles: dict[str, str] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    lagging: dict[str, str] = field(default_factory=dict)
    corrections: dict[Expr, Read] = field(default_factory=dict)

    @property
    def now(self) -> Expr:
        return Rank(self.split.outer)

    def name(self, wanted: str) -> str:
        found, number = wanted, 1
        while found in self.taken:
            number += 1
            found = f"{wanted}{number}"
        self.taken.add(found)
        return found

    def declare(self, name: str, ranks: tuple[Expr, ...], default: float) -> None:
        if default != 0.0:
            names = tuple(i.name for i in ranks if isinstance(i, Rank))
            self.decls.append(TensorDecl(name, names, default))

    # Reads of the loop's own values

    def at(self, expr: Expr, step: Expr) -> Expr:
        """States of ``expr`` replaced by their running values at ``step``."""
        found: dict[Expr, Expr] = {
            r: Read(self.running[r.tensor], (step, *r.index))
            for r in walk(expr)
            if isinstance(r, Read) and r.tensor in self.running
        }
        return substitute(expr, found)

    def in_tile(self, expr: Expr) -> Expr:
        """``expr`` on the tile: items of the tile, states at their reference."""
        found: dict[Expr, Expr] = {
            r: self.reference(r)
            for r in walk(expr)
            if isinstance(r, Read) and r.tensor in self.running
        }
        return self.split.expr(substitute(expr, found), self.tiles)

    def reference(self, read: Read) -> Expr:
        """The finite value that the terms of this tile are evaluated at."""
        name = self.references.get(read.tensor)
        if name is not None:
            return Read(name, (self.now, *read.index))
        return Read(self.running[read.tensor], (self.now + 1, *read.index))

    def old(self, read: Read, step: Expr) -> Expr:
        """The raw value that the past was accumulated at."""
        lag = self.lagging.get(read.tensor)
        return Read(lag or self.running[read.tensor], (step, *read.index))

    # Statements

    def emit(self, e: Einsum) -> None:
        """The Einsums of the loop that stand for ``e``."""
        name = e.out.tensor
        if name in self.steps:
            self.reduction(self.steps[name])
        elif self.flow.is_map(e):
            self.map(e)
        else:
            self.post(e)

    def map(self, e: Einsum) -> None:
        name = e.out.tensor
        if name in self.flow.dependent:
            self.tiles[name] = self.name(f"L{name}")
        elif name in self.outside:
            self.tiles[name] = self.name(f"B{name}")
        else:
            self.tiles[name] = name
        out = Read(self.tiles[name], self.split.index(e.out.index))
        self.body.append(
            Einsum(out, self.in_tile(e.expr), self.split.reduce(e.reduce), self.in_tile(e.guard))
        )
        old = self.flow.decls.get(name)
        if old is not None:
            ranks = tuple(r.name for r in out.index if isinstance(r, Rank))
            self.decls.append(replace(old, name=out.tensor, ranks=ranks))

    def post(self, e: Einsum) -> None:
        """A value made of complete values: recomputed from the running ones in every step."""
        name = self.name(f"R{e.out.tensor}")
        start, step = self.at(e.expr, Const(0)), self.at(e.expr, self.now + 1)
        self.init.append(Einsum(Read(name, (Const(0), *e.out.index)), start, e.reduce, e.guard))
        out = Read(name, (self.now + 1, *e.out.index))
        self.body.append(Einsum(out, step, e.reduce, e.guard))
        self.running[e.out.tensor] = name
        self.refer(e)

    def reduction(self, step: Step) -> None:
        e, op = step.einsum, self.flow.operation(step.einsum)
        index, name = e.out.index, e.out.tensor
        local = Read(self.name(f"L{name}"), (self.now, *index))
        inner = tuple((r, o) for r, o in self.split.reduce(e.reduce) if r != self.split.outer)
        self.body.append(Einsum(local, self.in_tile(e.expr), inner, self.in_tile(e.guard)))
        running = self.name(f"R{name}")
        self.declare(local.tensor, local.index, IDENTITY[op])
        self.declare(running, local.index, IDENTITY[op])
        self.init.append(Einsum(Read(running, (Const(0), *index)), Const(IDENTITY[op])))
        past = self.past(step, Read(running, (self.now, *index)))
        joined = call(op, local, past) if step.correction is not None else call(op, past, local)
        self.body.append(Einsum(Read(running, (self.now + 1, *index)), joined))
        self.running[name] = running
        self.refer(e)

    def past(self, step: Step, value: Read) -> Expr:
        """What was accumulated, re-based to the new states."""
        if step.correction is None:
            return value
        op = self.flow.operation(step.einsum)
        factor = self.correction(step)
        moved = rebased(value, factor, step, op)
        out = Read(self.name(f"P{step.einsum.out.tensor}"), value.index)
        self.body.append(Einsum(out, moved))
        self.declare(out.tensor, out.index, IDENTITY[op])
        return out

    def correction(self, step: Step) -> Expr:
        """The correction of this step, computed once for all reductions that share it."""
        assert step.correction is not None
        expr = corrected(
            self.flow, step, lambda r: self.old(r, self.now), lambda r: self.reference(r)
        )
        if expr not in self.corrections:
            ranks = tuple(i for i in step.einsum.out.index if ranks_of(i) & ranks_of(expr))
            states = self.flow.states(step.correction)
            out = Read(self.name(f"C{states[0].tensor}"), (self.now, *ranks))
            self.body.append(Einsum(out, expr))
            self.corrections[expr] = out
        return self.corrections[expr]

    def refer(self, e: Einsum) -> None:
        """The reference of a state that terms of a tile read, where it may still be infinite."""
        name, index = e.out.tensor, e.out.index
        start = starts_at(self.flow, e.out) if name in self.read_by_tiles else None
        if start is None:
            return
        value: Expr = Read(self.running[name], (self.now + 1, *index))
        if self.lazy is not None:
            value = self.lag(name, index, start)
        self.references[name] = self.name(f"REF{name}")
        self.body.append(
            Einsum(Read(self.references[name], (self.now, *index)), safe(value, start))
        )

    def lag(self, name: str, index: tuple[Expr, ...], start: float) -> Expr:
        """A reference that follows the running extremum only when it is more than tau behind."""
        lag, running = self.name(f"F{name}"), self.running[name]
        before, new = Read(lag, (self.now, *index)), Read(running, (self.now + 1, *index))
        ahead = new - before if start < 0 else before - new
        assert self.lazy is not None
        self.init.append(Einsum(Read(lag, (Const(0), *index)), Const(start)))
        follow = where(ahead > self.lazy, new, before)
        self.body.append(Einsum(Read(lag, (self.now + 1, *index)), follow))
        self.declare(lag, before.index, start)
        self.lagging[name] = lag
        return Read(lag, (self.now + 1, *index))

    # What the surroundings need

    @property
    def outside(self) -> frozenset[str]:
        """Tensors that Einsums after the loop still need in full."""
        rest = [e for e in self.flow.einsums if e.out.tensor not in self.steps]
        new = pruned(replace(self.flow.cascade, body=tuple(rest)))
        return frozenset(e.out.tensor for e in new.einsums())

    @property
    def read_by_tiles(self) -> frozenset[str]:
        members = loop_members(self.flow, self.steps)
        return frozenset(
            r.tensor
            for e in self.flow.einsums
            if e.out.tensor in members and self.flow.iterates(e)
            for r in accesses(e)
        )

    def final(self, step: Step) -> Einsum:
        """The complete value of a reduction, after the loop."""
        e, end = step.einsum, Extent(self.split.outer)
        value = Read(self.running[e.out.tensor], (end, *e.out.index))
        if step.correction is None or not self.lagging:
            return Einsum(e.out, value)
        # The past is relative to a reference that lags: move it to the true value once.
        factor = corrected(
            self.flow,
            step,
            lambda r: self.old(r, end),
            lambda r: safe(Read(self.running[r.tensor], (end, *r.index)), starts_at(self.flow, r)),
        )
        return Einsum(e.out, rebased(value, factor, step, self.flow.operation(e)))


def corrected(
    flow: Flow, step: Step, old: Callable[[Read], Expr], new: Callable[[Read], Expr]
) -> Expr:
    """The correction of ``step`` with the old and new values of its states filled in."""
    assert step.correction is not None
    values: dict[Expr, Expr] = {}
    for n in walk(step.correction):
        if not isinstance(n, Read):
            continue
        if n.tensor in flow.complete:
            before = old(n)
            values[n] = before if step.bounded else safe(before, starts_at(flow, n))
            values[new_state(n)] = new(n)
    return substitute(step.correction, values)


def rebased(value: Expr, factor: Expr, step: Step, op: str) -> Expr:
    """``value`` moved to new states; nothing accumulated stays nothing."""
    moved = value + factor if step.action == "add" else value * factor
    if step.bounded and op == "add":
        return moved
    return where(eq(value, IDENTITY[op]), IDENTITY[op], moved)


@dataclass(frozen=True)
class Emitted:
    """The one-pass cascade and its split-K form."""

    cascade: Cascade
    partial: Cascade
    finish: Cascade


def emit(
    flow: Flow, steps: Mapping[str, Step], tile: int | None = None, lazy: float | None = None
) -> Emitted:
    """Write the reductions of ``steps`` as one loop; every other Einsum follows it unchanged."""
    cascade, rank = flow.cascade, flow.rank
    decl = next(r for r in cascade.ranks if r.name == rank)
    is_part = any(rank in r.parts for r in cascade.ranks)
    parts = (rank, None) if is_part else sub_ranks(cascade.ranks, rank)
    ranks = cascade.ranks if is_part else split_rank(cascade.ranks, decl.name, tile)
    emitter = _Emitter(flow, steps, Split(rank, *parts), lazy)
    emitter.taken = {*flow.decls, *flow.producer}
    members = loop_members(flow, steps)
    for e in flow.einsums:
        if e.out.tensor in members:
            emitter.emit(e)
    loop = Loop(parts[0], tuple(emitter.init), tuple(emitter.body))
    late = flow.complete | flow.dependent
    before = [e for e in flow.einsums if not flow.iterates(e) and e.out.tensor not in late]
    finals = [emitter.final(step) for step in steps.values()]
    after = [e for e in flow.einsums if e not in before and e.out.tensor not in steps]
    renamed = {t for t in emitter.tiles.values() if t in flow.decls}
    kept = tuple(t for t in cascade.tensors if t.name not in renamed)
    base = replace(cascade, ranks=ranks, tensors=(*kept, *emitter.decls))
    head: tuple[Statement, ...] = (*before, loop, *finals)
    whole = forwarded(pruned(replace(base, body=(*head, *after))))
    states = tuple(steps)
    part = pruned(replace(base, name=f"{cascade.name}-part", body=head, outputs=states))
    return Emitted(whole, used_inputs(part), finish_cascade(flow, states, (*before, *after)))
