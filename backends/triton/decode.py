"""Decoding: few queries over a long cache, cut into parts that run side by side and are merged.

Each part runs the *partial* cascade of the fusion (states instead of outputs); a second kernel
folds the states with the *merge* cascade and ends with the *finish* cascade.  Both are emitted from
the cascades that `fuse_reductions` proves; neither knows which attention it is.

Keys and values lie in plain tensors, or in pages: ``K [pages, hkv, page, d]`` with a table
``pages [b, n]`` (int32) and ``lengths [b]`` (int32).  Pages also hold any other input with a value
for each key of each batch entry, as the scales of an 8-bit cache: ``[pages, hkv, page]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.triton.choose import unlisted
from attn_rewrite.backends.triton.emit import Source
from attn_rewrite.backends.triton.frame import lies_in_pages
from attn_rewrite.backends.triton.launch import (
    Call,
    extents_of,
    launch,
    result_dtype,
    without_gradients,
)
from attn_rewrite.backends.triton.packed import extents_by_rank
from attn_rewrite.backends.triton.prepare import (
    default_of,
    emitted,
    lanes_of,
    tuned_for,
    widened,
    with_lse,
)
from attn_rewrite.backends.triton.program import Program, read_program
from attn_rewrite.backends.triton.same import Same
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.cascade.expr import Const, Expr, Extent, Rank, Read, transform
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, Statement, TensorDecl
from attn_rewrite.errors import LowerError
from attn_rewrite.passes.cascade import Fusion, fuse_reductions
from attn_rewrite.site import Refusal

SPLIT = "split"
# Programs that keep a GPU busy (two for each of the 132 processors of an H100), and the fewest
# tiles that are worth a part.
_PROGRAMS = 264
_LEAST_TILES = 4
_FEW_QUERIES, _TYPICAL_TILE = 16, 64
# The kernel that folds the parts has a program for each 16 queries of a head.
JOIN = Schedule(block_rows=16, block_along=16)


@dataclass(frozen=True)
class SplitForm:
    """Programs of a split traversal: of one part, and of the joined states."""

    partial: Program
    joined: Program


@dataclass(frozen=True, eq=False)
class Pages:
    """A cache in pages: ``table [b, n]`` of page numbers, ``lengths [b]``, both int32."""

    table: Tensor
    lengths: Tensor


def split_form(cascade: Cascade) -> SplitForm:
    """The split form of an attention, with log-sum-exp; `LowerError` where it carries no state."""
    return _split_form(Same(cascade))


@lru_cache(maxsize=128)
def _split_form(same: Same[Cascade]) -> SplitForm:
    cascade = same.value
    found = fuse_reductions(with_lse(cascade), "kv")
    if not isinstance(found, Fusion) or found.partial is None:
        raise LowerError(
            f"cascade {cascade.name} cannot be split along its keys: it has no states that merge"
        )
    return SplitForm(_read(found.partial, "kv"), _read(joined(found), SPLIT))


def _read(cascade: Cascade, along: str) -> Program:
    program = read_program(cascade, "q", along)
    if isinstance(program, Refusal):
        raise LowerError(program.reason, [program])
    return program


def joined(fusion: Fusion) -> Cascade:
    """From states ``X[split, ...]`` of all parts to the outputs, by the merge rule of the fusion.

    The parts are folded one after the other: the state so far is the ``X_a`` of the merge cascade,
    the next part its ``X_b``.
    """
    partial, merge, finish = fusion.partial, fusion.merge, fusion.finish
    if partial is None or merge is None or finish is None:
        raise LowerError(f"cascade {fusion.cascade.name} carries no states to merge")
    states = partial.outputs
    shapes = {t.name.removesuffix("_a"): t for t in merge.inputs if t.name.endswith("_a")}
    rewriter = _Joiner(states)
    init = tuple(_start(s, shapes[s]) for s in states)
    known = {t.name: t for t in (*merge.inputs, *finish.inputs)}
    others = tuple(t for n, t in known.items() if n.removesuffix("_a").removesuffix("_b") not in
                   states)  # fmt: skip
    gone = {p for r in partial.ranks for p in (r.parts and (r.name, *r.parts))}
    body = tuple(rewriter.einsum(e, Rank(SPLIT) + 1) for e in _einsums(merge.body))
    last = tuple(rewriter.einsum(e, Extent(SPLIT)) for e in _einsums(finish.body))
    return Cascade(
        f"{partial.name}-joined",
        (*(r for r in partial.ranks if r.name not in gone), RankDecl(SPLIT)),
        (*(TensorDecl(s, (SPLIT, *shapes[s].ranks)) for s in states), *others),
        (Loop(SPLIT, init, body), *last),
        finish.outputs,
    )


def _einsums(body: Sequence[Statement]) -> list[Einsum]:
    return [e for e in body if isinstance(e, Einsum)]


def _start(state: str, decl: TensorDecl) -> Einsum:
    index = (Const(0), *(Rank(r) for r in decl.ranks))
    return Einsum(Read(f"R{state}", index), Const(float(decl.default)))


@dataclass(frozen=True)
class _Joiner:
    states: tuple[str, ...]

    def einsum(self, e: Einsum, place: Expr) -> Einsum:
        """An Einsum of the merge or finish cascade; merged states are read at ``place``."""

        def rule(node: Expr) -> Expr | None:
            return self._state(node, place) if isinstance(node, Read) else None

        out = e.out
        if out.tensor in self.states:
            out = Read(f"R{out.tensor}", (place, *out.index))
        return replace(e, out=out, expr=transform(e.expr, rule))

    def _state(self, read: Read, place: Expr) -> Expr | None:
        if read.tensor in self.states:
            return Read(f"R{read.tensor}", (place, *read.index))
        base, _, side = read.tensor.rpartition("_")
        if base not in self.states or side not in ("a", "b"):
            return None
        return Read(f"R{base}" if side == "a" else base, (Rank(SPLIT), *read.index))


# Running


def is_worth_splitting(inputs: Mapping[str, Tensor]) -> bool:
    """Few queries, and keys for several parts, all of known length."""
    sizes = (*inputs["Q"].shape[:3], inputs["K"].shape[2])
    if not all(isinstance(n, int) for n in sizes) or sizes[2] > _FEW_QUERIES:
        return False
    programs = sizes[0] * inputs["K"].shape[1]
    return parts_for(programs, sizes[3] // _TYPICAL_TILE) > 1


def parts_for(programs: int, tiles: int) -> int:
    """Parts that keep a GPU busy, each of a few tiles at least."""
    if tiles <= 0:
        return 1
    return max(1, min(-(-_PROGRAMS // max(programs, 1)), tiles // _LEAST_TILES))


def decode(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    *,
    pages: Pages | None = None,
    splits: int | None = None,
    schedule: Schedule | None = None,
    join: Schedule | None = None,
    wrap: bool = False,
) -> dict[str, Tensor]:
    """The outputs of an attention over a cache, and LSE [b, h, q].

    ``inputs`` by name, in the declared ranks; with ``pages`` K and V are [pages, hkv, page, d], and
    so is what else has a value for each key of each batch entry.
    ``splits``, ``schedule`` (of the parts) and ``join`` (of the kernel that folds them) are chosen
    where not given; ``wrap`` as in `launch`.  Reassociated.  Raises `LowerError` for an attention
    without states that merge, and where a gradient is asked for.
    """
    without_gradients("decode", inputs)
    form = split_form(cascade)
    lanes = lanes_of(form.partial, inputs)
    chosen = part_schedule(form.partial, inputs, pages, schedule)
    source = emitted(form.partial, chosen.with_(parts=0), lanes, "decode_part")
    sizes = extents_of(source, inputs, _sizes(inputs, pages))
    chunk, splits = _chunk(source, sizes, splits or chosen.parts)
    call = _parts(source, inputs, sizes, chunk, splits, pages)
    launch(source, call, splits, wrap=wrap)
    states = {o.name: call.tensors[o.name] for o in source.outputs}
    folding = join or tuned_for(form.joined, inputs, *join_tuning(form, inputs, pages)) or JOIN
    source, call = _join(form.joined, folding, states, inputs, {**sizes, SPLIT: splits}, lanes)
    launch(source, call, wrap=wrap)
    return {o.name: call.tensors[o.name] for o in source.outputs}


def part_schedule(
    program: Program,
    inputs: Mapping[str, Tensor],
    pages: Pages | None = None,
    schedule: Schedule | None = None,
) -> Schedule:
    """How the parts run: ``schedule``, what tuning found, or the default, for these operands."""
    chosen = schedule or tuned_for(program, inputs, *tuning(inputs, pages))
    chosen = widened(chosen or default_of(program, inputs), inputs)
    few = small(program, chosen, inputs["Q"])
    return chosen.with_(split=True, paged=pages is not None, **few)


def tuning(inputs: Mapping[str, Tensor], pages: Pages | None) -> tuple[str, dict[str, int]]:
    """What `tuning_key` needs to know of a cache beside the shapes of its tensors."""
    if pages is None:
        return "split", {}
    return "paged", {**_sizes(inputs, pages), "page": inputs["K"].shape[2]}


def join_tuning(
    form: SplitForm, inputs: Mapping[str, Tensor], pages: Pages | None
) -> tuple[str, dict[str, Any]]:
    """As `tuning` for the kernel that folds the parts: it is kept by the shapes of the cache."""
    kind, more = tuning(inputs, pages)
    return f"{kind} join", {**extents_by_rank(form.partial.cascade.inputs, inputs), **more}


def small(program: Program, schedule: Schedule, q: Tensor) -> dict[str, Any]:
    """Few rows need a low tile; positions of lists do not exist while decoding."""
    rows = q.shape[2] * schedule.pack
    side = max(16, min(schedule.block_rows, 1 << max(0, rows - 1).bit_length()))
    return {"block_rows": side, "skipping": unlisted(program, schedule)}


def _sizes(inputs: Mapping[str, Tensor], pages: Pages | None) -> dict[str, int]:
    if pages is None:
        return {}
    page = inputs["K"].shape[2]
    return {"b": inputs["Q"].shape[0], "kv": pages.table.shape[1] * page}


def programs_of(program: Program, schedule: Schedule, sizes: Mapping[str, int]) -> int:
    """Programs that run for each part."""
    programs = -(-sizes["q"] * schedule.pack // schedule.block_rows)
    for rank in program.roles.grid:
        programs *= sizes[rank] // (schedule.pack if rank == "h" else 1)
    return programs


def _chunk(source: Source, sizes: Mapping[str, int], splits: int) -> tuple[int, int]:
    """Keys of a part, a multiple of the tile side, and the number of parts."""
    side, length = source.schedule.block_along, sizes[source.program.roles.along]
    tiles = -(-length // side)
    wanted = splits or parts_for(programs_of(source.program, source.schedule, sizes), tiles)
    chunk = max(1, -(-tiles // wanted)) * side
    return chunk, max(1, -(-length // chunk))


def _parts(
    source: Source,
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    chunk: int,
    splits: int,
    pages: Pages | None,
) -> Call:
    """The launch of all parts, states allocated."""
    ranks: dict[str, Sequence[str]] = {t.name: t.ranks for t in source.program.cascade.inputs}
    special: dict[str, int] = {"chunk": chunk}
    tables: dict[str, Tensor] = {}
    if pages is not None:
        tables = {"pages": pages.table, "lengths": pages.lengths}
        roles = source.program.roles
        ranks |= {n: ("page", *r[1:]) for n, r in ranks.items() if lies_in_pages(roles, r)}
        ranks |= {"pages": ("b", "page")}
        special["PAGE"] = inputs["K"].shape[2]
    states = {}
    for o in source.outputs:
        shape = [splits, *(sizes[r] for r in o.ranks)]
        states[o.name] = torch.empty(shape, dtype=torch.float32, device=inputs["Q"].device)
        ranks[o.name] = (SPLIT, *o.ranks)
    return Call({**inputs, **tables, **states}, ranks, sizes, special)


def _join(
    program: Program,
    schedule: Schedule,
    states: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    lanes: Mapping[str, int],
) -> tuple[Source, Call]:
    """The launch that folds the states of all parts and finishes."""
    mine = {r: n for r, n in lanes.items() if r in program.roles.lanes}
    source = emitted(program, schedule, mine, "decode_join")
    declared = {t.name: t.ranks for t in program.cascade.inputs}
    operands = {n: states.get(n, inputs.get(n)) for n in declared}
    outputs = {}
    for o in source.outputs:
        wide = not set(program.roles.lanes) & set(o.ranks)
        kind = torch.float32 if wide else result_dtype(inputs.values())
        shape = [sizes[r] for r in o.ranks]
        outputs[o.name] = torch.empty(shape, dtype=kind, device=inputs["Q"].device)
        declared[o.name] = o.ranks
    tensors = {n: t for n, t in (operands | outputs).items() if t is not None}
    return source, Call(tensors, declared, sizes)
