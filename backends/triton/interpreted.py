"""What Triton's interpreter gets wrong and kernels here depend on, put right while one runs.

Its conversion from float32 to an 8-bit float loses the carry of a rounded significand (1.97 becomes
1.0), takes halves up, and cuts subnormals off (Triton 3.9).  GPUs round to the nearest, halves to
even, and so does torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TORCH = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


@contextmanager
def exact_conversions() -> Iterator[None]:
    """Conversions from float32 to 8-bit floats are torch's inside."""
    from triton.runtime import interpreter

    module: Any = interpreter
    original = module._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        kind = _TORCH.get(str(target))
        if kind is None or str(source) != "fp32":
            return original(data, source, target, mode)
        return torch.from_numpy(data.copy()).to(kind).view(torch.uint8).numpy()

    module._convert_float = convert
    try:
        yield
    finally:
        module._convert_float = original
