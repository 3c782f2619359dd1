"""What the parts of the emitter share: names, parameters, coordinates and the two halves of a body.

A kernel is written in two halves: the *head* holds coordinates, base addresses and tiles that do
not change along the traversal, the *body* the passes and the epilogue.  Whatever depends on rows
alone goes to the head when it is first needed.
"""

from __future__ import annotations

import keyword
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from attn_rewrite.backends.triton.expressions import HELPERS, Expressions, Value
from attn_rewrite.backends.triton.packed import NOTHING, is_packed
from attn_rewrite.backends.triton.program import Program, Roles
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.writer import Writer
from attn_rewrite.cascade.expr import Call, Expr, Extent, Rank, Read, walk
from attn_rewrite.errors import LowerError
from attn_rewrite.passes.quantize.packing import OFFSET

_RESERVED = frozenset(
    "tl triton part start item first last split pid rest row kernel PRECISION float range".split()
) | frozenset(HELPERS)


@dataclass(frozen=True)
class Parameter:
    """An argument of a kernel: what it is (``kind``), of which tensor and rank.

    Kinds: ``pointer``, ``stride``, ``extent``, ``block`` and ``lane`` (constants), ``special``.
    """

    name: str
    kind: str
    tensor: str = ""
    rank: str = ""

    @property
    def constant(self) -> bool:
        """Is its value part of the compiled kernel?"""
        return self.kind in ("block", "lane") or self.name == "PRECISION"


class Names:
    """Identifiers for the names of a cascade, each used once."""

    def __init__(self, taken: Sequence[str]) -> None:
        self.taken = {*taken, *_RESERVED, *keyword.kwlist}
        self.given: dict[str, str] = {}

    def of(self, name: str, kind: str = "") -> str:
        """The identifier of ``name``; another one where the plain spelling is taken.

        ``kind`` keeps apart what a cascade may name alike: a tensor ``keep`` and a mask.
        """
        key = f"{kind}/{name}"
        if key not in self.given:
            plain = re.sub(r"\W", "_", name, flags=re.ASCII)
            plain = plain if plain[:1].isalpha() or plain[:1] == "_" else f"_{plain}"
            while plain in self.taken:
                plain += "_"
            self.taken.add(plain)
            self.given[key] = plain
        return self.given[key]


def axis_order(roles: Roles, contracted: frozenset[str]) -> tuple[str, ...]:
    """Axes in the order of every tile: rows, folded lanes, the traversed rank, other lanes.

    Queries times keys then need no transposition, nor probabilities times values.
    """
    before = tuple(r for r in roles.lanes if r in contracted)
    after = tuple(r for r in roles.lanes if r not in contracted)
    return (roles.row, *before, roles.along, *after)


def lies_in_pages(roles: Roles, ranks: Sequence[str]) -> bool:
    """Does a paged cache hold an input: a value for each key of each batch entry?"""
    return roles.grid[:1] == tuple(ranks[:1]) and roles.along in ranks and roles.row not in ranks


