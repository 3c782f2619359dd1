"""What was found in a graph: attention sites, and refusals that say why not.

Light to import: torch is needed only where the values are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import SymInt
    from torch.fx import GraphModule, Node

    from attn_rewrite.cascade.ir import Cascade

Size = "int | SymInt"

# `Site.offset` where the graph does not show which key is the query's own.
UNKNOWN_OFFSET = "?"


@dataclass(frozen=True)
class Refusal:
    """Why an anchor is not a Site, or why a Site (or one step on it) was not rewritten.

    ``code`` is stable and machine-readable (``"probabilities-escape"``), ``reason`` one sentence,
    ``node`` the graph node as text, ``source`` the user's ``file:line, function`` where known,
    ``site`` the Site it is about where there is one.
    """

    code: str
    reason: str
    node: str = ""
    source: str | None = None
    site: str | None = None

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        head = f"{self.site}: " if self.site else ""
        return f"{head}[{self.code}] {self.reason}{where}" + (
            f" ({self.node})" if self.node else ""
        )

    def to_json(self) -> dict[str, str | None]:
        """Plain values for ``report.json``."""
        return {
            "code": self.code,
            "reason": self.reason,
            "node": self.node,
            "source": self.source,
            "site": self.site,
        }


@dataclass(frozen=True)
class Factor:
    """A part of an axis: ``role`` is one of b h g q kv d f (g = query heads sharing a key head).

    ``axis`` numbers the factors of the whole site, so that two equal extents are never confused.
    """

    role: str
    axis: int
    extent: int | SymInt


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of the host graph and what its axes are: one tuple of factors per dimension."""

    node: Node
    dims: tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention recognised in a graph, rewritable or not (`refusals` says why not).

    ``name`` is the module path of the softmax plus an index; ``nodes`` the covered nodes in graph
    order; ``inputs`` the operands by cascade input name (Q, K, V, then reads); ``output`` the node
    whose value the site produces, with its axes, and ``lse`` the one with the log-sum-exp of its
    rows, where that is used too (the cascade is that of the output alone).  Sizes are ints, or
    SymInts where dynamic.  ``causal`` is True only if proved.  ``offset`` is added to a query index
    to get its position among the keys: an expression, which reads the tensor ``POS`` where a cache
    of fixed size is written at positions that are data, or `UNKNOWN_OFFSET`.
    """

    name: str
    module: str
    kind: str  # self | cross | joint | pooling
    family: str  # softmax | channel | linear
    causal: bool
    hq: int
    hkv: int
    q_len: int | SymInt
    kv_len: int | SymInt
    d_qk: int
    d_v: int
    scale: float
    dropout: float
    rope: bool
    layout: str
    cascade: Cascade
    graph: GraphModule = field(repr=False)
    anchor: Node = field(repr=False)
    nodes: tuple[Node, ...] = field(repr=False)
    inputs: dict[str, Operand] = field(repr=False)
    output: Operand = field(repr=False)
    factors: tuple[Factor, ...] = field(repr=False)  # every axis, in canonical order
    offset: str = "0"
    source: str | None = None
    refusals: tuple[Refusal, ...] = ()
    lse: Operand | None = field(default=None, repr=False)

    @property
    def results(self) -> tuple[Node, ...]:
        """The nodes whose values the site produces, in graph order."""
        own = (self.output, *(() if self.lse is None else (self.lse,)))
        return tuple(sorted(o.node for o in own))  # nodes compare by place

    @property
    def rewritable(self) -> bool:
        """True when nothing stands against replacing the site."""
        return not self.refusals

    def groups(self, tensor: str) -> tuple[tuple[Factor, ...], ...]:
        """The canonical dimensions of an input, of AV or LSE: the factors merged into each."""
        roles = {"h": ("h", "g"), "hkv": ("h",)}
        return tuple(
            tuple(f for f in self.factors if f.role in roles.get(rank, (rank,)))
            for rank in self._ranks(tensor)
        )

    def _ranks(self, tensor: str) -> tuple[str, ...]:
        for decl in self.cascade.inputs:
            if decl.name == tensor:
                return decl.ranks
        made = self.cascade.producer("GM" if tensor == "LSE" else tensor)
        assert made is not None, f"{self.name} has no tensor {tensor}"
        return tuple(str(index) for index in made.out.index)

    def extents(self) -> dict[str, int | SymInt]:
        """Extents of the ranks of the cascade, the batch left out."""
        known: dict[str, int | SymInt] = {
            "h": self.hq, "hkv": self.hkv, "q": self.q_len, "kv": self.kv_len,
            "d": self.d_qk, "f": self.d_v,
        }  # fmt: skip
        for factor in self.factors:  # heads of probabilities and values, widths of further scores
            if factor.role not in ("b", "g", *known):
                known[factor.role] = 1
        own = [f for f in self.factors if f.role not in ("b", "h", "g", "q", "kv", "d", "f")]
        for factor in own:
            known[factor.role] *= factor.extent
        return known

    def facts(self) -> dict[str, str | int | float | bool]:
        """Facts as plain values, for reports; dynamic sizes as their symbol."""
        plain = ("kind", "family", "causal", "hq", "hkv", "d_qk", "d_v", "scale", "dropout", "rope")
        sizes = {
            n: v if isinstance(v := getattr(self, n), int) else str(v) for n in ("q_len", "kv_len")
        }
        more = {} if self.lse is None else {"lse": True}
        return {**{n: getattr(self, n) for n in plain}, **sizes, "layout": self.layout, **more}


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything found in a model: recognised attention, and anchors that are not one."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

    def site(self, name: str) -> Site:
        """The site called ``name``."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(
            f"no site {name!r}; found: {', '.join(s.name for s in self.sites) or 'none'}"
        )
