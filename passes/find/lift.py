"""Lift nodes to expressions: what each element of a tensor is, as a function of its coordinates.

`Lifter.lift(node, dims)` pulls the coordinates of ``node`` back through elementwise and layout
operators to index arithmetic (``arange``, ``tril``, comparisons), products, constants, and
*leaves*: tensors read as they are.  Masks and scores are both lifted this way, so that a mask is
recognised by what it computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank, Read, call, walk
from attn_rewrite.cascade.simplify import is_boolean, simplify
from attn_rewrite.graph import arguments, is_tensor, op_name, shape_of, value_of
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.bands import bands_of, written
from attn_rewrite.passes.find.constants import Constants, stored
from attn_rewrite.passes.find.layout import Coord, Dims, atom_rank, coordinate, pull, pure
from attn_rewrite.passes.find.operators import RULES, literal
from attn_rewrite.passes.find.product import Product, outer_product, product_of
from attn_rewrite.passes.find.vmapped import ENTER, LEAVE, mapped
from attn_rewrite.sizes import as_size, same_size

# An expression larger than this is read as a tensor instead.
MAX_NODES = 120
# ... but for a score, in which the product must stay visible beside a long mask.
MAX_SCORE_NODES = 1200
MAX_DEPTH = 64
# Stands for a known extent while a size is solved for its symbol.
_WHOLE = sympy.Symbol("whole")


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of the host graph read at pure coordinates."""

    name: str
    node: fx.Node
    dims: tuple[Atoms, ...]


@dataclass(frozen=True, eq=False)
class Dot:
    """A product met on the way: candidate for the score product."""

    name: str
    product: Product
    dims: tuple[Atoms, ...]  # coordinates of the product's output
    atoms: dict[str, Atoms]  # of every label, contracted ones included

    def operand(self, left: bool) -> tuple[fx.Node, tuple[Atoms, ...]]:
        """One operand and the atoms of its dimensions."""
        p = self.product
        node, labels = (p.left, p.left_labels) if left else (p.right, p.right_labels)
        return node, tuple(self.atoms[x] if x else () for x in labels)


