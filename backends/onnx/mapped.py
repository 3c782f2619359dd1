"""Probabilities that are mapped before they multiply V: rounded to codes, clipped, log-coded.

A row's exponentials below its maximum, their sum, and what the cascade makes of them.  Everything
but products of codes is float64, as in ``attn_rewrite::mapped_attention``: a probability that
rounds the other way is an error of a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from attn_rewrite.backends.onnx.elementwise import Coordinate, Elementwise, Frame, Typed
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.products import coded_bytes
from attn_rewrite.backends.onnx.rows import Operands
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import KV, Expr, F, substitute
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.cascade.staged import PI, PV, SD, SN, A, StagedAttention


@dataclass(frozen=True)
class ProbabilityMap:
    """What happens to the probabilities: the map, a statistic of them that it reads, the output as
    an expression over `PV` and `SD`; ``codes`` where the mapped ones are integer codes."""

    probability: Expr
    output: Expr
    peak: Einsum | None
    normalised: bool
    codes: bool

    @property
    def whole_peak(self) -> bool:
        """Whether the statistic is one number over all rows, known after a pass of its own."""
        return self.peak is not None and not self.peak.out.index


def mapping_of(staged: StagedAttention) -> ProbabilityMap | None:
    """The map of ``staged``; None where its probabilities are plain."""
    if staged.probability is None:
        return None
    assert staged.output is not None
    codes = any(t.name == PI.tensor and t.dtype in ("i4", "i8") for t in staged.tensors)
    return ProbabilityMap(staged.probability, staged.output, staged.peak, staged.normalised, codes)


class MappedRows:
    """Score, mask, exponentials and their map on one tile, recorded into ``r``.

    ``widths`` are the coordinates of V's last axis, shaped as the emitter takes those of keys.
    """

    def __init__(
        self,
        r: Recorder,
        make: Callable[[Frame], Elementwise],
        frame: Frame,
        form: SoftmaxAttention,
        mapping: ProbabilityMap,
        x: Operands,
        widths: Coordinate,
    ) -> None:
        self.r, self.make, self.frame, self.form = r, make, frame, form
        self.mapping, self.x, self.widths = mapping, x, widths
        self.emitter = make(frame)

    def attend(
        self,
        keep: ir.Value | None,
        contract: Callable[[ir.Value], ir.Value],
        peak: ir.Value | None = None,
    ) -> ir.Value:
        """The finished rows; ``peak`` is the statistic where it is over all rows."""
        r, dtype = self.r, self.x.dtype
        sums = self._statistics(keep)
        if self.mapping.peak is not None:
            found = self._row_peak() if peak is None else peak
            self.emitter.know(self.mapping.peak.out, found)
        p = self.emitter.number(self.mapping.probability)
        if keep is not None:
            p = r.op("Where", keep, p, r.number(0.0, dtype))
        p = r.op("Expand", p, r.op("Shape", self.emitter.emit(QK).value))
        if self.form.weight is not None:
            p = r.op("Mul", p, self.emitter.number(self.form.weight))
        if self.x.coded_values:
            p = coded_bytes(r, p, dtype)
        return self._output(contract(p), sums)

    def peaks(self, keep: ir.Value | None) -> ir.Value:
        """The statistic of every row, [..., rows, 1]."""
        self._statistics(keep)
        return self._row_peak()

    def _statistics(self, keep: ir.Value | None) -> ir.Value:
        """Exponentials and normalised probabilities, known from now on; the sums, 1 for a row that
        keeps no key."""
        r, dtype = self.r, self.x.dtype
        shape = r.op("Shape", self.emitter.emit(QK).value)
        score = r.op("Expand", self.emitter.number(self.form.score), shape)
        if keep is not None:
            score = r.masked(keep, score, dtype)
        top = r.op("ReduceMax", score, r.integers([-1]), keepdims=1)
        sink = None if self.form.sink is None else self.emitter.number(self.form.sink)
        if sink is not None:
            top = r.op("Max", top, sink)
        empty = r.op("IsInf", top, detect_positive=0)
        top = r.op("Where", empty, r.number(0.0, dtype), top)
        exponentials = r.op("Exp", r.op("Sub", score, top))
        sums = r.op("ReduceSum", exponentials, r.integers([-1]), keepdims=1)
        if sink is not None:
            sums = r.op("Add", sums, r.op("Exp", r.op("Sub", sink, top)))
        nothing = r.op("Equal", sums, r.number(0.0, dtype))
        sums = r.op("Where", nothing, r.number(1.0, dtype), sums)
        self.emitter.know(SN, exponentials)
        self.emitter.know(SD, sums)
        if self.mapping.normalised:
            self.emitter.know(A, r.op("Div", exponentials, sums))
        return sums

    def _row_peak(self) -> ir.Value:
        """The largest value in each row that the statistic counts; 0 where it counts none."""
        r, dtype = self.r, self.x.dtype
        assert self.mapping.peak is not None
        value = self.emitter.number(self.mapping.peak.expr)
        value = r.masked(self.emitter.truth(self.mapping.peak.guard), value, dtype)
        value = r.op("Expand", value, r.op("Shape", self.emitter.emit(QK).value))
        top = r.op("ReduceMax", value, r.integers([-1]), keepdims=1)
        return r.op("Where", r.op("IsInf", top, detect_positive=0), r.number(0.0, dtype), top)

    def _output(self, value: ir.Value, sums: ir.Value) -> ir.Value:
        """The output expression, V's last axis in the place of the keys."""
        there: dict[Expr, Expr] = {F: KV}
        known: dict[Expr, ir.Value] = {PV: value, SD: sums}
        frame = replace(
            self.frame,
            coordinates={**self.frame.coordinates, "kv": self.widths},
            known={substitute(e, there): Typed(v, "float") for e, v in known.items()},
        )
        return self.make(frame).number(substitute(self.mapping.output, there))


def whole_peak(r: Recorder, peaks: Sequence[ir.Value]) -> ir.Value:
    """The largest of all rows' statistics [b, ..., 1], as [1, 1, 1, 1]."""
    tops = [r.op("Reshape", r.op("ReduceMax", p, keepdims=0), r.integers([1])) for p in peaks]
    top = tops[0] if len(tops) == 1 else r.op("ReduceMax", r.op("Concat", *tops, axis=0))
    return r.op("Reshape", top, r.integers([1, 1, 1, 1]))
