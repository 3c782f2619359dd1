"""A cascade as a kernel sees it: steps per row, and passes along the traversed rank.

A kernel owns a block of *rows* (queries) and traverses another rank (keys) tile by tile.  Reading a
cascade gives a `Program`: an alternation of steps that run once per row block and of passes whose
steps run once per tile and carry states.  Fused cascades come with their states; a reduction that
is not part of a loop becomes a state with the identity of its operator as the start.

The sub-ranks of a partitioned rank disappear: ``kv1 * #kv0 + kv0`` is the coordinate ``kv``, a
tensor at ``kv1 + 1`` is the next value of a state, at ``#kv1`` its last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from attn_rewrite.cascade.expr import (
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    ranks_of,
    tensors_of,
    transform,
    walk,
)
from attn_rewrite.cascade.infer import IDENTITY
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop
from attn_rewrite.site import Refusal

NEXT = "_next"
_FOLDS = frozenset({"add", "max", "min"})


@dataclass(frozen=True)
class Roles:
    """What the ranks of a cascade are in the kernel.

    ``row`` is cut into blocks of rows, ``along`` is traversed, ``lanes`` lie whole in every tile
    (head dimensions), ``grid`` numbers the programs together with the row blocks.
    """

    row: str
    along: str
    lanes: tuple[str, ...]
    grid: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One value: ``expr`` over coordinates, inputs and earlier values, folded by ``reduce``.

    ``ranks`` are those the value has; outside ``guard`` it is ``default``; ``text`` is the Einsum.
    """

    name: str
    ranks: frozenset[str]
    expr: Expr
    reduce: tuple[tuple[str, str], ...] = ()
    guard: Expr = TRUE
    default: float = 0.0
    text: str = ""

    def uses(self) -> frozenset[str]:
        """Names of the tensors and values read."""
        return frozenset(tensors_of(self.expr)) | frozenset(tensors_of(self.guard))

    def folds(self) -> frozenset[str]:
        """Ranks folded away."""
        return frozenset(r for r, _ in self.reduce)


@dataclass(frozen=True)
class State:
    """A value carried from tile to tile: its start (a step per row block)."""

    init: Step

    @property
    def name(self) -> str:
        """The name of its current value; the next one is made by a step of the pass."""
        return self.init.name

    @property
    def next(self) -> str:
        """The name of its next value."""
        return self.init.name + NEXT


@dataclass(frozen=True)
class Pass:
    """One traversal: states, and the steps of a tile in order; ``stores`` are outputs per tile."""

    states: tuple[State, ...]
    steps: tuple[Step, ...]
    stores: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A cascade ready for emission."""

    cascade: Cascade
    roles: Roles
    stages: tuple[Step | Pass, ...]
    stepwise: bool = False  # one coordinate after the other instead of tiles

    def passes(self) -> tuple[Pass, ...]:
        """The traversals, in order."""
        return tuple(s for s in self.stages if isinstance(s, Pass))

    def steps(self) -> Iterator[Step]:
        """Every step, in order."""
        for stage in self.stages:
            if isinstance(stage, Step):
                yield stage
            else:
                yield from (s.init for s in stage.states)
                yield from stage.steps

    def guards(self) -> tuple[Expr, ...]:
        """The distinct guards of tile steps, literal True left out."""
        found = (s.guard for p in self.passes() for s in p.steps if s.guard != TRUE)
        return tuple(dict.fromkeys(found))


class UnreadableError(Exception):
    """Carries the refusal of a cascade that this backend does not read."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal(code, reason)


def read_program(cascade: Cascade, row: str = "q", along: str = "kv") -> Program | Refusal:
    """The program of ``cascade`` with blocks of ``row`` that traverse ``along``.

    Both names may be the paper's (``p``, ``m``).  Refused: iterative ranks other than the
    partitioned ``along``, values at computed coordinates, and reductions other than sum, maximum
    and minimum.
    """
    try:
        return _Reader(cascade, cascade.rank(row), cascade.rank(along)).program()
    except UnreadableError as problem:
        return problem.refusal


