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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import sympy

from attn_rewrite.cascade.count import PassAnalysis, leaf_ranks, operation_counts, pass_analysis
from attn_rewrite.cascade.expr import TRUE, Call, Const, Expr, Rank, Read, ranks_of, tensors_of
from attn_rewrite.cascade.extents import extents as solve_extents
from attn_rewrite.cascade.ir import ALIASES, Cascade, Einsum
from attn_rewrite.cascade.operations import WORD, EinsumCost, rank_symbol
from attn_rewrite.errors import PolicyError
from attn_rewrite.target import BYTES, Target, dtype_name

#: Query rows one unit works on at a time, and the inner extent of a split rank of unknown size.
TILE = 128
# An exponential costs what FuseMax charges for it: six dependent multiply-adds.
_EXP = 6
_STORED = {**BYTES, "i64": 8, "i32": 4, "bool": 1, "f8e4m3": 1, "f8e5m2": 1, "i4": 0.5}


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
    sizes = complete_extents(cascade, extents)
    ceilings = (target, dtype_name(dtype))
    counter = _Counter(cascade, sizes, (query_rank, rank), tile_fraction, ceilings)
    analysis = pass_analysis(cascade, rank)
    steps = [_Step(e, counter.work(e, c), counter.einsum_bytes(e, c)) for e, c in _paired(cascade)]
    live = tuple(t for t in analysis.live if not _is_input(cascade, t))
    fused = _fused(counter, analysis, live, steps, target)
    work = _add(s.work for s in steps)

    def alone(step: _Step) -> float:
        return max(_seconds(step.work, target), step.moved / target.bandwidth)

    return Cost(
        target=target.name,
        dtype=counter.dtype,
        passes=analysis.passes,
        live=live,
        live_bytes=counter.live_bytes(live),
        kept=fused.kept,
        flops=2 * work.macs + work.others,
        matrix_flops=2 * work.macs,
        dram_bytes=fused.moved,
        unfused_bytes=sum(s.moved for s in steps),
        arithmetic_s=_seconds(fused.work, target),
        memory_s=fused.moved / target.bandwidth,
        unfused_s=sum(alone(s) for s in steps),
    )


def _paired(cascade: Cascade) -> Iterator[tuple[Einsum, EinsumCost]]:
    return zip(cascade.einsums(), operation_counts(cascade), strict=True)


def complete_extents(cascade: Cascade, given: Mapping[str, int]) -> dict[str, int]:
    """The extent of every rank of ``cascade``, from some of them given by name or alias.

    Ranks the cascade has not are ignored.  A split rank is cut into tiles of `TILE` unless its
    parts are given; a rank only reached as ``h // 4`` is a quarter of ``h``, rounded up.

    Raises:
        PolicyError: an extent is missing, or not positive.
        CascadeError: the parts given for a split rank do not cover it.
    """
    names = {r.name for r in cascade.ranks}
    sizes = {r.name: r.size for r in cascade.ranks if r.size is not None}
    for name, size in given.items():
        own = name if name in names else ALIASES.get(name)
        if own in names:
            sizes[own] = size
    _divided(cascade, sizes)
    for decl in cascade.ranks:
        if decl.name in sizes and decl.parts and not sizes.keys() & set(decl.parts):
            sizes[decl.parts[-1]] = min(TILE, sizes[decl.name])
    _walked(cascade, sizes)
    # A rank that only tensors of the cascade have gets its extent from what is written to them.
    outside = {r for t in cascade.inputs for r in t.ranks}
    made = {r for t in cascade.tensors for r in t.ranks} - outside
    missing = names - sizes.keys() - {part for r in cascade.ranks for part in r.parts} - made
    for name in sorted(missing | {n for n, size in sizes.items() if size < 1}):
        got = f"is {sizes[name]}" if name in sizes else "is missing"
        raise PolicyError(
            f"cascade {cascade.name}: the extent of rank {name} {got}; give a positive number"
        )
    return {**sizes, **solve_extents(cascade, {}, sizes)}


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


