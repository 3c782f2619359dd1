"""What a guard keeps of the squares of a score matrix, each distinct square once.

Masks of positions repeat: along the diagonal, over the frames of a video, over the rows of a grid.
A square that was evaluated once is looked up in later calls; equal squares share memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from threading import Lock
from typing import cast

import numpy as np
from torch import Tensor

from attn_rewrite.backends.torch.emit import Emitter
from attn_rewrite.backends.torch.schedule import Row, Span
from attn_rewrite.backends.torch.tiles import Job, Problem
from attn_rewrite.cascade.expr import Expr, ranks_of, tensors_of
from attn_rewrite.graph import EagerBuilder

SIDE = 128
# Distinct squares that are kept of one guard: 16 KB each.
_MOST = 64

_EAGER = EagerBuilder()


class Squares:
    """Squares of one guard at fixed extents: a value that grows as it is asked for."""

    def __init__(self) -> None:
        self.growing = Lock()
        self._rows: dict[tuple[int, Row], tuple[Tensor | None, ...]] = {}
        self._distinct: dict[tuple[tuple[int, ...], bytes], Tensor] = {}  # by shape and digest

    def of(self, head: int, row: Row) -> tuple[Tensor | None, ...] | None:
        """The squares of a row that was seen, None for those that were too many."""
        return self._rows.get((head, row))

    def add(self, head: int, row: Row, squares: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Remember the squares of a row; those that they equal, where there are any."""
        known = [self._distinct_of(square) for square in squares]
        self._rows[head, row] = tuple(known)
        return tuple(k if k is not None else s for k, s in zip(known, squares, strict=True))

    def _distinct_of(self, square: Tensor) -> Tensor | None:
        kept = np.packbits(square.contiguous().numpy()).tobytes()
        key = (tuple(square.shape), blake2b(kept, digest_size=32).digest())
        if key not in self._distinct and len(self._distinct) < _MOST:
            self._distinct[key] = square.contiguous()
        return self._distinct.get(key)


@lru_cache(maxsize=32)
def _squares(guard: Expr, extents: tuple[tuple[str, int], ...]) -> Squares:
    return Squares()


if hasattr(os, "register_at_fork"):
    # A lane that was growing them when the process forked is not there to end it.
    os.register_at_fork(after_in_child=_squares.cache_clear)


class Guard:
    """The guard of a problem over parts of its rows, as truth values."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.guard = problem, problem.form.guard
        # What depends on data or on the batch entry is evaluated in every call.
        fixed = not tensors_of(self.guard) and "b" not in ranks_of(self.guard)
        extents = tuple(sorted(problem.extents().items()))
        self.known = _squares(self.guard, extents) if fixed else None
        self.by_head = "h" in ranks_of(self.guard)

    def squares(self, batch: int, head: int, row: Row) -> tuple[Tensor, ...]:
        """What is kept of the masked columns of ``row``, in their order: [1, 1, q, n] each."""
        head = head if self.by_head else 0
        if self.known is None:
            return tuple(self._keep(batch, head, row, span) for span in self._cut(row))
        found = self.known.of(head, row)
        if found is None:
            # One lane at a time: what evaluating needs for a while is more than what is kept.
            with self.known.growing:
                every = [self._keep(batch, head, row, span) for span in self._cut(row)]
                return self.known.add(head, row, every)
        if all(square is not None for square in found):
            return cast("tuple[Tensor, ...]", found)
        spans = self._cut(row)
        return tuple(
            self._keep(batch, head, row, span) if square is None else square
            for square, span in zip(found, spans, strict=True)
        )

    def _cut(self, row: Row) -> list[Span]:
        """The keys of what is evaluated in one go, in the order of the columns."""
        found: list[Span] = []
        fixed = self.known is not None
        at = 0
        for low, high in row.keys:
            shift = low - at
            for start, stop in row.masked:
                first, last = max(start, at) + shift, min(stop, at + high - low) + shift
                if first < last:
                    edges = range(first // SIDE * SIDE + SIDE, last, SIDE) if fixed else ()
                    found += pairwise([first, *edges, last])
            at += high - low
        return found

    def _keep(self, batch: int, head: int, row: Row, keys: Span) -> Tensor:
        job = Job((batch, batch + 1), (head, head + 1), replace(row, keys=(keys,), masked=()))
        keep: Tensor = Emitter.once(_EAGER, self.problem.space(job), self.guard).truth(self.guard)
        return keep[:, :1].expand(1, 1, row.height, keys[1] - keys[0])
