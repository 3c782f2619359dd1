"""The two products of attention: of floats, or of integer codes that travel as bytes.

``DynamicQuantizeLinear`` would make codes in one pass instead of ten (with ``MatMulInteger`` half
the time of a product of 2,048 tokens, 8 heads, width 64, on two threads), but others: one scale and
a zero point over the range of a whole tensor, where a scheme has a scale per head, block or row
about 0.  On normal numbers a quarter of its codes are the scheme's, so it expresses none exactly.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_rewrite.backends.onnx.graph import Recorder

# The byte of code 0.  ONNX Runtime's CPU kernel multiplies signed bytes a third as fast, and
# unsigned by signed ones wrongly where the first have a zero point.
ZERO = 128


def product(
    r: Recorder, a: ir.Value, b: ir.Value, dtype: ir.DataType, *, coded: bool = False
) -> ir.Value:
    """``a @ b`` in ``dtype``; of ``coded`` bytes as integers, each sum exact in 32 bits."""
    if not coded:
        return r.op("MatMul", a, b)
    zero = r.constant(np.array(ZERO, np.uint8))
    return r.cast(r.op("MatMulInteger", a, b, zero, zero), dtype)


def coded_bytes(r: Recorder, codes: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Whole numbers of -127 to 127 in ``dtype`` as bytes."""
    return r.cast(r.op("Add", codes, r.number(float(ZERO), dtype)), ir.DataType.UINT8)
