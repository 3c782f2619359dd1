"""The schedule of a program where nobody gave one."""

from __future__ import annotations

from collections.abc import Mapping

from attn_rewrite.backends.triton.bounds import loop_ranges
from attn_rewrite.backends.triton.emit import groups
from attn_rewrite.backends.triton.lists import blockwise_tables
from attn_rewrite.backends.triton.program import Program, reads_of
from attn_rewrite.backends.triton.schedule import Device, Schedule, default_schedule, least_side
from attn_rewrite.backends.triton.traversal import has_bounds, integer_tensors
from attn_rewrite.cascade.cover import Cover, block_cover
from attn_rewrite.cascade.expr import Expr, Rank, Read, conjunction, conjuncts, ranks_of, walk

# Up to this many queries heads of a group are packed: rows of a block would be empty otherwise.
FEW_ROWS = 16


def choose_schedule(
    program: Program,
    lanes: Mapping[str, int],
    item_bytes: int,
    device: Device,
    extents: Mapping[str, int | None] | None = None,
    *,
    random: str | None = None,
) -> Schedule:
    """Sides by head dimension and type, skipping by what the guard allows, packing for few rows.

    ``extents`` are lengths where they are fixed.  No timing: `autotune.tuned` improves on it.
    """
    base = default_schedule(lanes, item_bytes, device)
    more = _pair_tiles(program) or score_products(program) > 1
    if more or len(program.passes()) > 1 or accumulators(program) > 1:
        base = _lower_tiles(base, accumulators(program), lanes, device)
    if least_side(base, program.cascade.inputs) > base.block_along:
        base = base.with_(block_along=32)
    skipping, pack = choose_skipping(program), _packing(program, extents or {})
    if skipping == "lists" and base.block_rows % pack:
        pack = 1  # a list is made for whole positions
    return base.with_(skipping=skipping, pack=pack, random=random, widen=_widened(program))


def _lower_tiles(
    base: Schedule, accumulators: int, lanes: Mapping[str, int], device: Device
) -> Schedule:
    """Sides where another tile of scores, or a second accumulator, wants its registers."""
    width = max(lanes.values(), default=0)
    rows, along = min(base.block_rows, 64), min(base.block_along, 32)
    if width > 128 and accumulators > 1 and device.arch != 100:  # there they lie beside registers
        rows, along = 32, along if device.backend == "cuda" else 16
    elif 64 < width <= 128 and any(n % 16 for n in lanes.values()) and device.arch == 80:
        rows = 32  # addresses of rows that are not aligned take registers
    # On sm_100 a thread of two warp groups has half the registers.
    warps = 4 if device.arch == 100 else base.warps
    return base.with_(block_rows=rows, block_along=along, stages=min(base.stages, 2), warps=warps)


def choose_skipping(program: Program) -> str:
    """Closed form where the guard has one; lists where blocks are known; else every tile runs.

    A guard of which only a part has bounds (causal, and a table of blocks) takes lists where they
    leave out more.
    """
    guards = program.guards()
    if not guards:
        return "none"
    (guard, *others) = guards
    roles = {program.roles.row, program.roles.along}
    listed = not others and roles == {"q", "kv"} and _by_position(guard)
    if has_bounds(program):
        return "lists" if listed and _lists_pay(program, guard) else "bounds"
    return "lists" if listed else "none"


def unlisted(program: Program, schedule: Schedule) -> str:
    """What a kernel does where lists cannot be made."""
    if schedule.skipping != "lists":
        return schedule.skipping
    return "bounds" if has_bounds(program) else "none"


# A length at which tiles are counted, in tiles of usual sides, and what lists must save.
_LENGTH, _SIDES, _SAVED = 2048, (128, 64), 0.2


def _lists_pay(program: Program, guard: Expr) -> bool:
    """Do the terms that loop bounds leave to the mask empty many tiles?"""
    roles = program.roles
    whole = integer_tensors(program)

    def bounds(term: Expr) -> bool:
        ranges = loop_ranges(term, roles.row, roles.along, whole)
        return bool(ranges) and all(r.exact for r in ranges)

    if bounds(guard):
        return False
    if blockwise_tables(guard):
        return True
    left = conjunction(tuple(t for t in conjuncts(guard) if bounds(t)))
    listed, bounded = (_tiles(g) for g in (guard, left))
    return listed < (1 - _SAVED) * bounded


def _tiles(guard: Expr) -> int:
    """Tiles of one head that ``guard`` leaves, at a usual length."""
    found = block_cover(
        guard, q_len=_LENGTH, kv_len=_LENGTH, block_q=_SIDES[0], block_kv=_SIDES[1], head=0,
        batch=0, extents={"h": 1, "b": 1},
    )  # fmt: skip
    return int((found != Cover.EMPTY).sum())


def _by_position(guard: Expr) -> bool:
    """Do positions, or tables of blocks, decide anything of the guard?"""
    reads = [n for n in walk(guard) if isinstance(n, Read)]
    return not reads or bool(blockwise_tables(guard)) or _has_free_term(guard)


def _has_free_term(guard: Expr) -> bool:
    terms = conjuncts(guard)
    return any(not any(isinstance(n, Read) for n in walk(t)) for t in terms)


def _packing(program: Program, extents: Mapping[str, int | None]) -> int:
    """Query heads per block: all that share a key head, where there are few queries."""
    rows = extents.get(program.roles.row)
    group = groups(program)
    if group == 1 or rows is None or rows > FEW_ROWS or program.roles.row != "q":
        return 1
    if "h" not in program.roles.grid or any("h" in ranks_of(g) for g in program.guards()):
        return 1
    return group


def _pair_tiles(program: Program) -> int:
    """Inputs read at every pair of row and traversed coordinate, or computed ones."""
    both = {program.roles.row, program.roles.along}
    found: set[Read] = set()
    inputs = {t.name for t in program.cascade.inputs}
    for step in program.steps():
        for read in reads_of(step):
            ranks = {n.name for i in read.index for n in walk(i) if isinstance(n, Rank)}
            if read.tensor in inputs and both <= ranks:
                found.add(read)
    return len(found)


def score_products(program: Program) -> int:
    """Products of matrices that make a tile of scores: two in a backward pass."""
    both, lanes = {program.roles.row, program.roles.along}, set(program.roles.lanes)
    return max(
        (
            sum(both <= s.ranks and bool(lanes & s.folds()) for s in p.steps)
            for p in program.passes()
        ),
        default=0,
    )


def accumulators(program: Program) -> int:
    """States as large as a block of rows times a head dimension."""
    lanes = set(program.roles.lanes)
    return max(
        (sum(bool(lanes & s.init.ranks) for s in p.states) for p in program.passes()), default=0
    )


def _widened(program: Program) -> frozenset[str]:
    """Values stored in 8 bits that meet computed probabilities: products run in float16."""
    return frozenset(t.name for t in program.cascade.inputs if t.dtype in ("i8", "i4"))
