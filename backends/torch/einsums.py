"""Any cascade as plain ATen operators, Einsum by Einsum; iterative ranks are written out."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.torch.dense import DenseSpace, size
from attn_rewrite.backends.torch.emit import Emitter, StraightThrough, cast, dtype_of, value_of
from attn_rewrite.backends.torch.tidy import expanded, filled, is_same_size, squeezed
from attn_rewrite.cascade.expr import (
    TRUE,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjunction,
    ranks_of,
    substitute,
    walk,
)
from attn_rewrite.cascade.extents import extents as solve_extents
from attn_rewrite.cascade.extents import largest
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.graph import Builder, EagerBuilder, aten

Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_REDUCTIONS: dict[str, tuple[Any, float]] = {
    "add": (aten.sum.dim_IntList, 0.0),
    "max": (aten.amax.default, -math.inf),
    "min": (aten.amin.default, math.inf),
    "mul": (aten.prod.dim_int, 1.0),
    "or": (aten.any.dim, 0.0),
    "and": (aten.all.dim, 1.0),
}
_SCATTERED = {"add": "sum", "max": "amax", "min": "amin", "mul": "prod"}
_BY_DIM = ("mul", "or", "and")  # operators that reduce one dimension at a time


def lower_cascade_to_callable(cascade: Cascade) -> Function:
    """A function from input tensors to output tensors by name, running torch operators.

    Inputs have the declared ranks as dimensions; float outputs have the type of the first one
    that is floating.
    Raises `ValueError` where `why_not_unrolled` says why not.
    """
    reason = why_not_unrolled(cascade)
    if reason is not None:
        raise ValueError(reason)
    return lambda inputs: emit_cascade(EagerBuilder(), cascade, inputs)


def why_not_unrolled(cascade: Cascade) -> str | None:
    """Why a cascade cannot be written out, or None."""
    loop_ranks = {s.rank for s in cascade.body if isinstance(s, Loop)}
    for e in cascade.einsums():
        for index in e.out.index:
            if isinstance(index, Rank | Const | Extent) or not ranks_of(index) - loop_ranks:
                continue
            if len(ranks_of(index)) > 1 or largest(index) is None or loop_ranks:
                return (
                    f"cascade {cascade.name} writes {e.out} through the computed index {index}; "
                    f"plain ranks, blocks of one rank and loop coordinates are lowered"
                )
    return None


def emit_stages(build: Builder, cascade: Cascade, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of the stages of an attention by name, in float64.

    Scales and codes follow the oracle to the last bit: a code that rounds the other way is an error
    of a whole step.  Rounding passes gradients straight through (Bengio et al. 2013).
    """
    first = next(iter(inputs.values()))
    machine = _Machine(
        build, cascade, inputs, value_of(first).device, torch.float64, emitter=StraightThrough
    )
    for e in machine.statements():
        machine.run(e)
    return {name: machine.value(name) for name in cascade.outputs}