def _walked(cascade: Cascade, sizes: dict[str, int]) -> None:
    """Extents of ranks that walk through a dimension of another name (``j`` in ``B[j, p]``)."""
    dims: dict[str, tuple[Expr, ...]] = {
        t.name: tuple(Rank(r) for r in t.ranks) for t in cascade.inputs
    }
    for e in cascade.einsums():
        for read in e.reads():
            for own, index in zip(dims.get(read.tensor, ()), read.index, strict=False):
                if isinstance(index, Rank) and isinstance(own, Rank) and own.name in sizes:
                    sizes.setdefault(index.name, sizes[own.name])
        dims.setdefault(e.out.tensor, e.out.index)


def _is_view(einsum: Einsum) -> bool:
    """Does it only rename, permute or split the ranks of another tensor?"""
    if not isinstance(einsum.expr, Read) or einsum.guard != TRUE:
        return False
    source, out = (
        frozenset[str]().union(*map(ranks_of, r.index)) for r in (einsum.expr, einsum.out)
    )
    return source == out and not any(tensors_of(i) for i in einsum.expr.index)


def _is_input(cascade: Cascade, tensor: str) -> bool:
    """Is it an input, or a view of one?  Reading it again is reading the input again."""
    seen = {tensor}
    while (einsum := cascade.producer(tensor)) is not None:
        if not _is_view(einsum):
            return False
        tensor = einsum.reads()[0].tensor
        if tensor in seen:  # state that is handed from step to step
            return False
        seen.add(tensor)
    return True


