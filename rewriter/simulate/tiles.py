"""Tiles that neighborhood attention visits, and the bounds that follow.

Query tiles and key tiles are boxes of the grid; on each axis a query tile visits the key tiles
between the start of its first query's window and the end of its last one's, so all counts are
products over axes.  Source: Hassani et al. 2025 (Generalized Neighborhood Attention, 2504.16922),
section 4, whose simulator this is made after: the bound is the dense number of key tiles over the
number that the worst query tile visits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_rewrite.errors import PolicyError

Ints = npt.NDArray[np.int64]
# Tile areas (query, key) and the number of windows that `search` tries.
_AREAS = ((64, 64), (64, 128), (128, 128), (256, 128))
_MOST_WINDOWS = 24


@dataclass(frozen=True)
class Case:
    """One launch: the grid, the window per axis, and the tiles; all in tokens per axis."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    tile_q: tuple[int, ...]
    tile_kv: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    def __post_init__(self) -> None:
        counts = {len(v) for v in (self.grid, self.window, self.stride, self.tile_q, self.tile_kv)}
        if counts != {len(self.grid)} or not 1 <= len(self.grid) <= 3:
            raise PolicyError("grid, window, stride and tiles need one number per axis, 1 to 3")
        for axis, (x, w, s, d) in enumerate(
            zip(self.grid, self.window, self.stride, self.dilation, strict=True)
        ):
            if min(x, w, s, d, self.tile_q[axis], self.tile_kv[axis]) < 1:
                raise PolicyError(f"axis {axis}: sizes are at least 1")
            if w * d > x or s > w:
                raise PolicyError(
                    f"axis {axis}: window {w} with stride {s} and dilation {d} does not fit {x}; "
                    "stride <= window and window x dilation <= grid"
                )


@dataclass(frozen=True)
class Axis:
    """Counts of one axis: key tiles visited by each query tile, how many are full, and pairs."""

    visited: Ints
    full: Ints
    dense: int
    pairs: int


