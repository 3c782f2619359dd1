"""Exact products of integer codes: int8 instructions where they are exact, else floats that are."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Sums of int8 products this long stay below 2^24 (float32) and 2^31 (int32).
_FLOAT32_TERMS = (1 << 24) // (127 * 127)
_INT32_TERMS = ((1 << 31) - 1) // (127 * 127)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT`` of codes: a [n, i, d] and b [n, j, d], int8; [n, i, j] in float64, exact.

    Codes are at most 127 in size.
    """
    terms = a.shape[-1]
    if (
        terms <= _INT32_TERMS
        and a.device.type == "cpu"
        and a.numel()
        and b.numel()
        and _int_mm_is_exact()
    ):
        return torch.stack([torch._int_mm(x, y.mT) for x, y in zip(a, b, strict=True)]).double()
    kind = torch.float32 if terms <= _FLOAT32_TERMS else torch.float64
    return torch.bmm(a.to(kind), b.to(kind).mT).double()


@lru_cache(maxsize=1)
def _int_mm_is_exact() -> bool:
    """Whether this machine adds up int8 products without saturating on the way.

    Instructions older than VNNI add pairs of products in 16 bits; the largest codes show it.
    """
    try:
        high = torch.full((32, 128), 127, dtype=torch.int8)
        return all(
            bool((torch._int_mm(high, sign * high.T) == sign * 127 * 127 * 128).all())
            for sign in (1, -1)
        )
    except RuntimeError:
        return False
