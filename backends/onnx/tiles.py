"""Softmax attention over tiles: a Scan over query blocks that reads only the keys a mask can keep.

For every block of queries the key ranges of `bands.segments` are gathered, the mask is evaluated on
the tile from its expression, and the block's rows are finished in one step (a row's keys are all in
its tile, so no running maximum is needed).  A range never leaves the sequence: its start is moved
inside and its width cut to the length, which keeps every key it held; the mask decides the rest.

Shapes: q [b, hq, s, d], k [b, hkv, t, d], v [b, hkv, t, f] -> [b, hq, s, f].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from attn_rewrite.backends.onnx.bands import Reach, Segment
from attn_rewrite.backends.onnx.blocks import BlockPlan
from attn_rewrite.backends.onnx.elementwise import Coordinate, Elementwise, Frame, Typed, affine
from attn_rewrite.backends.onnx.gathered import Gathered
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.mapped import MappedRows, ProbabilityMap, whole_peak
from attn_rewrite.backends.onnx.products import product
from attn_rewrite.backends.onnx.rows import Operands, RowSoftmax
from attn_rewrite.backends.onnx.tile_plans import HeadPlan, Plan, TilePlan
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import FALSE, TRUE, ranks_of
from attn_rewrite.errors import LowerError

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _static(value: ir.Value, axis: int, what: str) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise LowerError(
            f"ONNX: {what} of {value.name} is {size}, expected a fixed number; "
            "export with only batch and lengths dynamic."
        )
    return size


def emit_attention(
    r: Recorder,
    inputs: Sequence[ir.Value],
    form: SoftmaxAttention,
    plan: Plan,
    mapping: ProbabilityMap | None = None,
) -> ir.Value:
    """Record ``form`` over ``inputs`` (q, k, v, then the reads) and return its output.

    Queries, keys and values that are bytes are codes (`products`); the output then has the type of
    what is no code, float64 where ``mapping`` maps the probabilities.
    """
    out, result, dtype = _emit(r, inputs, form, plan, mapping)
    return out if result == dtype else r.cast(out, result)


def emit_with_lse(
    r: Recorder, inputs: Sequence[ir.Value], form: SoftmaxAttention, plan: Plan
) -> tuple[ir.Value, ir.Value]:
    """The output of `emit_attention` and the log-sum-exp [b, hq, s] in float32 or wider, -inf for a
    row without keys.  For a form without a sink over operands that are no codes."""
    assert form.sink is None
    both, result, dtype = _emit(r, inputs, form, plan, None, lse=True)
    last, axis = r.integers([-1]), r.integers([3])
    out = r.op("Slice", both, r.integers([0]), last, axis)
    lse = r.op("Squeeze", r.op("Slice", both, last, r.integers([2**62]), axis), axis)
    return (out if result == dtype else r.cast(out, result)), lse


def _emit(
    r: Recorder,
    inputs: Sequence[ir.Value],
    form: SoftmaxAttention,
    plan: Plan,
    mapping: ProbabilityMap | None,
    *,
    lse: bool = False,
) -> tuple[ir.Value, ir.DataType, ir.DataType]:
    """The rows in the type of the arithmetic; the type that the output has, and that one."""
    q, k, v, *reads = inputs
    coded = [x.dtype == ir.DataType.UINT8 for x in (q, v)]
    result = ir.DataType.DOUBLE if coded[1] else v.dtype if coded[0] else q.dtype
    if result is None or len(reads) != len(form.reads):
        raise LowerError(f"ONNX: {q.name} has no type or the reads are not {len(form.reads)}.")
    dtype = ir.DataType.FLOAT if result in HALVES else result
    heads = _static(q, 1, "the head count")
    if result != dtype:
        q, k, v = (x if x.dtype == ir.DataType.UINT8 else r.cast(x, dtype) for x in (q, k, v))
    operands = Operands(
        q, k, v, tuple(reads), heads, dtype, coded=coded[0], coded_values=coded[1], lse=lse
    )
    if isinstance(plan, BlockPlan):
        out = Gathered(r, operands, form, plan, mapping).emit()
    elif isinstance(plan, HeadPlan):
        each = [_of_heads(r, operands, form, span, part, mapping) for span, part in plan.parts]
        out = r.op("Concat", *each, axis=1)
    else:
        out = _Tiled(r, operands, form, plan, mapping).emit()
    return out, result, dtype


def _of_heads(
    r: Recorder,
    x: Operands,
    form: SoftmaxAttention,
    span: tuple[int, int],
    plan: TilePlan,
    mapping: ProbabilityMap | None,
) -> ir.Value:
    """The query heads ``span`` with the key heads they read, tiled by ``plan``."""
    first, stop = span
    apart = bool(first % form.group or stop % form.group)
    # A part of the heads that share a key head takes a copy of it for each.
    keys = [h // form.group for h in range(first, stop, 1 if apart else form.group)]
    q = r.op("Gather", x.q, r.integers(list(range(first, stop))), axis=1)
    k, v = (r.op("Gather", t, r.integers(keys), axis=1) for t in (x.k, x.v))
    part = replace(x, q=q, k=k, v=v, heads=stop - first, first=first, every=x.heads)
    return _Tiled(r, part, replace(form, group=1 if apart else form.group), plan, mapping).emit()


class _Tiled:
    """One attention being recorded: the values outside the Scan that its body shares."""

    def __init__(
        self,
        r: Recorder,
        operands: Operands,
        form: SoftmaxAttention,
        plan: TilePlan,
        mapping: ProbabilityMap | None = None,
    ) -> None:
        self.r, self.x, self.form, self.plan, self.mapping = r, operands, form, plan, mapping
        self.peak: ir.Value | None = None
        self.extents = self._extents()
        # A block is never longer than the sequence, so that one query (decoding) costs one row.
        self.rows = r.op("Min", self.extents["q"], r.integers([plan.rows]))
        self.row_offsets = r.counting(self.rows)
        self.heads = r.integers(list(range(operands.first, operands.first + operands.heads)))
        self.batch = r.counting(self.extents["b"])
        self.keys = r.counting(self.extents["kv"]) if plan.dense else None
        self.key_offsets = [
            self._offsets(s)
            for s in plan.segments
            if isinstance(s, Segment) and s.width is not None
        ]

    def _extents(self) -> dict[str, ir.Value]:
        r, x = self.r, self.x
        found = {
            "b": r.extent(x.q, 0),
            "h": r.integers([x.every or x.heads]),
            "q": r.extent(x.q, 2),
            "kv": r.extent(x.k, 2),
        }
        for value, declared in zip(x.reads, self.form.reads, strict=True):
            for axis, rank in enumerate(declared.ranks):
                if rank not in found:
                    found[rank] = r.extent(value, axis)
        return found

    def _offsets(self, segment: Segment) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Width cut to the length, 0 .. width - 1, and the last start that stays inside."""
        r, length = self.r, self.extents["kv"]
        width = r.op("Min", length, r.integers([segment.width or 0]))
        return width, r.counting(width), r.op("Sub", length, width)

    def emit(self) -> ir.Value:
        """Scan over the starts of the query blocks, then undo the blocking."""
        if self.form.guard == FALSE or not self.plan.segments:
            return self._nothing()
        if self.mapping is not None and self.mapping.whole_peak:
            self.peak = whole_peak(self.r, [self._scanned("peaks", self.r.integers([1]))])
        return self._scanned("tile", self.x.width(self.r))

    def _scanned(self, name: str, width: ir.Value) -> ir.Value:
        """The rows of all blocks, [b, hq, q, width]."""
        r, x = self.r, self.x
        padded = r.op("Sub", r.op("Add", self.extents["q"], self.rows), r.integers([1]))
        blocks = r.op("Div", padded, self.rows)
        starts = r.op("Mul", r.counting(blocks), self.rows)
        body = r.inner()
        start = ir.Value(
            name=f"{r.prefix}/{name}_start",
            shape=ir.Shape([]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        tile = self._step(body, body.op("Reshape", start, r.integers([1])), name == "peaks")
        tile.dtype = x.dtype
        graph = ir.Graph(
            [start], [tile], nodes=body.nodes, name=f"{r.prefix}/{name}",
            opset_imports={"": r.opset},
        )  # fmt: skip
        scanned = r.op("Scan", starts, body=graph, num_scan_inputs=1, scan_output_axes=[2])
        # [b, h, blocks, rows, f]: joined, the last block's repeated rows cut off.
        rejoin = r.op("Concat", r.integers([0, x.heads, -1]), width, axis=0)
        joined = r.op("Reshape", scanned, rejoin)
        return r.op("Slice", joined, r.integers([0]), self.extents["q"], r.integers([2]))

    def _nothing(self) -> ir.Value:
        """A mask that keeps no pair."""
        return self.x.nothing(self.r, self.r.op("Shape", self.x.q, start=0, end=3))

    def _step(self, r: Recorder, start: ir.Value, peaks: bool) -> ir.Value:
        """The rows of one block, [b, hq, rows, f], or the ``peaks`` of their probabilities."""
        last = r.op("Sub", self.extents["q"], r.integers([1]))
        rows = r.op("Min", r.op("Add", self.row_offsets, start), last)
        columns, unique = self._columns(r, start)
        q = r.op("Gather", self.x.q, rows, axis=2)
        k, v = self.x.k, self.x.v
        if self.keys is None:
            k, v = (r.op("Gather", t, columns, axis=2) for t in (k, v))
        frame = self._frame(rows, columns, self._product(r, q, k))
        emitter = Elementwise(r, frame)
        keep = self._keep(r, emitter, unique)

        def contract(p: ir.Value) -> ir.Value:
            found = product(r, self._stacked(r, p), v, self.x.dtype, coded=self.x.coded_values)
            return self._unstacked(r, found)

        if self.mapping is None:
            row = RowSoftmax(r, emitter, self.form, self.x.dtype)
            return (row.attend_with_lse if self.x.lse else row.attend)(keep, contract)
        widths = Coordinate(r.counting(r.extent(self.x.v, 3)), True)
        mapped = MappedRows(
            r, lambda f: Elementwise(r, f), frame, self.form, self.mapping, self.x, widths
        )
        return mapped.peaks(keep) if peaks else mapped.attend(keep, contract, self.peak)

    def _columns(self, r: Recorder, start: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """The keys of the step, and which of them no earlier range of the step holds already."""
        if self.keys is not None:
            return self.keys, None
        if self.plan.reach is not None:
            return self._reached(r, start, self.plan.reach), None
        ranges: list[tuple[ir.Value, ir.Value]] = []
        columns: list[ir.Value] = []
        unique: list[ir.Value] = []
        for segment, (width, offsets, limit) in zip(
            self.plan.segments, self.key_offsets, strict=True
        ):
            assert isinstance(segment, Segment)
            first = affine(r, segment.start, self.extents)
            if segment.relative:
                first = r.op("Add", start, first)
            first = r.op("Min", r.op("Max", first, r.integers([0])), limit)
            columns.append(r.op("Add", offsets, first))
            unique.append(self._outside(r, columns[-1], ranges))
            ranges.append((first, r.op("Add", first, width)))
        if len(columns) == 1:
            return columns[0], None
        return r.op("Concat", *columns, axis=0), r.op("Concat", *unique, axis=0)

    def _reached(self, r: Recorder, start: ir.Value, reach: Reach) -> ir.Value:
        """The keys a block can reach, at least one: a softmax needs a column."""
        first, end = r.integers([0]), self.extents["kv"]
        if reach.low is not None:
            last = r.op("Sub", end, r.integers([1]))
            first = r.op("Add", start, affine(r, reach.low, self.extents))
            first = r.op("Min", r.op("Max", first, r.integers([0])), last)
        if reach.high is not None:
            stop = r.op("Add", start, affine(r, reach.high, self.extents))
            stop = r.op("Min", r.op("Add", stop, self.rows), end)
            end = r.op("Max", stop, r.op("Add", first, r.integers([1])))
        return r.op("Range", r.scalar(first), r.scalar(end), r.integers(1))

    @staticmethod
    def _outside(
        r: Recorder, columns: ir.Value, ranges: Sequence[tuple[ir.Value, ir.Value]]
    ) -> ir.Value:
        keep = r.op("GreaterOrEqual", columns, r.integers([0]))
        for first, end in ranges:
            before = r.op("Less", columns, first)
            after = r.op("GreaterOrEqual", columns, end)
            keep = r.op("And", keep, r.op("Or", before, after))
        return keep

    def _product(self, r: Recorder, q: ir.Value, k: ir.Value) -> ir.Value:
        """Q K^T [b, hq, rows, columns]; query heads that share a key head are stacked as rows."""
        q, k = self._stacked(r, q), r.op("Transpose", k, perm=[0, 1, 3, 2])
        return self._unstacked(r, product(r, q, k, self.x.dtype, coded=self.x.coded))

    def _stacked(self, r: Recorder, x: ir.Value) -> ir.Value:
        """[b, hq, rows, n] -> [b, hkv, group * rows, n]."""
        if self.form.group == 1:
            return x
        shape = r.op(
            "Concat",
            r.integers([0, self.x.heads // self.form.group, -1]),
            r.extent(x, 3),
            axis=0,
        )
        return r.op("Reshape", x, shape)

    def _unstacked(self, r: Recorder, x: ir.Value) -> ir.Value:
        """[b, hkv, group * rows, n] -> [b, hq, rows, n]."""
        if self.form.group == 1:
            return x
        head = r.integers([0, self.x.heads])
        shape = r.op("Concat", head, self.rows, r.extent(x, 3), axis=0)
        return r.op("Reshape", x, shape)

    def _frame(self, rows: ir.Value, columns: ir.Value, product: ir.Value) -> Frame:
        coordinates = {
            "b": Coordinate(self.batch, True),
            "h": Coordinate(self.heads, self.x.every is None),
            "q": Coordinate(rows, False),
            "kv": Coordinate(columns, self.keys is not None),
        }
        reads = {d.name: (value, d) for value, d in zip(self.x.reads, self.form.reads, strict=True)}
        return Frame(coordinates, self.extents, reads, {QK: Typed(product, "float")}, self.x.dtype)

    def _keep(self, r: Recorder, emitter: Elementwise, unique: ir.Value | None) -> ir.Value | None:
        """The mask on the tile, broadcastable to [b, hq, rows, columns]; None keeps everything."""
        keep = None if self.form.guard == TRUE else emitter.truth(self.form.guard)
        if keep is not None and not ranks_of(self.form.guard):
            keep = r.op("Reshape", keep, r.integers([1, 1, 1, 1]))
        if unique is None or keep is None:
            return keep if unique is None else unique
        return r.op("And", keep, unique)
