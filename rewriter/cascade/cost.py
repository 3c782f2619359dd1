"""What a cascade costs on a target: passes, live footprint, operations, bytes, and a time bound.

Two ways to run a cascade are priced.  *As written*, every Einsum is a kernel of its own that reads
and writes main memory.  *Fused*, one kernel runs the whole cascade: inputs are read and outputs
written once, and every intermediate that outlives a pass (`pass_analysis(...).live`) is kept on
chip, spilled or recomputed, whichever is fastest.  The time is bounded from below by the arithmetic
and by the memory ceiling of the target, so a cascade with fewer passes may well cost more.

Source of the pass-boundary choice: Nayak et al., "FuseMax", MICRO 2024, section III-B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy

from attn_rewrite.cascade.count import PassAnalysis, leaf_ranks, operation_counts, pass_analysis
from attn_rewrite.cascade.expr import TRUE, Call, Const, Rank, Read, ranks_of
from attn_rewrite.cascade.ir import ALIASES, Cascade, Einsum, RankDecl
from attn_rewrite.cascade.operations import WORD, EinsumCost, rank_symbol
from attn_rewrite.errors import PolicyError
from attn_rewrite.target import BYTES, Target, dtype_name

#: Query rows one unit works on at a time, and the inner extent of a split rank of unknown size.
TILE = 128
# An exponential costs what FuseMax charges for it: six dependent multiply-adds.
_EXP = 6


@dataclass(frozen=True)
class Cost:
    """Cost of one cascade on one target.

    ``passes`` over the key rank; ``live`` the intermediates that outlive a pass and ``live_bytes``
    their size per query row; ``kept`` what a fused kernel does with them (``"on chip"``,
    ``"spilled"``, ``"recomputed"``, or ``"nothing"`` where none is live).  ``flops`` counts a
    multiply-add as two and every elementwise operation as one; ``matrix_flops`` is the part in
    products.  ``dram_bytes``, ``arithmetic_s``, ``memory_s`` and ``time_s`` (the larger) are those
    of the fused kernel; ``unfused_bytes`` and ``unfused_s`` those of the cascade as written.
    """

    target: str
    dtype: str
    passes: int
    live: tuple[str, ...]
    live_bytes: int
    kept: str
    flops: float
    matrix_flops: float
    dram_bytes: float
    unfused_bytes: float
    arithmetic_s: float
    memory_s: float
    unfused_s: float

    @property
    def time_s(self) -> float:
        """Lower bound on the time of the fused kernel, seconds."""
        return max(self.arithmetic_s, self.memory_s)

    @property
    def bound(self) -> str:
        """``"arithmetic"`` or ``"memory"``: the ceiling that limits the fused kernel."""
        return "arithmetic" if self.arithmetic_s >= self.memory_s else "memory"

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``time_s`` and ``bound``."""
        plain = {**asdict(self), "live": list(self.live)}
        return {**plain, "time_s": self.time_s, "bound": self.bound}


def site_cost(
    cascade: Cascade,
    extents: Mapping[str, int],
    target: Target,
    *,
    dtype: object,
    tile_fraction: float = 1.0,
    rank: str = "kv",
    query_rank: str = "q",
) -> Cost:
    """Cost of ``cascade`` at ``extents`` (rank name or alias to size) on ``target``.

    ``tile_fraction`` is the share of (query, key) tiles that a guard leaves to be executed: it
    scales operations and bytes of everything that has both ranks.  Extents of partitions, and of
    ranks that inputs are read at through a floor division (shared key heads), are derived.

    Raises:
        PolicyError: an extent is missing or not positive, the fraction is outside [0, 1], or the
            target does not compute in ``dtype``.
        CascadeError: the cascade has no traversal order.
        ValueError: the cascade has no such rank.
    """
    if not 0 <= tile_fraction <= 1:
        raise PolicyError(f"tile fraction {tile_fraction} is not a share of tiles; use 0 to 1")
    key, query = cascade.rank(rank), cascade.rank(query_rank)
    sizes = complete_extents(cascade, extents)
    counter = _Counter(cascade, sizes, dtype_name(dtype), (query, key), tile_fraction)
    analysis = pass_analysis(cascade, key)
    einsums, costs = tuple(cascade.einsums()), operation_counts(cascade)
    work = [counter.work(c) for c in costs]
    live_bytes = sum(counter.row_bytes(t) for t in analysis.live)
    fused = _fused(counter, analysis, costs, live_bytes, target)
    alone = [
        0.0 if _is_rename(e) else counter.einsum_bytes(c)
        for e, c in zip(einsums, costs, strict=True)
    ]
    unfused = list(zip(work, alone, strict=True))
    total = _add(work)
    return Cost(
        target=target.name,
        dtype=counter.dtype,
        passes=analysis.passes,
        live=analysis.live,
        live_bytes=round(live_bytes),
        kept=fused.kept,
        flops=2 * total.macs + total.others,
        matrix_flops=2 * total.macs,
        dram_bytes=fused.moved,
        unfused_bytes=sum(b for _, b in unfused),
        arithmetic_s=_seconds(fused.work, target, counter.dtype),
        memory_s=fused.moved / target.bandwidth,
        unfused_s=sum(
            max(_seconds(w, target, counter.dtype), b / target.bandwidth) for w, b in unfused
        ),
    )


