"""Attention that returns its log-sum-exp as well, in standard operators.

torch's exporter translates ``_scaled_dot_product_flash_attention_for_cpu`` to a second output of
another shape, so the operator is translated here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from attn_rewrite.errors import LowerError

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def flash_attention_with_statistics(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """q [b, h, s, d], k [b, h, t, d], v [b, h, t, d], a mask that is added -> the output
    [b, h, s, d] in the type of q, and the log-sum-exp of the scaled and masked scores [b, h, s] in
    float32 or wider.

    A row of -inf scores has a log-sum-exp of -inf and an output of 0.
    """
    if dropout_p:
        raise LowerError(
            f"ONNX: an attention has dropout {dropout_p}, expected 0; "
            "call model.eval() before the export."
        )
    result, width = query.dtype, query.shape[3]
    dtype = ir.DataType.FLOAT if result in HALVES else result

    def wide(x: Any) -> Any:
        return x if x.dtype == dtype else op.Cast(x, to=int(dtype))

    def number(x: float) -> Any:
        return op.Constant(value=ir.tensor(np.array(x, dtype.numpy())))

    factor = 1 / math.sqrt(width) if scale is None else scale
    turned = op.Transpose(wide(key), perm=[0, 1, 3, 2])
    score = op.MatMul(op.Mul(wide(query), number(factor)), turned)
    if is_causal:
        score = op.Where(_causal(query, key), score, number(-math.inf))
    if attn_mask is not None:
        score = op.Add(score, wide(attn_mask))
    last = op.Constant(value_ints=[-1])
    top = op.ReduceMax(score, last, keepdims=1)
    top = op.Where(op.IsInf(top, detect_positive=0), number(0.0), top)
    shares = op.Exp(op.Sub(score, top))
    sums = op.ReduceSum(shares, last, keepdims=1)
    statistic = op.Squeeze(op.Add(top, op.Log(sums)), last)
    divisor = op.Where(op.Equal(sums, number(0.0)), number(1.0), sums)
    out = op.Div(op.MatMul(shares, wide(value)), divisor)
    return out if dtype == result else op.Cast(out, to=int(result)), statistic


def _causal(query: Any, key: Any) -> Any:
    """[s, t]: keys up to the query's own place, as in torch."""
    zero, one = (op.Constant(value_int=n) for n in (0, 1))
    ends = (op.Squeeze(op.Shape(x, start=2, end=3)) for x in (query, key))
    rows, columns = (op.Range(zero, end, one) for end in ends)
    return op.GreaterOrEqual(op.Unsqueeze(rows, op.Constant(value_ints=[1])), columns)