@dataclass
class Frame:
    """The state of one emission."""

    program: Program
    schedule: Schedule
    padded: frozenset[str]
    head: Writer = field(default_factory=lambda: Writer(depth=1))
    body: Writer = field(default_factory=lambda: Writer(depth=1))
    parameters: dict[str, Parameter] = field(default_factory=dict)
    memo: MutableMapping[Expr, Value] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = self.program.roles
        folded = {r for s in self.program.steps() for r in s.folds()} & set(roles.lanes)
        self.order = axis_order(roles, frozenset(folded))
        ranks = [r.name for r in self.program.cascade.ranks]
        made = ("{}_ok", "n_{}", "len_{}", "{}_start", "{}_low", "{}_high", "{}_first", "{}_last")
        self.names = Names([*ranks, *(m.format(r) for r in ranks for m in made)])
        self.inputs = {t.name: t for t in self.program.cascade.inputs}
        self.expressions = Expressions(self.order, self.resolve)
        self.memory: Memory | None = None

    # Names and parameters

    @property
    def roles(self) -> Roles:
        """Roles of the ranks."""
        return self.program.roles

    def rank(self, name: str) -> str:
        """The identifier of a coordinate."""
        return name if name.isidentifier() and not keyword.iskeyword(name) else self.names.of(name)

    def side(self, rank: str) -> str:
        """The constant that is the side of the tile along ``rank``."""
        kind = "block" if rank in (self.roles.row, self.roles.along) else "lane"
        return self.parameter(Parameter(f"BLOCK_{self.rank(rank).upper()}", kind, rank=rank))

    def shape(self, axes: Sequence[str]) -> str:
        """The shape of a tile over ``axes``."""
        return f"[{', '.join(self.side(a) for a in axes)}]"

    def parameter(self, wanted: Parameter) -> str:
        """Take an argument; its name."""
        self.parameters.setdefault(wanted.name, wanted)
        return wanted.name

    def extent(self, rank: str) -> str:
        """The extent of a rank: an argument, or a value of the head where sequences differ."""
        special = self.values.get(f"#{rank}")
        if special is not None:
            return special.text
        return self.parameter(Parameter(f"n_{self.rank(rank)}", "extent", rank=rank))

    # Values

    @contextmanager
    def tile(self) -> Iterator[None]:
        """A scope for what is loaded and defined for one tile."""
        outer = self.memo
        self.memo = ChainMap({}, outer)
        try:
            yield
        finally:
            self.memo = outer

    def resolve(self, expr: Expr) -> Value:
        """The value of a rank, an extent or a read; of a division only if it is known."""
        known = self.memo.get(expr)
        if known is not None:
            return known
        match expr:
            case Extent(rank):
                return Value(self.extent(rank), (), "int")
            case Read(name) if name in self.values:
                return self.values[name]
            case Read(name) if name in self.inputs:
                assert self.memory is not None
                return self.memory.load(expr)
            case Call():
                return Value("")
        raise LowerError(f"{expr} has no value in a kernel of cascade {self.program.cascade.name}")

    def axes(self, expr: Expr) -> tuple[str, ...]:
        """The axes the value of ``expr`` will have."""
        found: set[str] = set()
        stack = [expr]
        while stack:
            node = stack.pop()
            if node in self.memo:
                found |= set(self.memo[node].axes)
            elif isinstance(node, Read) and node.tensor in self.values:
                found |= set(self.values[node.tensor].axes)
            else:
                stack.extend(node.children)
                if isinstance(node, Rank) and node.name in (self.roles.row, self.roles.along):
                    found.add(node.name)
        return tuple(a for a in self.order if a in found)

    def is_along(self, expr: Expr) -> bool:
        """Does the value change along the traversal, through coordinates or through values?"""
        return any(
            (isinstance(n, Rank) and n.name == self.roles.along)
            or (isinstance(n, Read) and n.tensor in self.values)
            for n in walk(expr)
        )


