"""From stages to a cascade: ranks for every stage, tensors by name, Einsums.

Heads are where mixed attention differs from the plain one: scores, probabilities and values may
each have their own.  Every list of head axes that a stage has is a rank: ``h`` is that of the
scores, ``i``, ``j``, ... are the next ones on the way to the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from attn_rewrite.cascade.attention import MINUS_INF
from attn_rewrite.cascade.expr import (  # fmt: skip
    TRUE,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjunction,
    ranks_of,
    rebuild,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, RankDecl, TensorDecl
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.guards import split_guard
from attn_rewrite.passes.find.lift import Leaf
from attn_rewrite.passes.find.ranks import HEAD_RANKS, Lines, Places, UnplacedError, place_of
from attn_rewrite.passes.find.roles import in_ranks
from attn_rewrite.passes.find.stages import Stage, StageLifter
from attn_rewrite.site import Factor, Operand


@dataclass(frozen=True, eq=False)
class Assembled:
    """A cascade with the operands of its inputs, in the cascade's order."""

    cascade: Cascade
    inputs: dict[str, Operand]
    factors: tuple[Factor, ...]
    output: tuple[tuple[Factor, ...], ...]  # axes of the dimensions of the last product


@dataclass
class Assembler:
    """Writes the Einsums of a lifter's stages, the last of which is the output."""

    lifter: StageLifter
    places: Places
    root: Stage
    operands: dict[str, str]  # Q, K, V ... by leaf
    weights: frozenset[str] = frozenset()
    inputs: dict[tuple[str, str], tuple[str, tuple[str, ...], Operand]] = field(
        default_factory=dict
    )
    body: list[Einsum] = field(default_factory=list)
    tensors: list[TensorDecl] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    spaces: dict[frozenset[int], str] = field(default_factory=dict)
    lines: dict[str, Atoms] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.axes: Axes = self.lifter.axes
        for rank, line in (("b", self.places.b), ("q", self.places.q), ("kv", self.places.kv)):
            self.lines[rank] = line
        for stage in self.lifter.stages.values():
            self._space(stage)
        if not self.spaces:
            self.spaces[frozenset()] = "h"
            self.lines["h"] = ()
        for at, width in enumerate(self.places.widths):
            self.lines["d" + (str(at + 1) if at else "")] = self.axes.resolve(width)
        self.lines["f"] = self.places.f

    # Ranks

    def _atoms(self, stage: Stage) -> Atoms:
        return self.axes.resolve(stage.atoms)

    def _space(self, stage: Stage) -> None:
        own = tuple(a for a in self._atoms(stage) if a in self.places.heads)
        if not own or frozenset(own) in self.spaces:
            return
        if len(self.spaces) == len(HEAD_RANKS):
            raise UnplacedError
        name = HEAD_RANKS[len(self.spaces)]
        self.spaces[frozenset(own)] = name
        group = self.places.group
        if name == "h" and group and set(group) < set(own):
            own = (*(a for a in own if a not in group), *(a for a in own if a in group))
        self.lines[name] = own

    def head_rank(self, stage: Stage) -> str:
        """The rank of the stage's heads; of the scores' where it has none."""
        own = frozenset(a for a in self._atoms(stage) if a in self.places.heads)
        return self.spaces.get(own, "h")

    def ranks(self, stage: Stage) -> tuple[str, ...]:
        """The ranks of a stage, in canonical order."""
        own = set(self._atoms(stage))
        head = self.head_rank(stage)
        kept = [
            rank
            for rank, line in self.lines.items()
            if rank not in HEAD_RANKS
            and (rank == "b" or own & set(line) or self._implied(stage, rank))
        ]
        return tuple(sorted([*kept, head], key=place_of))

    def _implied(self, stage: Stage, rank: str) -> bool:
        """Ranks of length 1 have no atoms, and are there all the same."""
        if self.lines[rank]:
            return False
        if rank == "q":
            return bool(self._reads_queries(stage))
        return stage is self.root and rank == "f"

    def _reads_queries(self, stage: Stage) -> bool:
        if stage.kind == "score":
            return True
        if stage is self.root:
            return True
        return any(
            self._reads_queries(self.lifter.stages[r.tensor])
            for r in self.lifter.stage_reads(stage.body)
        )

    def frame(self, stage: Stage) -> Lines:
        """The ranks an Einsum of the stage iterates."""
        found = [(r, self.lines[r]) for r in self.ranks(stage)]
        folded = self.axes.resolve(stage.folded)
        if folded:
            found.append(self._folded(folded))
        return Lines(tuple(found))

    def _folded(self, atoms: Atoms) -> tuple[str, Atoms]:
        for rank, line in self.lines.items():
            if set(line) == set(atoms):
                return rank, line
        name = next(n for n in HEAD_RANKS if n not in self.lines)
        self.lines[name] = atoms
        self.spaces.setdefault(frozenset(atoms), name)
        return name, atoms

    # Expressions

    def convert(self, expr: Expr, lines: Lines) -> Expr:
        """An expression over atoms as one over the ranks of ``lines``."""
        if isinstance(expr, Read) and expr.tensor in self.lifter.stages:
            return self._read_stage(expr, lines)
        if isinstance(expr, Read):
            return self._read_leaf(self.lifter.leaves[expr.tensor], lines)
        if isinstance(expr, (Rank, Extent)):
            try:
                found = in_ranks(expr, lines, self.axes)
            except (KeyError, ValueError) as error:
                raise UnplacedError from error
            if found is None:
                raise UnplacedError
            return found
        return rebuild(expr, tuple(self.convert(c, lines) for c in expr.children))

    def _read_stage(self, read: Read, lines: Lines) -> Expr:
        stage = self.lifter.stages[read.tensor]
        entries = dict(zip(stage.atoms, read.index, strict=True))
        index = [self._index(rank, stage, entries, lines) for rank in self.ranks(stage)]
        return Read(self.names[stage.name], tuple(index))

    def _index(self, rank: str, stage: Stage, entries: dict[int, Expr], lines: Lines) -> Expr:
        """The coordinate of ``rank`` of a stage: its own, or computed from digits."""
        line = self.lines[rank]
        own = [a for a in stage.atoms if set(self.axes.resolve((a,))) & set(line)]
        pure = all(entries[a] == Rank(f"@{a}") for a in own)
        here = dict(lines.ranks)
        if pure and rank in here:
            return Rank(rank)
        if not line:
            return Const(0)
        if self.axes.resolve(own) != line or len(own) != len({*own}):
            raise UnplacedError
        total: Expr | None = None
        for atom in own:
            size = self.axes.extent((atom,))
            place = self.convert(entries[atom], lines)
            if total is not None and not isinstance(size, int):
                raise UnplacedError
            total = place if total is None else total * size + place
        assert total is not None
        return simplify(total)

    def _read_leaf(self, leaf: Leaf, lines: Lines) -> Expr:
        atoms = set(self.axes.resolve([a for d in leaf.dims for a in d]))
        known = {a for _, line in lines.ranks for a in line}
        if not atoms <= known:
            raise UnplacedError
        name = self.operands.get(leaf.name)
        wanted = [r for r, line in lines.ranks if atoms & set(line)]
        if name is not None:
            wanted = self._canonical(name, atoms, lines)
        ranks = tuple(wanted)
        key = (leaf.name, " ".join(ranks))
        if key not in self.inputs:
            made = Operand(leaf.node, self._factors(leaf.dims, lines))
            self.inputs[key] = (self._input_name(leaf, name), ranks, made)
        name, ranks, _ = self.inputs[key]
        return Read(name, tuple(self._leaf_index(r) for r in ranks))

    def _input_name(self, leaf: Leaf, name: str | None) -> str:
        taken = {n for n, _, _ in self.inputs.values()}
        if name is not None and name not in taken:
            return name
        head = "W" if leaf.name in self.weights else "M"
        count = sum(n.startswith(head) and n[1:].isdigit() for n in taken)
        return f"{head}{count}"

    def _canonical(self, name: str, atoms: set[int], lines: Lines) -> list[str]:
        """Q, K and V have a batch and heads, whether they vary over them or not."""
        here = [r for r, _ in lines.ranks]
        width = next((r for r in here if r.startswith("d")), "d")
        head = next(r for r in here if r in HEAD_RANKS)
        if name[0] == "Q":
            return ["b", head, "q", width]
        grouped = head == "h" and self.places.group and not atoms & set(self.places.group)
        return ["b", "hkv" if grouped else head, "kv", width if name[0] == "K" else "f"]

    def _leaf_index(self, rank: str) -> Expr:
        if rank != "hkv":
            return Rank(rank)
        size = self.axes.extent(self.places.group)
        return call("floordiv", Rank("h"), size)

    def _factors(self, dims: tuple[Atoms, ...], lines: Lines) -> tuple[tuple[Factor, ...], ...]:
        return tuple(
            tuple(Factor(self._role(a, lines), a, self.axes.size(a)) for a in self.axes.resolve(d))
            for d in dims
        )

    def _role(self, atom: int, lines: Lines) -> str:
        rank, _ = lines.line(atom)
        return "g" if rank == "h" and atom in self.places.group else rank

    # Einsums

    def assemble(self, name: str) -> Assembled:
        """The cascade of all stages.  Raises `UnplacedError`."""
        for stage in self.lifter.stages.values():
            self._write(stage)
        self._input_order()
        decls = tuple(TensorDecl(n, r) for n, r, _ in self.inputs.values())
        used = dict.fromkeys(("b", "h", *(r for d in decls for r in d.ranks)))
        used |= dict.fromkeys(r for e in self.body for r in (*ranks_of(e.out), *ranks_of(e.expr)))
        ranks = tuple(RankDecl(r) for r in sorted(used, key=place_of) if self._is_used(r))
        cascade = Cascade(name, ranks, decls, tuple(self.body), ("AV",), tuple(self.tensors))
        factors = tuple(
            Factor(self._role(a, Lines(((rank, line),))), a, self.axes.size(a))
            for rank, line in sorted(self.lines.items(), key=lambda item: place_of(item[0]))
            for a in line
        )
        operands = {n: o for n, _, o in self.inputs.values()}
        output = self._factors(self.root.dims, self.frame(self.root))
        return Assembled(cascade, operands, factors, output)

    def _write(self, stage: Stage) -> None:
        match stage.kind:
            case "score":
                self._score(stage)
            case "softmax":
                self._softmax(stage)
            case "product":
                self._product(stage)
            case "sum":
                self._sum(stage)
            case _:
                self._map(stage)

    def _is_used(self, rank: str) -> bool:
        return any(rank in ranks for _, ranks, _ in self.inputs.values()) or any(
            rank in ranks_of(e.out) for e in self.body
        )

    def _input_order(self) -> None:
        """Q, K of every score product, V, then the rest in the order of use."""
        order = list(self.operands.values())

        def place(item: tuple[str, tuple[str, ...], Operand]) -> int:
            return order.index(item[0]) if item[0] in order else len(order)

        pairs = sorted(self.inputs.items(), key=lambda pair: place(pair[1]))
        self.inputs = dict(pairs)

    def _point(self, stage: Stage, name: str) -> Read:
        self.names[stage.name] = name
        return Read(name, tuple(Rank(r) for r in self.ranks(stage)))

    def _free(self, name: str) -> str:
        """``name``, or the first of ``name2``, ``name3`` ... that no tensor has."""
        taken = {e.out.tensor for e in self.body} | {n for n, _, _ in self.inputs.values()}
        return next(n for n in _numbered(name) if n not in taken)

    def _reduced(self, stage: Stage, lines: Lines) -> tuple[tuple[str, str], ...]:
        folded = self.axes.resolve(stage.folded)
        return tuple((r, "add") for r, line in lines.ranks if set(line) == set(folded) and folded)

    def _score(self, stage: Stage) -> None:
        lines = self.frame(stage)
        body = self.convert(stage.body, lines)
        width = next((r for r, _ in lines.ranks if r.startswith("d")), "d")
        self.body.append(Einsum(self._point(stage, self._free("QK")), body, ((width, "add"),)))

    def _product(self, stage: Stage) -> None:
        lines = self.frame(stage)
        sums = "AS" if self._follows_softmax(stage) else "SB"
        left, right = (self._operand(c, lines, sums) for c in stage.body.children)
        out = self._point(
            stage, "AV" if stage is self.root else self._free(self._product_name(stage))
        )
        self.body.append(Einsum(out, left * right, self._reduced(stage, lines)))

    def _product_name(self, stage: Stage) -> str:
        if self.axes.resolve(stage.folded) == self.places.kv:
            return "KV"
        return "AM" if self._follows_softmax(stage) else "SM"

    def _follows_softmax(self, stage: Stage) -> bool:
        found = (self.lifter.stages[r.tensor] for r in self.lifter.stage_reads(stage.body))
        return any(s.kind == "softmax" or self._follows_softmax(s) for s in found)

    def _operand(self, expr: Expr, lines: Lines, name: str) -> Expr:
        """One side of a product; a sum of maps gets a name of its own first."""
        converted = simplify(self.convert(expr, lines))
        if _is_product(converted):
            return converted
        used = ranks_of(converted)
        order = sorted(used, key=place_of)
        out = Read(self._free(name), tuple(Rank(r) for r in order))
        self.body.append(Einsum(out, converted))
        return out

    def _sum(self, stage: Stage) -> None:
        lines = self.frame(stage)
        body = self.convert(stage.body, lines)
        out = self._point(stage, self._free("RS"))
        self.body.append(Einsum(out, simplify(body), self._reduced(stage, lines)))

    def _map(self, stage: Stage) -> None:
        lines = self.frame(stage)
        body = simplify(self.convert(stage.body, lines))
        self.body.append(Einsum(self._point(stage, self._free("AS")), body))

    def _softmax(self, stage: Stage) -> None:
        lines = self.frame(stage)
        score, terms = split_guard(simplify(self.convert(stage.body, lines)))
        guard = conjunction(terms)
        point = tuple(Rank(r) for r in self.ranks(stage))
        row = tuple(r for r in point if r != Rank("kv"))
        s, gm, sn, sd, a = (self._free(n) for n in ("S", "GM", "SN", "SD", "A"))
        reads = {n: Read(n, point) for n in (s, sn, a)} | {n: Read(n, row) for n in (gm, sd)}
        scores = reads[s]
        if score == Read("K", point) and guard == TRUE:
            scores = score  # a softmax of the keys themselves
        else:
            self.body.append(Einsum(scores, score, (), guard))
            self.tensors.append(TensorDecl(s, tuple(r.name for r in point), MINUS_INF))
        self.tensors.append(TensorDecl(gm, tuple(r.name for r in row), MINUS_INF))
        self.body += [
            Einsum(reads[gm], scores, (("kv", "max"),), guard),
            Einsum(reads[sn], call("exp", scores - reads[gm]), (), guard),
            Einsum(reads[sd], reads[sn], (("kv", "add"),), guard),
            Einsum(reads[a], reads[sn] / reads[sd], (), guard),
        ]
        self.names[stage.name] = a


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}{number}"
        number += 1


def _is_product(expr: Expr) -> bool:
    """A read, or a product or quotient of such: what a product with V takes as it is."""
    if isinstance(expr, (Read, Const)):
        return True
    inside = expr.children
    return getattr(expr, "op", "") in ("mul", "div") and all(map(_is_product, inside))