def emit_cascade(build: Builder, cascade: Cascade, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of ``cascade`` by name, computed in float32 or wider.

    They have the type of the first floating input; it is float64 that is computed in if any is.
    """
    first = next(iter(inputs.values()))
    kinds = [k for k in map(dtype_of, inputs.values()) if k is not None and k.is_floating_point]
    kind = kinds[0] if kinds else None
    dtype = torch.float64 if torch.float64 in kinds else torch.float32
    machine = _Machine(build, cascade, inputs, value_of(first).device, dtype)
    for e in machine.statements():
        machine.run(e)
    results = {name: machine.value(name) for name in cascade.outputs}
    if kind is not None:
        floats = (n for n, v in results.items() if _is_float(v))
        results |= {n: cast(build, results[n], kind) for n in floats}
    return results


def _is_float(value: Any) -> bool:
    dtype = dtype_of(value)
    return dtype is not None and dtype.is_floating_point


@dataclass
class _Machine:
    """Tensors by name while the Einsums are emitted.

    A dimension that a loop counts is not a dimension of a tensor here: ``slots`` holds one tensor
    per coordinate.
    """

    build: Builder
    cascade: Cascade
    inputs: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    tensors: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, dict[tuple[int, ...], Any]] = field(default_factory=dict)
    emitter: type[Emitter] = Emitter
    steps: Mapping[str, Expr] = field(
        default_factory=dict
    )  # loop coordinates of the Einsum at hand

    def __post_init__(self) -> None:
        self.tensors = {
            n: cast(self.build, t, self.dtype) if _is_float(t) else t
            for n, t in self.inputs.items()
        }
        self.extents = self._extents()
        self.defaults = {t.name: t.default for t in self.cascade.tensors}
        self.counted = self._counted()

    def _extents(self) -> dict[str, Any]:
        shapes = {n: tuple(value_of(t).shape) for n, t in self.inputs.items()}
        if all(isinstance(s, int) for shape in shapes.values() for s in shape):
            return dict(solve_extents(self.cascade, shapes))
        found: dict[str, Any] = {r.name: r.size for r in self.cascade.ranks if r.size is not None}
        for decl in self.cascade.inputs:
            for dim, rank in enumerate(decl.ranks):
                found.setdefault(
                    rank, self._once(size(self.build, self.inputs[decl.name], dim), found)
                )
        for whole in (r for r in self.cascade.ranks if len(r.parts) == 2 and r.name in found):
            outer, inner = whole.parts
            if outer not in found and isinstance(found.get(inner), int):
                found[outer] = self._tiles(found[whole.name], found[inner])
        return found

    def _once(self, extent: Any, found: Mapping[str, Any]) -> Any:
        """``extent``, or an equal one that is ``found``: what follows of it is computed once."""
        return next((known for known in found.values() if is_same_size(known, extent)), extent)

    def _tiles(self, whole: Any, tile: int) -> Any:
        """How many tiles cover a dynamic extent; the last one may be cut."""
        return self.build.call(
            operator.floordiv, self.build.call(operator.add, whole, tile - 1), tile
        )

    def _counted(self) -> dict[str, tuple[int, ...]]:
        """Dimensions of each tensor written here that a loop counts."""
        found: dict[str, set[int]] = {}
        for loop in (s for s in self.cascade.body if isinstance(s, Loop)):
            for e in loop.body:
                for dim, index in enumerate(e.out.index):
                    if loop.rank in ranks_of(index):
                        found.setdefault(e.out.tensor, set()).add(dim)
        return {name: tuple(sorted(dims)) for name, dims in found.items()}

    # Statements

    def statements(self) -> Iterator[Einsum]:
        """Einsums in the order they run, loop coordinates and extents as literals."""
        for s in self.cascade.body:
            if isinstance(s, Einsum):
                yield self._at(s, {})
                continue
            yield from (self._at(e, {}) for e in s.init)
            steps = range(int(self.extents[s.rank]))
            for step in reversed(steps) if s.descending else steps:
                yield from (self._at(e, {Rank(s.rank): Const(step)}) for e in s.body)

    def _at(self, e: Einsum, at: dict[Expr, Expr]) -> Einsum:
        fixed = {r: n for r, n in self.extents.items() if isinstance(n, int)}
        used = set(self._frame(e))
        self.steps = {r.name: i for r, i in at.items() if isinstance(r, Rank) and r.name in used}
        mapping: dict[Expr, Expr] = {**at, **{Extent(r): Const(n) for r, n in fixed.items()}}
        if not mapping:
            return e

        def put(expr: Expr) -> Expr:
            return substitute(expr, mapping)

        out = Read(e.out.tensor, tuple(simplify(put(i)) for i in e.out.index))
        return replace(e, out=out, expr=put(e.expr), guard=put(e.guard))

    def run(self, e: Einsum) -> None:
        """Emit one Einsum and note its output."""
        frame = self._frame(e)
        dims = self.counted.get(e.out.tensor, ())
        # A computed index (a block of a rank) keeps the rank until its points are folded together.
        kept = [r for d, i in enumerate(e.out.index) if d not in dims for r in ranks_of(i)]
        value = self._value(e, frame, kept)
        for dim, index in enumerate(e.out.index):
            if dim not in dims and not isinstance(index, Rank | Const | Extent):
                value = self._scattered(e, value, dim, index)
        if dims:
            at = tuple(_literal(e.out.index[d]) for d in dims)
            self.slots.setdefault(e.out.tensor, {})[at] = value
        else:
            self.tensors[e.out.tensor] = value

    def _frame(self, e: Einsum) -> tuple[str, ...]:
        """Ranks the Einsum iterates: those of the output first."""
        out = [r for i in e.out.index for r in ranks_of(i)]
        inside = [n.name for part in (e.expr, e.guard) for n in walk(part) if isinstance(n, Rank)]
        return tuple(dict.fromkeys([*out, *inside, *(r for r, _ in e.reduce)]))

    def _scattered(self, e: Einsum, value: Any, dim: int, index: Expr) -> Any:
        """Fold the points of one dimension that land on the same coordinate of the output."""
        (rank,) = ranks_of(index)
        line = DenseSpace(self.build, self.device, self.dtype, (rank,), self.extents, {})
        emitter = Emitter(self.build, line)
        top = largest(index)
        assert top is not None
        sizes = [size(self.build, value, d) for d in range(value_of(value).ndim)]
        groups = [emitter.emit(top + 1) if d == dim else n for d, n in enumerate(sizes)]
        decl = next((t for t in self.cascade.tensors if t.name == e.out.tensor), None)
        if decl is not None:  # later Einsums may iterate the groups
            self.extents.setdefault(decl.ranks[dim], groups[dim])
        operation = dict(e.reduce).get(rank, "add")
        start = _REDUCTIONS[operation][1]  # of groups without a point; nothing reads them
        target = self.build.call(
            aten.full.default, groups, start, dtype=dtype_of(value), device=self.device
        )
        at = emitter.tensor(index, torch.int64)
        at = self.build.call(
            aten.reshape.default, at, [-1 if d == dim else 1 for d in range(len(sizes))]
        )
        at = self.build.call(aten.expand.default, at, sizes)
        reduce = _SCATTERED[operation]
        return self.build.call(aten.scatter_reduce.two, target, dim, at, value, reduce)

    # Values

    def value(self, name: str) -> Any:
        """A whole tensor; slots of a loop are stacked in order."""
        if name in self.tensors:
            return self.tensors[name]
        (dim,) = self.counted[name]
        parts = [self.slots[name][at] for at in sorted(self.slots[name])]
        self.tensors[name] = self.build.call(aten.stack.default, parts, dim)
        return self.tensors[name]

    def _emitter(self, frame: tuple[str, ...], parts: Sequence[Expr]) -> Emitter:
        """An emitter over ``frame`` that knows the slots the expressions read."""
        known: dict[Expr, Any] = {}
        reads = {n for part in parts for n in walk(part) if isinstance(n, Read)}
        views = {r.tensor: self.tensors[r.tensor] for r in reads if r.tensor in self.tensors}
        space = DenseSpace(self.build, self.device, self.dtype, frame, self.extents, views)
        emitter = self.emitter(self.build, space, known)
        for read in reads:
            dims = self.counted.get(read.tensor, ())
            if not dims or read.tensor in self.tensors:
                continue
            index = [simplify(i) for i in read.index]
            if all(isinstance(index[d], Const) for d in dims):
                slot = self.slots[read.tensor][tuple(_literal(index[d]) for d in dims)]
                names = [
                    i.name for d, i in enumerate(index) if d not in dims and isinstance(i, Rank)
                ]
                emitter.know(read, space.placed(slot, names))
            else:
                views[read.tensor] = self.value(read.tensor)
        return emitter

    def _value(self, e: Einsum, frame: tuple[str, ...], kept: list[str]) -> Any:
        guard = self._guard(e, frame)
        emitter = self._emitter(frame, (e.expr, guard))
        folded = [r for r in frame if r not in kept]
        operators = dict(e.reduce)
        mask = None if guard == TRUE else emitter.truth(guard)
        factors, default = _factors(e.expr), self.defaults.get(e.out.tensor, 0.0)
        if folded and len(factors) > 1 and set(operators.values()) <= {"add"}:
            if mask is None or ranks_of(guard) & set(folded):
                return self._contracted(factors, emitter, frame, kept, mask)
            value = self._contracted(factors, emitter, frame, kept, None)
            return self._filled(value, self._without(mask, frame, kept), default)
        value = self._full(emitter.tensor(e.expr), frame)
        if mask is not None:
            fill = _REDUCTIONS[_first(folded, operators)][1] if folded else default
            value = self._filled(value, mask, fill)
        value = self._reduced(value, frame, folded, operators)
        if mask is not None and folded:
            value = self._untouched(value, mask, frame, folded, operators, default)
        return self._without(value, frame, kept)

    def _full(self, value: Any, frame: tuple[str, ...]) -> Any:
        """``value`` over every point of the frame."""
        return expanded(self.build, value, [self.extents[r] for r in frame])

    def _filled(self, value: Any, mask: Any, fill: float) -> Any:
        if dtype_of(value) == torch.bool:
            return self.build.call(
                aten.logical_and.default if not fill else aten.logical_or.default,
                value,
                mask if not fill else self.build.call(aten.logical_not.default, mask),
            )
        if not _is_float(value):
            value = cast(self.build, value, self.dtype)
        dropped = self.build.call(aten.logical_not.default, mask)
        return filled(self.build, value, dropped, fill)

    def _reduced(
        self, value: Any, frame: tuple[str, ...], folded: list[str], operators: dict[str, str]
    ) -> Any:
        """Summed ranks first, then the listed ones in their order; dimensions stay, of extent 1."""
        for rank in [
            *(r for r in folded if r not in operators),
            *(r for r in operators if r in folded),
        ]:
            name, dim = operators.get(rank, "add"), frame.index(rank)
            op = _REDUCTIONS[name][0]
            value = self.build.call(op, value, dim if name in _BY_DIM else [dim], True)
        return value

    def _untouched(
        self, value: Any, mask: Any, frame: tuple[str, ...], folded: list[str],
        operators: dict[str, str], default: float,
    ) -> Any:  # fmt: skip
        """The default where no point of the guard was folded in."""
        if _REDUCTIONS[_first(folded, operators)][1] == default:
            return value
        touched = self._full(mask, frame)
        for rank in folded:
            touched = self.build.call(aten.any.dim, touched, frame.index(rank), True)
        return self._filled(value, touched, default)

    def _without(self, value: Any, frame: tuple[str, ...], kept: list[str]) -> Any:
        """Drop folded dimensions and order the rest as the output has them."""
        gone = [d for d, r in enumerate(frame) if r not in kept]
        value = squeezed(self.build, value, gone)
        left = [r for r in frame if r in kept]
        order = [left.index(r) for r in kept]
        if order != list(range(len(order))):
            value = self.build.call(aten.permute.default, value, order)
        return value

    def _contracted(
        self, factors: tuple[Expr, ...], emitter: Emitter, frame: tuple[str, ...],
        kept: list[str], mask: Any,
    ) -> Any:  # fmt: skip
        """A sum of products by einsum, so that the product is not written out."""
        letters = {r: chr(ord("a") + i) for i, r in enumerate(frame)}
        values, terms, seen = [], [], set()
        for position, factor in enumerate(factors):
            value = emitter.tensor(factor, self.dtype)
            if not value_of(value).shape:  # a number
                value = self.build.call(aten.reshape.default, value, [1] * len(frame))
            if position == 0:
                # Ranks that no factor varies over are carried by the first one.
                missing = set(frame) - set().union(*map(ranks_of, factors))
                value = self._over(value, frame, ranks_of(factor) | missing)
                if mask is not None:
                    value = self._filled(self._full(value, frame), mask, 0.0)
            ranks = [
                r for d, r in enumerate(frame) if not _is_one(value, d) or r in ranks_of(factor)
            ]
            gone = [d for d, r in enumerate(frame) if r not in ranks]
            values.append(squeezed(self.build, value, gone))
            terms.append("".join(letters[r] for r in ranks))
            seen |= set(ranks)
        equation = f"{','.join(terms)}->{''.join(letters[r] for r in kept)}"
        return self.build.call(aten.einsum.default, equation, values)

    def _over(self, value: Any, frame: tuple[str, ...], ranks: frozenset[str] | set[str]) -> Any:
        shape = [self.extents[r] if r in ranks else -1 for r in frame]
        return expanded(self.build, value, shape)

    def _guard(self, e: Einsum, frame: tuple[str, ...]) -> Expr:
        """The guard, and that a split rank has no points beyond its extent."""
        terms = [] if e.guard == TRUE else [e.guard]
        for rank in self.cascade.ranks:
            if len(rank.parts) != 2 or rank.name in frame:
                continue
            whole = self._coordinate(rank.name, frame)
            if whole is not None and not self._divides(rank):
                terms.append(simplify(call("lt", whole, Extent(rank.name))))
        return conjunction(tuple(terms))

    def _divides(self, rank: RankDecl) -> bool:
        """True if the parts of a split rank are known to have no points beyond its extent."""
        outer, inner, whole = (self.extents[r] for r in (*rank.parts, rank.name))
        fixed = all(isinstance(n, int) for n in (outer, inner, whole))
        return fixed and outer * inner == whole

    def _coordinate(self, rank: str, frame: tuple[str, ...]) -> Expr | None:
        """The coordinate of a rank from the loop and the sub-ranks that are iterated."""
        if rank in frame:
            return Rank(rank)
        if rank in self.steps:
            return self.steps[rank]
        parts = next((r.parts for r in self.cascade.ranks if r.name == rank), ())
        if len(parts) != 2:
            return None
        outer, inner = (self._coordinate(p, frame) for p in parts)
        if outer is None or inner is None:
            return None
        whole: Expr = outer * Extent(parts[1]) + inner
        return whole


def _is_one(value: Any, dim: int) -> bool:
    found = value_of(value).shape[dim]
    return isinstance(found, int) and found == 1


def _first(folded: list[str], operators: dict[str, str]) -> str:
    """The operator applied first: a filtered point must be its identity."""
    plain = [r for r in folded if r not in operators]
    return "add" if plain else next(operators[r] for r in operators if r in folded)


def _factors(expr: Expr) -> tuple[Expr, ...]:
    match expr:
        case Call("mul", (a, b)):
            return _factors(a) + _factors(b)
    return (expr,)


def _literal(index: Expr) -> int:
    assert isinstance(index, Const), f"{index} is not a coordinate"
    return int(index.value)