class Memory:
    """Loads and stores: addresses from strides, and the conditions under which they are valid."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.bases: dict[tuple[str, tuple[str, ...]], str] = {}
        self.checked: dict[tuple[str, Expr], Value] = {}

    def load(self, read: Read) -> Value:
        """The tile of an input, in its stored type; the same variable for the same read."""
        frame = self.frame
        if frame.schedule.random == read.tensor:
            return self._random(read)
        decl = frame.inputs[read.tensor]
        kind = {"bool": "bool"}.get(decl.dtype, "int" if decl.dtype.startswith("i") else "float")
        inside = frame.is_along(read)
        writer = frame.body if inside else frame.head
        address, axes, mask = self._address(read.tensor, decl.ranks, read.index)
        seen = sum(isinstance(r, Read) and r.tensor == read.tensor for r in frame.memo)
        name = frame.names.of(f"{read.tensor}_{seen}" if seen else read.tensor)
        nothing = "0.0" if kind == "float" else str(NOTHING) if is_packed(decl) else "0"
        padding = "" if not mask else f", mask={mask}, other={nothing}"
        writer.line(f"{name} = tl.load({address}{padding})")
        if is_packed(decl):
            writer.line(f"{name} = {self._half(name, read.index[-1], axes)}")
        if kind == "bool":
            writer.line(f"{name} = {name} != 0")
        value = Value(name, axes, kind, raw=kind != "bool")
        memo = frame.memo if inside else _outermost(frame.memo)
        memo[read] = value
        return value

    def _half(self, name: str, place: Expr, axes: Sequence[str]) -> str:
        """The code of a position, from the byte that holds two."""
        at = self._index(place)
        shift = Value(f"{at.atom()} % 2 * 4", at.axes, "int", 6).over(axes)
        return f"(({name} >> {shift} & 15) - {OFFSET}).to(tl.int8)"

    def store(self, tensor: str, ranks: Sequence[str], value: Value) -> None:
        """Write a tile of an output, converted to its type."""
        frame = self.frame
        pointer = self.pointer(tensor)
        address, axes, mask = self._address(tensor, ranks, [Rank(r) for r in ranks], output=True)
        text = value.over(axes)
        if set(value.axes) != set(axes):
            text = f"tl.broadcast_to({text}, {frame.shape(axes)})"
        where = f", mask={mask}" if mask else ""
        frame.body.line(f"tl.store({address}, {text}.to({pointer}.dtype.element_ty){where})")

    # Addresses

    def _address(
        self, tensor: str, ranks: Sequence[str], index: Sequence[Expr], *, output: bool = False
    ) -> tuple[str, tuple[str, ...], str]:
        """Address text, the axes it spans, and the mask (empty where every lane is valid)."""
        frame = self.frame
        pointer = self.pointer(tensor)
        decl = frame.inputs.get(tensor)
        packed = ranks[-1] if decl is not None and is_packed(decl) else ""
        fixed: list[str] = []
        moving: list[tuple[Value, str]] = []
        checks: list[Value] = []
        for rank, at in zip(ranks, index, strict=True):
            if self._elsewhere(tensor, ranks, rank):
                continue
            stride = self.stride(tensor, rank)
            value = self._index(at)
            if rank == packed:
                value = Value(f"{value.atom()} // 2", value.axes, "int", 6)
            if not value.axes and frame.is_along(at):
                moving.append((value, stride))
            elif not value.axes:
                if value.text != "0":
                    fixed.append(f"{_wide(value)} * {stride}")
            else:
                moving += self._terms(tensor, rank, value, stride)
                checks += self._check(rank, at, value)
        fixed += self._starts(tensor, ranks, output)
        base = self._base(tensor, pointer, fixed)
        axes = tuple(a for a in frame.order if any(a in v.axes for v, _ in moving))
        parts = [f"{_placed(v, axes)} * {s}" for v, s in moving]
        return " + ".join([base, *parts]), axes, self._mask(axes, checks)

    def pointer(self, tensor: str) -> str:
        """The argument that points to the first element of a tensor."""
        name = self.frame.names.of(f"{tensor} ptr", "address")
        return self.frame.parameter(Parameter(name, "pointer", tensor))

    def stride(self, tensor: str, rank: str) -> str:
        """The argument that is the distance of neighbours along a rank, in elements."""
        name = self.frame.names.of(f"{tensor} {rank}", "address")
        return self.frame.parameter(Parameter(name, "stride", tensor, rank))

    def _index(self, at: Expr) -> Value:
        value = self.frame.expressions.emit(at)
        if value.kind == "float":
            value = Value(f"{value.atom()}.to(tl.int64)", value.axes, "int")
        return value

    def _base(self, tensor: str, pointer: str, fixed: Sequence[str]) -> str:
        """The address of the first element of a tile: one variable for each distinct one."""
        if not fixed:
            return pointer
        key = (pointer, tuple(fixed))
        if key not in self.bases:
            seen = sum(p == pointer for p, _ in self.bases)
            name = self.frame.names.of(f"{tensor} at {seen}" if seen else f"{tensor} at", "address")
            self.frame.head.line(f"{name} = {pointer} + {' + '.join(fixed)}")
            self.bases[key] = name
        return self.bases[key]

    def _elsewhere(self, tensor: str, ranks: Sequence[str], rank: str) -> bool:
        """Is the batch coordinate replaced by a position (varlen) or a page?"""
        batch = self.frame.roles.grid[:1]
        if (rank,) != batch:
            return False
        return self._is_packed(ranks) or self._is_paged(tensor, ranks)

    def _is_packed(self, ranks: Sequence[str]) -> bool:
        """Is it laid end to end?  What is the same for every batch entry is read by position."""
        roles = self.frame.roles
        own = roles.grid[:1] == tuple(ranks[:1]) and not {roles.row, roles.along}.isdisjoint(ranks)
        return self.frame.schedule.varlen and own

    def _is_paged(self, tensor: str, ranks: Sequence[str]) -> bool:
        paged = self.frame.schedule.paged and tensor in self.frame.inputs
        return paged and lies_in_pages(self.frame.roles, ranks)

    def _starts(self, tensor: str, ranks: Sequence[str], output: bool) -> list[str]:
        """Where the sequence begins (varlen), and the part of split outputs."""
        found = []
        if self._is_packed(ranks):
            for rank in (self.frame.roles.row, self.frame.roles.along):
                if rank in ranks:
                    name = self.frame.rank(rank)
                    found.append(f"{name}_start.to(tl.int64) * {self.stride(tensor, rank)}")
        if output and self.frame.schedule.split:
            found.append(f"split.to(tl.int64) * {self.stride(tensor, 'split')}")
        return found

    def _terms(self, tensor: str, rank: str, value: Value, stride: str) -> list[tuple[Value, str]]:
        """The terms of an address for one index; two of them where keys lie in pages."""
        frame = self.frame
        ranks = frame.inputs[tensor].ranks if tensor in frame.inputs else ()
        if rank != frame.roles.along or not self._is_paged(tensor, ranks):
            return [(value, stride)]
        page = Rank("page of " + rank)
        if page not in frame.memo:
            size = frame.parameter(Parameter("PAGE", "block"))
            name = frame.rank(rank)
            frame.body.line(f"page = tl.load(pages_at + {name} // {size}, mask={name}_ok, other=0)")
            frame.body.line(f"slot = {name} % {size}")
            frame.memo[page] = Value("page", (rank,), "int")
        jump = self.stride(tensor, "page")
        return [(Value("page", (rank,), "int"), jump), (Value("slot", (rank,), "int"), stride)]

    # Conditions

    def _check(self, rank: str, at: Expr, value: Value) -> list[Value]:
        """A computed index may leave the tensor where the guard does not hold."""
        if isinstance(at, Rank) or value.axes == ():
            return []
        frame = self.frame
        if frame.memo.get(at) is not None:
            return []
        limit = frame.extent(rank)
        text = f"({value.atom()} >= 0) & ({value.atom()} < {limit})"
        return [Value(text, value.axes, "bool", 3)]

    def _mask(self, axes: Sequence[str], checks: Sequence[Value]) -> str:
        frame = self.frame
        found: list[Value] = []
        for axis in axes:
            if axis in frame.roles.lanes and axis not in frame.padded:
                continue
            found.append(Value(f"{frame.rank(axis)}_ok", (axis,), "bool"))
        return " & ".join(v.over(axes) for v in [*found, *checks])

    # Random numbers

    def _random(self, read: Read) -> Value:
        """``1 / (1 - p)`` or 0, from Philox with the coordinates as its counter."""
        frame = self.frame
        values = [frame.expressions.emit(i) for i in read.index]
        axes = tuple(a for a in frame.order if any(a in v.axes for v in values))
        zero = f"tl.zeros({frame.shape(axes)}, tl.int32)"
        pointer = frame.parameter(Parameter("seed_ptr", "pointer", "seed"))
        rate = frame.parameter(Parameter("dropout", "special"))
        counters = [f"{zero} + {v.over(axes)}" for v in reversed(values)]
        counters += [zero] * (4 - len(counters))
        name = frame.names.of(read.tensor)
        call = f"tl.philox(tl.load({pointer}), {', '.join(counters)})"
        frame.body.line(f"{name}_bits, _, _, _ = {call}")
        frame.body.line(
            f"{name} = tl.where(tl.uint_to_uniform_float({name}_bits) >= {rate}, "
            f"1.0 / (1.0 - {rate}), 0.0)"
        )
        value = Value(name, axes)
        frame.memo[read] = value
        return value


def _outermost(memo: MutableMapping[Expr, Value]) -> MutableMapping[Expr, Value]:
    while isinstance(memo, ChainMap):
        memo = memo.maps[-1]
    return memo


def _wide(value: Value) -> str:
    """An index as a 64-bit integer: tensors may have more than 2^31 elements."""
    if value.text.lstrip("-").isdigit():
        return value.text
    return value.text if value.text.endswith(".to(tl.int64)") else f"{value.atom()}.to(tl.int64)"


def _placed(value: Value, axes: Sequence[str]) -> str:
    """An index over the axes of the tile, 64 bits wide."""
    if not value.axes:
        return f"tl.cast({value.text}, tl.int64)"
    return Value(_wide(value), value.axes, "int").over(axes)


def constant_parameters(found: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
    """Parameters in the order of the signature: pointers, strides, numbers, then constants."""
    order = {"pointer": 0, "stride": 1, "extent": 2, "special": 3, "block": 4, "lane": 4}
    return tuple(sorted(found.values(), key=lambda p: order[p.kind] + p.constant))
