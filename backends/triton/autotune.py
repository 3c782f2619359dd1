"""Tuning: a small space of schedules, timed once, remembered on disk.

The space is the default schedule and its neighbours in tile sides, warps and stages; what cannot
fit a processor is left out before anything is compiled.  Where keys are cut into parts, a few
numbers of parts are tried first, and the other choices at the best of them.  Results are kept by
source, class of shapes, type, device and versions, so that one length tunes all of its class.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

from attn_rewrite import knobs
from attn_rewrite.backends.triton.build import write_whole
from attn_rewrite.backends.triton.choose import accumulators, score_products
from attn_rewrite.backends.triton.program import Program
from attn_rewrite.backends.triton.schedule import Schedule, from_text, padded_side, to_text
from attn_rewrite.errors import ToolError

Timer = Callable[[Schedule], float]
Propose = Callable[[Schedule], Iterable[Schedule]]
MOST = 24  # schedules that are timed for one result
_WAVES = (1, 2, 4, 8)  # programs for each processor
_REGISTERS = 255  # a thread has no more
_SHARED = 227 * 1024  # bytes one block can take on sm_90; smaller parts fail to launch and drop out


@dataclass(frozen=True)
class Pressure:
    """What a program holds in registers: accumulators as wide as a head, and tiles of scores.

    A forward pass has one of each, the gradients of keys and values two.
    """

    accumulators: int = 1
    scores: int = 1


def pressure_of(program: Program) -> Pressure:
    """The pressure of the pass of ``program`` that has most of it."""
    return Pressure(max(1, accumulators(program)), max(1, score_products(program)))


def space(
    schedule: Schedule,
    lanes: Mapping[str, int],
    item_bytes: int,
    pressure: Pressure | None = None,
    rows: int | None = None,
) -> Iterator[Schedule]:
    """The schedules worth timing: at most `MOST`, the given one first.

    ``rows`` fixes the side of blocks of rows, as few queries do.
    """
    seen = {schedule}
    yield schedule
    held = pressure or Pressure()
    sides: tuple[int, ...] = (32, 64, 128) if schedule.block_rows < 64 else (64, 128)
    if rows is not None:
        sides = (rows,)
    for side, along, warps, stages in product(sides, (32, 64, 128), (4, 8), (2, 3)):
        new = schedule.with_(block_rows=side, block_along=along, warps=warps, stages=stages)
        if new not in seen and _plausible(new, lanes, item_bytes, held) and len(seen) < MOST:
            seen.add(new)
            yield new


def _plausible(
    schedule: Schedule, lanes: Mapping[str, int], item_bytes: int, held: Pressure
) -> bool:
    """By counting: accumulators and scores within the registers, tiles within shared memory."""
    width = max((padded_side(n) for n in lanes.values()), default=64)
    threads = 32 * schedule.warps
    row = held.accumulators * width + 2 * held.scores * schedule.block_along
    words = schedule.block_rows * row / threads
    tiles = (2 * schedule.block_along * schedule.stages + schedule.block_rows) * width * item_bytes
    return words <= _REGISTERS - 32 and tiles <= _SHARED


def parts_space(
    schedule: Schedule, programs: int, tiles: int, processors: int
) -> Iterator[Schedule]:
    """``schedule`` with the numbers of parts worth timing: at most four.

    ``programs`` (batch entries x key heads x blocks of queries) run for each part; all parts give
    each of a GPU's ``processors`` one, two, four or eight.  A part has two of the ``tiles`` at
    least.
    """
    most = max(1, tiles // 2)
    wanted = (-(-waves * processors // max(programs, 1)) for waves in _WAVES)
    for parts in dict.fromkeys(min(most, n) for n in wanted):
        yield schedule.with_(parts=parts)


def join_space(schedule: Schedule, lanes: Mapping[str, int], rows: int) -> Iterator[Schedule]:
    """The schedules worth timing of a kernel that folds the states of ``rows`` rows: at most 12."""
    width = max((padded_side(n) for n in lanes.values()), default=16)
    for side, warps in product((16, 32, 64), (1, 2, 4, 8)):
        words = side * width / (32 * warps)
        if side <= padded_side(rows) and words <= _REGISTERS - 32:
            yield schedule.with_(block_rows=side, warps=warps)


def shape_class(extents: Mapping[str, int]) -> str:
    """Lengths by their power of two, other extents as they are."""
    parts = []
    for rank, extent in sorted(extents.items()):
        long = rank in ("q", "kv") and extent > 16
        parts.append(f"{rank}{'~' if long else ''}{_power(extent) if long else extent}")
    return ",".join(parts)


def _power(extent: int) -> int:
    return 1 << max(0, math.ceil(math.log2(max(extent, 1))))


def cache_key(program: Program, extents: Mapping[str, int], dtype: str, device: str) -> str:
    """A digest of everything a result depends on: the program stands for its source."""
    import torch
    import triton

    parts = [str(program.cascade), str(program.roles), shape_class(extents), dtype, device,
             str(torch.__version__), str(triton.__version__)]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _path(key: str) -> Path:
    return knobs.cache_directory() / "triton-tuned" / f"{key}.json"


@lru_cache(maxsize=1024)
def remembered(key: str) -> Schedule | None:
    """The schedule found earlier, if any; a file that cannot be read counts as none."""
    try:
        return from_text(json.loads(_path(key).read_text("utf-8"))["schedule"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(key: str, schedule: Schedule, milliseconds: float) -> None:
    """Keep a result; no reader sees it half written.  `ToolError` where the disk refuses."""
    path = _path(key)
    text = json.dumps({"schedule": to_text(schedule), "milliseconds": milliseconds})
    try:
        write_whole(path, text)
        remembered.cache_clear()
    except OSError as error:
        raise ToolError(
            f"the tuned schedule cannot be written to {path}: {error.strerror or error}; point "
            f"{knobs.CACHE} at a writable folder", stage="autotune",
        ) from error  # fmt: skip


def tuned(
    key: str,
    schedule: Schedule,
    lanes: Mapping[str, int],
    item_bytes: int,
    timer: Timer,
    pressure: Pressure | None = None,
) -> Schedule:
    """The fastest schedule of the space, from disk or timed now with ``timer`` (milliseconds).

    ``timer`` gives infinity for a schedule that does not run.  The default is returned where none
    does.
    """

    def near(best: Schedule) -> Iterator[Schedule]:
        return space(best, lanes, item_bytes, pressure)

    return searched(key, schedule, [near], timer)


def searched(key: str, schedule: Schedule, proposals: Sequence[Propose], timer: Timer) -> Schedule:
    """As `tuned`, with the neighbours that each of ``proposals`` sees in the fastest so far.

    At most `MOST` are timed, ``schedule`` first.
    """
    known = remembered(key)
    if known is not None:
        return known
    times = {schedule: timer(schedule)}
    for propose in proposals:
        for new in propose(min(times, key=times.__getitem__)):
            if new not in times and len(times) < MOST:
                times[new] = timer(new)
    best = min(times, key=times.__getitem__)
    if math.isfinite(times[best]):
        remember(key, best, times[best])
        return best
    return schedule
