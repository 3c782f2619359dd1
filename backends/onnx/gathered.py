"""Block-sparse attention in standard operators: a Scan per kind of step of a `BlockPlan`.

A step gathers its rows' queries and keys by constant tables, evaluates the guard on the blocks the
cover left open, and finishes its rows.  Nothing else is computed; rows without keys are zeros.

Shapes: q [b, hq, s, d], k [b, hkv, t, d], v [b, hkv, t, f] -> [b, hq, s, f] with s and t fixed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from attn_rewrite.backends.onnx.blocks import BlockPlan, Steps
from attn_rewrite.backends.onnx.elementwise import Coordinate, Frame, Joined, Typed
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.mapped import MappedRows, ProbabilityMap, whole_peak
from attn_rewrite.backends.onnx.products import product
from attn_rewrite.backends.onnx.rows import Operands, RowSoftmax
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import KV, Expr, call


class Gathered:
    """One block-sparse attention being recorded."""

    def __init__(
        self,
        r: Recorder,
        x: Operands,
        form: SoftmaxAttention,
        plan: BlockPlan,
        mapping: ProbabilityMap | None = None,
    ) -> None:
        self.r, self.x, self.form, self.plan, self.mapping = r, x, form, plan, mapping
        self.peak: ir.Value | None = None
        problem, block = plan.problem, plan.block
        self.guard = form.guard
        if problem.kv_len % block:
            self.guard = form.guard & call("lt", KV, problem.kv_len)
        self.q = self._blocked(x.q, problem.heads, problem.q_len, plan.q_blocks)
        keys = problem.heads // problem.group
        self.k = self._blocked(x.k, keys, problem.kv_len, plan.kv_blocks)
        self.v = self._blocked(x.v, keys, problem.kv_len, plan.kv_blocks)
        self.within = r.counting(r.integers([block]))
        self.extents = self._extents()
        self.examples = r.counting(self.extents["b"])
        declared = zip(x.reads, form.reads, strict=True)
        self.reads = {d.name: (value, d) for value, d in declared}

    def _extents(self) -> dict[str, ir.Value]:
        r, x, problem = self.r, self.x, self.plan.problem
        fixed = {"h": problem.heads, "q": problem.q_len, "kv": problem.kv_len}
        found = {"b": r.extent(x.q, 0), **{n: r.integers([size]) for n, size in fixed.items()}}
        for value, declared in zip(x.reads, self.form.reads, strict=True):
            for axis, rank in enumerate(declared.ranks):
                found.setdefault(rank, r.extent(value, axis))
        return found

    def emit(self) -> ir.Value:
        """Record the loops and put their rows in order."""
        r, plan = self.r, self.plan
        groups = list(enumerate(plan.groups))
        if self.mapping is not None and self.mapping.whole_peak and groups:
            self.peak = whole_peak(r, [self._scan(i, steps, peaks=True) for i, steps in groups])
        parts = [self._scan(i, steps) for i, steps in groups]
        order = plan.order()
        if order.max(initial=0) == sum(g.rows.size for g in plan.groups):
            parts.append(self._zeros())
        rows = r.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        rows = r.op("Gather", rows, r.constant(order), axis=1)
        lead = r.integers([0, plan.problem.heads, plan.q_blocks * plan.block])
        out = r.op("Reshape", rows, r.op("Concat", lead, self.x.width(r), axis=0))
        if plan.problem.q_len % plan.block == 0:
            return out
        return r.op(
            "Slice", out, r.integers([0]), r.integers([plan.problem.q_len]), r.integers([2])
        )

    def _zeros(self) -> ir.Value:
        """One row of blocks without keys, [b, 1, block, width]."""
        r = self.r
        lead = r.op("Concat", r.extent(self.x.q, 0), r.integers([1, self.plan.block]), axis=0)
        return self.x.nothing(r, lead)

    def _blocked(self, x: ir.Value, heads: int, length: int, blocks: int) -> ir.Value:
        """[b, heads, length, n] -> [b, heads * blocks, block, n], padded with zeros."""
        r, block = self.r, self.plan.block
        if length % block:
            extra = blocks * block - length
            x = r.op("Pad", x, r.integers([0, 0, 0, 0, 0, 0, extra, 0]))
        lead = r.integers([0, heads * blocks, block])
        return r.op("Reshape", x, r.op("Concat", lead, r.extent(x, 3), axis=0))

    def _scan(self, index: int, steps: Steps, peaks: bool = False) -> ir.Value:
        """The rows of one group of steps, [b, steps * size, block, f], or the ``peaks`` of their
        probabilities, [..., 1]."""
        r, prefix = self.r, f"{self.r.prefix}/{'peaks' if peaks else 'steps'}_{index}"
        keys = r.constant(steps.keys)
        body = r.inner()
        given = {
            name: ir.Value(
                name=f"{prefix}/{name}", shape=ir.Shape([n]), type=ir.TensorType(ir.DataType.INT64)
            )
            for name, n in (("rows", steps.size), ("span", 3))
        }
        out = _Step(self, body, steps, given, keys).emit(peaks)
        out.dtype = self.x.dtype
        graph = ir.Graph(
            list(given.values()), [out], nodes=body.nodes, name=f"{prefix}/tile",
            opset_imports={"": r.opset},
        )  # fmt: skip
        scanned = r.op(
            "Scan", r.constant(steps.rows), r.constant(steps.spans),
            body=graph, num_scan_inputs=2, scan_output_axes=[1],
        )  # fmt: skip
        lead = r.integers([0, steps.rows.size, self.plan.block])
        width = r.integers([1]) if peaks else self.x.width(r)
        return r.op("Reshape", scanned, r.op("Concat", lead, width, axis=0))


class _Step:
    """The body of a Scan: one score tile [b, size, block, columns]."""

    def __init__(
        self,
        outer: Gathered,
        r: Recorder,
        steps: Steps,
        given: Mapping[str, ir.Value],
        keys: ir.Value,
    ) -> None:
        self.outer, self.r, self.steps, self.rows = outer, r, steps, given["rows"]
        self.block = outer.plan.block
        start, self.count, self.open = (
            r.op("Gather", given["span"], r.integers([i]), axis=0) for i in range(3)
        )
        end = r.op("Add", start, r.op("Mul", self.count, r.integers([steps.size])))
        self.keys = r.op("Slice", keys, start, end)

    def emit(self, peaks: bool = False) -> ir.Value:
        """The finished rows, [b, size, block, f], or the ``peaks`` of their probabilities."""
        r, outer, x = self.r, self.outer, self.outer.x
        q = r.op("Gather", outer.q, self.rows, axis=1)
        k, v = self._gathered(outer.k), self._gathered(outer.v)
        turned = r.op("Transpose", k, perm=[0, 1, 3, 2])
        scores = product(r, q, turned, x.dtype, coded=x.coded)
        columns = self._columns()
        frame = self._frame(columns, {QK: Typed(scores, "float")})
        keep = self._keep(columns) if self.steps.masked else None

        def contract(p: ir.Value) -> ir.Value:
            return product(r, p, v, x.dtype, coded=x.coded_values)

        if outer.mapping is None:
            rows = RowSoftmax(r, Joined(r, frame), outer.form, x.dtype, self.steps.certain)
            return (rows.attend_with_lse if x.lse else rows.attend)(keep, contract)
        places = r.op("Reshape", r.counting(r.extent(x.v, 3)), r.integers([1, 1, 1, -1]))
        mapped = MappedRows(
            r, lambda f: Joined(r, f), frame, outer.form, outer.mapping, x,
            Coordinate(places, False),
        )  # fmt: skip
        return mapped.peaks(keep) if peaks else mapped.attend(keep, contract, outer.peak)

    def _gathered(self, x: ir.Value) -> ir.Value:
        """Key blocks of the step joined per row, [b, size, columns, n]."""
        r = self.r
        width = r.op("Mul", self.count, r.integers([self.block]))
        lead = r.op("Concat", r.integers([0, self.steps.size]), width, r.extent(x, 3), axis=0)
        return r.op("Reshape", r.op("Gather", x, self.keys, axis=1), lead)

    def _columns(self) -> ir.Value:
        """Key positions of the tile's columns, [1, size, 1, columns]."""
        r = self.r
        block = r.op("Mod", self.keys, r.integers([self.outer.plan.kv_blocks]))
        first = r.op("Mul", block, r.integers([self.block]))
        every = r.op("Add", r.op("Unsqueeze", first, r.integers([1])), self.outer.within)
        return r.op("Reshape", every, r.integers([1, self.steps.size, 1, -1]))

    def _frame(self, columns: ir.Value, known: Mapping[Expr, Typed]) -> Frame:
        r, outer, size = self.r, self.outer, self.steps.size
        blocks = r.integers([outer.plan.q_blocks])
        first = r.op("Mul", r.op("Mod", self.rows, blocks), r.integers([self.block]))
        queries = r.op("Add", r.op("Unsqueeze", first, r.integers([1])), outer.within)
        apart = {
            "b": r.op("Reshape", outer.examples, r.integers([-1, 1, 1, 1])),
            "h": r.op("Reshape", r.op("Div", self.rows, blocks), r.integers([1, size, 1, 1])),
            "q": r.op("Reshape", queries, r.integers([1, size, self.block, 1])),
            "kv": columns,
        }
        coordinates = {n: Coordinate(v, False) for n, v in apart.items()}
        return Frame(coordinates, outer.extents, outer.reads, known, outer.x.dtype)

    def _keep(self, columns: ir.Value) -> ir.Value:
        """The guard on the tile: evaluated on the last ``open`` blocks of a row, true before."""
        r, size, block = self.r, self.steps.size, self.block
        width = r.op("Mul", self.open, r.integers([block]))
        if self.steps.certain:
            last = r.op("Neg", width)
            columns = r.op("Slice", columns, last, r.integers([2**62]), r.integers([3]))
        keep = Joined(r, self._frame(columns, {})).truth(self.outer.guard)
        keep = r.op("Expand", keep, r.op("Concat", r.integers([1, size, block]), width, axis=0))
        if not self.steps.certain:
            return keep
        whole = r.op("Mul", r.op("Sub", self.count, self.open), r.integers([block]))
        shape = r.op("Concat", r.op("Shape", keep, start=0, end=3), whole, axis=0)
        return r.op("Concat", r.op("Expand", r.constant(np.array(True)), shape), keep, axis=3)
