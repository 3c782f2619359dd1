"""Operators of ONNX Runtime's own domain, where they express a site exactly and are faster.

``MultiHeadAttention`` without a mask is a streaming kernel on the CPU: no score matrix in memory,
and faster than MatMul, Softmax, MatMul.  The other candidates lose there, and say why:
``GroupQueryAttention`` streams only where its caches are results of the graph, and computes every
key of a local window; ``SparseAttention`` computes the dense product on the CPU and is wrong on
blocks above the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from attn_rewrite.backends.onnx.dense import SdpaOptions
from attn_rewrite.backends.onnx.graph import Recorder

DOMAIN = "com.microsoft"
NOT_BLOCKS = (
    "com.microsoft::SparseAttention computes the dense product on the CPU, and GroupQueryAttention "
    "every key of a local window; these tiles skip"
)
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def why_not(inputs: Sequence[ir.Value], options: SdpaOptions) -> str | None:
    """Why ``MultiHeadAttention`` is not used for ``scaled_dot_product_attention``; None: it is."""
    shapes = [x.shape for x in inputs[:3]]
    if len(inputs) > 3:
        return "MultiHeadAttention with a mask holds all scores and is no faster"
    if options.causal:
        return (
            "GroupQueryAttention streams only where its caches are results of the graph, and "
            "MultiHeadAttention computes the upper half"
        )
    if any(s is None or len(s) != 4 for s in shapes):
        return "MultiHeadAttention takes batch, heads, length and width"
    heads, widths = ([None if s is None else s[i] for s in shapes] for i in (1, 3))
    if not all(isinstance(n, int) for n in (*heads, *widths)) or len(set(heads)) > 1:
        return "MultiHeadAttention takes one fixed number of heads for queries and keys"
    if len({str(s[0]) for s in shapes if s is not None}) > 1:
        return "MultiHeadAttention does not broadcast the batch"
    if inputs[0].dtype not in _TYPES:
        return f"MultiHeadAttention has no kernel for {inputs[0].dtype}"
    return None


def emit_multi_head(r: Recorder, inputs: Sequence[ir.Value], options: SdpaOptions) -> ir.Value:
    """Record one ``MultiHeadAttention``: q, k, v [b, h, s, n] -> [b, h, s, f]."""
    q, _, v = inputs
    heads, width, out = (_fixed(x, i) for x, i in ((q, 1), (q, 3), (v, 3)))
    scale = 1 / math.sqrt(width) if options.scale is None else options.scale
    flat = [_joined(r, x) for x in inputs]
    result = r.op("MultiHeadAttention", *flat, domain=DOMAIN, num_heads=heads, scale=scale)
    apart = r.op("Reshape", result, r.integers([0, 0, heads, out]))
    return r.op("Transpose", apart, perm=[0, 2, 1, 3])


def _fixed(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)  # `why_not` was asked
    return size


def _joined(r: Recorder, x: ir.Value) -> ir.Value:
    """[b, h, s, n] -> [b, s, h * n]."""
    rows = r.op("Transpose", x, perm=[0, 2, 1, 3])
    return r.op("Reshape", rows, r.integers([0, 0, _fixed(x, 1) * _fixed(x, 3)]))
