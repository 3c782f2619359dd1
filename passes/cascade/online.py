"""Emission of the one-pass form: a loop over tiles that carries running values.

For a reduction U without states and a dependent reduction D with correction c::

    LU[r1]     = fold u(x) over the tile            RU[r1+1] = RU[r1] (+) LU[r1]
    REFU[r1]   = RU[r1+1], 0 where it is infinite   CU[r1]   = c(RU[r1] -> REFU[r1])
    LD[r1]     = fold g(x, REFU[r1])                PD[r1]   = RD[r1] * CU[r1]
    RD[r1+1]   = LD[r1] (+) PD[r1]

The reference of an empty prefix is 0, because ``-inf - -inf`` is not a number; its correction is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from attn_rewrite.cascade.expr import (
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    ranks_of,
    substitute,
    walk,
    where,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, Statement, TensorDecl
from attn_rewrite.cascade.unroll import accesses
from attn_rewrite.passes.cascade.flow import (
    IDENTITY,
    Flow,
    fresh_name,
    pruned,
    split_rank,
    sub_ranks,
)
from attn_rewrite.passes.cascade.partitioning import Split
from attn_rewrite.passes.cascade.parts import (
    finish_cascade,
    forwarded,
    used_inputs,
    without_ranks,
)
from attn_rewrite.passes.cascade.scans import Scan
from attn_rewrite.passes.cascade.stability import starts_at
from attn_rewrite.passes.cascade.steps import Step, corrected, rebased, safe


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
    scans: Mapping[str, Scan] = field(default_factory=dict)
    within: Mapping[str, str] = field(default_factory=dict)
    descending: bool = False
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

    # The state at coordinate r holds the tiles before r, or in a descending loop those from r on.

    @property
    def before(self) -> Expr:
        return self.now + 1 if self.descending else self.now

    @property
    def after(self) -> Expr:
        return self.now if self.descending else self.now + 1

    @property
    def start(self) -> Expr:
        return Extent(self.split.outer) if self.descending else Const(0)

    @property
    def end(self) -> Expr:
        return Const(0) if self.descending else Extent(self.split.outer)

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
        return Read(self.running[read.tensor], (self.after, *read.index))

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
        elif name in self.scans:
            self.scan(self.scans[name])
        elif self.flow.is_map(e):
            self.map(e)
        else:
            self.post(e)

    def map(self, e: Einsum) -> None:
        out = self.tile(e.out)
        self.body.append(
            Einsum(out, self.in_tile(e.expr), self.split.reduce(e.reduce), self.in_tile(e.guard))
        )

    def tile(self, made: Read) -> Read:
        """The tile of a tensor that carries the rank, declared like the tensor."""
        name = made.tensor
        if name in self.flow.dependent:
            self.tiles[name] = self.name(f"L{name}")
        elif name in self.outside:
            self.tiles[name] = self.name(f"B{name}")
        else:
            self.tiles[name] = name
        out = Read(self.tiles[name], self.split.index(made.index))
        old = self.flow.decls.get(name)
        if old is not None:
            ranks = tuple(r.name for r in out.index if isinstance(r, Rank))
            self.decls.append(replace(old, name=out.tensor, ranks=ranks))
        return out

    def scan(self, scan: Scan) -> None:
        """A fold over one side of every item: within the tile, joined with all tiles before it.

        ``within`` walks the items of the tile under another rank than the outputs.
        """
        made, op, empty = scan.einsum.out, scan.op, IDENTITY[scan.op]
        inner, within = self.split.inner, self.within[scan.other]
        assert inner is not None
        row = tuple(i for i in made.index if i != Rank(self.split.rank))
        items = Read(self.name(f"I{made.tensor}"), (self.now, Rank(inner), *row))
        side = Read(self.name(f"W{made.tensor}"), items.index)
        total = Read(self.name(f"L{made.tensor}"), (self.now, *row))
        running = self.name(f"R{made.tensor}")
        for read in (items, side, total, Read(running, total.index)):
            self.declare(read.tensor, read.index, empty)
        past, out = Read(running, (self.before, *row)), self.tile(made)
        walked = Read(items.tensor, (self.now, Rank(within), *row))
        self.init.append(Einsum(Read(running, (self.start, *row)), Const(empty)))
        self.body += [
            Einsum(items, self.in_tile(scan.item), (), self.in_tile(scan.kept)),
            Einsum(side, walked, ((within, op),), scan.compare(Rank(within), Rank(inner))),
            Einsum(out, call(op, past, side), (), self.in_tile(scan.where)),
            Einsum(total, items, ((inner, op),)),
            Einsum(Read(running, (self.after, *row)), call(op, past, total)),
        ]

    def post(self, e: Einsum) -> None:
        """A value made of complete values: recomputed from the running ones in every step."""
        name = self.name(f"R{e.out.tensor}")
        start, step = self.at(e.expr, self.start), self.at(e.expr, self.after)
        self.init.append(Einsum(Read(name, (self.start, *e.out.index)), start, e.reduce, e.guard))
        out = Read(name, (self.after, *e.out.index))
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
        self.init.append(Einsum(Read(running, (self.start, *index)), Const(IDENTITY[op])))
        past = self.past(step, Read(running, (self.before, *index)))
        joined = call(op, local, past) if step.correction is not None else call(op, past, local)
        self.body.append(Einsum(Read(running, (self.after, *index)), joined))
        self.running[name] = running
        self.refer(e)

    def past(self, step: Step, value: Read) -> Expr:
        """What was accumulated, re-based to the new states."""
        if step.correction is None:
            return value
        op = self.flow.operation(step.einsum)
        factor = self.correction(step)
        moved = rebased(value, factor, step, op)
        index = (self.now, *step.einsum.out.index)
        out = Read(self.name(f"P{step.einsum.out.tensor}"), index)
        self.body.append(Einsum(out, moved))
        self.declare(out.tensor, out.index, IDENTITY[op])
        return out

    def correction(self, step: Step) -> Expr:
        """The correction of this step, computed once for all reductions that share it."""
        assert step.correction is not None
        expr = corrected(
            self.flow, step, lambda r: self.old(r, self.before), lambda r: self.reference(r)
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
        value: Expr = Read(self.running[name], (self.after, *index))
        if self.lazy is not None:
            value = self.lag(name, index, start)
        self.references[name] = self.name(f"REF{name}")
        self.body.append(
            Einsum(Read(self.references[name], (self.now, *index)), safe(value, start))
        )

    def lag(self, name: str, index: tuple[Expr, ...], start: float) -> Expr:
        """A reference that follows the running extremum only when it is more than tau behind."""
        lag, running = self.name(f"F{name}"), self.running[name]
        before, new = Read(lag, (self.before, *index)), Read(running, (self.after, *index))
        ahead = new - before if start < 0 else before - new
        assert self.lazy is not None
        self.init.append(Einsum(Read(lag, (self.start, *index)), Const(start)))
        follow = where(ahead > self.lazy, new, before)
        self.body.append(Einsum(Read(lag, (self.after, *index)), follow))
        self.declare(lag, (self.now, *index), start)
        self.lagging[name] = lag
        return Read(lag, (self.after, *index))

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
        e, end = step.einsum, self.end
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


@dataclass(frozen=True)
class Emitted:
    """The one-pass cascade and its split-K form."""

    cascade: Cascade
    partial: Cascade
    finish: Cascade


def emit(
    flow: Flow,
    steps: Mapping[str, Step],
    tile: int | None = None,
    lazy: float | None = None,
    scans: Mapping[str, Scan] | None = None,
) -> Emitted:
    """Write the reductions of ``steps`` as one loop; every other Einsum follows it unchanged.

    ``scans`` (all of one direction) run along in the loop and decide its direction.
    """
    cascade, rank = flow.cascade, flow.rank
    decl = next(r for r in cascade.ranks if r.name == rank)
    is_part = any(rank in r.parts for r in cascade.ranks)
    parts = (rank, None) if is_part else sub_ranks(cascade.ranks, rank)
    ranks = cascade.ranks if is_part else split_rank(cascade.ranks, decl.name, tile)
    found = scans or {}
    within = _ranks_within(ranks, found)
    ranks = (*ranks, *(RankDecl(name, tile) for name in within.values()))
    descending = any(s.descending for s in found.values())
    emitter = _Emitter(flow, steps, Split(rank, *parts), lazy, found, within, descending)
    emitter.taken = {*flow.decls, *flow.producer}
    members = loop_members(flow, steps)
    for e in flow.einsums:
        if e.out.tensor in members:
            emitter.emit(e)
    loop = Loop(parts[0], tuple(emitter.init), tuple(emitter.body), descending)
    late = flow.complete | flow.dependent
    before = [e for e in flow.einsums if not flow.iterates(e) and e.out.tensor not in late]
    finals = [emitter.final(step) for step in steps.values()]
    after = [e for e in flow.einsums if e not in before and e.out.tensor not in steps]
    renamed = {t for t in emitter.tiles.values() if t in flow.decls}
    kept = tuple(t for t in cascade.tensors if t.name not in renamed)
    base = replace(cascade, ranks=ranks, tensors=(*kept, *emitter.decls))
    head: tuple[Statement, ...] = (*before, loop, *finals)
    whole = forwarded(pruned(replace(base, body=(*head, *after))), emitter.end)
    whole = without_ranks(whole, frozenset(within))
    states = tuple(steps)
    part = pruned(replace(base, name=f"{cascade.name}-part", body=head, outputs=states))
    return Emitted(whole, used_inputs(part), finish_cascade(flow, states, (*before, *after)))


def _ranks_within(ranks: tuple[RankDecl, ...], scans: Mapping[str, Scan]) -> dict[str, str]:
    """For each scanned rank the one that walks through a single tile (``j0`` for ``j``)."""
    taken = {r.name for r in ranks}
    return {scan.other: fresh_name(f"{scan.other}0", taken) for scan in scans.values()}
