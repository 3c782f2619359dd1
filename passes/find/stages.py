"""Attention maps that are mixed, summed or renormalised, lifted to a few tensors and what each is.

`Lifter` lifts a tensor to one expression.  Between two products of an attention more may stand than
one expression says: linear maps over heads, several softmaxes, sums of rows.  `StageLifter` gives
each of them a name, a *stage*, so that every tensor is an expression over stages and tensors read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from attn_rewrite.cascade.expr import Expr, Rank, Read, ranks_of, walk
from attn_rewrite.graph import arguments, live_users, op_name, shape_of, truncates
from attn_rewrite.passes.find.anchor import SOFTMAX
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.layout import Coord, Dims, atom_rank, coordinate, only_moves, pure
from attn_rewrite.passes.find.lift import Lifter
from attn_rewrite.passes.find.operands import trim
from attn_rewrite.passes.find.product import Contraction, Product, contraction, of_weights
from attn_rewrite.passes.find.reach import Way
from attn_rewrite.sizes import as_size, same_size


@dataclass(frozen=True, eq=False)
class Stage:
    """A tensor on the way: ``body`` at each point, with the ``folded`` atoms reduced.

    ``kind``: ``score`` (a product of two leaves), ``product``, ``softmax``, ``sum`` or ``map``
    (nothing is folded).  ``private`` dimensions have atoms of this stage alone: readers give an
    expression for them.  ``factor`` multiplies what readers read.
    """

    name: str
    kind: str
    node: fx.Node
    dims: tuple[Atoms, ...]
    private: tuple[bool, ...]
    body: Expr
    folded: Atoms = ()
    factor: float = 1.0

    @property
    def atoms(self) -> Atoms:
        """Atoms of all dimensions, in order; the index of a read has one expression for each."""
        return tuple(a for d in self.dims for a in d)


@dataclass
class Region:
    """Where a lifter may look: the softmax it is about, what follows from it up to the last
    product, and the atoms that products sum over where they are not new ones."""

    anchor: fx.Node
    keys: Atoms
    ahead: frozenset[fx.Node]
    bound: Mapping[tuple[fx.Node, str], Atoms] = field(default_factory=dict)


class StageLifter(Lifter):
    """Lifts the last product of an attention to stages."""

    def __init__(self, axes: Axes, module: torch.nn.Module, region: Region) -> None:
        super().__init__(axes, module)
        self.region = region
        self.stages: dict[str, Stage] = {}
        self.operands: dict[str, list[str]] = {}  # leaves of a product, by stage
        self.dropouts: list[float] = []
        self._naming: set[fx.Node] = set()

    def stage_reads(self, expr: Expr) -> list[Read]:
        """Reads of stages in an expression."""
        return [n for n in walk(expr) if isinstance(n, Read) and n.tensor in self.stages]

    def _holds_product(self, expr: Expr) -> bool:
        return bool(self.stage_reads(expr))

    # One level

    def _open(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        name = op_name(node)
        if self._is_shared(node):
            return self._named_map(node, dims, depth)
        if name in SOFTMAX:
            return self._softmax(node, dims, depth)
        if name == "sum":
            return self._total(node, dims, depth)
        if name == "nan_to_num" and node.args[0] in self.region.ahead:
            inner = self.lift(node.args[0], dims, depth + 1)  # type: ignore[arg-type]
            return inner if isinstance(inner, Read) and inner.tensor in self.stages else None
        if name in _SAME_VALUES and truncates(node):
            return None
        found = contraction(node)
        return (
            super()._open(node, dims, depth) if found is None else self._product(found, dims, depth)
        )

    def _is_shared(self, node: fx.Node) -> bool:
        """A map that is used more than once: it is computed once."""
        if node not in self.region.ahead or node in self._naming or op_name(node) in SOFTMAX:
            return False
        if only_moves(node):
            return False
        return contraction(node) is None and len(live_users(node)) > 1

    def _named_map(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        known = self._known(node, dims)
        if known is not None:
            return self._read_stage(known, dims)
        own, private = self._own(node, dims)
        self._naming.add(node)
        body = self._open(node, own, depth)
        if body is None:
            return None
        return self._made("map", node, own, private, dims, body)

    def _softmax(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        named = arguments(node)
        keys = dims[int(named["dim"]) % len(dims)]
        if isinstance(keys, Expr) or self.axes.resolve(keys) != self.axes.resolve(self.region.keys):
            return None
        known = self._known(node, dims)
        if known is not None:
            return self._read_stage(known, dims)
        own, private = self._own(node, dims)
        body = self.lift(named["self"], own, depth + 1)
        if body is None or not (self._holds_product(body) or node is self.region.anchor):
            return None  # no scores: a map that is read as it is
        return self._made("softmax", node, own, private, dims, body)

    def _total(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        """A sum of the map over the keys."""
        named = arguments(node)
        source, over = named["self"], named.get("dim")
        over = [over] if isinstance(over, int) else list(over or ())
        if len(over) != 1 or source not in self.region.ahead:
            return None
        shape, keys = shape_of(source), self.region.keys
        place = int(over[0]) % len(shape)
        if not same_size(as_size(shape[place]), self.axes.extent(keys)):
            return None
        known = self._known(node, dims)
        if known is not None:
            return self._read_stage(known, dims)
        own, private = self._own(node, dims)
        inner = list(own)
        inner[place : place + bool(named.get("keepdim"))] = [keys]
        if set(self.axes.resolve(keys)) & {a for d in own for a in self.axes.resolve(d)}:
            return None
        body = self.lift(source, tuple(inner), depth + 1)
        if body is None or not self._holds_product(body):
            return None
        return self._made("sum", node, own, private, dims, body, keys)

    def _dropout(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        named = arguments(node)
        inner = self.lift(named["input"], dims, depth + 1)
        if not (named["train"] and named["p"]):
            return inner
        if inner is None or not self._holds_product(inner):
            return None
        self.dropouts.append(float(named["p"]))
        return inner

    # Products

    def _product(self, found: Contraction, dims: Dims, depth: int) -> Expr | None:
        product = found.product
        known = self._known(product.node, dims)
        if known is not None:
            return self._with_bias(known, found, dims)
        own, private = self._own(product.node, dims)
        atoms = {x: d for x, d in zip(product.out_labels, own, strict=True) if x}
        sizes = product.sizes()
        for label in product.contracted:
            bound = self.region.bound.get((product.node, label))
            atoms[label] = self.axes.fresh(sizes[label]) if bound is None else bound
        sides = [
            (node, tuple(atoms[x] if x else () for x in labels))
            for node, labels in (
                (product.left, product.left_labels), (product.right, product.right_labels),
            )
        ]  # fmt: skip
        bodies = self._bodies(product, sides, depth)
        if bodies is None:
            return None
        (left, right), kind, factor = bodies
        if self._comes_second(left, right):
            left, right = right, left
        folded = tuple(a for x in product.contracted for a in atoms[x])
        read = self._made(
            kind, product.node, own, private, dims, left * right, folded, factor=factor
        )
        stage = self._known(product.node, dims)
        if read is None or stage is None:
            return None
        self.operands[stage.name] = [
            e.tensor for e in (left, right) if isinstance(e, Read) and e.tensor in self.leaves
        ]
        return self._with_bias(stage, found, dims)

    def _bodies(
        self, product: Product, sides: list[tuple[fx.Node, tuple[Atoms, ...]]], depth: int
    ) -> tuple[list[Expr], str, float] | None:
        """What the operands are: maps on the way, or tensors read."""
        if product.node in self.region.ahead:
            opened = [n in self.region.ahead or n is self.region.anchor for n, _ in sides]
        else:
            opened = [of_weights(n) for n, _ in reversed(sides)]
            if all(opened):
                return None
        if not any(opened):
            if not self._is_score(product, sides):
                return None
            trimmed = [trim(n, d, self.axes) for n, d in sides]
            factor = trimmed[0][0] * trimmed[1][0]
            return [self._leaf(*t) for _, t in trimmed], "score", factor
        parts: list[Expr] = []
        for open_it, (node, dims) in zip(opened, sides, strict=True):
            if not open_it:
                parts.append(self._leaf(*trim(node, dims, self.axes, scale=False)[1]))
                continue
            lifted = self.lift(node, dims, depth + 1)
            if lifted is None or not self._holds_product(lifted):
                return None
            parts.append(lifted)
        return parts, "product", 1.0

    def _comes_second(self, left: Expr, right: Expr) -> bool:
        """One order whatever the author wrote: maps before weights and V, Q before K."""
        if self._holds_product(left) != self._holds_product(right):
            return self._holds_product(right)
        keys = {f"@{a}" for a in self.axes.resolve(self.region.keys)}
        return bool(keys & ranks_of(left)) and not keys & ranks_of(right)

    def _is_score(self, product: Product, sides: list[tuple[fx.Node, tuple[Atoms, ...]]]) -> bool:
        """A product whose output has the keys, from one side."""
        if not product.contracted and op_name(product.node) != "einsum":
            return False
        keys = set(self.axes.resolve(self.region.keys))
        on = [
            keys <= {a for d in dims for a in self.axes.resolve(d)} for _, dims in sides
        ]  # fmt: skip
        return on[0] != on[1]

    def _with_bias(self, stage: Stage, found: Contraction, dims: Dims) -> Expr | None:
        read = self._read_stage(stage, dims)
        if found.bias is None or read is None:
            return read
        place = found.product.out_labels.index("n")
        own = pure(dims)
        return None if own is None else read + self._leaf(found.bias, (own[place],))

    # Stages

    def _own(self, node: fx.Node, dims: Dims) -> tuple[tuple[Atoms, ...], tuple[bool, ...]]:
        """Coordinates of the stage: those of its reader, or new ones where those are computed."""
        private = tuple(isinstance(d, Expr) for d in dims)
        own = tuple(
            self.axes.fresh(size) if isinstance(d, Expr) else d
            for size, d in zip(shape_of(node), dims, strict=True)
        )
        return own, private

    def _made(
        self, kind: str, node: fx.Node, own: tuple[Atoms, ...], private: tuple[bool, ...],
        dims: Dims, body: Expr, folded: Atoms = (), *, factor: float = 1.0,
    ) -> Expr | None:  # fmt: skip
        name = f"T{len(self.stages)}"
        stage = Stage(name, kind, node, own, private, body, folded, factor)
        self.stages[name] = stage
        return self._read_stage(stage, dims)

    def _known(self, node: fx.Node, dims: Dims) -> Stage | None:
        for stage in self.stages.values():
            if stage.node is node and all(
                p or self._same(c, o)
                for p, c, o in zip(stage.private, dims, stage.dims, strict=True)
            ):
                return stage
        return None

    def _same(self, coord: Coord, own: Atoms) -> bool:
        return not isinstance(coord, Expr) and self.axes.resolve(coord) == self.axes.resolve(own)

    def _read_stage(self, stage: Stage, dims: Dims) -> Expr | None:
        index: list[Expr] = []
        for own, private, coord in zip(stage.dims, stage.private, dims, strict=True):
            if not private:
                index += [atom_rank(a) for a in own]
                continue
            place = coordinate(coord, self.axes)
            if place is None:
                return None
            index += [place] if own else []
        read: Expr = Read(stage.name, tuple(index))
        return read if stage.factor == 1.0 else read * stage.factor


_SAME_VALUES = ("to", "_to_copy", "type_as")


def is_self_read(stage: Stage, read: Read) -> bool:
    """True where a read has the coordinates of the stage itself."""
    return read.index == tuple(Rank(f"@{a}") for a in stage.atoms)


def stages_of(
    anchor: fx.Node, module: torch.nn.Module, first: Way, last: Way | None = None
) -> tuple[StageLifter, Stage | None]:
    """The stages up to the product of ``last`` (``first``, if None), and that product's own.

    The axis that the product of ``first`` sums over is the keys.
    """
    axes, product, end = Axes(), first.product, first if last is None else last
    sizes = product.sizes()
    bound = {(product.node, x): axes.line(sizes[x]) for x in product.contracted}
    labels = product.left_labels if first.map_on_left else product.right_labels
    keys = tuple(a for x in labels if (product.node, x) in bound for a in bound[product.node, x])
    lifter = StageLifter(axes, module, Region(anchor, keys, first.nodes | end.nodes, bound))
    node = end.product.node
    dims = tuple(axes.fresh(s) for s in shape_of(node))
    lifter.know_sizes((*dims, keys))
    found = lifter.lift(node, dims)
    root = lifter.stages.get(found.tensor) if isinstance(found, Read) else None
    return lifter, root if root is not None and root.node is node else None
