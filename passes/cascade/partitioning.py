"""Partitioning: a rank becomes tiles, coordinate = outer * #inner + inner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attn_rewrite.cascade.expr import Expr, Extent, Rank, Read, transform
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, Statement, TensorDecl
from attn_rewrite.passes.cascade.flow import split_rank, sub_ranks
from attn_rewrite.site import Refusal


@dataclass(frozen=True)
class Split:
    """A rank over its parts; ``inner`` is None where the rank itself counts the tiles."""

    rank: str
    outer: str
    inner: str | None

    @property
    def flat(self) -> Expr:
        """The coordinate of the whole rank."""
        if self.inner is None:
            return Rank(self.outer)
        return Rank(self.outer) * Extent(self.inner) + Rank(self.inner)

    def index(self, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """The index of a tile tensor: the whole rank becomes the two parts."""
        found: list[Expr] = []
        for i in index:
            whole = i in (self.flat, Rank(self.rank)) and self.inner is not None
            found.extend((Rank(self.outer), Rank(self.inner or "")) if whole else (i,))
        return tuple(found)

    def expr(self, expr: Expr, tiles: Mapping[str, str]) -> Expr:
        """``expr`` over the parts; tensors of ``tiles`` are read by tile, under their new name."""

        def rule(node: Expr) -> Expr | None:
            if node == Rank(self.rank):
                return self.flat
            if isinstance(node, Read) and node.tensor in tiles:
                return Read(tiles[node.tensor], self.index(node.index))
            return None

        return transform(expr, rule)

    def reduce(self, reduce: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """Reductions of the whole rank become reductions of both parts."""
        found: list[tuple[str, str]] = []
        for rank, op in reduce:
            parts = (self.outer, self.inner) if rank == self.rank and self.inner else (rank,)
            found.extend((p, op) for p in parts)
        return tuple(found)


def partition_rank(cascade: Cascade, rank: str, tile: int | None = None) -> Cascade | Refusal:
    """Split ``rank`` into tiles of ``tile`` coordinates (None: chosen by whoever runs it).

    Intermediates carry both parts, inputs and outputs keep the whole rank.  Exact: the same
    operations on the same points; the last tile may be cut.  Refused (``not-normal-form``) for a
    rank that is split or iterated already.  Raises `ValueError` for a tile below 1.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"a tile has at least 1 coordinate, got {tile}")
    name = cascade.rank(rank)
    decl = next(r for r in cascade.ranks if r.name == name)
    if decl.parts or any(isinstance(s, Loop) and s.rank == name for s in cascade.body):
        reason = f"{cascade.name}: rank {name} is split or iterated already; partition it once"
        return Refusal("not-normal-form", reason)
    outer, inner = sub_ranks(cascade.ranks, name)
    split = Split(name, outer, inner)
    written = {e.out.tensor for e in cascade.einsums()} - set(cascade.outputs)
    tiles = {t: t for t in written}

    def tiled(e: Einsum) -> Einsum:
        out = split.expr(e.out, tiles)
        assert isinstance(out, Read)
        guard = split.expr(e.guard, tiles)
        return Einsum(out, split.expr(e.expr, tiles), split.reduce(e.reduce), guard)

    def statement(s: Statement) -> Statement:
        if isinstance(s, Einsum):
            return tiled(s)
        return replace(s, init=tuple(map(tiled, s.init)), body=tuple(map(tiled, s.body)))

    return replace(
        cascade,
        ranks=split_rank(cascade.ranks, name, tile),
        body=tuple(map(statement, cascade.body)),
        tensors=tuple(_split_decl(t, split) if t.name in tiles else t for t in cascade.tensors),
    )


def _split_decl(decl: TensorDecl, split: Split) -> TensorDecl:
    ranks: list[str] = []
    for r in decl.ranks:
        ranks.extend((split.outer, split.inner) if r == split.rank and split.inner else (r,))
    return replace(decl, ranks=tuple(ranks))
