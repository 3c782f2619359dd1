"""``scaled_dot_product_attention`` in standard operators, with torch's answer on empty rows.

Two spellings: the operator ``Attention`` from opset 23 on, and MatMul, Softmax, MatMul before.  In
the second a row whose keys are all masked gives 0, as in torch; a plain decomposition gives NaN.

Shapes: q [..., hq, s, d], k [..., hkv, t, d], v [..., hkv, t, f], mask broadcastable to
[..., hq, s, t] (bool keeps, float is added) -> [..., hq, s, f].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import KV, Q
from attn_rewrite.errors import LowerError

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FIRST_ATTENTION_OPSET = 23


@dataclass(frozen=True)
class SdpaOptions:
    """The arguments of the operator that are not tensors; ``scale`` None is 1 / sqrt(d)."""

    causal: bool = False
    grouped: bool = False
    scale: float | None = None


def _sizes(value: ir.Value) -> tuple[object, ...]:
    if value.shape is None or value.dtype is None:
        raise LowerError(f"ONNX: {value.name} has no known rank or type; this is a bug.")
    return tuple(value.shape)


def _fixed(value: ir.Value, axis: int, what: str) -> int:
    size = _sizes(value)[axis]
    if not isinstance(size, int):
        raise LowerError(f"ONNX: {what} of {value.name} is {size}, expected a fixed number.")
    return size


def sdpa_form(inputs: Sequence[ir.Value], options: SdpaOptions, opset: int) -> tuple[str, str]:
    """The name of the form that `emit_sdpa` records, and a sentence on it."""
    masked = "a mask" if len(inputs) > 3 else "a causal mask" if options.causal else "no mask"
    if opset >= FIRST_ATTENTION_OPSET and _fits_attention(inputs):
        return "Attention", f"the standard operator, {masked}"
    return "dense", f"MatMul and Softmax, {masked}"


def emit_sdpa(r: Recorder, inputs: Sequence[ir.Value], options: SdpaOptions) -> ir.Value:
    """Record the operator; returns its output."""
    scale = _scale(inputs, options)
    if r.opset >= FIRST_ATTENTION_OPSET and _fits_attention(inputs):
        masked = _whole_mask(r, inputs)
        return r.op("Attention", *masked, is_causal=int(options.causal), scale=scale)
    return _Decomposed(r, inputs, options, scale).emit()


def _scale(inputs: Sequence[ir.Value], options: SdpaOptions) -> float:
    if options.scale is not None:
        return options.scale
    return 1 / math.sqrt(_fixed(inputs[0], -1, "the head dimension"))


def _fits_attention(inputs: Sequence[ir.Value]) -> bool:
    """The operator takes four dimensions and does not broadcast the batch; in half precision it
    would round a mask's sum with the score, which torch does not."""
    sizes = [_sizes(x) for x in inputs[:3]]
    rounded = len(inputs) > 3 and inputs[3].dtype in HALVES
    fits = all(len(s) == 4 for s in sizes) and len({str(s[0]) for s in sizes}) == 1
    return fits and not rounded


