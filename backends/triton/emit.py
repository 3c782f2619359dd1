"""The emitter: a program and a schedule become the source of one Triton kernel.

Any cascade with a block of rows and one traversed rank goes through here: the states, corrections
and folds of a fused cascade are written out as its Einsums stand, one loop for each pass.  There is
no kernel per method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from attn_rewrite.backends.triton.base2 import to_base_2
from attn_rewrite.backends.triton.expressions import HELPERS, Value
from attn_rewrite.backends.triton.frame import Frame, Memory, Parameter, constant_parameters
from attn_rewrite.backends.triton.program import NEXT, Pass, Program, Step, reads_of
from attn_rewrite.backends.triton.references import with_safe_references
from attn_rewrite.backends.triton.schedule import Schedule, least_side, padded_side
from attn_rewrite.backends.triton.tiles import Masking, Steps
from attn_rewrite.backends.triton.traversal import Traversal
from attn_rewrite.backends.triton.writer import Writer
from attn_rewrite.cascade.expr import Call, Const, Rank, Read, call
from attn_rewrite.errors import LowerError


@dataclass(frozen=True)
class Output:
    """A result: its name, its ranks in memory order, and the value of points nobody wrote."""

    name: str
    ranks: tuple[str, ...]
    default: float = 0.0


@dataclass(frozen=True)
class Source:
    """The text of a kernel and what its arguments are.

    ``name`` is the function's; ``outputs`` in the order of the cascade.
    """

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    outputs: tuple[Output, ...]
    program: Program
    schedule: Schedule

    @property
    def key(self) -> str:
        """A digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def emit(
    program: Program,
    schedule: Schedule,
    lanes: Mapping[str, int],
    *,
    name: str = "attention",
) -> Source:
    """The kernel of ``program``; ``lanes`` are the extents of its head dimensions.

    Reassociated: sums run tile by tile, exponentials to the base of two.  Raises `LowerError` for
    an Einsum that is neither a map, a fold of at most two axes, nor a product of matrices.
    """
    least = least_side(schedule, program.cascade.inputs)
    padded = frozenset(r for r, n in lanes.items() if padded_side(n, least) != n)
    prepared = to_base_2(with_safe_references(program))
    return _Emitter(Frame(prepared, schedule, padded), name).source()


