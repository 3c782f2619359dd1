"""Scans along the rank: a fold over all earlier (or all later) items, one value per item.

``REST[m, p] = g(x[j, p]) :: reduce_j op where j > m`` reads the whole fiber again for every ``m``.
Traversed in the right direction it is a running value: ascending for ``j < m``, descending for
``j > m``.  Stick-breaking attention and decays over positions are of this kind.  What each item
needs is what came before it, so the parts of the rank are not independent: there is no split-K.

Source: the streaming scan is the iteration of FuseMax's cascade 3 (Nayak et al., MICRO 2024,
section III-C), with a value per step instead of the last one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_rewrite.cascade.expr import (
    Call,
    Const,
    Expr,
    Rank,
    Read,
    call,
    conjunction,
    conjuncts,
    ranks_of,
    substitute,
)
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.cascade.unroll import accesses
from attn_rewrite.passes.cascade.flow import IDENTITY, Flow, iteration_ranks
from attn_rewrite.passes.cascade.proof import FusionRefusal, Proof

_RULE = "S (streaming scan)"
_COMPARED = {"lt": (False, True), "le": (False, False), "gt": (True, True), "ge": (True, False)}
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


@dataclass(frozen=True)
class Scan:
    """``einsum`` folds ``item`` at ``other`` over one side of each coordinate of the rank.

    ``descending`` for later items (``j > m``), ``strict`` where the item itself is left out;
    ``kept`` filters items (written at the rank), ``where`` filters the outputs.
    """

    einsum: Einsum
    other: str
    op: str
    item: Expr
    descending: bool
    strict: bool
    kept: Expr
    where: Expr

    def compare(self, item: Expr, output: Expr) -> Expr:
        """Does the item count for the output?  Both are coordinates within one tile."""
        later, early = ("gt", "lt") if self.strict else ("ge", "le")
        return call(later if self.descending else early, item, output)

    def proof(self, rank: str) -> Proof:
        """Why a running value is this fold."""
        way = "descending" if self.descending else "ascending"
        side = self.compare(Rank(self.other), Rank(rank))
        conditions = (
            f"streams {way}: the fold of all {side} is known when item {rank} comes",
            f"{self.op} is associative and starts from {IDENTITY[self.op]}, the default",
            "items and their filter do not depend on the output's coordinate",
        )
        empty = Const(IDENTITY[self.op])
        return Proof(
            _RULE, self.einsum.out.tensor, rank, (), self.item, empty, "scan",
            side_conditions=conditions,
        )  # fmt: skip


def scans_of(flow: Flow) -> Mapping[str, Scan] | FusionRefusal:
    """The scans of ``flow`` by tensor, or why a tensor along the rank is read out of step.

    Any other read of a produced tensor at a coordinate that is not the rank's needs the whole
    fiber: the rules about items and states do not hold for it.
    """
    found: dict[str, Scan] = {}
    for e in flow.einsums:
        other = _scanned_rank(flow, e)
        if other is not None:
            scan = _scan(flow, e, other)
            if isinstance(scan, FusionRefusal):
                return scan
            found[e.out.tensor] = scan
            continue
        foreign = next(iter(_foreign(flow, e)), None)
        if foreign is not None and flow.iterates(e):
            return _refused(e, f"reads {foreign} out of step with rank {flow.rank}")
    return found


def direction_of(scans: Mapping[str, Scan]) -> bool | FusionRefusal:
    """True where the scans run from the last coordinate to the first; refused where they differ."""
    for scan in scans.values():
        if scan.descending != next(iter(scans.values())).descending:
            return _refused(scan.einsum, "folds later items where another scan folds earlier ones")
    return any(scan.descending for scan in scans.values())


def _refused(e: Einsum, why: str) -> FusionRefusal:
    return FusionRefusal("not-a-scan", f"{e.out} {why}", rule=_RULE, tensor=e.out.tensor)


def _foreign(flow: Flow, e: Einsum) -> list[Read]:
    """Reads of tensors that carry the rank, at other coordinates than the rank's."""
    made = (r for r in accesses(e) if r.tensor in flow.producer)
    return [r for r in made if flow.is_map(flow.producer[r.tensor]) and not _moves(r, flow.rank)]


def _moves(expr: Expr, rank: str) -> bool:
    return rank in ranks_of(expr)


def _scanned_rank(flow: Flow, e: Einsum) -> str | None:
    """The folded rank that ``e`` compares with the rank it writes, if there is one."""
    if not flow.is_map(e):
        return None
    folded = iteration_ranks(e) - frozenset[str]().union(*(ranks_of(i) for i in e.out.index))
    for term in conjuncts(e.guard):
        other = _compared(term, flow.rank)
        if other is not None and other[0] in folded and _same_fiber(flow, e, other[0]):
            return other[0]
    return None


def _compared(term: Expr, rank: str) -> tuple[str, bool, bool] | None:
    """(other rank, is it later, strictly) of ``j > m`` and the like."""
    match term:
        case Call(op, (Rank(left), Rank(right))) if op in _COMPARED and rank in (left, right):
            if left == rank:
                left, op = right, _MIRRORED[op]
            return left, *_COMPARED[op]
    return None


def _same_fiber(flow: Flow, e: Einsum, other: str) -> bool:
    """Does ``other`` walk through a dimension that is the rank elsewhere?"""
    for read in accesses(e):
        made, decl = flow.producer.get(read.tensor), flow.decls.get(read.tensor)
        own: tuple[Expr, ...] = ()
        if made is not None:
            own = made.out.index
        elif decl is not None:
            own = tuple(Rank(r) for r in decl.ranks)
        pairs = zip(own, read.index, strict=False)
        if any(o == Rank(flow.rank) and i == Rank(other) for o, i in pairs):
            return True
    return False


def _scan(flow: Flow, e: Einsum, other: str) -> Scan | FusionRefusal:
    op = dict(e.reduce).get(other, "add")
    terms = conjuncts(e.guard)
    sides = [c for t in terms if (c := _compared(t, flow.rank)) and c[0] == other]
    rest = [t for t in terms if not ((c := _compared(t, flow.rank)) and c[0] == other)]
    both = next((t for t in rest if {other, flow.rank} <= ranks_of(t)), None)
    if len(sides) != 1 or both is not None:
        return _refused(e, f"folds a window of {other}, not all items on one side")
    if any(flow.rank in r.parts for r in flow.cascade.ranks):
        return _refused(e, f"runs along {flow.rank}, which counts tiles: fuse before partitioning")
    if flow.others_reduced(e) != {other} or _moves(e.expr, flow.rank):
        return _refused(e, f"does not fold one value per {other}")
    if flow.default(e.out.tensor) != IDENTITY[op]:
        return _refused(e, f"has another default than {IDENTITY[op]}, the fold of no item")
    late = flow.complete | flow.dependent
    waits = next((r for r in accesses(e) if r.tensor in late), None)
    if waits is not None:
        return _refused(e, f"waits for {waits}, which is complete only after a whole traversal")
    here: dict[Expr, Expr] = {Rank(other): Rank(flow.rank)}
    items = tuple(substitute(t, here) for t in rest if other in ranks_of(t))
    outputs = tuple(t for t in rest if other not in ranks_of(t))
    _, later, strict = sides[0]
    return Scan(
        e, other, op, substitute(e.expr, here), later, strict,
        conjunction(items), conjunction(outputs),
    )  # fmt: skip
