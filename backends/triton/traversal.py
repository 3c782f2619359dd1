"""The loop of a pass: its parts (border tiles, full tiles) and where each of them begins and ends.

All parts share one loop body; ``tl.static_range`` unrolls them, and the test for masks is decided
at compile time in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from attn_rewrite.backends.triton.bounds import Range, Side, loop_ranges
from attn_rewrite.backends.triton.expressions import Value, bare
from attn_rewrite.backends.triton.frame import Frame, Parameter
from attn_rewrite.backends.triton.program import Pass, Program
from attn_rewrite.cascade.expr import TRUE, Expr, Rank


@dataclass(frozen=True)
class Part:
    """Tiles from ``first`` to ``last`` (in elements, or places of a list); ``masked`` or full."""

    first: str
    last: str
    masked: bool


def integer_tensors(program: Program) -> frozenset[str]:
    """Inputs declared to hold integers."""
    return frozenset(t.name for t in program.cascade.inputs if t.dtype in ("i64", "i32"))


def has_bounds(program: Program) -> bool:
    """Can the guard of every pass be turned into loop bounds?"""
    roles = program.roles
    guards = program.guards()
    whole = integer_tensors(program)
    return bool(guards) and all(loop_ranges(g, roles.row, roles.along, whole) for g in guards)


class Traversal:
    """Writes the loop of a pass."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.along = frame.rank(frame.roles.along)
        self.stepwise = frame.program.stepwise
        self.side = "1" if self.stepwise else frame.side(frame.roles.along)
        self.first, self.last = "0", frame.extent(frame.roles.along)
        if frame.schedule.split:
            self.first, self.last = f"{self.along}_first", f"{self.along}_last"

    def parts(self, of: Pass) -> list[Part]:
        """The parts of a pass; writes the lines that compute their bounds."""
        if self.stepwise:
            return [Part("0", self.last, False)]
        guards = {s.guard for s in of.steps} - {TRUE}
        guard = self._shared_guard(of)
        if guard is not None and self.frame.schedule.skipping == "lists":
            return self._lists()
        if guard is not None and self.frame.schedule.skipping == "bounds":
            roles = self.frame.roles
            whole = integer_tensors(self.frame.program)
            found = loop_ranges(guard, roles.row, roles.along, whole)
            if found:
                return self._bounded(found)
        if guards:
            return [Part(self.first, self.last, True)]
        self.frame.body.line(f"whole = {self.last} // {self.side} * {self.side}")
        return [Part(self.first, "whole", False), Part("whole", self.last, True)]

    def _shared_guard(self, of: Pass) -> Expr | None:
        """The guard of everything that leaves a tile; None where one fold sees more than another.

        A tile may be skipped only if no fold and no output of the pass takes anything from it.
        """
        along = self.frame.roles.along
        leaving = {s.guard for s in of.steps if along in s.folds() or s.name in of.stores}
        return leaving.pop() if len(leaving) == 1 and TRUE not in leaving else None

    @contextmanager
    def loop(self, parts: Sequence[Part]) -> Iterator[str | None]:
        """The loop over the tiles of all parts; yields the test for tiles that are not full."""
        if self.stepwise:
            with self._steps():
                yield None
            return
        body, lists = self.frame.body, self.frame.schedule.skipping == "lists"
        condition = _condition(parts)
        if len(parts) == 1:
            with self._tiles(parts[0].first, parts[0].last, condition, lists=lists):
                yield condition
            return
        with body.block(f"for part in tl.static_range({len(parts)}):"):
            for number, part in enumerate(parts):
                head = f"if part == {number}:" if number == 0 else f"elif part == {number}:"
                with body.block(head if number < len(parts) - 1 else "else:"):
                    body.line(f"first = {part.first}")
                    body.line(f"last = {part.last}")
            with self._tiles("first", "last", condition, lists=lists):
                yield condition

    @contextmanager
    def _steps(self) -> Iterator[None]:
        """One coordinate after the other: it is a number, not an axis."""
        frame = self.frame
        with frame.body.block(f"for {self.along} in range(0, {self.last}):"), frame.tile():
            frame.memo[Rank(frame.roles.along)] = Value(self.along, (), "int")
            yield

    @contextmanager
    def _tiles(self, first: str, last: str, condition: str, *, lists: bool) -> Iterator[None]:
        frame, along = self.frame, self.along
        step = "" if lists and self._listed else f", {self.side}"
        place = "item" if lists and self._listed else "start"
        with frame.body.block(f"for {place} in range({first}, {last}{step}):"), frame.tile():
            if place == "item":
                frame.body.line(f"start = tl.load(columns_ptr + item) * {self.side}")
            frame.body.line(f"{along} = start + tl.arange(0, {self.side})")
            self._inside(condition)
            frame.memo[Rank(frame.roles.along)] = Value(along, (frame.roles.along,), "int")
            yield

    _listed = False

    def _inside(self, condition: str) -> None:
        """``kv_ok``: literally true in full tiles, so that their loads need no mask."""
        body, along = self.frame.body, self.along
        if not condition:
            body.line(f"{along}_ok = {along} < {self.last}")
            return
        with body.block(f"if {condition}:"):
            body.line(f"{along}_ok = {along} < {self.last}")
        with body.block("else:"):
            body.line(f"{along}_ok = tl.full([{self.side}], True, tl.int1)")

    # Lists

    def _lists(self) -> list[Part]:
        frame = self.frame
        self._listed = True
        rows = frame.parameter(Parameter("tiles_ptr", "pointer", "tiles"))
        frame.parameter(Parameter("columns_ptr", "pointer", "columns"))
        terms = []
        for rank in ("b", "h"):
            known = frame.memo.get(Rank(rank))
            if rank in frame.roles.grid and known is not None and not known.axes:
                stride = frame.parameter(Parameter(f"tiles_{rank}", "stride", "tiles", rank))
                terms.append(f"{known.text}.to(tl.int64) * {stride}")
        terms.append("row_block * 3")
        body = frame.body
        body.line(f"tiles_at = {rows} + {' + '.join(terms)}")
        for place, name in enumerate(("begin", "full", "end")):
            body.line(f"list_{name} = tl.load(tiles_at + {place})")
        return [Part("list_begin", "list_full", True), Part("list_full", "list_end", False)]

    # Closed form

    def _bounded(self, ranges: Sequence[Range]) -> list[Part]:
        if len(ranges) == 1:
            return self._range(ranges[0], "", self.first)
        head = self._range(ranges[0], "sink_", self.first, hull=True)
        # What the first range covers is not visited again.
        self.frame.body.line(f"after = tl.cdiv({head[-1].last}, {self.side}) * {self.side}")
        return head + self._range(ranges[1], "", "after")

    def _range(self, found: Range, prefix: str, floor: str, *, hull: bool = False) -> list[Part]:
        """Parts of one range: border, full tiles, border; ``hull`` gives one masked part."""
        body, side = self.frame.body, self.side
        first, last = f"{prefix}begin", f"{prefix}end"
        low = self._extreme(found.low, smallest=True, upper=False)
        if low is None and floor == self.first:
            first = floor
        elif low is None:
            body.line(f"{first} = {floor}")
        else:
            body.line(f"{first} = tl.maximum({low}, {floor}) // {side} * {side}")
        high = self._extreme(found.high, smallest=False, upper=True)
        if high is None:
            last = self.last
        else:
            body.line(f"{last} = tl.minimum(tl.maximum({high} + 1, 0), {self.last})")
        if hull or not found.exact:
            return [Part(first, last, True)]
        return self._full(found, first, last)

    def _full(self, found: Range, first: str, last: str) -> list[Part]:
        body, side = self.frame.body, self.side
        low = self._extreme(found.low, smallest=False, upper=False)
        high = self._extreme(found.high, smallest=True, upper=True)
        head = []
        full = first
        if low is not None:
            full = "full_begin"
            body.line(f"{full} = tl.cdiv(tl.maximum({low}, {first}), {side}) * {side}")
            head = [Part(first, f"tl.minimum({full}, {last})", True)]
        limit = self.last if high is None else f"tl.minimum(tl.maximum({high} + 1, 0), {self.last})"
        body.line(f"full_end = tl.maximum({limit} // {side} * {side}, {full})")
        return [*head, Part(full, "full_end", False), Part("full_end", last, True)]

    def _extreme(self, sides: Sequence[Side], *, smallest: bool, upper: bool) -> str | None:
        """The bound over all rows of the block: the strictest of all terms."""
        if not sides:
            return None
        row = self.frame.roles.row
        first, last = Rank(f"first {row}"), Rank(f"last {row}")
        exprs = [s.at(row, first, last, smallest=smallest) for s in sides]
        texts = [self._scalar(e) for e in exprs]
        result = texts[0]
        for text in texts[1:]:
            result = f"{'tl.minimum' if upper else 'tl.maximum'}({result}, {text})"
        return result

    def _scalar(self, expr: Expr) -> str:
        return bare(self.frame.expressions.emit(expr).text)


def _condition(parts: Sequence[Part]) -> str:
    """The test for the parts that are masked; empty if all of them are."""
    full = [n for n, p in enumerate(parts) if not p.masked]
    if not full:
        return ""
    return f"part != {full[0]}"
