"""How a cascade is run: tile sides, warps, and what the source of its kernel provides for.

A `Schedule` is a value: the same cascade and schedule give the same source text.  Lengths are not
part of it, so one kernel serves every length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from attn_rewrite.cascade.ir import TensorDecl

# How tiles that the guard empties are left out.
SKIPPING = ("none", "bounds", "lists")
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class Schedule:
    """Sizes and choices of one kernel.

    ``block_rows`` x ``block_along`` scores are a tile (powers of two, at least 16).  ``skipping``
    is ``"none"``, ``"bounds"`` (loop bounds in closed form) or ``"lists"`` (lists of blocks).
    ``pack`` query heads of one key head share the rows of a block.  ``precision`` is that of
    products of float32 operands.  ``split`` cuts the traversed rank over programs that write
    partial states; ``varlen`` reads sequences of different lengths laid end to end; ``paged``
    reads keys and values through a table of pages.  ``random`` names the input that Philox makes;
    values of the inputs in ``widen`` are stored in 8 bits and multiplied in float16.
    """

    block_rows: int = 64
    block_along: int = 64
    warps: int = 4
    stages: int = 2
    skipping: str = "none"
    pack: int = 1
    precision: str = "ieee"
    split: bool = False
    parts: int = 0
    varlen: bool = False
    paged: bool = False
    random: str | None = None
    widen: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_along"):
            side = getattr(self, name)
            if side < 16 or side & (side - 1):
                raise ValueError(f"{name} is {side}; expected a power of two of at least 16")
        if self.skipping not in SKIPPING:
            raise ValueError(f"skipping is {self.skipping!r}; expected one of {SKIPPING}")
        if self.skipping == "lists" and self.block_rows % self.pack:
            raise ValueError(
                f"blocks of {self.block_rows} rows hold no whole number of positions of "
                f"{self.pack} packed heads; expected a divisor where tiles are skipped by lists"
            )
        if self.parts < 0:
            raise ValueError(f"parts is {self.parts}; expected 0 or a number of parts")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; expected one of {PRECISIONS}")

    def with_(self, **changes: object) -> Schedule:
        """The same schedule but for ``changes``."""
        return replace(self, **changes)  # type: ignore[arg-type]


def padded_side(extent: int, least: int = 16) -> int:
    """The side of a tile that holds ``extent`` lanes: a power of two, at least ``least``."""
    return max(least, 1 << (extent - 1).bit_length())


def least_side(schedule: Schedule, inputs: Iterable[TensorDecl]) -> int:
    """The fewest terms of a product: tensor cores take 16, and 32 where numbers have 8 bits."""
    return 32 if schedule.widen or any(t.dtype in _NARROW for t in inputs) else 16


@dataclass(frozen=True)
class Device:
    """What a default depends on: ``cuda`` or ``hip``, and its architecture."""

    backend: str = "cuda"
    arch: int | str = 90


_NARROW = frozenset({"i8", "i4", "f8e4m3", "f8e5m2"})
_LARGE = (90, 100, 103)  # products of matrices read shared memory, and not registers


def default_schedule(
    lanes: Mapping[str, int], item_bytes: int, device: Device | None = None
) -> Schedule:
    """Tile sides that fit registers and shared memory without tuning.

    ``lanes`` are the extents of the head dimensions, ``item_bytes`` the size of an operand element.
    The accumulator (rows x value lanes, float32) and the scores share the register file, and
    ``stages`` tiles of keys and values the shared memory, so both shrink with the head dimension.
    """
    device = device or Device()
    width = max((padded_side(n) for n in lanes.values()), default=64)
    cuda = device.backend == "cuda"
    if item_bytes > 2:  # products of float32 run on the general units, operand by operand
        if width > 128:
            return _sides(32, 16, 8, 1)
        return _sides(64, 32, 8, 2) if width <= 64 else _sides(64, 16, 8, 2)
    if width > 128:
        # On sm_100 a thread of two warp groups has half the registers.
        if not cuda:
            return _sides(64, 32, 4, 1)
        return _sides(64, 32, 4 if device.arch in (100, 103) else 8, 2)
    if not cuda:
        return _sides(128, 64 if width <= 64 else 32, 4, 2)
    padded = any(n != padded_side(n) for n in lanes.values())
    uneven = any(n % 16 for n in lanes.values())  # rows of such tiles are not aligned
    # Masks of the lanes beyond the last one take registers.
    if width > 64 and uneven:
        return _sides(128, 32, 8, 3) if device.arch in _LARGE else _sides(64, 32, 8, 2)
    if width > 64 and padded and device.arch not in _LARGE:
        return _sides(128, 32, 8, 3)
    # On sm_100 a third stage takes registers that bounds of a mask need (8 bytes were spilled).
    return _sides(128, 64, 8, 2 if device.arch in (100, 103) else 3)


def _sides(rows: int, along: int, warps: int, stages: int) -> Schedule:
    return Schedule(block_rows=rows, block_along=along, warps=warps, stages=stages)


def to_text(schedule: Schedule) -> str:
    """The schedule as JSON, without fields that have their defaults."""
    plain = Schedule()
    fields = {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in asdict(schedule).items()
        if value != getattr(plain, name)
    }
    return json.dumps(fields, sort_keys=True)


def from_text(text: str) -> Schedule:
    """The schedule `to_text` wrote."""
    fields = json.loads(text)
    if "widen" in fields:
        fields["widen"] = frozenset(fields["widen"])
    return Schedule(**fields)
