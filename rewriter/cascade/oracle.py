"""The oracle: interprets a cascade in float64, slowly and obviously, independent of every kernel.

Each Einsum is evaluated as it is written, as torch operations over its whole iteration space; the
steps of an iterative rank run one after the other.  Semantics (Nayak et al., MICRO 2024, sec. II):

* a point outside the guard, outside the whole of a split rank, or where a divisor of the outermost
  product is 0, is not touched; an output point that no touched point lands on keeps the default;
* ranks that the output does not carry are folded: those not listed in ``reduce`` are summed first,
  then the listed ones in their order;
* points that land on one output coordinate (an index such as ``m // 2`` or a table) are folded too;
* a declared float type does not round, casts do; integer and bool tensors hold just those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from attn_rewrite.cascade.expr import (
    TRUE,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    conjunction,
    conjuncts,
    ranks_of,
    walk,
)
from attn_rewrite.cascade.extents import extents
from attn_rewrite.cascade.fold import (
    Points,
    contract,
    iteration_ranks,
    map_and_fold,
    output_ranks,
    pieces,
)
from attn_rewrite.cascade.infer import IDENTITY
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, TensorDecl, checked
from attn_rewrite.cascade.values import Frame, evaluate, place, real, truth
from attn_rewrite.errors import CascadeError

_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin", "or": "amax", "and": "amin"}


def interpret(
    cascade: Cascade,
    inputs: Mapping[str, Tensor | float],
    sizes: Mapping[str, int] | None = None,
    *,
    also: Iterable[str] = (),
) -> dict[str, Tensor]:
    """The outputs of ``cascade`` by name, in float64 (int64 and bool where so declared).

    ``inputs`` has one tensor per declared input, with the declared ranks as dimensions, in any
    dtype; ``sizes`` gives extents that no input has (and, if wanted, of sub-ranks); ``also`` names
    intermediates to return besides the outputs.  A row whose keys are all filtered out gives 0.
    Raises `CascadeError` for missing or unknown inputs, shapes that disagree and reads outside a
    tensor.
    """
    _check_inputs(checked(cascade), inputs)
    tensors = {n: _tensor(cascade, n, v) for n, v in inputs.items()}
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


def _tensor(cascade: Cascade, name: str, value: Tensor | float) -> Tensor:
    try:
        found = torch.as_tensor(value)
        what = str(found.dtype)
    except (TypeError, ValueError, RuntimeError):
        what = type(value).__name__
    else:
        if not found.is_complex():
            return found
    raise CascadeError(
        f"cascade {cascade.name}: input {name} is a {what}; expected a tensor of real numbers"
    )


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
        ranks = iteration_ranks(e)
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
        points = contract(e, frame, mask) if self._default(e.out.tensor) == 0 else None
        if points is not None:
            self._write(e, frame, points)
            return
        cut = pieces(e, frame)
        for piece in cut:
            self._evaluate(e, piece)
        if not cut:
            self._write(e, frame, map_and_fold(e, frame, mask))

    def _split_guards(self, frame: Frame) -> list[Expr]:
        """A split rank has no points beyond its extent: the last tile may be cut."""
        guards: list[Expr] = []
        for rank in self.cascade.ranks:
            if len(rank.parts) != 2 or rank.name in frame.ranks:
                continue
            outer, inner = (self.extents.get(p, 0) for p in rank.parts)
            whole = self._coordinate(rank.name, frame)
            if whole is not None and outer * inner != self.extents[rank.name]:
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
        if outer is None or inner is None:
            return None
        return outer * Extent(parts[1]) + inner

    # Writing

    def _default(self, tensor: str) -> float:
        return self.decls[tensor].default if tensor in self.decls else 0.0

    def _empty(self, name: str) -> Tensor:
        """The tensor with its default everywhere, as large as all Einsums that write it need."""
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
        frame = Frame(ranks, coordinates, self.extents, self.tensors)
        values = evaluate(index, frame)
        for inside in self._split_guards(frame):  # the last tile may be cut
            values = torch.where(truth(evaluate(inside, frame)), values, -1)
        return int(values.max()) + 1 if values.numel() else 0

    def _write(self, e: Einsum, frame: Frame, points: Points) -> None:
        carried = output_ranks(e)
        shape = [n if r in carried else 1 for r, n in zip(frame.ranks, frame.shape(), strict=True)]
        values = points.values.expand(shape)
        touched = None if points.touched is None else points.touched.expand(shape)
        target = place(e.out, self.tensors[e.out.tensor], frame)
        if target is None:
            self._scatter(e, frame, values, touched)
            return
        ranks = [n.name for i in e.out.index for n in walk(i) if isinstance(n, Rank)]
        axes = [frame.axis(r) for r in ranks]
        order = [*axes, *(a for a in range(len(shape)) if a not in axes)]
        values = values.permute(order).reshape(target.shape).to(target.dtype)
        if touched is not None:
            values = torch.where(touched.permute(order).reshape(target.shape), values, target)
        target.copy_(values)

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
        ops = {op for r, op in e.reduce if r in output_ranks(e)} or {"add"}
        op = ops.pop()
        folded = torch.full(
            (target.numel(),), IDENTITY[op], dtype=torch.float64, device=self.device
        )
        folded.scatter_reduce_(0, where, real(values[inside]), _SCATTER[op])
        landed = torch.zeros(target.numel(), dtype=torch.bool, device=self.device)
        landed[where] = True
        target.copy_(torch.where(landed, folded, real(target.reshape(-1))).reshape(target.shape))
