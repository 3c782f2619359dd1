"""Cascades under other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from attn_rewrite.cascade.expr import Expr, Extent, Rank, Read, transform
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, Statement, TensorDecl


@dataclass(frozen=True)
class Names:
    """New names of ranks and of tensors by old name; what is not in it keeps its name."""

    ranks: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def rank(self, name: str) -> str:
        """The new name of a rank."""
        return self.ranks.get(name, name)

    def tensor(self, name: str) -> str:
        """The new name of a tensor."""
        return self.tensors.get(name, name)

    def expr(self, expr: Expr) -> Expr:
        """The expression under the new names."""
        return transform(expr, self._node)

    def _node(self, node: Expr) -> Expr | None:
        match node:
            case Rank(name):
                return Rank(self.rank(name))
            case Extent(name):
                return Extent(self.rank(name))
            case Read(name, index):
                return Read(self.tensor(name), index)
        return None

    def einsum(self, e: Einsum) -> Einsum:
        """The Einsum under the new names."""
        out = self.expr(e.out)
        assert isinstance(out, Read)
        reduce = tuple((self.rank(r), op) for r, op in e.reduce)
        return Einsum(out, self.expr(e.expr), reduce, self.expr(e.guard))

    def statement(self, s: Statement) -> Statement:
        """The Einsum or loop under the new names."""
        if isinstance(s, Einsum):
            return self.einsum(s)
        init, body = (tuple(map(self.einsum, part)) for part in (s.init, s.body))
        return Loop(self.rank(s.rank), init, body, s.descending)

    def declaration(self, t: TensorDecl) -> TensorDecl:
        """The declaration under the new names."""
        scale = None if t.scale is None else self.tensor(t.scale)
        ranks = tuple(map(self.rank, t.ranks))
        return replace(t, name=self.tensor(t.name), ranks=ranks, scale=scale)

    def cascade(self, c: Cascade) -> Cascade:
        """The cascade under the new names, everything in its order."""
        return Cascade(
            c.name,
            tuple(
                RankDecl(self.rank(r.name), r.size, tuple(map(self.rank, r.parts))) for r in c.ranks
            ),
            tuple(map(self.declaration, c.inputs)),
            tuple(map(self.statement, c.body)),
            tuple(map(self.tensor, c.outputs)),
            tuple(map(self.declaration, c.tensors)),
        )
