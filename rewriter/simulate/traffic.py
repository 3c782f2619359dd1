"""DRAM traffic of one attention on each design, in bytes.

A head is cut into ``keys`` x ``queries`` tiles.  The one-pass designs keep the state of a block of
query rows in the buffer and read all keys and values once per block.  FLAT keeps whole rows of
scores, and what does not fit of them is spilled.

Sources: FuseMax (MICRO 2024), section V; buffer accounting and FLAT's tuned mappings from the
artifact (github.com/FPSG-UIUC/micro24-fusemax-artifact), checked on all its published rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from attn_rewrite.simulate.accelerator import Accelerator
from attn_rewrite.simulate.designs import Design
from attn_rewrite.simulate.workload import Workload

# FLAT's tuner never keeps more rows of scores than this, unless a whole head fits.
_FLAT_ROWS = 1024
# Each of QK and A written and read, SN written and read twice: moves per spilled score.
_FLAT_SPILL_MOVES = 7


@dataclass(frozen=True)
class Tiles:
    """How a workload falls into square tiles: ``keys`` by ``queries`` tiles per head."""

    keys: int
    queries: int
    heads: int

    @property
    def count(self) -> int:
        """Tiles of all heads."""
        return self.keys * self.queries * self.heads


def tiles_of(workload: Workload, hardware: Accelerator) -> Tiles:
    """Tiles of ``workload``; lengths are rounded up to whole tiles."""
    w = hardware.array
    return Tiles(math.ceil(workload.kv_len / w), math.ceil(workload.q_len / w), workload.rows)


def dram_traffic(workload: Workload, design: Design) -> tuple[int, ...]:
    """Bytes moved: one number for a fused design, one per phase (QK, softmax, AV) otherwise.

    Raises:
        ValueError: the buffer does not hold one row of tiles.
    """
    hardware = design.hardware
    scale = hardware.value_bytes * workload.rows
    if not design.fused:
        return tuple(scale * n for n in _unfused(workload))
    if design.cascade == "three-pass":
        return (round(scale * _flat(workload, hardware)),)
    return (scale * _one_pass(workload, design),)


def _unfused(w: Workload) -> tuple[int, int, int]:
    scores = w.kv_len * w.q_len
    queries_keys = (w.q_len + w.kv_len) * w.d_qk
    return scores + queries_keys, 2 * scores, scores + (w.q_len + w.kv_len) * w.d_v


def _one_pass(w: Workload, design: Design) -> int:
    tiles = tiles_of(w, design.hardware)
    blocks = tiles.queries // block_tiles(w, design)
    width = w.d_qk + w.d_v
    return w.q_len * width + blocks * w.kv_len * width


def block_tiles(w: Workload, design: Design) -> int:
    """Tiles of queries whose running state (Q, maximum, sum, output) stays in the buffer.

    The mapping has perfect factors only: the largest divisor of the number of query tiles.

    Raises:
        ValueError: not even one tile of queries fits.
    """
    hardware = design.hardware
    streamed, state = _buffered(w, design)
    fits = (hardware.buffer - streamed) // state
    if fits < 1:
        raise ValueError(
            f"{design.name}: a buffer of {hardware.buffer} bytes does not hold one tile of "
            f"{hardware.array} queries of {w.name}, which takes {streamed + state} bytes"
        )
    queries = tiles_of(w, hardware).queries
    return next(n for n in range(min(fits, queries), 0, -1) if queries % n == 0)


def minimum_buffer(w: Workload, design: Design) -> int:
    """Bytes of buffer with which ``design`` can run at all (one tile of queries)."""
    return sum(_buffered(w, design)) if design.cascade == "one-pass" else 1


def _buffered(w: Workload, design: Design) -> tuple[int, int]:
    """Bytes of one streamed tile of keys and values, and of the state of one tile of queries."""
    tile_row = design.hardware.value_bytes * design.hardware.array
    state = w.d_qk + w.d_v + 2 + design.scores_on_chip * design.hardware.array
    return tile_row * (w.d_qk + w.d_v), tile_row * state


def _flat(w: Workload, hardware: Accelerator) -> Fraction:
    """Elements moved per head."""
    size = hardware.array
    tiles = tiles_of(w, hardware)
    scores, passes = w.kv_len * w.q_len, tiles.queries
    rows = flat_rows(w, hardware)
    outputs = w.q_len * w.d_v
    if rows is None:
        blocks = math.ceil(w.q_len / _FLAT_ROWS)
        kept = w.q_len * w.d_qk + blocks * w.kv_len * (w.d_qk + w.d_v)
        return Fraction(4 * scores + kept + outputs)
    # A tuner's choice: wide heads keep one operand, narrow heads stream all of them.
    wide, whole = w.d_qk > hardware.array // 4, rows >= w.q_len
    spilled = _flat_spill(w, hardware, rows)
    per_tile = tiles.keys * tiles.queries * size
    keys = Fraction(per_tile * w.d_qk)
    queries = _resident(w.q_len * w.d_qk, per_tile * w.d_qk, wide and not whole, spilled)
    values = _resident(w.kv_len * w.d_v, passes * w.kv_len * w.d_v, wide and whole, spilled)
    return keys + queries + values + outputs + _FLAT_SPILL_MOVES * spilled * scores


def _resident(once: int, streamed: int, kept: bool, spilled: Fraction) -> Fraction:
    """Elements read of an operand that is streamed, or kept but for its spilled fraction."""
    return once * (1 - spilled) + streamed * spilled if kept else Fraction(streamed)


def flat_rows(w: Workload, hardware: Accelerator) -> int | None:
    """Rows of scores FLAT keeps: all of a head, a power of two, or None if not even one tile."""
    row = w.kv_len * hardware.value_bytes
    if w.q_len * row <= hardware.buffer:
        return w.q_len
    fits = hardware.buffer // row
    if fits < hardware.array:
        return None
    return min(_FLAT_ROWS, 1 << (fits.bit_length() - 1))


def _flat_spill(w: Workload, hardware: Accelerator, rows: int) -> Fraction:
    """Fraction of the scores beyond the buffer, which also double-buffers the operands."""
    tile, size = hardware.array, hardware.value_bytes
    wide, whole = w.d_qk > hardware.array // 4, rows >= w.q_len
    queries = rows if wide and not whole else tile
    values = w.kv_len if wide and whole else tile
    operands = (queries + tile) * w.d_qk + (values + tile) * w.d_v
    need = size * (rows * w.kv_len + 2 * operands)
    return max(Fraction(0), 1 - Fraction(hardware.buffer, need))
