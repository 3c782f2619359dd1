"""Errors between two tensors, in float64.

Cosine similarity, relative L1 and RMSE are those of the flattened tensors, as in the evaluation of
quantised attention (Zhang et al., ICLR 2025, SageAttention, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_rewrite.report import ErrorMeasure

_CHUNK = 1 << 22  # elements in float64 at a time


@dataclass(frozen=True)
class _Sums:
    """What an `ErrorMeasure` is made of; sums of parts add up."""

    dot: float = 0.0
    result_square: float = 0.0
    reference_square: float = 0.0
    difference: float = 0.0
    difference_square: float = 0.0
    reference: float = 0.0
    count: int = 0
    excluded: int = 0
    max_abs: float = 0.0
    max_reference: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        mine, theirs = list(vars(self).values()), list(vars(other).values())
        sums = [a + b for a, b in zip(mine[:-2], theirs[:-2], strict=True)]
        return _Sums(*sums, *map(max, mine[-2:], theirs[-2:]))

    def measure(self) -> ErrorMeasure:
        norm = math.sqrt(self.result_square) * math.sqrt(self.reference_square)
        if math.isinf(self.max_abs):
            cosine = 0.0
        elif norm > 0:
            cosine = max(-1.0, min(1.0, self.dot / norm))
        else:
            cosine = 1.0 if self.result_square == self.reference_square else 0.0
        if self.reference > 0:
            relative = self.difference / self.reference
        else:
            relative = 0.0 if self.difference == 0 else math.inf
        return ErrorMeasure(
            cosine=cosine,
            relative_l1=relative,
            rmse=math.sqrt(self.difference_square / self.count) if self.count else 0.0,
            max_abs=self.max_abs,
            max_reference=self.max_reference,
            rows_excluded=self.excluded,
        )


def measure(result: Tensor, reference: Tensor) -> ErrorMeasure:
    """The error of ``result`` against ``reference``: two tensors of one shape, any dtypes.

    Rows (along the last dimension) where the reference has a NaN are left out and counted.  Equal
    infinities are no error; any other difference that is not finite is an infinite one.
    """
    if result.shape != reference.shape:
        shapes = f"{list(result.shape)} and {list(reference.shape)}"
        raise ValueError(f"tensors of different shapes cannot be compared: {shapes}")
    total = _Sums()
    for part, wanted in zip(_rows(result), _rows(reference), strict=True):
        total = total + _sums(part.to(torch.float64), wanted.to(torch.float64))
    return total.measure()


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as a matrix, some rows at a time."""
    if tensor.numel() == 0:
        return
    matrix = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step]


def _sums(result: Tensor, reference: Tensor) -> _Sums:
    kept = ~reference.isnan().any(dim=1)
    excluded = int((~kept).sum())
    if excluded:
        result, reference = result[kept], reference[kept]
    if result.numel() == 0:
        return _Sums(excluded=excluded)
    finite = result.isfinite() & reference.isfinite()
    wrong = bool((~finite & (result != reference)).any())
    result, reference = result.where(finite, 0.0), reference.where(finite, 0.0)
    difference = (result - reference).abs()
    return _Sums(
        dot=float((result * reference).sum()),
        result_square=float(result.square().sum()),
        reference_square=float(reference.square().sum()),
        difference=math.inf if wrong else float(difference.sum()),
        difference_square=math.inf if wrong else float(difference.square().sum()),
        reference=float(reference.abs().sum()),
        count=result.numel(),
        excluded=excluded,
        max_abs=math.inf if wrong else float(difference.max()),
        max_reference=float(reference.abs().max()),
    )


def implementation_bound(
    original: Tensor, reference: Tensor, rewritten: Tensor | None = None
) -> float:
    """Largest error that rounding explains.

    That is max(2 x error of the original computation in its own dtype against float64,
    4 eps x max|reference|).  ``original`` is the original output, ``reference`` its float64 value,
    and ``rewritten`` the float64 value of the rewritten attention where that is another one.
    """
    error = measure(original, reference)
    largest = error.max_reference
    if rewritten is not None:
        largest = measure(rewritten, rewritten).max_reference
    return max(2 * error.max_abs, 4 * torch.finfo(original.dtype).eps * largest)