def complete_extents(cascade: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """The extent of every rank of ``cascade``, from some of them given by name or alias.

    A split rank gives its parts (the inner one `TILE` unless it says its size), a rank that is only
    reached as ``h // 4`` a quarter of ``h``, rounded up.

    Raises:
        PolicyError: an extent is missing, or not positive.
    """
    sizes = {r.name: r.size for r in cascade.ranks if r.size is not None}
    declared = {r.name for r in cascade.ranks}
    for name, size in extents.items():
        sizes[name if name in declared else ALIASES.get(name, name)] = size
    for decl in cascade.ranks:
        if decl.parts and decl.name in sizes:
            _split(decl, sizes)
    _divided(cascade, sizes)
    for name in sorted(declared):
        if sizes.get(name, 0) < 1:
            got = f"is {sizes[name]}" if name in sizes else "is missing"
            raise PolicyError(
                f"cascade {cascade.name}: the extent of rank {name} {got}; give a positive number"
            )
    return sizes


def _split(decl: RankDecl, sizes: dict[str, int]) -> None:
    """Extents of the parts of a rank: outer times inner covers the whole."""
    outer, inner = decl.parts[0], decl.parts[-1]
    whole = sizes[decl.name]
    if inner not in sizes:
        sizes[inner] = math.ceil(whole / sizes[outer]) if outer in sizes else min(TILE, whole)
    sizes.setdefault(outer, math.ceil(whole / sizes[inner]))


def _divided(cascade: Cascade, sizes: dict[str, int]) -> None:
    """Extents of ranks that inputs are read at through a floor division, or under another name."""
    ranks = {t.name: t.ranks for t in cascade.inputs}
    for read in (r for e in cascade.einsums() for r in e.reads() if r.tensor in ranks):
        for name, index in zip(ranks[read.tensor], read.index, strict=False):
            if name in sizes:
                continue
            match index:
                case Rank(other) if other in sizes:
                    sizes[name] = sizes[other]
                case Call("floordiv", (Rank(other), Const(int(by)))) if other in sizes:
                    sizes[name] = math.ceil(sizes[other] / by)


def _is_rename(einsum: Einsum) -> bool:
    """Does it give a tensor another name without touching its elements?"""
    source = einsum.expr
    plain = isinstance(source, Read) and source.index == einsum.out.index
    return plain and einsum.guard == TRUE


@dataclass(frozen=True)
class _Work:
    """Operations: multiply-adds of products, elementwise ones, and those weighted by their cost."""

    macs: float = 0.0
    others: float = 0.0
    weighted: float = 0.0

    def times(self, n: float) -> _Work:
        return _Work(self.macs * n, self.others * n, self.weighted * n)


def _add(parts: Iterable[_Work]) -> _Work:
    listed = list(parts)
    return _Work(*(sum(getattr(w, f) for w in listed) for f in ("macs", "others", "weighted")))


def _seconds(work: _Work, target: Target, dtype: str) -> float:
    """Least time of the arithmetic; elementwise work is done in float32.

    Units of their own run beside the matrix units, the same units one after the other.
    """
    matrix = 2 * work.macs / target.peak(dtype)
    if target.vector_flops is None:
        return matrix + work.weighted / target.peak("f32")
    return max(matrix, work.weighted / target.vector_flops)


class _Counter:
    """Puts numbers into the symbolic counts of one cascade."""

    def __init__(
        self,
        cascade: Cascade,
        sizes: Mapping[str, int],
        dtype: str,
        pair: tuple[str, str],
        tile_fraction: float,
    ) -> None:
        self.cascade, self.dtype, self.fraction = cascade, dtype, tile_fraction
        self.values = {rank_symbol(r): n for r, n in sizes.items()}
        self.values[WORD] = BYTES[dtype]
        self.query, self.key = (self._symbols(r) for r in pair)
        self.declared = {t.name: t for t in (*cascade.tensors, *cascade.inputs)}

    def _symbols(self, rank: str) -> frozenset[sympy.Symbol]:
        return frozenset(rank_symbol(r) for r in (rank, *leaf_ranks(self.cascade, rank)))

    def number(self, counts: sympy.Expr) -> float:
        """The value of ``counts``; terms over queries and keys happen in executed tiles only."""
        total = 0.0
        for term in sympy.Add.make_args(sympy.expand(counts)):
            pairs = term.free_symbols & self.query and term.free_symbols & self.key
            total += float(term.subs(self.values)) * (self.fraction if pairs else 1.0)
        return total

    def work(self, cost: EinsumCost) -> _Work:
        """Operations of one Einsum."""
        ops = {kind: self.number(n) for kind, n in cost.operations.items()}
        others = sum(n for kind, n in ops.items() if kind != "mac")
        return _Work(ops["mac"], others, others + (_EXP - 1) * ops["exp"])

    def einsum_bytes(self, cost: EinsumCost) -> float:
        """Bytes one Einsum reads and writes when it runs alone."""
        return self.number(cost.bytes_read + cost.bytes_written)

    def boundary_bytes(self) -> dict[str, float]:
        """Bytes of every input that is read and every output, each once."""
        used = {r.tensor for e in self.cascade.einsums() for r in e.reads()}
        names = [t.name for t in self.cascade.inputs if t.name in used]
        return {name: self.tensor_bytes(name) for name in (*names, *self.cascade.outputs)}

    def tensor_bytes(self, tensor: str) -> float:
        """Bytes of a whole tensor."""
        return self.number(sympy.Mul(*self._shape(tensor)) * self._width(tensor))

    def row_bytes(self, tensor: str) -> float:
        """Bytes of a tensor for one query of one head."""
        decl = {rank_symbol(r) for r in ("b", "h", "hkv")} | self.query
        kept = [s for s in self._shape(tensor) if s not in decl]
        return self.number(sympy.Mul(*kept) * self._width(tensor))

    def _shape(self, tensor: str) -> tuple[sympy.Symbol, ...]:
        decl = self.declared.get(tensor)
        if decl is not None and decl.ranks:
            return tuple(rank_symbol(r) for r in decl.ranks)
        producer = self.cascade.producer(tensor)
        index = producer.out.index if producer is not None else ()
        return tuple(rank_symbol(r) for i in index for r in sorted(ranks_of(i)))

    def _width(self, tensor: str) -> sympy.Expr:
        decl = self.declared.get(tensor)
        fixed = decl is not None and decl.dtype != "float"
        return sympy.Integer(BYTES.get(decl.dtype, 4)) if fixed and decl else WORD


@dataclass(frozen=True)
class _Fused:
    """One way to run the cascade as one kernel."""

    kept: str
    work: _Work
    moved: float


def _fused(
    counter: _Counter,
    analysis: PassAnalysis,
    costs: Sequence[EinsumCost],
    live_bytes: float,
    target: Target,
) -> _Fused:
    """The fastest way to carry the live intermediates over the pass boundaries."""
    work = _add(counter.work(c) for c in costs)
    boundary = counter.boundary_bytes()
    once = sum(boundary.values())
    if not analysis.live:
        return _Fused("nothing", work, once)
    if live_bytes * TILE * target.units <= target.on_chip:
        return _Fused("on chip", work, once)
    spilled = _Fused("spilled", work, once + _spill_bytes(counter, analysis))
    # Whatever a later pass needs is made again from the inputs, ancestors included.
    again = {t: passes - 1 for t, passes in analysis.tensor_passes.items()}
    repeated = _add(counter.work(c).times(again.get(c.tensor, 0)) for c in costs)
    reread = sum(n * again.get(t, 0) for t, n in boundary.items())
    recomputed = _Fused("recomputed", _add([work, repeated]), once + reread)

    def time(way: _Fused) -> float:
        memory = way.moved / target.bandwidth
        return max(_seconds(way.work, target, counter.dtype), memory)

    return min(spilled, recomputed, key=time)


def _spill_bytes(counter: _Counter, analysis: PassAnalysis) -> float:
    """Each live tensor is written once and read once in every later pass that needs it."""
    total = 0.0
    for tensor in analysis.live:
        made = analysis.pass_of.get(tensor)
        readers = {
            analysis.pass_of[e.out.tensor]
            for e in counter.cascade.einsums()
            if e.out.tensor in analysis.pass_of and tensor in (r.tensor for r in e.reads())
        }
        total += counter.tensor_bytes(tensor) * (1 + len(readers - {made}))
    return total
