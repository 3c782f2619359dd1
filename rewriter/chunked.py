"""The oracle on Sites of any size: a cascade interpreted slice by slice of its outer ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_rewrite.cascade.expr import Const, Expr, Extent, Rank, Read, ranks_of, rebuild
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop
from attn_rewrite.cascade.lse import LSE, lse_alone
from attn_rewrite.cascade.oracle import interpret
from attn_rewrite.cascade.reordered import Reordered, as_reordered
from attn_rewrite.cascade.staged import as_staged, core_of, stages_of

LIMIT_BYTES = 256 << 20
# Tensors over (q, kv) that live at once while the three-pass cascade is interpreted.
_LIVE = 4
_ROW = ("b", "h", "q")

Evaluate = Callable[[Cascade, Mapping[str, Tensor]], Tensor]


def oracle(cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES) -> Tensor:
    """AV[b, h, q, f] of ``cascade`` in float64, with at most about ``limit`` bytes of scores.

    Batch, heads and queries are independent of each other, so they are taken in slices; a cascade
    where one of them is reduced or stepped through is not cut there.
    """

    def interpreted(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return interpret(part, held)["AV"].to(torch.float64)

    found = as_reordered(cascade)
    if found is not None:
        return restored(found, oracle(found.inner, gathered(found, inputs), limit))
    cascade, inputs = unstaged(cascade, inputs)
    return sliced(cascade, inputs, ("b", "h", "q"), limit, interpreted)


def oracle_lse(cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES) -> Tensor:
    """The log-sum-exp [b, h, q] of the rows of a softmax attention, as `oracle` has its output."""

    def interpreted(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return interpret(part, held)[LSE].to(torch.float64)

    return of_rows(cascade, inputs, lambda c, held: sliced(c, held, _ROW, limit, interpreted))


def of_rows(cascade: Cascade, inputs: Mapping[str, Tensor], evaluate: Evaluate) -> Tensor:
    """``evaluate`` of what `LSE` is computed from, with one number for a row [b, h, q]: stages
    computed before it, reordered rows put back."""
    found = as_reordered(cascade)
    if found is not None:
        inner = of_rows(found.inner, gathered(found, inputs), evaluate)
        return restored(found, inner[..., None])[..., 0]
    cascade, inputs = unstaged(cascade, inputs)
    return evaluate(lse_alone(cascade), inputs)


def gathered(found: Reordered, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the inner cascade: Q, K and V in the new order, in their own dtype."""
    made = interpret(found.before(), {n: inputs[n] for n in "QKV"})
    moved = {n: made[f"{n}P"].to(inputs[n].dtype) for n in "QKV"}
    return {**inputs, **moved}


def restored(found: Reordered, output: Tensor) -> Tensor:
    """The output of the inner cascade with its rows put back."""
    return interpret(found.after(), {"AVP": output})["AV"].to(output.dtype)


def unstaged(
    cascade: Cascade, inputs: Mapping[str, Tensor]
) -> tuple[Cascade, Mapping[str, Tensor]]:
    """The attention with its stages computed: scales over whole sequences are not cut.

    The same objects for a cascade without stages.
    """
    staged = as_staged(cascade)
    if staged is None or not staged.stages:
        return cascade, inputs
    first, rest = stages_of(staged), core_of(staged, cascade.name)
    made = interpret(first, {t.name: inputs[t.name] for t in first.inputs})
    return rest, {t.name: made[t.name] if t.name in made else inputs[t.name] for t in rest.inputs}


