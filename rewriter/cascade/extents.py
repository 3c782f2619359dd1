"""Extents of ranks from the shapes of the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank, Read, call, ranks_of, walk
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.errors import CascadeError

if TYPE_CHECKING:
    from torch import Tensor


def extents(
    cascade: Cascade,
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The extent of every rank, from the shape of each input, declared sizes and ``sizes``.

    ``sizes`` may use aliases (``m`` for ``kv``).  A split rank whose parts have no size is split
    into tiles of about its square root: the value of a cascade does not depend on it.  Raises
    `CascadeError` where shapes disagree or an extent stays unknown.
    """
    solver = _Solver(cascade, {cascade.rank(n): s for n, s in (sizes or {}).items()})
    for tensor in cascade.inputs:
        if tensor.name in shapes:
            solver.read_shape(tensor, shapes[tensor.name])
    solver.solve()
    missing = sorted(solver.needed() - solver.known.keys())
    if missing:
        raise CascadeError(
            f"cascade {cascade.name}: no input has rank {missing[0]}; give its extent with "
            f"sizes={{{missing[0]!r}: ...}}"
        )
    return solver.known


class _Solver:
    """Extents known so far, and where each one comes from."""

    def __init__(self, cascade: Cascade, sizes: Mapping[str, int]) -> None:
        self.cascade = cascade
        self.known: dict[str, int] = {}
        self.origin: dict[str, str] = {}
        for name, size in sizes.items():
            self.learn(name, size, "sizes")
        for rank in cascade.ranks:
            if rank.size is not None and rank.name not in sizes:
                self.learn(rank.name, rank.size, "its declaration")
        self.dims: dict[str, list[int | None]] = {}

    def learn(self, rank: str, extent: int, origin: str) -> bool:
        """Note an extent; True if it is news."""
        if not 0 <= extent < 2**63:
            raise CascadeError(
                f"cascade {self.cascade.name}: rank {rank} has extent {extent} by {origin}; an "
                "extent is at least 0 and fits a 64-bit integer"
            )
        old = self.known.setdefault(rank, extent)
        if old != extent:
            raise CascadeError(
                f"cascade {self.cascade.name}: rank {rank} has extent {old} by "
                f"{self.origin[rank]}, but {extent} by {origin}"
            )
        news = rank not in self.origin
        self.origin.setdefault(rank, origin)
        return news

    def read_shape(self, tensor: TensorDecl, shape: Sequence[int]) -> None:
        """Take the extents of an input's ranks from its shape."""
        if len(shape) != len(tensor.ranks):
            raise CascadeError(
                f"cascade {self.cascade.name}: input {tensor.name} has shape {list(shape)}; "
                f"expected {len(tensor.ranks)} dimensions, [{', '.join(tensor.ranks)}]"
            )
        for rank, extent in zip(tensor.ranks, shape, strict=True):
            self.learn(rank, int(extent), f"input {tensor.name}")
        self.dims[tensor.name] = [int(s) for s in shape]

    def solve(self) -> None:
        """Propagate through splits and plain accesses; then choose the free tile sizes."""
        while True:
            if any([self._splits(), *map(self._accesses, self.cascade.einsums())]):
                continue
            if not self._choose_tile():
                return

    def _splits(self) -> bool:
        news = False
        for rank in self.cascade.ranks:
            if len(rank.parts) == 2:
                news |= self._split(rank.name, *rank.parts)
        return news

    def _split(self, whole: str, outer: str, inner: str) -> bool:
        known, origin = self.known, f"the split of {whole} into {outer} and {inner}"
        if whole not in known:
            if outer in known and inner in known:
                return self.learn(whole, known[outer] * known[inner], origin)
            return False
        for part, other in ((outer, inner), (inner, outer)):
            if part not in known and other in known:
                if known[other] < 1:
                    raise CascadeError(
                        f"rank {other} has extent {known[other]}; a tile needs at least 1"
                    )
                return self.learn(part, -(-known[whole] // known[other]), origin)
        if outer in known and inner in known and known[outer] * known[inner] < known[whole]:
            raise CascadeError(
                f"cascade {self.cascade.name}: {outer} x {inner} = {known[outer]} x {known[inner]} "
                f"does not cover rank {whole} of extent {known[whole]}"
            )
        return False

    def _choose_tile(self) -> bool:
        for rank in self.cascade.ranks:
            if len(rank.parts) == 2 and rank.name in self.known and rank.parts[1] not in self.known:
                tile = max(1, math.isqrt(max(0, self.known[rank.name] - 1)) + 1)
                return self.learn(rank.parts[1], tile, "the choice of the interpreter")
        return False

    def _accesses(self, einsum: Einsum) -> bool:
        """A rank that only indexes tensors of known shape has their extent."""
        news = False
        for read in _reads(einsum):
            dims = self.dims.get(read.tensor, ())
            for index, extent in zip(read.index, dims, strict=False):
                if isinstance(index, Rank) and extent is not None and index.name not in self.known:
                    news |= self.learn(index.name, extent, f"the read {read}")
        if einsum.out.tensor not in self.dims:
            dims_out = [self._reach(i) for i in einsum.out.index]
            if None not in dims_out:
                self.dims[einsum.out.tensor] = dims_out
                self._groups(einsum.out, dims_out)
                news = True
        return news

    def _reach(self, index: Expr) -> int | None:
        """The extent an output index gives; None where a rank of it is not known."""
        if not ranks_of(index) <= self.known.keys():
            return None
        top = largest(index) if isinstance(index, Rank) or _is_grouped(index) else None
        return None if top is None else _number(top, self.known) + 1

    def _groups(self, out: Read, dims: Sequence[int | None]) -> None:
        """The declared rank of a dimension that counts groups (``q // 128``) has their number."""
        decl = next((t for t in self.cascade.tensors if t.name == out.tensor), None)
        if decl is None or len(decl.ranks) != len(dims):
            return
        for rank, index, extent in zip(decl.ranks, out.index, dims, strict=True):
            if _is_grouped(index) and extent is not None and rank not in self.known:
                self.learn(rank, extent, f"the groups of {out}")

    def needed(self) -> set[str]:
        """Every rank that an Einsum iterates."""
        found: set[str] = set()
        for e in self.cascade.einsums():
            for part in (e.out, e.expr, e.guard):
                found |= {n.name for n in walk(part) if isinstance(n, Rank)}
            found |= {r for r, _ in e.reduce}
        return found


def _reads(einsum: Einsum) -> Iterator[Read]:
    for part in (einsum.expr, einsum.guard):
        yield from (n for n in walk(part) if isinstance(n, Read))


def _is_grouped(index: Expr) -> bool:
    """Does the index put several points of a rank together?"""
    return any(isinstance(n, Call) and n.op == "floordiv" for n in walk(index))


def largest(index: Expr) -> Expr | None:
    """The largest value of a computed index as an expression over extents; None where not known.

    Sums, multiples, quotients and remainders by positive literals of ranks: all grow with their
    ranks, or are bounded by their divisor.
    """
    match index:
        case Rank(name):
            return Extent(name) - 1
        case Call("mod", (_, Const(int(size)))):
            return Const(size - 1)
        case Call("floordiv" | "mul" as op, (inner, Const(int(by)))) if by > 0:
            top = largest(inner)
            return None if top is None else call(op, top, by)
        case Call("add", (left, right)):
            tops = (largest(left), largest(right))
            return None if tops[0] is None or tops[1] is None else tops[0] + tops[1]
        case Const(int(value)):
            return Const(value)
    return None


def _number(expr: Expr, sizes: Mapping[str, int]) -> int:
    """An expression of `largest` at given extents."""
    match expr:
        case Const(value):
            return int(value)
        case Extent(rank):
            return sizes[rank]
        case Call(op, (left, right)):
            a, b = _number(left, sizes), _number(right, sizes)
            return {"add": a + b, "sub": a - b, "mul": a * b, "floordiv": a // max(b, 1)}[op]
    raise ValueError(f"{expr} is no size")


@dataclass(frozen=True)
class Shift:
    """An index that is a rank plus a constant; only the constant where ``rank`` is None."""

    rank: str | None
    offset: int

    def span(self, coordinates: Mapping[str, Tensor]) -> tuple[int, int]:
        """First index and count over consecutive coordinates of the rank."""
        if self.rank is None:
            return self.offset, 1
        found = coordinates[self.rank]
        return self.offset + (int(found[0]) if len(found) else 0), len(found)


def shift_of(index: Expr, sizes: Mapping[str, int]) -> Shift | None:
    """The shift that ``index`` is (``r``, ``r + 1``, ``r - 1``, ``3``, ``#r``); None for others."""
    match index:
        case Rank(name):
            return Shift(name, 0)
        case Const(bool()):
            return None
        case Const(int(value)):
            return Shift(None, value)
        case Extent(rank):
            return Shift(None, sizes[rank])
        case Call("add", (Rank(name), Const(int(value)))):
            return Shift(name, value)
        case Call("add", (Const(int(value)), Rank(name))):
            return Shift(name, value)
        case Call("sub", (Rank(name), Const(int(value)))):
            return Shift(name, -value)
    return None