class _Reader:
    def __init__(self, cascade: Cascade, row: str, along: str) -> None:
        self.cascade, self.row, self.along = cascade, row, along
        parts = next((r.parts for r in cascade.ranks if r.name == along), ())
        self.outer, self.inner = parts if len(parts) == 2 else ("", "")
        self.stepwise = any(isinstance(s, Loop) and s.rank == along for s in cascade.body)
        if self.stepwise:
            self.outer, self.inner = along, ""
        self._places = (Rank(self.outer), Extent(self.outer))
        self.inputs = {t.name for t in cascade.inputs}
        self.defaults = {t.name: t.default for t in cascade.tensors}
        self.whole = call("add", call("mul", Rank(self.outer), Extent(self.inner)),
                          Rank(self.inner))  # fmt: skip

    def program(self) -> Program:
        rows, tiles = self._split()
        for step, _ in tiles:
            if self.row in step.folds():
                raise UnreadableError(
                    "folds-rows", f"{step.text} folds {self.row}, of which a kernel sees one block"
                )
        roles = self._roles([*rows.values(), *(s for s, _ in tiles)])
        levels = _Levels(self, rows, tiles)
        return Program(self.cascade, roles, levels.stages(), self.stepwise)

    # Statements

    def _split(self) -> tuple[dict[str, Step], list[tuple[Step, bool]]]:
        """State starts by name, and all other steps in order with "it is in the loop"."""
        inits: dict[str, Step] = {}
        steps: list[tuple[Step, bool]] = []
        for statement in self.cascade.body:
            if isinstance(statement, Einsum):
                steps.append((self.step(statement), False))
                continue
            self._check_loop(statement)
            for e in statement.init:
                step = self.step(e)
                if self.along in step.ranks:
                    steps.append((step, True))
                else:
                    inits[step.name] = step
            steps += [(self.step(e), True) for e in statement.body]
        return inits, steps

    def _check_loop(self, loop: Loop) -> None:
        if loop.rank != self.outer or loop.descending:
            raise UnreadableError(
                "iterative-rank",
                f"cascade {self.cascade.name} iterates {loop.rank} step by step; a Triton kernel "
                f"traverses {self.along} in tiles of any size",
            )

    def step(self, e: Einsum) -> Step:
        """An Einsum with sub-ranks replaced by the whole rank."""
        out = self._local(e.out)
        ranks = frozenset(r for i in out.index for r in ranks_of(i))
        expr, guard = self._whole(e.expr), self._whole(e.guard)
        names = {self.inner: self.along} if self.inner else {}
        listed = tuple((names.get(r, r), op) for r, op in e.reduce)
        iterated = ranks_of(expr) - ranks - {r for r, _ in listed}
        if self.stepwise:
            iterated -= {self.along}
        listed = tuple((r, "add") for r in sorted(iterated)) + listed
        for rank, op in listed:
            if op not in _FOLDS:
                raise UnreadableError(
                    "reduction", f"{e.out} folds {rank} with {op}; known are add, max and min"
                )
        return Step(
            out.tensor, ranks, expr, listed, guard, self.defaults.get(e.out.tensor, 0.0), str(e)
        )

    def _whole(self, expr: Expr) -> Expr:
        def rule(node: Expr) -> Expr | None:
            if self.inner and node == self.whole:
                return Rank(self.along)
            if isinstance(node, Read) and node.tensor not in self.inputs:
                return self._local(node)
            return None

        return transform(expr, rule)

    def _local(self, read: Read) -> Read:
        """A value of the cascade without sub-ranks: plain ranks only, states named by version."""
        index: list[Expr] = []
        name = read.tensor
        for i in read.index:
            if self.outer and i == Rank(self.outer) + 1:
                name += NEXT
            elif self.outer and (isinstance(i, Const) or i in self._places):
                continue
            elif isinstance(i, Rank):
                index.append(Rank(self.along) if i.name == self.inner else i)
            else:
                raise UnreadableError(
                    "computed-coordinate", f"{read} is a value at the computed coordinate {i}"
                )
        return Read(name, tuple(index))

    # Ranks

    def _roles(self, steps: Sequence[Step]) -> Roles:
        """Head dimensions are folded away, or missing from the values of a tile."""
        both = {self.row} if self.stepwise else {self.row, self.along}
        tiles = [s for s in steps if both <= s.ranks]
        carried = frozenset.intersection(*(s.ranks for s in tiles)) if tiles else frozenset()
        folded = frozenset().union(*(s.folds() for s in steps)) - {self.row, self.along}
        every = frozenset().union(*(s.ranks for s in steps), folded) - {self.row, self.along}
        grid = carried & every - folded
        order = [r.name for r in self.cascade.ranks]
        return Roles(
            self.row,
            self.along,
            tuple(r for r in order if r in every - grid),
            tuple(r for r in order if r in grid),
        )