def _whole_mask(r: Recorder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The mask over all queries and keys: ONNX Runtime's kernel does not broadcast those axes."""
    if len(inputs) < 4:
        return inputs
    q, k, v, mask = inputs
    shape = r.op("Concat", r.extent(q, -2), r.extent(k, -2), axis=0)
    return q, k, v, r.op("Expand", _finite(r, mask), shape)


def _finite(r: Recorder, mask: ir.Value) -> ir.Value:
    """A mask without the lowest number of its type, which ONNX Runtime's kernel takes for -inf: a
    row of nothing else gives 0 there, and the mean of the values in torch.  The next number up is
    as good, since no score changes either."""
    if mask.dtype == ir.DataType.BOOL or mask.dtype is None:
        return mask
    lowest = np.finfo(mask.dtype.numpy()).min
    above = np.nextafter(lowest, lowest.dtype.type(0))
    is_lowest = r.op("Equal", mask, r.number(lowest, mask.dtype))
    return r.op("Where", is_lowest, r.number(above, mask.dtype), mask)


# Causal attention this short is one step of tiles, which saves nothing.
SHORT = 256


def fits_whole(inputs: Sequence[ir.Value]) -> bool:
    """Whether q, k, v have four dimensions, fixed heads and one batch, and no mask."""
    sizes = [_sizes(x) for x in inputs[:3]]
    if len(inputs) != 3 or any(len(s) != 4 or not isinstance(s[1], int) for s in sizes):
        return False
    return len({str(s[0]) for s in sizes}) == 1


def fits_tiles(inputs: Sequence[ir.Value]) -> bool:
    """Whether q, k, v are what tiles take, with enough queries."""
    length = _sizes(inputs[0])[-2]
    return fits_whole(inputs) and not (isinstance(length, int) and length <= SHORT)


def causal_form(inputs: Sequence[ir.Value], options: SdpaOptions) -> SoftmaxAttention:
    """Causal attention (top-left, as in torch) of what `fits_whole`."""
    q, k, _ = inputs
    group = _fixed(q, 1, "the head count") // _fixed(k, 1, "the head count")
    return SoftmaxAttention(QK * _scale(inputs, options), Q >= KV, group=group)


class _Decomposed:
    def __init__(
        self, r: Recorder, inputs: Sequence[ir.Value], options: SdpaOptions, scale: float
    ) -> None:
        self.r, self.options, self.scale = r, options, scale
        self.result = inputs[0].dtype or ir.DataType.FLOAT
        self.dtype = ir.DataType.FLOAT if self.result in HALVES else self.result
        self.q, self.k, self.v = (self._wide(x) for x in inputs[:3])
        self.mask = inputs[3] if len(inputs) > 3 else None
        self.rank = len(_sizes(inputs[0]))
        self.group = 1
        if options.grouped:
            hq, hkv = (_fixed(x, -3, "the head count") for x in inputs[:2])
            self.group, self.heads = hq // hkv, hq

    def _wide(self, value: ir.Value) -> ir.Value:
        return value if self.dtype == self.result else self.r.cast(value, self.dtype)

    def emit(self) -> ir.Value:
        r = self.r
        swapped = [*range(self.rank - 2), self.rank - 1, self.rank - 2]
        q = r.op("Mul", self.q, r.number(self.scale, self.dtype))
        score = r.op("MatMul", self._stacked(q), r.op("Transpose", self.k, perm=swapped))
        score, keep = self._masked(self._unstacked(score))
        probabilities = self._stacked(r.op("Softmax", score, axis=-1))
        out = self._unstacked(r.op("MatMul", probabilities, self.v))
        if keep is not None:
            out = r.zero_where_empty(keep, out, self.dtype)
        return out if self.dtype == self.result else r.cast(out, self.result)

    def _masked(self, score: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """The score with its mask, and what the mask keeps (None where no row can be empty).

        A mask is added, as in torch: selecting takes ONNX Runtime nearly as long as the products.
        """
        r = self.r
        zero, lowest = (r.number(x, self.dtype) for x in (0.0, -math.inf))
        if self.options.causal:
            rows = r.op("Unsqueeze", r.counting(r.extent(self.q, -2)), r.integers([1]))
            keep = r.op("GreaterOrEqual", rows, r.counting(r.extent(self.k, -2)))
            return r.op("Add", score, r.op("Where", keep, zero, lowest)), None
        if self.mask is None:
            return score, None
        if self.mask.dtype == ir.DataType.BOOL:
            return r.op("Add", score, r.op("Where", self.mask, zero, lowest)), self.mask
        bias = self.mask if self.mask.dtype == self.dtype else r.cast(self.mask, self.dtype)
        return r.op("Add", score, bias), r.op("Greater", bias, lowest)

    def _stacked(self, x: ir.Value) -> ir.Value:
        """Query heads that share a key head as rows: [..., hq, s, n] -> [..., hkv, g * s, n]."""
        if self.group == 1:
            return x
        r = self.r
        lead = r.op("Shape", x, start=0, end=self.rank - 3)
        middle = r.integers([self.heads // self.group, -1])
        return r.op("Reshape", x, r.op("Concat", lead, middle, r.extent(x, -1), axis=0))

    def _unstacked(self, x: ir.Value) -> ir.Value:
        if self.group == 1:
            return x
        r = self.r
        lead = r.op("Shape", x, start=0, end=self.rank - 3)
        middle = r.integers([self.heads])
        rows = r.extent(self.q, -2)
        return r.op("Reshape", x, r.op("Concat", lead, middle, rows, r.extent(x, -1), axis=0))
