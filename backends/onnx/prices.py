"""Prices of attention in ONNX Runtime by examples/benchmarks/onnx_prices.py.

2026-11-30, ONNX Runtime 1.32.0, 2 threads, float32,
x86_64, 2 cores, AMD EPYC.
"""

# Seconds for a call, a step of a loop, a number moved, a score, and a multiplication.
PRICES: dict[str, tuple[float, ...]] = {
    "MultiHeadAttention": (0.000358, 0.0, 0.0, 0.0, 1.82e-11),
    "GroupQueryAttention": (1.14e-05, 0.0, 1.8e-09, 1.52e-09, 1.45e-11),
    "GroupQueryAttention with a window": (5.96e-05, 0.0, 1.87e-09, 1.96e-09, 1.44e-11),
    "dense": (0.000298, 0.0, 0.0, 5.5e-10, 1.72e-11),
    "MultiHeadAttention with a mask": (0.000339, 0.0, 0.0, 5.87e-10, 1.94e-11),
    "dense with a mask": (0.000239, 0.0, 0.0, 6.92e-10, 2.22e-11),
    "tiles": (7.13e-05, 0.000309, 0.0, 4.23e-10, 2.51e-11),
    "blocks": (0.00107, 5.98e-05, 3.2e-10, 0.0, 2.19e-11),
}
# The largest relative error of an estimate at a size that was measured.
ERRORS = {
    "MultiHeadAttention": 0.13,
    "GroupQueryAttention": 0.22,
    "GroupQueryAttention with a window": 0.18,
    "dense": 0.1,
    "MultiHeadAttention with a mask": 0.14,
    "dense with a mask": 0.09,
    "tiles": 0.29,
    "blocks": 0.17,
}
