"""Where scales may stand: the rule that makes an integer product mean what it should.

A sum of products of codes is the sum of the products of values only if each scale is constant along
the summed rank, because only then it can be taken out of the sum.  So Q and K may have scales per
tensor, head, block or token, never per channel; V per tensor, head or channel, never per token.
Probabilities may have a fixed scale below their row maximum; after the division they are about one
over the number of keys, and a fixed scale would round them away.

The rule is checked on the cascade, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attn_rewrite.cascade.expr import Call, Expr, Rank, Read, ranks_of, substitute, tensors_of, walk
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl


@dataclass(frozen=True)
class Misplaced:
    """A scale that cannot stand where it stands, and why."""

    code: str
    tensor: str
    reason: str


def check_placement(cascade: Cascade) -> Misplaced | None:
    """The first scale of ``cascade`` that breaks the rule, or None."""
    scales = {t.name: t for t in (*cascade.inputs, *cascade.tensors) if t.scale is not None}
    for e in cascade.einsums():
        summed = _summed(e)
        if not summed:
            continue
        for read in e.reads():
            decl = scales.get(read.tensor)
            if decl is None or decl.scale in tensors_of(e.expr):
                continue  # multiplied by its scale inside the sum: a product of values
            found = _inside(cascade, e, read, decl, summed)
            if found is not None:
                return found
    return _normalised(cascade)


def _summed(e: Einsum) -> frozenset[str]:
    """Ranks that ``e`` sums over; none for a maximum."""
    other = {rank for rank, op in e.reduce if op != "add"}
    carried = frozenset[str]().union(*map(ranks_of, e.out.index))
    return ranks_of(e.expr) - carried - other


def _inside(
    cascade: Cascade, e: Einsum, read: Read, decl: TensorDecl, summed: frozenset[str]
) -> Misplaced | None:
    """Does the scale of ``read`` differ along a summed rank?"""
    made = cascade.producer(read.tensor)
    index = _scale_index(made, decl) if made is not None else _declared(cascade, decl)
    if made is not None:
        here = dict(zip(made.out.index, read.index, strict=True))
        index = tuple(substitute(i, here) for i in index)
    ranks = frozenset[str]().union(*(ranks_of(i) for i in index)) & summed
    if not ranks:
        return None
    operand = read.tensor
    return Misplaced(
        "scale-placement",
        operand,
        f"the scale of {operand} differs along {', '.join(sorted(ranks))}, over which "
        f"{e.out.tensor} sums; a scale leaves a sum only if it is constant along the summed rank",
    )


def _scale_index(made: Einsum, decl: TensorDecl) -> tuple[Expr, ...]:
    return next((r.index for r in made.reads() if r.tensor == decl.scale), ())


def _declared(cascade: Cascade, decl: TensorDecl) -> tuple[Expr, ...]:
    """Scales that come from outside differ along the ranks they are declared with."""
    known = (*cascade.inputs, *cascade.tensors)
    ranks = next((t.ranks for t in known if t.name == decl.scale), ())
    return tuple(Rank(r) for r in ranks)


def _normalised(cascade: Cascade) -> Misplaced | None:
    """A narrow cast of probabilities that were divided already, without a scale of their own."""
    shares = {e.out.tensor for e in cascade.einsums() if _is_share(cascade, e)}
    for e in cascade.einsums():
        read = set(tensors_of(e.expr))
        if not read & shares or not any(_narrow(n) for n in walk(e.expr)):
            continue
        if not any(_statistic(cascade, t, shares) for t in read - shares):
            return Misplaced(
                "static-scale-normalised",
                e.out.tensor,
                f"{e.out.tensor} rounds probabilities with a fixed scale after they were divided: "
                "they are about one over the number of keys, so long rows would round to zero; "
                "round them below the row maximum, or with a scale taken from them",
            )
    return None


def _narrow(node: Expr) -> bool:
    return isinstance(node, Call) and node.op in ("cast_i8", "cast_f8e4m3", "cast_f8e5m2")


def _is_share(cascade: Cascade, e: Einsum) -> bool:
    """A quotient of exponentials and their sum."""
    match e.expr:
        case Call("div", (Read(), Read(total))):
            made = cascade.producer(total)
            return made is not None and any(n in dict(_reduced(cascade, made)) for n in ("kv", "m"))
    return False


def _reduced(cascade: Cascade, e: Einsum) -> Iterator[tuple[str, str]]:
    """Reductions of an Einsum, and of those it is made of pointwise (a sink joins a sum)."""
    yield from e.reduce
    yield from ((rank, "add") for rank in _summed(e))
    if not e.reduce:
        for t in tensors_of(e.expr):
            made = cascade.producer(t)
            if made is not None and made.out.tensor != e.out.tensor and made.reduce:
                yield from made.reduce


def _statistic(cascade: Cascade, tensor: str, shares: set[str]) -> bool:
    """Is ``tensor`` a maximum of the probabilities?"""
    made = cascade.producer(tensor)
    return made is not None and bool(shares & set(tensors_of(made.expr))) and bool(made.reduce)
