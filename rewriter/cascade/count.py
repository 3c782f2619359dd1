"""Passes of a cascade over a rank: how often the fibers of that rank must be traversed.

A pass is one traversal of all elements of a fiber; an element that must be read again *after every
other element was read*, for every mapping, costs one more (Nayak et al., MICRO 2024, section
III-A).  The paper gives no algorithm.  Here the question is a longest path: Einsums and the two
readiness events of each tensor are nodes, a dependence that may stream weighs 0, a dependence on a
value that is complete only at the end of a traversal (a *barrier*) weighs 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx

from attn_rewrite.cascade.expr import (
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    ranks_of,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, checked
from attn_rewrite.cascade.operations import EinsumCost, operation_counts, rank_symbol
from attn_rewrite.cascade.unroll import accesses, unrolled
from attn_rewrite.errors import CascadeError

__all__ = [
    "EinsumCost",
    "PassAnalysis",
    "count_passes",
    "live_footprint",
    "operation_counts",
    "pass_analysis",
    "rank_symbol",
]


@dataclass(frozen=True)
class PassAnalysis:
    """What one traversal of ``rank`` can and cannot do.

    ``pass_of`` maps the output of every Einsum that iterates the whole rank to its pass (1, 2, ...;
    an Einsum on summaries of a partitioned rank has no entry), ``tensor_passes`` every tensor that
    carries the rank to the number of times it is traversed, ``barriers`` lists the dependences
    (complete value, Einsum output that waits for it), and ``live`` the intermediates that must be
    held for a whole fiber because they are made in one pass and read in another.
    """

    rank: str
    passes: int
    pass_of: Mapping[str, int] = field(hash=False)
    tensor_passes: Mapping[str, int] = field(hash=False)
    barriers: tuple[tuple[str, str], ...]
    live: tuple[str, ...]


def count_passes(cascade: Cascade, rank: str) -> int:
    """Passes that ``cascade`` makes over ``rank`` (an alias such as ``m`` for ``kv`` is accepted).

    Raises `CascadeError` naming the cycle when no traversal order exists, `ValueError` for an
    unknown rank.
    """
    return pass_analysis(cascade, rank).passes


def live_footprint(cascade: Cascade, rank: str) -> tuple[str, ...]:
    """Intermediates whose live footprint grows with the extent of ``rank``, in program order."""
    return pass_analysis(cascade, rank).live


def pass_analysis(cascade: Cascade, rank: str) -> PassAnalysis:
    """Passes, barriers and live tensors of ``cascade`` over ``rank``; errors as `count_passes`."""
    view = _View(checked(cascade), cascade.rank(rank))
    level = _solve(view)
    full = [n for n, node in enumerate(view.nodes) if node.full]
    pass_of: dict[str, int] = {}
    for n in full:
        name = view.nodes[n].einsum.out.tensor
        pass_of[name] = max(pass_of.get(name, 0), level["einsum", n])
    tensor_passes = _tensor_passes(view, level, full)
    return PassAnalysis(
        rank=view.rank,
        passes=max(tensor_passes.values(), default=max(pass_of.values(), default=0)),
        pass_of=pass_of,
        tensor_passes=tensor_passes,
        barriers=_barriers(view, level),
        live=_live(view, level),
    )


def leaf_ranks(cascade: Cascade, rank: str) -> tuple[str, ...]:
    """The innermost sub-ranks of ``rank``, outermost first; the rank itself if it is not split."""
    parts = next((r.parts for r in cascade.ranks if r.name == rank), ())
    return tuple(leaf for part in parts for leaf in leaf_ranks(cascade, part)) or (rank,)


def offset_of(index: Expr, levels: frozenset[str]) -> int | None:
    """Constant offset of an index along a level rank (``m1 + 1`` -> 1); None if it is not a shift.

    A flattened partition ``m1 * #m0 + m0`` is the coordinate itself: offset 0.
    """
    match index:
        case Rank(name):
            return 0 if name in levels else None
        case Call("add", (base, Const(int(value)))) | Call("add", (Const(int(value)), base)):
            inner = offset_of(base, levels)
            return None if inner is None else inner + value
        case Call("sub", (base, Const(int(value)))):
            inner = offset_of(base, levels)
            return None if inner is None else inner - value
        case Call("add", (Call("mul", (outer, Extent())), inner_rank)):
            # The inner coordinate may itself be a flattened partition (three levels and more).
            plain = isinstance(inner_rank, Rank | Call)
            return offset_of(outer, levels) if plain else None
    return None


@dataclass(frozen=True)
class _Node:
    """An Einsum of the (unrolled) program with what the rank means to it."""

    einsum: Einsum
    iterates: bool
    full: bool
    descending: bool | None  # direction of the loop over the rank it stands in, if any


class _View:
    """A cascade seen along one rank: unrolled Einsums, and which tensors carry the rank."""

    def __init__(self, cascade: Cascade, rank: str) -> None:
        self.cascade, self.rank = cascade, rank
        leaves = leaf_ranks(cascade, rank)
        self.levels = frozenset({rank, leaves[0]})
        self.leaves = frozenset(leaves)
        self.loops = frozenset(s.rank for s in cascade.body if isinstance(s, Loop))
        program = tuple(unrolled(cascade, self.levels))
        written = {e.out.tensor for e, _ in program}
        reads = {r.tensor for e, _ in program for r in accesses(e)}
        self.inputs = reads - written
        self.carrying = {
            r.tensor for e, _ in program for r in (e.out, *accesses(e)) if self.carries(r)
        }
        self.nodes = tuple(self._node(e, loop) for e, loop in program)

    def _node(self, einsum: Einsum, loop: Loop | None) -> _Node:
        ranks = _iteration_ranks(einsum)
        inside = loop is not None and loop.rank in self.levels
        if inside and loop is not None:
            ranks = ranks | {loop.rank}
        iterates = bool(ranks & self.levels)
        full = self.rank in ranks or self.leaves <= ranks
        return _Node(einsum, iterates, full, loop.descending if inside and loop else None)

    def carries(self, access: Read) -> bool:
        """Does an index of the access move with the rank?"""
        return any(ranks_of(i) & self.levels for i in access.index)

    def covers(self, access: Read) -> bool:
        """Does the access span the whole rank, not only summaries of its tiles?"""
        ranks = frozenset[str]().union(*(ranks_of(i) for i in access.index))
        return self.rank in ranks or self.leaves <= ranks

    def initial(self, read: Read) -> list[int]:
        """Einsums that write the fixed coordinate that is read, before the rank is traversed."""
        return [
            n
            for n, node in enumerate(self.nodes)
            if node.einsum.out.tensor == read.tensor
            and not self.carries(node.einsum.out)
            and any(
                not ranks_of(i) and i == j
                for i, j in zip(node.einsum.out.index, read.index, strict=False)
            )
        ]

    def offset(self, access: Read) -> int | None:
        """The shift of a carrying access along the rank; None if it is irregular."""
        moving = [i for i in access.index if ranks_of(i) & self.levels]
        shifts = {offset_of(i, self.levels) for i in moving}
        return shifts.pop() if len(shifts) == 1 else None


def _iteration_ranks(einsum: Einsum) -> frozenset[str]:
    parts = (einsum.expr, einsum.guard, *einsum.out.index)
    reduced = (rank for rank, _ in einsum.reduce)
    return frozenset[str](reduced).union(*(ranks_of(p) for p in parts))


_Key = tuple[str, "str | int"]


def _graph(view: _View) -> nx.DiGraph:
    """Nodes carry the least level (``base``), edges a weight and whether they advance a loop."""
    graph = nx.DiGraph()
    for tensor in {r.tensor for n in view.nodes for r in (n.einsum.out, *accesses(n.einsum))}:
        graph.add_node(("stream", tensor), base=1, label=tensor)
        graph.add_node(("done", tensor), base=0, label=tensor)
    for n, node in enumerate(view.nodes):
        graph.add_node(("einsum", n), base=int(node.iterates), label=node.einsum.out.tensor)
        for read in accesses(node.einsum):
            _add_read(graph, view, n, read)
        _add_write(graph, view, n)
    return graph


def _edge(graph: nx.DiGraph, tail: _Key, head: _Key, weight: int, advances: bool = False) -> None:
    old = graph.get_edge_data(tail, head)
    if old is not None:
        weight, advances = max(weight, old["weight"]), advances and old["advances"]
    graph.add_edge(tail, head, weight=weight, advances=advances)


def _add_read(graph: nx.DiGraph, view: _View, n: int, read: Read) -> None:
    node, me = view.nodes[n], ("einsum", n)
    if view.carries(read):
        if read.tensor in view.inputs:
            return  # an input may be read in any order
        shift, barrier = _distance(view, node, read)
        advances = shift or _advances_elsewhere(view, read)
        _edge(graph, ("stream", read.tensor), me, int(barrier), bool(advances))
        return
    waits = int(node.iterates)
    if read.tensor in view.carrying:
        starts = view.initial(read)
        for start in starts:  # the value before the first step
            _edge(graph, ("einsum", start), me, waits)
        if not starts and read.tensor not in view.inputs:  # the state after the traversal
            _edge(graph, ("stream", read.tensor), me, waits)
        return
    _edge(graph, ("done", read.tensor), me, waits, _advances_elsewhere(view, read))


def _add_write(graph: nx.DiGraph, view: _View, n: int) -> None:
    node, me, out = view.nodes[n], ("einsum", n), view.nodes[n].einsum.out
    if view.carries(out):
        _edge(graph, me, ("stream", out.tensor), 0)
    elif out.tensor in view.carrying:  # the initial value of a state
        _edge(graph, me, ("stream", out.tensor), int(not node.iterates))
    else:
        _edge(graph, me, ("done", out.tensor), 0)


def _distance(view: _View, consumer: _Node, read: Read) -> tuple[int, bool]:
    """Iterations from write to read, and whether the traversal direction makes that a barrier."""
    shift, barrier = 0, False
    for producer in view.nodes:
        out = producer.einsum.out
        if out.tensor != read.tensor or not view.carries(out):
            continue
        written, wanted = view.offset(out), view.offset(read)
        if written is None or wanted is None:
            return 0, True
        if {producer.descending, consumer.descending} == {True, False}:
            return 0, True
        distance = written - wanted
        direction = _direction(view, producer, consumer)
        shift = shift or distance
        barrier = barrier or (distance < 0 and not direction) or (distance > 0 and direction)
    return shift, barrier


def _direction(view: _View, producer: _Node, consumer: _Node) -> bool:
    """True for a descending traversal: that of the loop, else the one all shifts agree on."""
    for node in (producer, consumer):
        if node.descending is not None:
            return node.descending
    if any(node.descending is not None for node in view.nodes):
        return any(node.descending for node in view.nodes)
    shifts = set()
    for node in view.nodes:
        for read in accesses(node.einsum):
            if view.carries(read) and read.tensor not in view.inputs:
                shifts.add(view.offset(read) or 0)
    return any(s > 0 for s in shifts) and not any(s < 0 for s in shifts)


def _advances_elsewhere(view: _View, read: Read) -> bool:
    """Does the read take a value of an earlier step of a loop over another rank?"""
    others = view.loops - view.levels
    if not others:
        return False
    for producer in view.nodes:
        if producer.einsum.out.tensor != read.tensor:
            continue
        for written, wanted in zip(producer.einsum.out.index, read.index, strict=False):
            if ranks_of(written) & others and written != wanted:
                return True
    return False


def _solve(view: _View) -> dict[_Key, int]:
    """Level of every node: the longest path, after proving that every cycle may run."""
    graph = _graph(view)
    condensed = nx.condensation(graph)
    level: dict[_Key, int] = {}
    for component in nx.topological_sort(condensed):
        members = condensed.nodes[component]["members"]
        inner = graph.subgraph(members)
        _check_schedulable(view, inner)
        value = 0
        for n in members:
            arriving = (
                level[p] + d["weight"] for p, _, d in graph.in_edges(n, data=True) if p in level
            )
            value = max(value, graph.nodes[n]["base"], *arriving, 0)
        level.update(dict.fromkeys(members, value))
    return level


def _check_schedulable(view: _View, component: nx.DiGraph) -> None:
    barrier = next(((a, b) for a, b, d in component.edges(data=True) if d["weight"]), None)
    if barrier is not None:
        back = nx.shortest_path(component, barrier[1], barrier[0])
        raise _not_schedulable(
            view, component, [*back, barrier[1]], "it waits for its own complete value"
        )
    same = nx.subgraph_view(component, filter_edge=lambda a, b: not component[a][b]["advances"])
    if not nx.is_directed_acyclic_graph(same):
        cycle = [a for a, _ in nx.find_cycle(same)]
        raise _not_schedulable(view, component, [*cycle, cycle[0]], "no step of it comes first")


def _not_schedulable(view: _View, graph: nx.DiGraph, cycle: list[_Key], why: str) -> CascadeError:
    names: list[str] = []
    for key in cycle:
        label = graph.nodes[key]["label"]
        if not names or names[-1] != label:
            names.append(label)
    return CascadeError(
        f"cascade {view.cascade.name} is not schedulable over rank {view.rank}: the cycle "
        f"{' -> '.join(names)} has no traversal order, {why}; break the cycle, use an iterative "
        "rank, or give the rank of a solver loop a fixed size"
    )


def _tensor_passes(view: _View, level: Mapping[_Key, int], full: list[int]) -> dict[str, int]:
    flow = nx.DiGraph()
    for node in view.nodes:
        reads = [r for r in accesses(node.einsum) if view.carries(r)]
        flow.add_nodes_from(r.tensor for r in (*reads, node.einsum.out) if view.covers(r))
        if view.carries(node.einsum.out):
            flow.add_edges_from((r.tensor, node.einsum.out.tensor) for r in reads)
    readers: dict[str, set[int]] = {}
    for n in full:
        for r in accesses(view.nodes[n].einsum):
            if view.carries(r):
                readers.setdefault(r.tensor, set()).add(level["einsum", n])
    covering = [t for t in flow if any(view.covers(r) for r in _touches(view, t))]
    return {
        t: len(set[int]().union(*(readers.get(d, set()) for d in {t, *nx.descendants(flow, t)})))
        for t in covering
    }


def _touches(view: _View, tensor: str) -> Iterator[Read]:
    for node in view.nodes:
        for r in (node.einsum.out, *accesses(node.einsum)):
            if r.tensor == tensor:
                yield r


def _barriers(view: _View, level: Mapping[_Key, int]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], None] = {}
    for node in view.nodes:
        for read in accesses(node.einsum) if node.iterates else ():
            if view.carries(read) or read.tensor in view.inputs:
                continue
            kind = "stream" if read.tensor in view.carrying else "done"
            if level[kind, read.tensor] > 0:
                found[read.tensor, node.einsum.out.tensor] = None
    return tuple(found)


def _live(view: _View, level: Mapping[_Key, int]) -> tuple[str, ...]:
    used: dict[str, set[int]] = {}
    for n, node in enumerate(view.nodes):
        out = node.einsum.out
        if view.covers(out):
            used.setdefault(out.tensor, set()).add(level["einsum", n])
        for read in accesses(node.einsum):
            if read.tensor not in view.inputs and view.covers(read):
                used.setdefault(read.tensor, set()).add(level["einsum", n])
    return tuple(t for t, passes in used.items() if len(passes) > 1)
