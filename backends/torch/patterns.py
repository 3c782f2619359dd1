"""What a guard keeps of the squares of a score matrix, each distinct square once.

Masks of positions repeat: along the diagonal, over the frames of a video, over the rows of a grid.
A square that was evaluated once is looked up in later calls; equal squares share memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

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
_Place = tuple[int, Span, Span]  # head, queries, keys


class Squares:
    """Squares of one guard at fixed extents: a value that grows as it is asked for."""

    def __init__(self) -> None:
        self._at: dict[_Place, Tensor] = {}
        self._distinct: dict[tuple[int, bytes], Tensor] = {}  # by width and digest

    def find(self, place: _Place) -> Tensor | None:
        """The square at ``place``, if it was seen."""
        return self._at.get(place)

    def add(self, place: _Place, square: Tensor) -> Tensor:
        """Remember a square; the one it equals, if there is one."""
        kept = np.packbits(square.contiguous().numpy()).tobytes()
        key = (square.shape[-1], blake2b(kept, digest_size=32).digest())
        if key not in self._distinct and len(self._distinct) < _MOST:
            self._distinct[key] = square.contiguous()
        if key in self._distinct:
            square = self._at[place] = self._distinct[key]
        return square


@lru_cache(maxsize=32)
def _squares(guard: Expr, extents: tuple[tuple[str, int], ...]) -> Squares:
    return Squares()


class Guard:
    """The guard of a problem over parts of its rows, as truth values."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.guard = problem, problem.form.guard
        # What depends on data or on the batch entry is evaluated in every call.
        fixed = not tensors_of(self.guard) and "b" not in ranks_of(self.guard)
        extents = tuple(sorted(problem.extents().items()))
        self.known = _squares(self.guard, extents) if fixed else None
        self.by_head = "h" in ranks_of(self.guard)

    def parts(self, batch: int, head: int, row: Row) -> list[tuple[int, Tensor]]:
        """First columns of the masked parts of ``row``, and what is kept [1, 1, queries, n]."""
        found = []
        at = 0
        for low, high in row.keys:
            for start, stop in row.masked:
                first, last = max(start, at), min(stop, at + high - low)
                shift = low - at
                found += [
                    (part[0] - shift, self._keep(batch, head, row, part))
                    for part in self._cut((first + shift, last + shift))
                ]
            at += high - low
        return found

    def _cut(self, keys: Span) -> list[Span]:
        """Parts of a range of keys that are evaluated in one go."""
        if self.known is None:
            return [keys] if keys[0] < keys[1] else []
        edges = [keys[0], *range(keys[0] // SIDE * SIDE + SIDE, keys[1], SIDE), keys[1]]
        return [s for s in pairwise(edges) if s[0] < s[1]]

    def _keep(self, batch: int, head: int, row: Row, keys: Span) -> Tensor:
        place = (head if self.by_head else 0, row.queries, keys)
        found = None if self.known is None else self.known.find(place)
        if found is not None:
            return found
        job = Job((batch, batch + 1), (head, head + 1), replace(row, keys=(keys,), masked=()))
        keep = Emitter.once(_EAGER, self.problem.space(job), self.guard).truth(self.guard)
        keep = keep[:, :1].expand(1, 1, row.height, keys[1] - keys[0])
        return keep if self.known is None else self.known.add(place, keep)