class _Emitter:
    def __init__(self, frame: Frame, name: str) -> None:
        self.frame, self.name = frame, name
        frame.memory = Memory(frame)
        self.memory = frame.memory
        self.outputs = _outputs(frame.program)

    def source(self) -> Source:
        frame = self.frame
        self._coordinates()
        stored: set[str] = set()
        for stage in frame.program.stages:
            if isinstance(stage, Pass):
                self._pass(stage)
                stored |= set(stage.stores)
            else:
                Steps(frame).run(stage)
        for output in self.outputs:
            if output.name not in stored:
                self.memory.store(output.name, output.ranks, frame.values[output.name])
        parameters = constant_parameters(frame.parameters)
        return Source(
            self.name, self._text(parameters), parameters, self.outputs, frame.program,
            frame.schedule,
        )  # fmt: skip

    # The head: which rows this program owns

    def _coordinates(self) -> None:
        frame, head = self.frame, self.frame.head
        roles, row = frame.roles, frame.rank(frame.roles.row)
        side = frame.side(roles.row)
        group = frame.schedule.pack
        longest = f"n_{row}"
        frame.parameter(Parameter(longest, "extent", rank=roles.row))
        rows = longest if group == 1 else f"{longest} * {group}"
        head.line("pid = tl.program_id(0)")
        head.line(f"blocks = tl.cdiv({rows}, {side})")
        head.line("row_block = pid % blocks")
        self._grid(group)
        self._sequences()
        limit = frame.extent(roles.row)
        if group == 1:
            head.line(f"{row} = row_block * {side} + tl.arange(0, {side})")
            head.line(f"{row}_ok = {row} < {limit}")
        else:
            self._packed_rows(row, side, group, limit)
        self._row_range(row, side, group, limit)
        frame.memo[Rank(roles.row)] = Value(row, (roles.row,), "int")
        self._lanes()
        if frame.schedule.split:
            self._split()

    def _grid(self, group: int) -> None:
        """Coordinates of the grid ranks; with packed heads the head is a key head."""
        frame, head = self.frame, self.frame.head
        ranks = frame.roles.grid
        if ranks:
            head.line("rest = pid // blocks")
        for place, rank in reversed(list(enumerate(ranks))):
            name = frame.rank(rank)
            packed = group > 1 and rank == "h"
            target = f"{name}_shared" if packed else name
            if place == 0:
                head.line(f"{target} = rest")
            else:
                count = f"({frame.extent(rank)} // {group})" if packed else frame.extent(rank)
                head.line(f"{target} = rest % {count}")
                head.line(f"rest = rest // {count}")
            if not packed:
                frame.memo[Rank(rank)] = Value(name, (), "int")

    def _packed_rows(self, row: str, side: str, group: int, limit: str) -> None:
        """Rows are queries times the query heads of a key head."""
        frame, head = self.frame, self.frame.head
        head.line(f"packed = row_block * {side} + tl.arange(0, {side})")
        head.line(f"{row} = packed // {group}")
        head.line(f"h = h_shared * {group} + packed % {group}")
        head.line(f"{row}_ok = {row} < {limit}")
        frame.memo[Rank("h")] = Value("h", (frame.roles.row,), "int")
        shared = call("floordiv", Rank("h"), Const(group))
        frame.memo[shared] = Value("h_shared", (), "int")

    def _row_range(self, row: str, side: str, group: int, limit: str) -> None:
        """First and last row of the block, for bounds of loops."""
        frame, head = self.frame, self.frame.head
        if frame.schedule.skipping != "bounds":
            return
        over = "" if group == 1 else f" // {group}"
        head.line(f"{row}_low = row_block * {side}{over}")
        end = f"(row_block + 1) * {side} - 1" if group == 1 else f"((row_block + 1) * {side} - 1)"
        head.line(f"{row}_high = tl.minimum({end}{over}, {limit} - 1)")
        rank = frame.roles.row
        frame.memo[Rank(f"first {rank}")] = Value(f"{row}_low", (), "int")
        frame.memo[Rank(f"last {rank}")] = Value(f"{row}_high", (), "int")

    def _sequences(self) -> None:
        """Lengths and starts of the sequences of a batch (varlen, paged)."""
        frame, head, schedule = self.frame, self.frame.head, self.frame.schedule
        roles = frame.roles
        along = frame.rank(roles.along)
        if schedule.varlen:
            for rank in (roles.row, roles.along):
                name = frame.rank(rank)
                pointer = frame.parameter(Parameter(f"{name}_starts_ptr", "pointer",
                                                    f"{name}_starts"))  # fmt: skip
                head.line(f"{name}_start = tl.load({pointer} + {roles.grid[0]})")
                head.line(f"len_{name} = tl.load({pointer} + {roles.grid[0]} + 1) - {name}_start")
                frame.values[f"#{rank}"] = Value(f"len_{name}", (), "int")
            row = frame.rank(roles.row)
            pack = "" if schedule.pack == 1 else f" * {schedule.pack}"
            with head.block(f"if row_block * {frame.side(roles.row)} >= len_{row}{pack}:"):
                head.line("return")
        if schedule.paged:
            pages = frame.parameter(Parameter("pages_ptr", "pointer", "pages"))
            stride = frame.parameter(Parameter("pages_b", "stride", "pages", "b"))
            head.line(f"pages_at = {pages} + {roles.grid[0]}.to(tl.int64) * {stride}")
            lengths = frame.parameter(Parameter("lengths_ptr", "pointer", "lengths"))
            head.line(f"len_{along} = tl.load({lengths} + {roles.grid[0]})")
            frame.values[f"#{roles.along}"] = Value(f"len_{along}", (), "int")

    def _lanes(self) -> None:
        frame, head = self.frame, self.frame.head
        for rank in frame.roles.lanes:
            name, side = frame.rank(rank), frame.side(rank)
            head.line(f"{name} = tl.arange(0, {side})")
            frame.memo[Rank(rank)] = Value(name, (rank,), "int")
            if rank in frame.padded:
                frame.parameter(Parameter(f"N_{name.upper()}", "lane", rank=rank))
                head.line(f"{name}_ok = {name} < N_{name.upper()}")

    def _split(self) -> None:
        """The part of the traversed rank this program takes: a multiple of the tile side."""
        frame, head = self.frame, self.frame.head
        along = frame.rank(frame.roles.along)
        chunk = frame.parameter(Parameter("chunk", "special"))
        head.line("split = tl.program_id(1)")
        head.line(f"{along}_first = split * {chunk}")
        # A part beyond the length is empty: it must not run the last tile of another one.
        end = f"tl.minimum({along}_first + {chunk}, {frame.extent(frame.roles.along)})"
        head.line(f"{along}_last = tl.maximum({end}, {along}_first)")

    # Passes

    def _pass(self, stage: Pass) -> None:
        frame, body = self.frame, self.frame.body
        body.line()
        for state in stage.states:
            self._start(state.init)
        self._hoist(stage)
        traversal = Traversal(frame)
        parts = traversal.parts(stage)
        with traversal.loop(parts) as condition:
            steps = Steps(frame, Masking(condition))
            for step in stage.steps:
                value = steps.run(step)
                if step.name in stage.stores:
                    output = next(o for o in self.outputs if o.name == step.name)
                    self.memory.store(output.name, output.ranks, value)
            for state in stage.states:
                body.line(f"{frame.values[state.name].text} = {frame.values[state.next].text}")
        body.line()

    def _start(self, init: Step) -> None:
        """The first value of a state, as a whole tile."""
        frame = self.frame
        axes = self._state_axes(init)
        name = frame.names.of(init.name)
        frame.body.comment(init.text)
        value = frame.expressions.emit(init.expr)
        if value.axes == axes:
            frame.body.line(f"{name} = {value.text}")
        elif isinstance(init.expr, Const):
            frame.body.line(f"{name} = tl.full({frame.shape(axes)}, {value.text}, tl.float32)")
        else:
            zeros = f"tl.zeros({frame.shape(axes)}, tl.float32)"
            frame.body.line(f"{name} = {zeros} + {value.over(axes)}")
        frame.values[init.name] = Value(name, axes)

    def _state_axes(self, init: Step) -> tuple[str, ...]:
        frame = self.frame
        ranks = {a for r in init.ranks if (v := frame.memo.get(Rank(r))) for a in v.axes}
        return tuple(a for a in frame.order if a in ranks)

    def _hoist(self, stage: Pass) -> None:
        """Load what does not change along the traversal before it begins."""
        for step in stage.steps:
            for read in reads_of(step):
                if read.tensor in self.frame.inputs and not self.frame.is_along(read):
                    self.frame.resolve(read)

    # Text

    def _text(self, parameters: tuple[Parameter, ...]) -> str:
        out = Writer()
        out.line('"""Generated from the cascade below; edits are lost.')
        out.line()
        for line in str(self.frame.program.cascade).rstrip().splitlines():
            out.line(line.replace("\\", "/"))
        out.line('"""')
        out.line()
        out.line("import triton")
        out.line("import triton.language as tl")
        out.line()
        for helper in sorted(self.frame.expressions.helpers):
            out.line()
            out.line("@triton.jit")
            out.lines += HELPERS[helper]
            out.line()
        numbers = [p.name for p in parameters if self._is_number(p)]
        out.line()
        out.line(f"@triton.jit(do_not_specialize={numbers!r})" if numbers else "@triton.jit")
        out.line(f"def {self.name}(")
        for p in parameters:
            out.line(f"    {p.name}{': tl.constexpr' if p.constant else ''},")
        out.line("):")
        return out.text + self.frame.head.text + self.frame.body.text

    def _is_number(self, p: Parameter) -> bool:
        """Not specialised: lengths, and strides that are lengths as well, of what has no head
        dimension (statistics per row or key, tables of pages, lists of tiles).

        Triton makes another binary for an argument of 1 and for multiples of 16; the strides of
        tiles gain from that, and follow the head dimension where layouts are plain.
        """
        if p.kind != "stride":
            return p.kind in ("extent", "special")
        roles = self.frame.roles
        made = {o.name: o.ranks for o in self.outputs}
        decl = self.frame.inputs.get(p.tensor)
        ranks = made.get(p.tensor, ()) if decl is None else decl.ranks
        if {roles.row, roles.along} <= set(ranks) or not set(roles.lanes).isdisjoint(ranks):
            return False
        return not ranks or p.rank != ranks[-1]


def _outputs(program: Program) -> tuple[Output, ...]:
    found = []
    made = {s.name: s for s in program.steps()}
    for name in program.cascade.outputs:
        einsum = program.cascade.producer(name)
        if einsum is None or name.endswith(NEXT) or name not in made:
            raise LowerError(f"cascade {program.cascade.name} never makes its output {name}")
        ranks = tuple(i.name for i in einsum.out.index if isinstance(i, Rank))
        if len(ranks) != len(einsum.out.index):
            raise LowerError(f"output {einsum.out} is at a computed coordinate")
        found.append(Output(name, ranks, made[name].default))
    return tuple(found)


def groups(program: Program) -> int:
    """Query heads that share a key head: the literal of ``h // group``, 1 where there is none."""
    sizes = {
        int(node.args[1].value)
        for step in program.steps()
        for read in reads_of(step)
        for node in read.index
        if isinstance(node, Call) and node.op == "floordiv" and node.args[0] == Rank("h")
        and isinstance(node.args[1], Const) and isinstance(read, Read)
    }  # fmt: skip
    return sizes.pop() if len(sizes) == 1 else 1
