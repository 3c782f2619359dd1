"""What a text leaves undeclared: ranks, inputs, outputs, extents and defaults.

Bare names are resolved here, because what a name means depends on the whole text: ``M0`` is the
extent of rank ``m0``, ``Y`` a scalar that the text computes, ``c`` a scalar input unless it is used
as a coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from attn_rewrite.cascade.expr import (
    TRUE,
    Call,
    Expr,
    Extent,
    Rank,
    Read,
    ranks_of,
    rebuild,
    transform,
    walk,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, Statement, TensorDecl
from attn_rewrite.cascade.statements import Draft
from attn_rewrite.errors import CascadeError

IDENTITY = {"add": 0.0, "mul": 1.0, "max": -math.inf, "min": math.inf, "or": 0.0, "and": 1.0}


def complete(draft: Draft) -> Cascade:
    """The cascade of a draft, everything missing inferred; `CascadeError` where it cannot be."""
    names = _Names(draft)
    body = tuple(names.statement(s) for s in draft.body)
    einsums = tuple(_einsums(body))
    _check_declarations(draft)
    _check_accesses(draft, einsums)
    ranks = _ranks(draft, body)
    written = {e.out.tensor for e in einsums}
    inputs = [*draft.inputs, *_inputs(draft, einsums, written, ranks)]
    inferred = inferred_tensors(body)
    outputs = draft.outputs
    if outputs is None:
        read = {r.tensor for e in einsums for r in reads(e) if r.tensor != e.out.tensor}
        outputs = [t for t in dict.fromkeys(e.out.tensor for e in einsums) if t not in read]
    if not outputs:
        raise CascadeError(
            f"cascade {draft.name} has no output; write an Einsum such as Y[m] = A[k, m] * B[k]"
        )
    for name in outputs:
        if name not in written and all(t.name != name for t in inputs):
            raise CascadeError(
                f"output {name} is never written; it needs an Einsum {name}[...] = ..."
            )
    return Cascade(
        draft.name,
        tuple(ranks),
        tuple(inputs),
        body,
        tuple(outputs),
        tuple(draft.tensors if draft.tensors is not None else inferred),
    )


# Every function over expressions calls itself once or more for each level.
_DEEPEST = 250


def too_deep() -> CascadeError:
    """An expression that no function over expressions could walk."""
    return CascadeError(
        f"an expression nests more than {_DEEPEST} operators; give a part of it a name of its own"
    )


def _check_accesses(draft: Draft, einsums: Iterable[Einsum]) -> None:
    """A tensor has as many indices everywhere as it has ranks; expressions are not too deep."""
    ranks = {t.name: len(t.ranks) for t in (*draft.inputs, *(draft.tensors or ()))}
    for e in einsums:
        if any(_depth(part) > _DEEPEST for part in (e.expr, e.guard)):
            raise too_deep()
        for access in (e.out, *reads(e)):
            count = ranks.setdefault(access.tensor, len(access.index))
            if count != len(access.index):
                raise CascadeError(
                    f"{access} has {len(access.index)} indices, but {access.tensor} has {count} "
                    "ranks elsewhere; use one number of ranks"
                )


def _depth(expr: Expr) -> int:
    deepest, queue = 0, [(expr, 1)]
    while queue:
        node, depth = queue.pop()
        deepest = max(deepest, depth)
        queue += [(child, depth + 1) for child in node.children]
    return deepest


def inferred_tensors(body: Iterable[Statement]) -> tuple[TensorDecl, ...]:
    """Declarations of tensors whose empty value cannot be 0: those made or read by a max or min."""
    einsums = tuple(_einsums(body))
    filtered = {e.out.tensor: e.out for e in einsums if e.guard != TRUE}
    found: dict[str, TensorDecl] = {}
    for e in einsums:
        ops = {op for _, op in e.reduce}
        identity = IDENTITY[ops.pop()] if len(ops) == 1 and ops <= {"max", "min"} else 0.0
        if identity == 0.0:
            continue
        operand = filtered.get(e.expr.tensor) if isinstance(e.expr, Read) else None
        for tensor in (operand, e.out):
            if tensor is not None and all(isinstance(i, Rank) for i in tensor.index):
                ranks = tuple(i.name for i in tensor.index if isinstance(i, Rank))
                found.setdefault(tensor.tensor, TensorDecl(tensor.tensor, ranks, identity))
    return tuple(found.values())


def reads(einsum: Einsum) -> Iterator[Read]:
    """Every tensor read of an Einsum: expression, guard and output index tables."""
    for part in (einsum.expr, einsum.guard, *einsum.out.index):
        yield from (n for n in walk(part) if isinstance(n, Read))


def einsums_of(statement: Statement) -> tuple[Einsum, ...]:
    """The Einsums of a statement: itself, or those of a loop."""
    if isinstance(statement, Loop):
        return (*statement.init, *statement.body)
    return (statement,)


def _einsums(body: Iterable[Statement]) -> Iterator[Einsum]:
    for statement in body:
        yield from einsums_of(statement)


class _Names:
    """What the bare names of a draft mean."""

    def __init__(self, draft: Draft) -> None:
        self.extents = draft.extents
        self.declared = {r.name for r in draft.ranks} | {p for r in draft.ranks for p in r.parts}
        declared = [*draft.inputs, *(draft.tensors or ())]
        self.scalars = {t.name for t in declared if not t.ranks}
        self.coordinates = {s.rank for s in draft.body if isinstance(s, Loop)}
        for e in _einsums(draft.body):
            if not e.out.index:
                self.scalars.add(e.out.tensor)
            self.coordinates |= {r for r, _ in e.reduce}
            for access in (e.out, *reads(e)):
                self.coordinates |= {n for i in access.index for n in ranks_of(i)}

    def statement(self, statement: Statement) -> Statement:
        if isinstance(statement, Loop):
            init = tuple(self.einsum(e) for e in statement.init)
            return replace(statement, init=init, body=tuple(self.einsum(e) for e in statement.body))
        return self.einsum(statement)

    def einsum(self, e: Einsum) -> Einsum:
        out = rebuild(e.out, tuple(transform(i, self.resolve) for i in e.out.index))
        assert isinstance(out, Read)
        return Einsum(
            out, transform(e.expr, self.resolve), e.reduce, transform(e.guard, self.resolve)
        )

    def resolve(self, node: Expr) -> Expr | None:
        if isinstance(node, Extent):
            name = self._extent(node.rank)
            return None if name is None else Extent(name)
        if not isinstance(node, Rank) or node.name in self.declared:
            return None
        extent = self._extent(node.name)
        if extent is not None:
            return Extent(extent)
        if node.name in self.scalars or node.name not in self.coordinates:
            return Read(node.name, ())
        return None

    def _extent(self, name: str) -> str | None:
        """The rank whose extent the paper writes as ``name`` (``M0`` for ``m0``), if it is one."""
        if name in self.extents:
            return self.extents[name]
        lower = name.lower()
        known = lower in self.declared or lower in self.coordinates
        taken = name in self.declared or name in self.scalars
        return lower if known and lower != name and not taken else None


def _check_declarations(draft: Draft) -> None:
    groups = {
        "rank": [r.name for r in draft.ranks],
        "tensor": [t.name for t in (*draft.inputs, *(draft.tensors or ()))],
    }
    for what, names in groups.items():
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise CascadeError(f"{what} {twice} is declared twice; keep one of the declarations")


def _ranks(draft: Draft, body: Sequence[Statement]) -> list[RankDecl]:
    found = {r.name: r for r in draft.ranks}
    declared = found.keys() | set()
    parts = {p for r in draft.ranks for p in r.parts}
    made = {e.out.tensor for e in _einsums(body)} | {t.name for t in draft.inputs}
    for statement in body:
        for e in _einsums([statement]):
            for name in _names_in_order(e):
                found.setdefault(name, RankDecl(name))
        if isinstance(statement, Loop):
            found.setdefault(statement.rank, RankDecl(statement.rank))
    for name in (r for t in (*draft.inputs, *(draft.tensors or ())) for r in t.ranks):
        if name not in parts:
            found.setdefault(name, RankDecl(name))
    return list(_with_splits(found, declared, parts, made, body).values())


def _with_splits(
    found: dict[str, RankDecl],
    declared: set[str],
    parts: set[str],
    made: set[str],
    body: Sequence[Statement],
) -> dict[str, RankDecl]:
    """Ranks that a read flattens (``m1 * #m0 + m0``) become parts of one that is whole.

    Not where the text declares both of them and the tensor (is it in ``made``?): then nothing is
    left to infer, and the index is arithmetic like any other.
    """
    said = declared | parts
    for access in (r for e in _einsums(body) for r in reads(e)):
        for index in access.index:
            split = _split(index)
            if split is None or set(split) <= parts:
                continue
            if set(split) <= said and access.tensor in made:
                continue
            whole = _whole(split)
            if whole in declared:
                continue
            found[whole] = replace(found.get(whole, RankDecl(whole)), parts=split)
            parts |= set(split)
    return found


def _names_in_order(e: Einsum) -> Iterator[str]:
    for part in (e.out, e.expr, e.guard):
        yield from (n.name for n in walk(part) if isinstance(n, Rank))
    yield from (r for r, _ in e.reduce)


def _split(index: Expr) -> tuple[str, str] | None:
    """``(outer, inner)`` of a flattened partition ``outer * #inner + inner``."""
    match index:
        case Call("add", (Call("mul", (Rank(outer), Extent(inner))), Rank(other))) if (
            inner == other
        ):
            return outer, inner
    return None


def _whole(split: tuple[str, str]) -> str:
    outer, inner = split
    stem = outer.rstrip("0123456789")
    return stem if stem and stem == inner.rstrip("0123456789") else f"{outer}_{inner}"


def _inputs(
    draft: Draft, einsums: Sequence[Einsum], written: set[str], ranks: list[RankDecl]
) -> Iterator[TensorDecl]:
    """Undeclared inputs by their accesses; a rank that none of them names is added to ``ranks``."""
    known = {t.name for t in draft.inputs} | written
    accesses: dict[str, list[Read]] = {}
    for e in einsums:
        for read in reads(e):
            if read.tensor not in known:
                accesses.setdefault(read.tensor, []).append(read)
    for name, found in accesses.items():
        other = next((r for r in found if len(r.index) != len(found[0].index)), None)
        if other is not None:
            raise CascadeError(
                f"{name} is read as {found[0]} and as {other}; use one number of ranks"
            )
        columns = zip(*(r.index for r in found), strict=True)
        yield TensorDecl(
            name, tuple(_input_rank(f"{name}_{d}", c, ranks) for d, c in enumerate(columns))
        )


def _input_rank(fresh: str, indices: Sequence[Expr], ranks: list[RankDecl]) -> str:
    """The rank of one dimension: the one it is indexed by, the one it splits, or a new one."""
    for index in indices:
        if isinstance(index, Rank):
            return index.name
    wholes = {r.parts: r.name for r in ranks if r.parts}
    for index in indices:
        split = _split(index)
        if split in wholes:
            return wholes[split]
    while any(r.name == fresh for r in ranks):
        fresh += "'"
    ranks.append(RankDecl(fresh))
    return fresh
