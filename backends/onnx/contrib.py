"""``MultiHeadAttention`` of ONNX Runtime's own domain.

Without a mask it is a streaming kernel on the CPU: no score matrix in memory.  With one it holds
all scores, in less time than MatMul, a bias and Softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from attn_rewrite.backends.onnx.dense import SdpaOptions
from attn_rewrite.backends.onnx.graph import Recorder

DOMAIN = "com.microsoft"
MULTI_HEAD = "MultiHeadAttention"
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def price_of(operator: str, masked: bool) -> str:
    """The name in the table of prices."""
    return f"{operator} with a mask" if masked else operator


def why_not(inputs: Sequence[ir.Value]) -> str | None:
    """Why ``MultiHeadAttention`` does not express ``scaled_dot_product_attention`` of q, k, v and
    a mask that is not causal; None: it does."""
    shapes = [x.shape for x in inputs[:3]]
    if any(s is None or len(s) != 4 for s in shapes):
        return f"{MULTI_HEAD} takes batch, heads, length and width"
    heads, widths = ([None if s is None else s[i] for s in shapes] for i in (1, 3))
    if not all(isinstance(n, int) for n in (*heads, *widths)):
        return f"{MULTI_HEAD} takes fixed numbers of heads and widths"
    if len({str(s[0]) for s in shapes if s is not None}) > 1:
        return f"{MULTI_HEAD} does not broadcast the batch"
    if inputs[0].dtype not in _TYPES:
        return f"{MULTI_HEAD} has no kernel for {inputs[0].dtype}"
    if len(inputs) > 3 and (inputs[3].shape is None or len(inputs[3].shape) > 4):
        return f"{MULTI_HEAD} takes a mask of up to four dimensions"
    return None


def emit_multi_head(r: Recorder, inputs: Sequence[ir.Value], options: SdpaOptions) -> ir.Value:
    """Record one ``MultiHeadAttention``: q, k, v [b, h, s, n], a mask -> [b, h, s, f]."""
    q, _, v, *masks = inputs
    heads, width, out = (_fixed(x, i) for x, i in ((q, 1), (q, 3), (v, 3)))
    scale = 1 / math.sqrt(width) if options.scale is None else options.scale
    given: list[ir.Value | None] = [_joined(r, x, heads) for x in inputs[:3]]
    keep: ir.Value | None = None
    if masks:
        bias, keep = _bias(r, inputs)
        given += [None, None, bias]
    result = r.op(MULTI_HEAD, *given, domain=DOMAIN, num_heads=heads, scale=scale)
    apart = r.op("Reshape", result, r.integers([0, 0, heads, out]))
    rows = r.op("Transpose", apart, perm=[0, 2, 1, 3])
    return rows if keep is None else r.zero_where_empty(keep, rows, _type(q))


def _bias(r: Recorder, inputs: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """The mask as a bias over all queries and keys, and what it keeps."""
    q, k, _, mask = inputs
    dtype = _type(q)
    lowest = r.number(-math.inf, dtype)
    if mask.dtype == ir.DataType.BOOL:
        keep, bias = mask, r.op("Where", mask, r.number(0.0, dtype), lowest)
    else:
        bias = mask if mask.dtype == dtype else r.cast(mask, dtype)
        keep = r.op("Greater", bias, lowest)
    shape = r.op("Concat", r.integers([1, 1]), r.extent(q, 2), r.extent(k, 2), axis=0)
    return r.op("Expand", bias, shape), keep


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None  # `why_not` was asked
    return value.dtype


def _fixed(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)  # `why_not` was asked
    return size


def _joined(r: Recorder, x: ir.Value, heads: int) -> ir.Value:
    """[b, h, s, n] -> [b, s, heads * n]; a head that several query heads share is repeated."""
    own, width = _fixed(x, 1), _fixed(x, 3)
    if own != heads:
        x = r.op("Gather", x, r.integers([h * own // heads for h in range(heads)]), axis=1)
    rows = r.op("Transpose", x, perm=[0, 2, 1, 3])
    return r.op("Reshape", rows, r.integers([0, 0, heads * width]))
