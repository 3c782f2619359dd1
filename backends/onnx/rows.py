"""The softmax over finished rows of a tile: all keys of a row are there, so nothing is carried."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from attn_rewrite.backends.onnx.elementwise import Elementwise
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import Call, Const, Expr, Read, walk

_FINITE = frozenset(
    ("add", "sub", "mul", "neg", "abs", "min", "max", "clip", "tanh", "sigmoid", "relu", "sign")
)


@dataclass(frozen=True)
class Operands:
    """The attention's inputs as ONNX values, already in the type of the arithmetic.

    ``heads`` query heads are given, from ``first`` on, of ``every``.  ``coded``: q and k are bytes
    of codes; ``coded_values``: v is, and so are the probabilities that multiply it.  ``lse``: every
    row of the output ends with its log-sum-exp, one column more than v has.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    reads: tuple[ir.Value, ...]
    heads: int
    dtype: ir.DataType
    first: int = 0
    every: int | None = None
    coded: bool = False
    coded_values: bool = False
    lse: bool = False

    def width(self, r: Recorder) -> ir.Value:
        """The columns of an output row: an int64 vector of one element."""
        own = r.extent(self.v, 3)
        return r.op("Add", own, r.integers([1])) if self.lse else own

    def nothing(self, r: Recorder, lead: ir.Value) -> ir.Value:
        """Rows without keys, [*lead, width]: 0, and a log-sum-exp of -inf."""
        shape = r.op("Concat", lead, r.extent(self.v, 3), axis=0)
        zeros = r.op("Expand", r.number(0.0, self.dtype), shape)
        if not self.lse:
            return zeros
        column = r.op("Concat", lead, r.integers([1]), axis=0)
        lowest = r.op("Expand", r.number(-math.inf, self.dtype), column)
        return r.op("Concat", zeros, lowest, axis=-1)


class RowSoftmax:
    """Score, mask, sink, softmax and weight of ``form`` on one tile, recorded into ``r``.

    ``certain`` says that every row keeps a key with a finite score unless the score itself is -inf.
    """

    def __init__(
        self,
        r: Recorder,
        emitter: Elementwise,
        form: SoftmaxAttention,
        dtype: ir.DataType,
        certain: bool = False,
    ) -> None:
        self.r, self.emitter, self.form, self.dtype = r, emitter, form, dtype
        self.certain = certain

    def attend(self, keep: ir.Value | None, contract: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """``contract`` of the probabilities; rows that keep nothing give 0.

        ``keep`` broadcasts to the tile; None keeps everything.  A row whose kept scores are all
        -inf keeps nothing either, as in torch's attention.
        """
        r, score, dtype = self.r, self._score(), self.dtype
        some: ir.Value | None = None
        empty: ir.Value | None = None
        if not always_finite(self.form.score):
            score = score if keep is None else r.masked(keep, score, dtype)
            top = r.op("ReduceMax", score, r.integers([-1]), keepdims=1)
            empty = r.op("IsInf", top, detect_positive=0)
        elif keep is not None:
            score, some = self._biased(score, keep)
        probabilities = self._softmax(score)
        if self.form.weight is not None:
            probabilities = r.op("Mul", probabilities, self.emitter.number(self.form.weight))
        out = contract(probabilities)
        if some is not None:
            return r.op("Mul", out, some)
        return out if empty is None else r.op("Where", empty, r.number(0.0, dtype), out)

    def attend_with_lse(
        self, keep: ir.Value | None, contract: Callable[[ir.Value], ir.Value]
    ) -> ir.Value:
        """The output of `attend` with one column more: the log-sum-exp of each row, -inf where it
        keeps nothing.  For a form without a sink."""
        r, dtype, score = self.r, self.dtype, self._score()
        if keep is not None:
            score = r.masked(keep, score, dtype)
        zero, one = r.number(0.0, dtype), r.number(1.0, dtype)
        top = r.op("ReduceMax", score, r.integers([-1]), keepdims=1)
        top = r.op("Where", r.op("IsInf", top, detect_positive=0), zero, top)
        shares = r.op("Exp", r.op("Sub", score, top))
        sums = r.op("ReduceSum", shares, r.integers([-1]), keepdims=1)
        if self.form.weight is not None:
            shares = r.op("Mul", shares, self.emitter.number(self.form.weight))
        out = r.op("Div", contract(shares), r.op("Where", r.op("Equal", sums, zero), one, sums))
        return r.op("Concat", out, r.op("Add", top, r.op("Log", sums)), axis=-1)

    def _score(self) -> ir.Value:
        """The score, spread over the tile where it does not contain the product."""
        score = self.emitter.number(self.form.score)
        if QK in walk(self.form.score):
            return score
        return self.r.op("Expand", score, self.r.op("Shape", self.emitter.emit(QK).value))

    def _biased(self, score: ir.Value, keep: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """The score with -inf added where masked, and 1 or 0 per row: whether it keeps a key.

        A row that keeps none is left unmasked, to be multiplied by 0 afterwards.  Adding a bias of
        the mask's own (small) shape is many times faster in ONNX Runtime than selecting.
        """
        r, dtype = self.r, self.dtype
        zero, lowest = r.number(0.0, dtype), r.number(-math.inf, dtype)
        if self.certain:
            return r.op("Add", score, r.op("Where", keep, zero, lowest)), None
        some = r.nonempty(keep, dtype)
        empty = r.op("Not", r.cast(some, ir.DataType.BOOL))
        bias = r.op("Where", r.op("Or", keep, empty), zero, lowest)
        return r.op("Add", score, bias), some

    def _softmax(self, score: ir.Value) -> ir.Value:
        """Over the columns; a sink is one more column, dropped again."""
        r = self.r
        if self.form.sink is None:
            return r.op("Softmax", score, axis=-1)
        shape = r.op("Concat", r.op("Shape", score, start=0, end=3), r.integers([1]), axis=0)
        column = r.op("Expand", self.emitter.number(self.form.sink), shape)
        extended = r.op("Softmax", r.op("Concat", score, column, axis=-1), axis=-1)
        cut = (r.integers([0]), r.integers([-1]), r.integers([-1]))
        return r.op("Slice", extended, *cut)


def always_finite(score: Expr) -> bool:
    """True where a score is finite for every finite product, masked points included."""
    for node in walk(score):
        match node:
            case Read():
                if node != QK:
                    return False
            case Const(value):
                if not math.isfinite(value):
                    return False
            case Call(op) if op not in _FINITE and not _divides_by_number(node):
                return False
    return True


def _divides_by_number(node: Call) -> bool:
    divisor = node.args[-1]
    return node.op == "div" and isinstance(divisor, Const) and bool(divisor.value)