@dataclass(frozen=True)
class _Work:
    """Operations (multiply-adds of products, elementwise ones) and how long each kind takes."""

    macs: float = 0.0
    others: float = 0.0
    matrix_s: float = 0.0
    vector_s: float = 0.0

    def times(self, n: float) -> _Work:
        return _Work(*(n * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class _Step:
    """An Einsum as a kernel of its own: its work, and the bytes it moves."""

    einsum: Einsum
    work: _Work
    moved: float


def _add(parts: Iterable[_Work]) -> _Work:
    listed = list(parts)
    return _Work(*(sum(getattr(w, f.name) for w in listed) for f in fields(_Work)))


def _seconds(work: _Work, target: Target) -> float:
    """Least time of the arithmetic: elementwise units of their own run beside the matrix units."""
    if target.vector_flops is None:
        return work.matrix_s + work.vector_s
    return max(work.matrix_s, work.vector_s)


class _Counter:
    """Puts numbers into the symbolic counts of one cascade."""

    def __init__(
        self,
        cascade: Cascade,
        sizes: Mapping[str, int],
        pair: tuple[str, str],
        tile_fraction: float,
        ceilings: tuple[Target, str],
    ) -> None:
        self.cascade, self.fraction = cascade, tile_fraction
        self.target, dtype = ceilings
        self.dtype = dtype
        self.values = {rank_symbol(r): n for r, n in sizes.items()}
        self.values[WORD] = BYTES[dtype]
        query, key = pair
        known = {r.name for r in cascade.ranks}
        has_query = query in known or ALIASES.get(query) in known
        self.query = self._symbols(query) if has_query else frozenset()
        self.key = self._symbols(key)
        self.declared = {t.name: t for t in (*cascade.tensors, *cascade.inputs)}

    def _symbols(self, rank: str) -> frozenset[sympy.Symbol]:
        name = self.cascade.rank(rank)
        return frozenset(rank_symbol(r) for r in (name, *leaf_ranks(self.cascade, name)))

    def number(self, counts: sympy.Expr) -> float:
        """The value of ``counts``; terms over queries and keys happen in executed tiles only."""
        total = 0.0
        for term in sympy.Add.make_args(sympy.expand(counts)):
            pairs = term.free_symbols & self.query and term.free_symbols & self.key
            total += float(term.subs(self.values)) * (self.fraction if pairs else 1.0)
        return total

    def work(self, einsum: Einsum, cost: EinsumCost) -> _Work:
        """Operations of one Einsum and their time; elementwise work is done in float32."""
        ops = {kind: self.number(n) for kind, n in cost.operations.items()}
        others = sum(n for kind, n in ops.items() if kind != "mac")
        vector = self.target.vector_flops or self.target.peak("f32")
        matrix_s = 2 * ops["mac"] / self.target.peak(self._product_dtype(einsum))
        return _Work(ops["mac"], others, matrix_s, (others + (_EXP - 1) * ops["exp"]) / vector)

    def _product_dtype(self, einsum: Einsum) -> str:
        """The type all operands are stored in, where the target multiplies it; else the model's."""
        decls = [self.declared.get(r.tensor) for r in einsum.reads()]
        stored = {"float" if d is None else d.dtype for d in decls}
        fixed = stored.pop() if len(stored) == 1 else "float"
        return fixed if fixed in dict(self.target.flops) else self.dtype

    def einsum_bytes(self, einsum: Einsum, cost: EinsumCost) -> float:
        """Bytes one Einsum reads and writes when it runs alone; a view moves none."""
        return 0.0 if _is_view(einsum) else self.number(cost.bytes_read + cost.bytes_written)

    def boundary_bytes(self) -> dict[str, float]:
        """Bytes of every input that is read and every output, each once."""
        used = {r.tensor for e in self.cascade.einsums() for r in e.reads()}
        names = [t.name for t in self.cascade.inputs if t.name in used]
        return {name: self.tensor_bytes(name) for name in (*names, *self.cascade.outputs)}

    def tensor_bytes(self, tensor: str) -> float:
        """Bytes of a whole tensor."""
        return self.number(sympy.Mul(*self._shape(tensor)) * self._width(tensor))

    def live_bytes(self, tensors: Iterable[str]) -> int:
        """Bytes of ``tensors`` for one query of one head, whichever tiles are executed."""
        outside = {rank_symbol(r) for r in ("b", "h", "hkv", "g")} | self.query
        total = 0
        for tensor in tensors:
            kept = [symbol for symbol in self._shape(tensor) if symbol not in outside]
            total += int((sympy.Mul(*kept) * self._width(tensor)).subs(self.values))
        return total

    def _shape(self, tensor: str) -> tuple[sympy.Symbol, ...]:
        decl = self.declared.get(tensor)
        if decl is not None and decl.ranks:
            return tuple(rank_symbol(r) for r in decl.ranks)
        producer = self.cascade.producer(tensor)
        index = producer.out.index if producer is not None else ()
        return tuple(rank_symbol(r) for i in index for r in sorted(ranks_of(i)))

    def _width(self, tensor: str) -> sympy.Expr:
        decl = self.declared.get(tensor)
        if decl is None or decl.dtype == "float":
            return WORD
        return sympy.nsimplify(_STORED.get(decl.dtype, 4))


@dataclass(frozen=True)
class _Fused:
    """One way to run the cascade as one kernel."""

    kept: str
    work: _Work
    moved: float


def _fused(
    counter: _Counter,
    analysis: PassAnalysis,
    live: tuple[str, ...],
    steps: Sequence[_Step],
    target: Target,
) -> _Fused:
    """The fastest way to carry the live intermediates over the pass boundaries."""
    work = _add(s.work for s in steps)
    boundary = counter.boundary_bytes()
    once = sum(boundary.values())
    if not live:
        return _Fused("nothing", work, once)
    if counter.live_bytes(live) * TILE * target.units <= target.on_chip:
        return _Fused("on chip", work, once)
    spilled = _Fused("spilled", work, once + _spill_bytes(counter, analysis, live))
    # Whatever a later pass needs is made again from the inputs, ancestors included.
    again = {t: passes - 1 for t, passes in analysis.tensor_passes.items()}
    repeated = _add(s.work.times(again.get(s.einsum.out.tensor, 0)) for s in steps)
    reread = sum(n * again.get(t, 0) for t, n in boundary.items())
    recomputed = _Fused("recomputed", _add([work, repeated]), once + reread)

    def time(way: _Fused) -> float:
        memory = way.moved / target.bandwidth
        return max(_seconds(way.work, target), memory)

    return min(spilled, recomputed, key=time)


def _spill_bytes(counter: _Counter, analysis: PassAnalysis, live: Iterable[str]) -> float:
    """Each live tensor is written once and read once in every later pass that needs it."""
    total = 0.0
    for tensor in live:
        made = analysis.pass_of.get(tensor)
        readers = {
            analysis.pass_of[e.out.tensor]
            for e in counter.cascade.einsums()
            if e.out.tensor in analysis.pass_of and tensor in (r.tensor for r in e.reads())
        }
        total += counter.tensor_bytes(tensor) * (1 + len(readers - {made}))
    return total
