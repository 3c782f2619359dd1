"""One Einsum over a box of points: map its expression, fold the ranks its output does not carry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_rewrite.cascade.expr import Call, Expr, Rank, ranks_of, walk
from attn_rewrite.cascade.infer import IDENTITY
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.cascade.values import Frame, broadcast_shape, evaluate, real, truth

CHUNK = 1 << 25  # points evaluated at a time where a rank of the output can be cut


@dataclass(frozen=True)
class Points:
    """Folded values over the output ranks, and which of them were touched (None: all)."""

    values: Tensor
    touched: Tensor | None


def iteration_ranks(e: Einsum) -> tuple[str, ...]:
    """Ranks of the output first, then the others in order of appearance."""
    found: dict[str, None] = {}
    for part in (*e.out.index, e.expr, e.guard):
        found.update(dict.fromkeys(n.name for n in walk(part) if isinstance(n, Rank)))
    found.update(dict.fromkeys(r for r, _ in e.reduce))
    return tuple(found)


def output_ranks(e: Einsum) -> frozenset[str]:
    """Ranks that the output carries."""
    return frozenset[str]().union(*(ranks_of(i) for i in e.out.index))


def contract(e: Einsum, frame: Frame, mask: Tensor | None) -> Points | None:
    """A product that is summed, by `torch.einsum`; None where that does not say the same.

    The output must have default 0: points without a divisor would keep another one.
    """
    folded = [r for r in frame.ranks if r not in output_ranks(e)]
    factors = _factors(e.expr)
    if not folded or len(factors) < 2 or any(op != "add" for _, op in e.reduce):
        return None
    inner = frame if mask is None else frame.restricted(mask)
    values = [real(evaluate(f, inner)) for f in factors]
    counts = frame.shape()
    touched = None
    if mask is not None:
        if not all(bool(v.isfinite().all()) for v in values):
            return None  # 0 * inf: a filtered point must not be seen
        values = _masked(values, mask)
        touched = mask
        for rank in folded:
            touched = touched.any(frame.axis(rank), keepdim=True)
    spanned = broadcast_shape(*(v.shape for v in values))
    if any(spanned[frame.axis(r)] != counts[frame.axis(r)] for r in folded):
        return None  # a rank that no factor carries counts points
    kept = [a for a, r in enumerate(frame.ranks) if r not in folded]
    return Points(_einsum(values, kept, counts), touched)


def _factors(expr: Expr) -> list[Expr]:
    if isinstance(expr, Call) and expr.op == "mul":
        return _factors(expr.args[0]) + _factors(expr.args[1])
    return [expr]


def _masked(values: list[Tensor], mask: Tensor) -> list[Tensor]:
    """The factors with the mask in the one that spans it, or as a factor of its own."""
    for i, value in enumerate(values):
        if all(v >= m for v, m in zip(value.shape, mask.shape, strict=True)):
            return [*values[:i], torch.where(mask, value, 0.0), *values[i + 1 :]]
    return [real(mask), *values]


def _einsum(values: list[Tensor], kept: list[int], counts: list[int]) -> Tensor:
    letters = [chr(ord("a") + a) if a < 26 else chr(ord("A") + a - 26) for a in range(len(counts))]
    operands, words = [], []
    for v in values:
        axes = [a for a, n in enumerate(v.shape) if n != 1 or counts[a] == 1]
        operands.append(v.reshape([v.shape[a] for a in axes]))
        words.append("".join(letters[a] for a in axes))
    out = [a for a in kept if any(letters[a] in w for w in words)]
    result = torch.einsum(f"{','.join(words)}->{''.join(letters[a] for a in out)}", *operands)
    return result.reshape([counts[a] if a in out else 1 for a in range(len(counts))])


def pieces(e: Einsum, frame: Frame) -> list[Frame]:
    """Pieces of a frame that is too large, along its longest plain output rank."""
    if math.prod(frame.shape()) <= CHUNK:
        return []
    plain = [i.name for i in e.out.index if isinstance(i, Rank)]
    long = [r for r in plain if len(frame.coordinates[r]) > 1]
    if len(plain) != len(e.out.index) or len(set(plain)) != len(plain) or not long:
        return []
    rank = max(long, key=lambda r: len(frame.coordinates[r]))
    whole = frame.coordinates[rank]
    pieces = whole.tensor_split(min(len(whole), -(-math.prod(frame.shape()) // CHUNK)))
    return [
        Frame(frame.ranks, {**frame.coordinates, rank: p}, frame.extents, frame.tensors)
        for p in pieces
    ]


def map_and_fold(e: Einsum, frame: Frame, mask: Tensor | None) -> Points:
    """Map the expression over the frame and fold the ranks that the output does not carry."""
    inner = frame if mask is None else frame.restricted(mask)
    values = evaluate(e.expr, inner, outermost=True)
    touched = mask
    for present in inner.present:
        touched = present if touched is None else touched & present
    listed = dict(e.reduce)
    folded = [r for r in frame.ranks if r not in output_ranks(e)]
    counts = dict(zip(frame.ranks, frame.shape(), strict=True))
    for rank in [*(r for r in folded if r not in listed), *(r for r in listed if r in folded)]:
        values, touched = _fold(
            values, touched, frame.axis(rank), counts[rank], listed.get(rank, "add")
        )
    return Points(values, touched)


def _fold(
    values: Tensor, touched: Tensor | None, axis: int, count: int, op: str
) -> tuple[Tensor, Tensor | None]:
    """Fold one rank of ``count`` points; a point counts where it is touched."""
    shape = list(values.shape)
    if touched is not None:
        shape = broadcast_shape(values.shape, touched.shape)
        values = torch.where(touched, real(values), IDENTITY[op])
        wide = list(touched.shape)
        wide[axis] = count
        touched = touched.expand(wide).any(axis, keepdim=True)
    shape[axis] = count
    values = values.expand(shape)
    if count == 0:  # nothing lands anywhere
        shape[axis] = 1
        nothing = torch.zeros(shape, dtype=torch.bool, device=values.device)
        return torch.full_like(nothing, IDENTITY[op], dtype=torch.float64), nothing
    return _REDUCTIONS[op](values, axis), touched


_REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "add": lambda v, axis: real(v).sum(axis, keepdim=True),
    "mul": lambda v, axis: real(v).prod(axis, keepdim=True),
    "max": lambda v, axis: real(v).amax(axis, keepdim=True),
    "min": lambda v, axis: real(v).amin(axis, keepdim=True),
    "or": lambda v, axis: truth(v).any(axis, keepdim=True),
    "and": lambda v, axis: truth(v).all(axis, keepdim=True),
}