@dataclass(frozen=True)
class Result:
    """Visited tiles of a `Case` and what they bound."""

    case: Case
    axes: tuple[Axis, ...]
    share: float | None = None

    @property
    def visited_max(self) -> int:
        """Key tiles of the worst query tile."""
        return math.prod(int(a.visited.max()) for a in self.axes)

    @property
    def visited_total(self) -> int:
        """Key tiles over all query tiles."""
        return math.prod(int(a.visited.sum()) for a in self.axes)

    @property
    def full_total(self) -> int:
        """Visited tiles without a masked pair."""
        return math.prod(int(a.full.sum()) for a in self.axes)

    @property
    def dense(self) -> int:
        """Key tiles of dense attention."""
        return math.prod(a.dense for a in self.axes)

    def to_json(self) -> dict[str, Any]:
        """The numbers, and the case they are of."""
        mean = self.visited_total / math.prod(len(a.visited) for a in self.axes)
        bound = self.dense / self.visited_max
        pairs = math.prod(a.pairs for a in self.axes)
        return {
            "grid": list(self.case.grid),
            "window": list(self.case.window),
            "stride": list(self.case.stride),
            "dilation": list(self.case.dilation),
            "causal": list(self.case.causal),
            "tile_q": list(self.case.tile_q),
            "tile_kv": list(self.case.tile_kv),
            "visited_per_axis": [int(a.visited.max()) for a in self.axes],
            "visited_max": self.visited_max,
            "visited_mean": mean,
            "visited_total": self.visited_total,
            "full_total": self.full_total,
            "dense": self.dense,
            "bound_max": bound,
            "bound_mean": self.dense / mean,
            "flop_bound": math.prod(self.case.grid) ** 2 / pairs,
            "full_fraction": self.full_total / self.visited_total,
            "fully_block_sparse": self.full_total == self.visited_total,
            "end_to_end_bound": None if self.share is None else amdahl(self.share, bound),
        }


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of the whole when a ``share`` of the time becomes ``speedup`` times faster."""
    return 1.0 / ((1.0 - share) + share / speedup)


def simulate(case: Case, share: float | None = None) -> Result:
    """Count the tiles of ``case``; ``share`` is the part of run time spent in attention."""
    if share is not None and not 0 <= share <= 1:
        raise PolicyError(f"the share of attention is {share}; expected 0 to 1")
    axes = (_axis(case, axis) for axis in range(len(case.grid)))
    return Result(case, tuple(axes), share)


def windows(length: int, window: int, stride: int, causal: bool) -> tuple[Ints, Ints]:
    """First key and the one after the last, for each query of an axis without dilation.

    ``window`` is at most ``length``; see the source, section 3.
    """
    i = np.arange(length, dtype=np.int64)
    if causal:
        leader = np.minimum(i // stride * stride + stride - 1, length - 1)
        return np.maximum(leader - window + 1, 0), i + 1
    leader = np.minimum(i // stride * stride + stride // 2, length - 1)
    start = np.clip(leader - window // 2, 0, length - window)
    return start, start + window


def _axis(case: Case, axis: int) -> Axis:
    return _line(
        case.grid[axis], case.window[axis], case.stride[axis], case.dilation[axis],
        case.causal[axis], case.tile_q[axis], case.tile_kv[axis],
    )  # fmt: skip


@lru_cache(maxsize=8192)  # a search asks for the same axes again and again
def _line(
    length: int, window: int, stride: int, dilation: int, causal: bool, tile_q: int, tile_kv: int
) -> Axis:
    """Dilation groups of an axis are attentions of their own, one after the other."""
    visited, full, pairs = [], [], 0
    for group in range(dilation):
        size = len(range(group, length, dilation))
        start, end = windows(size, window, stride, causal)
        pairs += int((end - start).sum())
        first = np.arange(0, size, tile_q)
        last = np.minimum(first + tile_q, size) - 1
        visited.append(-(-end[last] // tile_kv) - start[first] // tile_kv)
        # Full: after the last query's start and before the first one's end, cut at the border.
        low = -(-start[last] // tile_kv)
        high = np.where(end[first] == size, -(-size // tile_kv), end[first] // tile_kv)
        full.append(np.maximum(high - low, 0))
    dense = -(-length // tile_kv)
    return Axis(np.concatenate(visited), np.concatenate(full), dense, pairs)


def search(
    grid: tuple[int, ...],
    *,
    window: tuple[int, ...] | None = None,
    sparsity: float | None = None,
    causal: tuple[bool, ...],
    share: float | None = None,
    count: int = 10,
) -> list[Result]:
    """The strides and tiles with the best bound, for a window or for the windows of a sparsity.

    A larger stride is another approximation of the model, so of equal bounds the one with the
    smaller strides comes first.  ``sparsity`` is the share of pairs left out; the windows most like
    the grid in shape, within a twentieth of the density, are tried.
    """
    if (window is None) == (sparsity is None):
        raise PolicyError("search needs either a window or a sparsity")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise PolicyError(f"the sparsity is {sparsity}; expected 0 to less than 1")
    found: list[Result] = []
    for tile_q, tile_kv in _tile_pairs(grid):
        wanted = [window] if window is not None else _windows_of(grid, tile_kv, sparsity or 0.0)
        for one in wanted:
            base = Case(grid, one, (1,) * len(grid), tile_q, tile_kv, (1,) * len(grid), causal)
            found.append(simulate(_best_stride(base), share))
    found.sort(key=lambda r: (-r.dense / r.visited_max, -r.full_total, math.prod(r.case.stride)))
    return found[:count]


def _best_stride(case: Case) -> Case:
    """The stride with the fewest tiles on each axis (axes are independent); the smallest such."""
    chosen = []
    for axis, window in enumerate(case.window):
        options = sorted({1, window, *(n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n <= window)})

        def tiles(stride: int, axis: int = axis) -> tuple[int, int, int]:
            strides = tuple(stride if a == axis else s for a, s in enumerate(case.stride))
            counts = _axis(replace(case, stride=strides), axis)
            return int(counts.visited.max()), -int(counts.full.sum()), stride

        chosen.append(min(options, key=tiles))
    return replace(case, stride=tuple(chosen))


def _tile_pairs(grid: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for area_q, area_kv in _AREAS:
        yield from itertools.product(_boxes(area_q, grid), _boxes(area_kv, grid))


def _boxes(area: int, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Boxes of ``area`` tokens with sides that are powers of two and within the grid."""
    sides = [[1 << n for n in range(area.bit_length()) if 1 << n <= size] for size in grid]
    boxes = [box for box in itertools.product(*sides) if math.prod(box) == area]
    # Near-cubes first: long thin tiles touch more windows.
    boxes.sort(key=lambda box: max(box) / min(box))
    return boxes[:8]


def _windows_of(
    grid: tuple[int, ...], tile: tuple[int, ...], sparsity: float
) -> list[tuple[int, ...]]:
    """Windows of whole key tiles whose density is within a twentieth of what is asked."""
    density = 1.0 - sparsity
    sides = [sorted({*range(t, x + 1, t), x}) for x, t in zip(grid, tile, strict=True)]
    fits = []
    for window in itertools.product(*sides):
        share = math.prod(window) / math.prod(grid)
        if abs(share - density) <= density / 20:
            shape = [w / x for w, x in zip(window, grid, strict=True)]
            fits.append((max(shape) / min(shape), window))
    fits.sort()
    return [window for _, window in fits[:_MOST_WINDOWS]]
