"""The oracle: interprets a cascade in float64, slowly and obviously, independent of every kernel.

Each Einsum is evaluated as it is written, as torch operations over its whole iteration space; the
steps of an iterative rank run one after the other.  Semantics (Nayak et al., MICRO 2024, section II):

* a point outside the guard, outside the whole of a split rank, or where a divisor of the outermost
  product is 0, is not touched; an output point that no touched point lands on keeps the tensor's default;
* ranks that the output does not carry are folded: those not listed in ``reduce`` are summed first,
  then the listed ones in their order;
* points that land on the same output coordinate (an index such as ``m // 2`` or a table) are folded too;
* a declared float type does not round, casts do; integer and bool tensors hold integers and truths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
    conjuncts,
    ranks_of,
    walk,
)
from attn_rewrite.cascade.extents import extents, shift_of
from attn_rewrite.cascade.infer import IDENTITY
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, TensorDecl
from attn_rewrite.cascade.values import Frame, evaluate, real, truth
from attn_rewrite.errors import CascadeError

_CHUNK = 1 << 25  # points evaluated at a time where a rank of the output can be cut


def interpret(
    cascade: Cascade,
    inputs: Mapping[str, Tensor | float],
    sizes: Mapping[str, int] | None = None,
    *,
    also: Iterable[str] = (),
) -> dict[str, Tensor]:
    """The outputs of ``cascade`` by name, in float64 (int64 and bool where so declared).

    ``inputs`` has one tensor per declared input, with the declared ranks as dimensions, in any dtype;
    ``sizes`` gives extents that no input has (and, if wanted, of sub-ranks); ``also`` names
    intermediates to return besides the outputs.  A row whose keys are all filtered out gives 0.
    Raises `CascadeError` for missing or unknown inputs, shapes that disagree and reads outside a tensor.
    """
    _check_inputs(cascade, inputs)
    tensors = {n: torch.as_tensor(v) for n, v in inputs.items()}
    found = extents(cascade, {n: tuple(v.shape) for n, v in tensors.items()}, sizes)
    machine = _Machine(cascade, tensors, found)
    machine.run()
    names = [*cascade.outputs, *also]
    for name in names:
        if name not in machine.tensors:
            raise CascadeError(f"cascade {cascade.name} has no tensor {name}")
    return {name: machine.tensors[name] for name in names}


def _check_inputs(cascade: Cascade, inputs: Mapping[str, Tensor | float]) -> None:
    declared = [t.name for t in cascade.inputs]
    missing = [n for n in declared if n not in inputs]
    unknown = [n for n in inputs if n not in declared]
    if missing or unknown:
        what = f"needs input {missing[0]}" if missing else f"has no input {unknown[0]}"
        raise CascadeError(f"cascade {cascade.name} {what}; its inputs are {', '.join(declared)}")


@dataclass(frozen=True)
class _Points:
    """Folded values of an Einsum over the output ranks, and which of them were touched (None: all)."""

    values: Tensor
    touched: Tensor | None


class _Machine:
    """Tensors by name while the statements run."""

    def __init__(
        self, cascade: Cascade, inputs: Mapping[str, Tensor], sizes: dict[str, int]
    ) -> None:
        self.cascade, self.extents = cascade, sizes
        self.decls = {t.name: t for t in (*cascade.inputs, *cascade.tensors)}
        self.device = next((t.device for t in inputs.values()), torch.device("cpu"))
        self.tensors = {n: self._stored(n, t) for n, t in inputs.items()}

    def _stored(self, name: str, value: Tensor) -> Tensor:
        """Floats as float64; integers and truths as they are, unless a type is declared."""
        declared = self.decls.get(name, TensorDecl(name, ())).dtype
        if declared == "bool":
            return truth(value)
        if declared.startswith("i"):
            return value.to(torch.int64)
        return value if not value.is_floating_point() else real(value)

    def run(self) -> None:
        for statement in self.cascade.body:
            if isinstance(statement, Einsum):
                self.einsum(statement, {})
                continue
            for e in statement.init:
                self.einsum(e, {})
            for step in self._steps(statement):
                at = {statement.rank: torch.arange(step, step + 1, device=self.device)}
                for e in statement.body:
                    self.einsum(e, at)

    def _steps(self, loop: Loop) -> Iterable[int]:
        steps = range(self.extents[loop.rank])
        return reversed(steps) if loop.descending else steps

    def einsum(self, e: Einsum, at: Mapping[str, Tensor]) -> None:
        """Evaluate one Einsum at the loop coordinates ``at`` and write its output."""
        ranks = _iteration_ranks(e)
        coordinates = {
            r: at[r] if r in at else torch.arange(self.extents[r], device=self.device)
            for r in ranks
        }
        if e.out.tensor not in self.tensors:
            self.tensors[e.out.tensor] = self._empty(e.out.tensor)
        self._evaluate(e, Frame(ranks, coordinates, self.extents, self.tensors))

    def _evaluate(self, e: Einsum, frame: Frame) -> None:
        guard = conjunction((*self._split_guards(frame), *conjuncts(e.guard)))
        mask = None if guard == TRUE else truth(evaluate(guard, frame))
        points = self._contract(e, frame, mask)
        if points is None:
            cut = _cut(e, frame)
            if cut:
                for piece in cut:
                    self._evaluate(e, piece)
                return
            points = _fold_all(e, frame, mask)
        self._write(e, frame, points)

    def _split_guards(self, frame: Frame) -> list[Expr]:
        """A split rank has no points beyond its extent: the last tile may be cut."""
        guards: list[Expr] = []
        for rank in self.cascade.ranks:
            whole = self._coordinate(rank.name, frame)
            if whole is not None and not isinstance(whole, Rank):
                guards.append(whole < Const(self.extents[rank.name]))
        return guards

    def _coordinate(self, rank: str, frame: Frame) -> Expr | None:
        """The coordinate of ``rank`` from the sub-ranks that the frame iterates."""
        if rank in frame.ranks:
            return Rank(rank)
        parts = next((r.parts for r in self.cascade.ranks if r.name == rank), ())
        if len(parts) != 2:
            return None
        outer, inner = (self._coordinate(p, frame) for p in parts)
        if outer is None or inner is None or self._divides(rank, parts):
            return None
        return outer * Extent(parts[1]) + inner

    def _divides(self, rank: str, parts: tuple[str, ...]) -> bool:
        return self.extents[parts[0]] * self.extents[parts[1]] == self.extents[rank]

    # Products that are summed go through torch.einsum

    def _contract(self, e: Einsum, frame: Frame, mask: Tensor | None) -> _Points | None:
        """The sum of a product by `torch.einsum`; None where that does not say the same."""
        folded = [r for r in frame.ranks if r not in _out_ranks(e)]
        factors = _factors(e.expr)
        summed = all(op == "add" for _, op in e.reduce)
        if not folded or len(factors) < 2 or not summed or self._default(e.out.tensor) != 0:
            return None
        inner = frame if mask is None else frame.restricted(mask)
        values = [real(evaluate(f, inner)) for f in factors]
        if mask is not None:
            values = _masked(values, mask)
        counts = frame.shape()
        carried = [any(v.shape[a] == n for v in values) for a, n in enumerate(counts)]
        if not all(carried[frame.axis(r)] for r in folded):
            return None
        if mask is not None and not all(bool(v.isfinite().all()) for v in values):
            return None  # 0 * inf: a filtered point must not be seen
        kept = [a for a, r in enumerate(frame.ranks) if r not in folded]
        return _Points(_einsum(values, kept, counts), None)

    # Writing

    def _default(self, tensor: str) -> float:
        return self.decls[tensor].default if tensor in self.decls else 0.0

    def _empty(self, name: str) -> Tensor:
        """The output tensor with its default everywhere, large enough for every Einsum that writes it."""
        writers = [e for e in self.cascade.einsums() if e.out.tensor == name]
        shape = [
            max(self._reach(e.out.index[d], name) for e in writers)
            for d in range(self._ndim(writers))
        ]
        decl = self.decls.get(name)
        if decl is not None and len(decl.ranks) == len(shape):
            known = [self.extents.get(r, 0) for r in decl.ranks]
            shape = [max(pair) for pair in zip(shape, known, strict=True)]
        values = torch.full(shape, self._default(name), dtype=torch.float64, device=self.device)
        return self._stored(name, values)

    def _ndim(self, writers: list[Einsum]) -> int:
        counts = {len(e.out.index) for e in writers}
        if len(counts) > 1:
            raise CascadeError(
                f"{writers[0].out} and {writers[-1].out} differ in their number of ranks"
            )
        return counts.pop()

    def _reach(self, index: Expr, tensor: str) -> int:
        """One more than the largest coordinate that ``index`` takes; 0 for a table (declare it)."""
        if any(isinstance(n, Read) for n in walk(index)):
            if tensor not in self.decls:
                raise CascadeError(
                    f"declare the ranks of {tensor}: its index {index} is read from a table"
                )
            return 0
        ranks = tuple(sorted(ranks_of(index)))
        coordinates = {r: torch.arange(self.extents[r], device=self.device) for r in ranks}
        values = evaluate(index, Frame(ranks, coordinates, self.extents, self.tensors))
        return int(values.max()) + 1 if values.numel() else 0

    def _write(self, e: Einsum, frame: Frame, points: _Points) -> None:
        out_ranks = _out_ranks(e)
        shape = [
            n if r in out_ranks else 1 for r, n in zip(frame.ranks, frame.shape(), strict=True)
        ]
        values = points.values.expand(shape)
        touched = None if points.touched is None else points.touched.expand(shape)
        target = self.tensors[e.out.tensor]
        values = values.to(target.dtype) if target.dtype != torch.bool else truth(values)
        places = [shift_of(i) if not isinstance(i, Extent) else None for i in e.out.index]
        ranks = [p[0] for p in places if p is not None and p[0] is not None]
        plain = all(
            isinstance(i, Extent) or p is not None for i, p in zip(e.out.index, places, strict=True)
        )
        if not plain or len(set(ranks)) != len(ranks):
            self._scatter(e, frame, values, touched)
            return
        for dim in reversed(range(target.ndim)):
            target = self._narrowed(e, frame, target, dim)
        keep = [frame.axis(r) for r in ranks if r is not None]
        drop = [a for a in range(len(frame.ranks)) if a not in keep]
        values = values.permute(keep + drop).reshape(target.shape)
        if touched is not None:
            touched = touched.permute(keep + drop).reshape(target.shape)
            values = torch.where(touched, values, target)
        target.copy_(values)

    def _narrowed(self, e: Einsum, frame: Frame, target: Tensor, dim: int) -> Tensor:
        index = e.out.index[dim]
        rank, offset = (
            (None, self.extents[index.rank])
            if isinstance(index, Extent)
            else shift_of(index) or (None, 0)
        )
        if rank is None:
            return target.select(dim, offset)
        coordinates = frame.coordinates[rank]
        start = offset + (int(coordinates[0]) if len(coordinates) else 0)
        return target.narrow(dim, start, len(coordinates))

    def _scatter(self, e: Einsum, frame: Frame, values: Tensor, touched: Tensor | None) -> None:
        """Write through arbitrary indices; points that land together are folded."""
        target = self.tensors[e.out.tensor]
        flat = torch.zeros([1] * values.ndim, dtype=torch.int64, device=self.device)
        inside = torch.ones_like(values, dtype=torch.bool) if touched is None else touched
        for index, size in zip(e.out.index, target.shape, strict=True):
            at = evaluate(index, frame).to(torch.int64)
            if bool((((at < 0) | (at >= size)) & inside).any()):
                raise CascadeError(
                    f"{e.out} is written outside its extent {size} by the index {index}"
                )
            flat = flat * size + at
        where = flat.expand(values.shape)[inside]
        ops = {op for r, op in e.reduce if r in _out_ranks(e)} or {"add"}
        op = ops.pop()
        name = {
            "add": "sum",
            "mul": "prod",
            "max": "amax",
            "min": "amin",
            "or": "amax",
            "and": "amin",
        }[op]
        folded = torch.full(
            (target.numel(),), IDENTITY[op], dtype=torch.float64, device=self.device
        )
        folded.scatter_reduce_(0, where, real(values[inside]), name)
        landed = torch.zeros(target.numel(), dtype=torch.bool, device=self.device)
        landed[where] = True
        result = torch.where(landed, folded, real(target.reshape(-1))).reshape(target.shape)
        target.copy_(result if target.dtype != torch.bool else truth(result))


def _iteration_ranks(e: Einsum) -> tuple[str, ...]:
    """Ranks of the output first, then the others in order of appearance."""
    found: dict[str, None] = {}
    for part in (*e.out.index, e.expr, e.guard):
        found.update(dict.fromkeys(n.name for n in walk(part) if isinstance(n, Rank)))
    found.update(dict.fromkeys(r for r, _ in e.reduce))
    return tuple(found)


def _out_ranks(e: Einsum) -> frozenset[str]:
    return frozenset[str]().union(*(ranks_of(i) for i in e.out.index))


def _factors(expr: Expr) -> list[Expr]:
    if isinstance(expr, Call) and expr.op == "mul":
        return _factors(expr.args[0]) + _factors(expr.args[1])
    return [expr]


def _masked(values: list[Tensor], mask: Tensor) -> list[Tensor]:
    """The factors with the mask in the one that spans it, or as a factor of its own."""
    for i, value in enumerate(values):
        if all(v >= m for v, m in zip(value.shape, mask.shape, strict=True)):
            return [*values[:i], torch.where(mask, value, 0.0), *values[i + 1 :]]
    return [real(mask), *values]


def _einsum(values: list[Tensor], kept: list[int], counts: list[int]) -> Tensor:
    letters = [chr(ord("a") + a) if a < 26 else chr(ord("A") + a - 26) for a in range(len(counts))]
    operands, words = [], []
    for v in values:
        axes = [a for a, n in enumerate(v.shape) if n != 1 or counts[a] == 1]
        operands.append(v.reshape([v.shape[a] for a in axes]))
        words.append("".join(letters[a] for a in axes))
    out = [a for a in kept if any(letters[a] in w for w in words)]
    result = torch.einsum(f"{','.join(words)}->{''.join(letters[a] for a in out)}", *operands)
    return result.reshape([counts[a] if a in out else 1 for a in range(len(counts))])


def _cut(e: Einsum, frame: Frame) -> list[Frame]:
    """Pieces of a frame that is too large, along its longest plain output rank."""
    if math.prod(frame.shape()) <= _CHUNK:
        return []
    plain = [i.name for i in e.out.index if isinstance(i, Rank)]
    long = [r for r in plain if len(frame.coordinates[r]) > 1]
    if len(plain) != len(e.out.index) or len(set(plain)) != len(plain) or not long:
        return []
    rank = max(long, key=lambda r: len(frame.coordinates[r]))
    whole = frame.coordinates[rank]
    pieces = whole.tensor_split(min(len(whole), -(-math.prod(frame.shape()) // _CHUNK)))
    return [
        Frame(frame.ranks, {**frame.coordinates, rank: p}, frame.extents, frame.tensors)
        for p in pieces
    ]


def _fold_all(e: Einsum, frame: Frame, mask: Tensor | None) -> _Points:
    """Map the expression over the frame and fold the ranks that the output does not carry."""
    inner = frame if mask is None else frame.restricted(mask)
    values = evaluate(e.expr, inner, outermost=True)
    touched = mask
    for present in inner.present:
        touched = present if touched is None else touched & present
    listed = dict(e.reduce)
    folded = [r for r in frame.ranks if r not in _out_ranks(e)]
    counts = dict(zip(frame.ranks, frame.shape(), strict=True))
    for rank in [*(r for r in folded if r not in listed), *(r for r in listed if r in folded)]:
        values, touched = _fold(
            values, touched, frame.axis(rank), counts[rank], listed.get(rank, "add")
        )
    return _Points(values, touched)


def _fold(
    values: Tensor, touched: Tensor | None, axis: int, count: int, op: str
) -> tuple[Tensor, Tensor | None]:
    shape = list(values.shape)
    if touched is not None:
        shape = list(torch.broadcast_shapes(values.shape, touched.shape))
        values = torch.where(touched, real(values), IDENTITY[op])
    shape[axis] = count
    values = values.expand(shape)
    if count == 0:  # nothing lands anywhere
        shape[axis] = 1
        nothing = torch.zeros(shape, dtype=torch.bool, device=values.device)
        return torch.full(shape, IDENTITY[op], dtype=torch.float64, device=values.device), nothing
    match op:
        case "add" | "mul":
            values = real(values)
            values = (
                values.sum(axis, keepdim=True) if op == "add" else values.prod(axis, keepdim=True)
            )
        case "max" | "min":
            values = values.to(torch.int64) if values.dtype == torch.bool else values
            values = (
                values.amax(axis, keepdim=True) if op == "max" else values.amin(axis, keepdim=True)
            )
        case "or":
            values = truth(values).any(axis, keepdim=True)
        case "and":
            values = truth(values).all(axis, keepdim=True)
    if touched is not None:
        wide = list(touched.shape)
        wide[axis] = count
        touched = touched.expand(wide).any(axis, keepdim=True)
    return values, touched