class Lifter:
    """Lifts nodes of one graph in the coordinates of one site."""

    def __init__(self, axes: Axes, module: torch.nn.Module, *, outer: bool = False) -> None:
        """With ``outer`` a broadcasting multiplication counts as a product of width 1."""
        self.axes = axes
        self.module = module
        self.outer = outer
        self.bound: dict[fx.Node, Expr | fx.Node] = {}  # inputs of a graph that is called
        self.places: dict[Expr, Atoms] = {}  # axes whose coordinate is an expression
        self.leaves: dict[str, Leaf] = {}
        self.dots: dict[str, Dot] = {}
        self.constants = Constants(self.module)
        self._memo: dict[tuple[Any, ...], Expr | None] = {}
        self._symbols: dict[Any, Expr] = {}
        self._levels: dict[int, Coord] = {}  # coordinate of each open level of vmap
        self._mapped: dict[fx.Graph, frozenset[fx.Node]] = {}

    def know_sizes(self, dims: tuple[Atoms, ...]) -> None:
        """Let symbolic sizes that are the extent of an axis be written as that extent."""
        for dim in dims:
            for atom in self.axes.resolve(dim):
                size = self.axes.size(atom)
                if isinstance(size, int):
                    continue
                free = [s for s in size.free_symbols if s not in self._symbols]
                if len(free) != 1:
                    continue
                solved = _solution(size, free[0], _WHOLE)
                if solved is not None:
                    self._symbols[_WHOLE] = Extent(f"@{atom}")
                    known = self._size_expr(solved)
                    del self._symbols[_WHOLE]
                    if known is not None:
                        self._symbols[free[0]] = known

    def lift(self, node: fx.Node, dims: Dims, depth: int = 0) -> Expr | None:
        """The expression of ``node`` at ``dims``; a leaf where nothing more is known.

        None only where ``dims`` are not pure and the node is not understood.
        """
        key = (node, dims, tuple(self._levels.items()))
        if key in self._memo:
            return self._memo[key]
        expr = self._open(node, dims, depth) if depth < MAX_DEPTH else None
        if (expr is None or self._reads_tensors(expr)) and not self._is_inside(node):
            known = self._made_of_sizes(node, dims)
            expr = expr if known is None else known
        if expr is not None:
            expr = simplify(expr)
            own = {a for d in pure(dims) or () for a in self.axes.resolve(d)}
            covers = len(own) == len(
                {r for n in walk(expr) if isinstance(n, Read) for r in n.index}
            )
            if (self._is_plain_data(expr) and covers) or self._is_too_large(expr):
                expr = None
        if expr is None:
            atoms = pure(dims)
            hidden = (self._levels and self._is_mapped(node)) or self._is_inside(node)
            expr = None if atoms is None or hidden else self._leaf(node, atoms)
        self._memo[key] = expr
        return expr

    def _is_mapped(self, node: fx.Node) -> bool:
        """True for a node whose value has no dimension for some level of vmap."""
        if node.graph not in self._mapped:
            self._mapped[node.graph] = mapped(node.graph)
        return node in self._mapped[node.graph]

    def _is_inside(self, node: fx.Node) -> bool:
        """True for a node of a graph that is called: nothing outside can read it."""
        return any(node.graph is n.graph for n in self.bound)

    def _is_too_large(self, expr: Expr) -> bool:
        size = sum(1 for _ in walk(expr))
        if size <= MAX_NODES:
            return False
        return not self._holds_product(expr) or size > MAX_SCORE_NODES

    def _reads_tensors(self, expr: Expr) -> bool:
        """True if it reads tensors, and no product."""
        read = [n for n in walk(expr) if isinstance(n, Read)]
        return bool(read) and not self._holds_product(expr)

    def _holds_product(self, expr: Expr) -> bool:
        """True if a product is read in it."""
        return any(isinstance(n, Read) and n.tensor in self.dots for n in walk(expr))

    def _is_plain_data(self, expr: Expr) -> bool:
        """No position and no product in it, and no smaller than what it reads: better read as it
        is."""
        inside = list(walk(expr))
        reads = [n for n in inside if isinstance(n, Read)]
        if not isinstance(expr, Call) or self._holds_product(expr):
            return False
        if any(
            isinstance(a, (Rank, Extent)) for n in inside if isinstance(n, Call) for a in n.args
        ):
            return False
        every = {a for r in reads for a in r.index}
        return any(set(r.index) == every for r in reads) and bool(every)

    def _leaf(self, node: fx.Node, dims: tuple[Atoms, ...]) -> Expr:
        for leaf in self.leaves.values():
            if leaf.node is node and leaf.dims == dims:
                return self._read(leaf)
        leaf = Leaf(f"L{len(self.leaves)}", node, dims)
        self.leaves[leaf.name] = leaf
        return self._read(leaf)

    def _read(self, leaf: Leaf) -> Expr:
        return Read(leaf.name, tuple(atom_rank(a) for d in leaf.dims for a in d))

    def as_leaf(self, dot: Dot) -> Expr:
        """Read a product as a tensor after all."""
        return self._leaf(dot.product.node, dot.dims)

    # -- one level
    # ----------------------------------------------------------------------------------

    def _open(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        name = op_name(node)
        if node in self.bound:
            given = self.bound[node]
            return given if isinstance(given, Expr) else self.lift(given, dims, depth + 1)
        if node.op == "get_attr":
            return self._constant(node, dims)
        if name == "to" and self._changes_kind(node):
            return self._cast(node, dims, depth)
        moved = pull(node, dims, self.axes)
        if moved is not None:
            return self.lift(*moved, depth + 1)
        if name in (ENTER, LEAVE):
            return (self._enter if name == ENTER else self._leave)(node, dims, depth)
        if name == "dropout":
            return self._dropout(node, dims, depth)
        product = product_of(node) or (outer_product(node) if self.outer else None)
        if product is not None:
            return self._dot(product, dims)
        rule = RULES.get(name if name.startswith("__") else name.removesuffix("_"))
        return None if rule is None else rule(self, node, dims, depth)

    def _leave(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        """A mapped value: the coordinate that ``vmap`` puts in belongs to the level from here
        on."""
        source, level, _, place = node.args
        if not (isinstance(source, fx.Node) and isinstance(level, int) and isinstance(place, int)):
            return None
        place %= len(dims)
        before = dict(self._levels)
        self._levels[level] = dims[place]
        try:
            return self.lift(source, (*dims[:place], *dims[place + 1 :]), depth + 1)
        finally:
            self._levels = before

    def _enter(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        """What a function is mapped over: the level's coordinate is a dimension again."""
        source, place, level = node.args
        if not (isinstance(source, fx.Node) and isinstance(level, int) and isinstance(place, int)):
            return None
        if level not in self._levels:
            return None
        place %= len(dims) + 1
        before = dict(self._levels)
        inner = (*dims[:place], self._levels.pop(level), *dims[place:])
        try:
            return self.lift(source, inner, depth + 1)
        finally:
            self._levels = before

    def _dot(self, product: Product, dims: Dims) -> Expr | None:
        out = pure(dims)
        if out is None:
            return None
        atoms = {x: d for x, d in zip(product.out_labels, out, strict=True) if x}
        sizes = product.sizes()
        for label in product.contracted:
            atoms[label] = self.axes.fresh(sizes[label])
        outer = set(product.left_labels) ^ set(product.right_labels)
        if not product.contracted and (
            len(outer) < 2 or not (self.outer or op_name(product.node) == "einsum")
        ):
            return None  # an outer product written as an einsum is one of width 1
        dot = Dot(f"D{len(self.dots)}", product, out, atoms)
        self.dots[dot.name] = dot
        return Read(dot.name)

    def _dropout(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        named = arguments(node)
        if named["train"] and named["p"]:
            return None
        return self.lift(named["input"], dims, depth + 1)

    def _changes_kind(self, node: fx.Node) -> bool:
        source = node.args[0]
        if not is_tensor(source):
            return False
        assert isinstance(source, fx.Node)
        before, after = value_of(source).dtype, value_of(node).dtype
        return before != after and not (before.is_floating_point and after.is_floating_point)

    def _cast(self, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        inner = self.lift(source, dims, depth + 1)
        after = value_of(node).dtype
        if inner is None:
            return None
        if after == torch.bool:
            return inner if is_boolean(inner) else call("ne", inner, 0)
        if value_of(source).dtype == torch.bool and not is_boolean(inner):
            return None  # a mask read as a tensor stays one tensor read, cast in the graph
        if after.is_floating_point or not value_of(source).dtype.is_floating_point:
            return call("cast_f32" if after.is_floating_point else "cast_i64", inner)
        return _in_whole_numbers(inner)

    def _constant(self, node: fx.Node, dims: Dims) -> Expr | None:
        module = node.graph.owning_module if self._is_inside(node) else self.module
        value = stored(module, node)
        if value is None:
            return None
        if value.numel() == 1:
            return literal(value.reshape(()).item())
        return self._band(value, dims)

    def _band(self, value: torch.Tensor, dims: Dims) -> Expr | None:
        """A known tensor of two values in bands along the diagonal, read at two coordinates."""
        pieces = bands_of(value)
        if pieces is None or any(coordinate(d, self.axes) != Const(0) for d in dims[:-2]):
            return None
        row, column = (coordinate(d, self.axes) for d in dims[-2:])
        if row is None or column is None:
            return None
        found = written(pieces, row, column)
        return None if found is None else simplify(found)

    def _made_of_sizes(self, node: fx.Node, dims: Dims) -> Expr | None:
        """A tensor that no rule reads, and that depends on nothing but fixed sizes."""
        if self._levels or node.op != "call_function" or len(dims) < 2:
            return None
        value = self.constants.value(node)
        return None if value is None else self._band(value, dims)

    # -- operands
    # -----------------------------------------------------------------------------------

    def operand(self, arg: Any, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        """Lift an argument of an elementwise operator, with broadcasting."""
        if isinstance(arg, (bool, int, float)):
            return literal(arg)
        if not isinstance(arg, fx.Node):
            return None
        value = arg.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return self._size_expr(as_size(value))
        if not isinstance(value, torch.Tensor):
            return None
        shape, whole = shape_of(arg), shape_of(node)
        if len(shape) > len(whole):
            return None  # a boolean index: it has the axes of what it picks from
        inner = dims[len(dims) - len(shape) :]
        own: Dims = tuple(
            () if same_size(as_size(s), 1) and not same_size(as_size(w), 1) else d
            for s, w, d in zip(shape, whole[len(whole) - len(shape) :], inner, strict=True)
        )
        return self.lift(arg, own, depth + 1)

    def _size_expr(self, size: Any) -> Expr | None:
        if isinstance(size, int):
            return Const(size)
        if size in self._symbols:
            return self._symbols[size]
        if getattr(size, "is_Integer", False):
            return Const(int(size))
        if isinstance(size, (sympy.Add, sympy.Mul)):
            parts = [self._size_expr(a) for a in size.args]
            if any(p is None for p in parts):
                return None
            op = "add" if isinstance(size, sympy.Add) else "mul"
            total = parts[0]
            for part in parts[1:]:
                assert total is not None
                assert part is not None
                total = call(op, total, part)
            return total
        return None


def _in_whole_numbers(expr: Expr) -> Expr | None:
    """``expr`` as an integer of any width, where it is a choice between small whole numbers."""
    if isinstance(expr, Const):
        small = math.isfinite(expr.value) and 0 <= expr.value <= 127
        return Const(int(expr.value)) if small and expr.value == int(expr.value) else None
    if isinstance(expr, Call) and expr.op == "where":
        yes, no = (_in_whole_numbers(a) for a in expr.args[1:])
        return None if yes is None or no is None else call("where", expr.args[0], yes, no)
    return None


def _solution(size: Any, symbol: Any, whole: Any) -> Any | None:
    """``symbol`` where ``size == whole``, for sizes linear in it (``s // 10`` has no inverse)."""
    slope = sympy.diff(size, symbol) if size.is_polynomial(symbol) else None
    if slope is None or slope.free_symbols or slope == 0:
        return None
    return (whole - size.subs(symbol, 0)) / slope