class _Levels:
    """Distributes steps over traversals: a value complete after pass n is used in pass n + 1."""

    def __init__(
        self, reader: _Reader, inits: dict[str, Step], steps: list[tuple[Step, bool]]
    ) -> None:
        self.reader, self.inits, self.steps = reader, inits, steps
        self.along = reader.along
        self.outputs = frozenset(reader.cascade.outputs)
        self.level: dict[str, int] = {}
        self.looped = {s.name for s, inside in steps if inside}
        self.maker = {s.name: s for s, _ in steps}

    def stages(self) -> tuple[Step | Pass, ...]:
        """Row steps and passes, alternating, without what no output needs."""
        for step, inside in self.steps:
            self.level[step.name] = self._level(step, inside)
            if step.name.endswith(NEXT):
                self.level[step.name.removesuffix(NEXT)] = self.level[step.name]
        needed = self._needed()
        last = max(self.level.values(), default=0)
        stages: list[Step | Pass] = self._rows(0, needed)
        for level in range(1, last + 1):
            stages.append(self._pass(level, needed))
            stages += self._rows(level, needed)
        return tuple(stages)

    def traverses(self, step: Step, inside: bool) -> bool:
        """Does the step run once per tile?"""
        return inside or self.along in step.ranks | step.folds()

    def _level(self, step: Step, inside: bool) -> int:
        if not self.traverses(step, inside):
            return max((self.level.get(u, 0) for u in step.uses()), default=0)
        found = 1
        for name in step.uses() & self.level.keys():
            made = self.maker.get(name, self.inits.get(name))
            carried = inside and not self.looped.isdisjoint({name, name + NEXT})
            streams = carried or (made is not None and self.along in made.ranks)
            found = max(found, self.level[name] + (not streams))
        return found

    def _needed(self) -> frozenset[str]:
        needed = set(self.outputs)
        while True:
            more = set(needed)
            for step in (*(s for s, _ in self.steps), *self.inits.values()):
                if step.name in needed:
                    more |= step.uses()
            more |= {n + NEXT for n in more if n in self.inits}
            more |= {n.removesuffix(NEXT) for n in more if n.endswith(NEXT)}
            if more == needed:
                return frozenset(needed)
            needed = more

    def _rows(self, level: int, needed: frozenset[str]) -> list[Step | Pass]:
        return [
            s
            for s, inside in self.steps
            if not self.traverses(s, inside) and self.level[s.name] == level and s.name in needed
        ]

    def _pass(self, level: int, needed: frozenset[str]) -> Pass:
        states: list[State] = []
        body: list[Step] = []
        mine = [
            (s, inside)
            for s, inside in self.steps
            if s.name in needed and self.traverses(s, inside) and self.level[s.name] == level
        ]
        for step in self._recomputed(mine, level):
            body.append(step)
        for step, inside in mine:
            if not inside and self.along in step.folds():
                op = dict(step.reduce)[self.along]
                states.append(State(_start(step, op)))
                body += _accumulated(step, op)
            else:
                body.append(step)
                if step.name.endswith(NEXT):
                    states.append(State(self.inits[step.name.removesuffix(NEXT)]))
        stores = tuple(s.name for s in body if s.name in self.outputs and self.along in s.ranks)
        return Pass(tuple(states), _used(body, {*stores, *(s.next for s in states)}), stores)

    def _recomputed(self, mine: Sequence[tuple[Step, bool]], level: int) -> list[Step]:
        """Values of earlier passes that carry the traversed rank: they are made again."""
        want = {u for s, _ in mine for u in s.uses()}
        found: list[Step] = []
        for step, inside in reversed(self.steps):
            again = step.name in want and self.level[step.name] < level
            if not again or self.along not in step.ranks:
                continue
            if inside and step.uses() & {n + NEXT for n in self.inits}:
                raise UnreadableError(
                    "value-crosses-passes",
                    f"{step.name} of the loop over {self.along} is needed in a later pass",
                )
            found.insert(0, step)
            want |= step.uses()
        return found


def _used(body: list[Step], wanted: set[str]) -> tuple[Step, ...]:
    """The steps that the states and the stores of a pass need."""
    found: list[Step] = []
    for step in reversed(body):
        if step.name in wanted:
            found.insert(0, step)
            wanted |= step.uses()
    return tuple(found)


def _start(step: Step, op: str) -> Step:
    start = Const(float(IDENTITY[op]))
    return Step(step.name, step.ranks, start, text=f"{step.name} = {start}")


def _accumulated(step: Step, op: str) -> tuple[Step, Step]:
    """The fold of one tile, and the running value."""
    tile = replace(step, name=step.name + "_tile", default=float(IDENTITY[op]))
    index = tuple(Rank(r) for r in sorted(step.ranks))
    running = Call(op, (Read(step.name, index), Read(tile.name, index)))
    return tile, Step(step.name + NEXT, step.ranks, running, text=f"{step.name} over the tiles")


def reads_of(step: Step) -> Iterator[Read]:
    """Every read of a step."""
    for expr in (step.expr, step.guard):
        yield from (n for n in walk(expr) if isinstance(n, Read))