def sliced(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    ranks: tuple[str, ...],
    limit: int,
    evaluate: Evaluate,
) -> Tensor:
    """``evaluate`` on slices of the ranks, outermost first, where the scores exceed ``limit``."""
    need = _score_bytes(cascade, inputs)
    if need > limit and ranks:
        rank, rest = ranks[0], ranks[1:]
        extent = _extent(cascade, inputs, rank)
        if extent and extent > 1 and (slicer := _Slicer.of(cascade, rank, extent)):
            step = max(1, extent * limit // need)
            parts = []
            for start in range(0, extent, step):
                part, held = slicer.cut(inputs, start, min(start + step, extent))
                parts.append(sliced(part, held, rest, limit, evaluate))
            return torch.cat(parts, dim=slicer.axis)
        return sliced(cascade, inputs, rest, limit, evaluate)
    return evaluate(cascade, inputs)


def _extent(cascade: Cascade, inputs: Mapping[str, Tensor], rank: str) -> int | None:
    for declared in cascade.inputs:
        if rank in declared.ranks:
            return inputs[declared.name].shape[declared.ranks.index(rank)]
    return None


def _score_bytes(cascade: Cascade, inputs: Mapping[str, Tensor]) -> int:
    need = 8 * _LIVE
    for rank in ("b", "h", "q", "kv"):
        need *= _extent(cascade, inputs, rank) or 1
    return need


@dataclass(frozen=True)
class _Slicer:
    """Cuts one rank of a cascade: coordinates are shifted, declared dimensions narrowed."""

    cascade: Cascade
    rank: str
    extent: int
    axis: int

    @classmethod
    def of(cls, cascade: Cascade, rank: str, extent: int) -> _Slicer | None:
        """A slicer, or None where points of the rank depend on each other."""
        here = Rank(rank)
        output = cascade.producer("AV") or cascade.producer(LSE)
        if output is None or here not in output.out.index:
            return None
        if any(r.name == rank and r.parts for r in cascade.ranks):
            return None
        if any(isinstance(s, Loop) and s.rank == rank for s in cascade.body):
            return None
        slicer = cls(cascade, rank, extent, output.out.index.index(here))
        return slicer if all(slicer.independent(e) for e in cascade.einsums()) else None

    def independent(self, einsum: Einsum) -> bool:
        """No point of the rank reads or writes what belongs to another one."""
        used = ranks_of(einsum.expr) | ranks_of(einsum.guard)
        if self.rank in used and Rank(self.rank) not in einsum.out.index:
            return False
        if any(self.rank in ranks_of(i) and i != Rank(self.rank) for i in einsum.out.index):
            return False
        return all(
            index == Rank(self.rank)
            for read in (*_reads(einsum.expr), *_reads(einsum.guard), einsum.out)
            for index, cut in zip(read.index, self.cuts(read.tensor), strict=True)
            if cut
        )

    def cuts(self, tensor: str) -> tuple[bool, ...]:
        """Which dimensions of a tensor the cut narrows."""
        for declared in self.cascade.inputs:
            if declared.name == tensor:
                return tuple(name == self.rank for name in declared.ranks)
        writers = [e.out.index for e in self.cascade.einsums() if e.out.tensor == tensor]
        return tuple(Rank(self.rank) in indices for indices in zip(*writers, strict=True))

    def cut(
        self, inputs: Mapping[str, Tensor], start: int, stop: int
    ) -> tuple[Cascade, dict[str, Tensor]]:
        """The cascade and inputs of coordinates ``start`` to ``stop``."""
        held = dict(inputs)
        for declared in self.cascade.inputs:
            if self.rank in declared.ranks:
                axis = declared.ranks.index(self.rank)
                held[declared.name] = inputs[declared.name].narrow(axis, start, stop - start)
        body = tuple(
            replace(s, init=self._all(s.init, start), body=self._all(s.body, start))
            if isinstance(s, Loop)
            else self._einsum(s, start)
            for s in self.cascade.body
        )
        ranks = tuple(
            replace(r, size=None) if r.name == self.rank else r for r in self.cascade.ranks
        )
        return replace(self.cascade, body=body, ranks=ranks), held

    def _all(self, einsums: tuple[Einsum, ...], start: int) -> tuple[Einsum, ...]:
        return tuple(self._einsum(e, start) for e in einsums)

    def _einsum(self, e: Einsum, start: int) -> Einsum:
        return replace(e, expr=self._shift(e.expr, start), guard=self._shift(e.guard, start))

    def _shift(self, expr: Expr, start: int) -> Expr:
        """Coordinates as they were before the cut, except where a cut dimension is indexed."""
        if expr == Rank(self.rank):
            return expr + start if start else expr
        if expr == Extent(self.rank):
            return Const(self.extent)
        if not isinstance(expr, Read):
            return rebuild(expr, tuple(self._shift(c, start) for c in expr.children))
        places = zip(expr.index, self.cuts(expr.tensor), strict=True)
        return rebuild(expr, tuple(i if cut else self._shift(i, start) for i, cut in places))


def _reads(expr: Expr) -> tuple[Read, ...]:
    from attn_rewrite.cascade.expr import walk

    return tuple(n for n in walk(expr) if isinstance(n, Read))
