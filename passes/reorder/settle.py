"""Where a graph reorders its tokens: gathers move through token-wise operators and cancel.

A reordered Site gathers its operands and puts its output back.  Between two Sites stand operators
that do the same to every token, so the tokens may as well stay in the new order there; what must
see them in the model's order (a convolution, an unpatchifying reshape, an output of the model)
marks the border.  Which values are kept in which order so that the least is gathered is a minimum
cut of the dataflow graph: a value on one side that is read on the other is gathered once.

The kernels compute what they did: their operands come in the order the policy said.  Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from attn_rewrite.graph import GraphBuilder, aten, is_tensor, op_name, shape_of
from attn_rewrite.memory import sharing, viewed, written
from attn_rewrite.passes.reorder.token_wise import only_shape, tokens_of

# Metadata of gathers of tokens, set where they are made: "into" an order of all heads, "back" from
# it, or "heads" where every head has its own.
ROLE = "attn_rewrite_order"
Indices = npt.NDArray[np.int64]
_SPLITS = frozenset({"split", "chunk", "split_with_sizes", "unbind", "tensor_split"})


@dataclass(frozen=True)
class Gathers:
    """Gathers of tokens in a graph: of activations, and of tables that no input reaches."""

    activations: int = 0
    tables: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.tables

    def __add__(self, other: Gathers) -> Gathers:
        return Gathers(self.activations + other.activations, self.tables + other.tables)


def settle_orders(graph: fx.Graph) -> None:
    """Move the gathers of ``graph`` to where the fewest elements are gathered.

    ``graph`` is edited (it is the copy that splicing made), and what is not read any more is left
    in it.  One order of tokens after the other; orders that differ from head to head stay at their
    Sites.
    """
    found = (order for node in graph.nodes if (order := _order(node)) is not None)
    for order in {o.tobytes(): o for o in found}.values():
        _Settlement(graph, order).apply()


def count_gathers(graph: fx.Graph) -> Gathers:
    """The gathers of tokens of a graph."""
    total = Gathers()
    for node in graph.nodes:
        if ROLE in node.meta:
            table = _is_table(node)
            total += Gathers(int(not table), int(table))
    return total


def _is_table(node: fx.Node) -> bool:
    """True if no input of the model reaches the value."""
    queue, seen = [node], {node}
    while queue:
        here = queue.pop()
        if here.op == "placeholder":
            return False
        fresh = [n for n in here.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return True


def _order(node: fx.Node) -> Indices | None:
    """The token at each position of the order that a gather of whole tokens leads into."""
    role = node.meta.get(ROLE)
    if role not in ("into", "back") or op_name(node) != "index_select":
        return None
    found = _constant(node.args[2])
    if found is None or not np.array_equal(np.sort(found), np.arange(len(found))):
        return None
    return found if role == "into" else np.argsort(found)


def _constant(node: object) -> Indices | None:
    """The value of a node that is computed from nothing but literals."""
    if not isinstance(node, fx.Node):
        return None
    chain = _ancestors(node)
    if any(n.op != "call_function" or written(n) for n in chain):
        return None
    env: dict[fx.Node, torch.Tensor] = {}
    for n in chain:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: env[a])
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        assert callable(n.target)
        env[n] = n.target(*args, **kwargs)
    value = env[node]
    return np.asarray(value.numpy(), np.int64) if value.ndim == 1 else None


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """``node`` and everything it is computed from, in graph order."""
    found, queue = {node}, [node]
    while queue:
        fresh = [n for n in queue.pop().all_input_nodes if n not in found]
        found.update(fresh)
        queue += fresh
    return sorted(found)


def _operand(gather: fx.Node) -> fx.Node:
    source = gather.args[0]
    assert isinstance(source, fx.Node)
    return source


def _dim(gather: fx.Node) -> int:
    dim = gather.args[1]
    assert isinstance(dim, int)
    return dim


def parts_of(value: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(user, node that reads the value): the parts of a split, and the split, or the user twice."""
    found = []
    for user in value.users:
        if op_name(user) in _SPLITS and all(op_name(part) == "getitem" for part in user.users):
            found += [(part, user) for part in user.users]
        else:
            found.append((user, user))
    return found


@dataclass(eq=False)
class _Settlement:
    """One order: which values could be held in it, which are, and the edit that follows.

    ``dims`` has the token dimension of every value that token-wise operators connect to a gather;
    ``ties`` its inputs with tokens, None where nothing was proved; ``fixed`` values stay in the
    model's order; ``written`` ones share memory that is written to, and one order.
    """

    graph: fx.Graph
    order: Indices
    dims: dict[fx.Node, int] = field(default_factory=dict)
    ties: dict[fx.Node, dict[fx.Node, int] | None] = field(default_factory=dict)
    fixed: set[fx.Node] = field(default_factory=set)
    into: set[fx.Node] = field(default_factory=set)
    back: set[fx.Node] = field(default_factory=set)
    written: set[fx.Node] = field(default_factory=set)

    def apply(self) -> None:
        """Edit the graph if that gathers less."""
        for node in self.graph.nodes:
            found = _order(node)
            if found is not None and np.array_equal(found, self.order):
                (self.into if node.meta[ROLE] == "into" else self.back).add(node)
        self._explore()
        if not (self.into and self.back):  # nothing to cancel
            return
        self._fix_conflicts()
        held = self._cut()
        if held:
            _Edit(self, held).apply()

    # What is connected

    def _explore(self) -> None:
        queue = [(_operand(node), _dim(node)) for node in self.into]
        queue += [(node, _dim(node)) for node in self.back]
        while queue:
            value, dim = queue.pop()
            if value in self.dims:
                if self.dims[value] != dim:
                    self.fixed.add(value)
                continue
            self.dims[value] = dim
            if value in self.back:
                self.ties[value] = {}
            else:
                found = tokens_of(value, dim) if value not in self.into else None
                self.ties[value] = None if found is None else dict(found)
                queue += list((found or {}).items())
            users = (user for user, _ in parts_of(value))
            queue += [(user, at) for user in users if (at := self._at(user, value, dim)) >= 0]
        self.into = {n for n in self.into if self.dims[_operand(n)] == _dim(n)}

    def _at(self, user: fx.Node, value: fx.Node, dim: int) -> int:
        """Where the tokens of ``value`` are in the value of ``user``; -1 if nowhere proved."""
        if user in self.into or user in self.back or only_shape(user, value):
            return -1
        if not is_tensor(user):
            return -1
        for at, size in enumerate(shape_of(user)):
            if size == len(self.order) and (tokens_of(user, at) or {}).get(value) == dim:
                return at
        return -1

    def _fix_conflicts(self) -> None:
        """Values whose tokens are found at two places, and memory that is written in part."""
        for value, ties in self.ties.items():
            for source, dim in (ties or {}).items():
                if self.dims.get(source) != dim:
                    self.fixed |= {value, source}
            for parts in _siblings(value):  # a split has one operand, in one order
                if any(self.ties.get(part) is None for part in parts):
                    self.fixed.update(parts)
        seen: set[fx.Node] = set()
        for value in list(self.dims):
            if value in seen:
                continue
            group = sharing(value)
            seen.update(group)
            writers = [u for member in group for u in member.users if member in written(u)]
            if writers and self._moves_whole(group, writers):
                self.written.update(group)
            elif writers:
                self.fixed |= {*group, *(u for member in group for u in member.users)}

    def _moves_whole(self, group: Iterable[fx.Node], writers: list[fx.Node]) -> bool:
        """Memory made here, all of whose views and writes are token-wise, read after the last."""
        members = set(group)
        last = max(writers)
        for member in members:
            if member.op != "call_function" or self.ties.get(member) is None:
                return False
            readers = [u for u in member.users if u not in members and not only_shape(u, member)]
            if any(user < last for user in readers):
                return False
        return True

    # What is held in the new order

    def _cut(self) -> set[fx.Node]:
        """The values to hold in the new order; none if the gathers stand well where they are."""
        flow = nx.DiGraph()
        flow.add_nodes_from(("model", "order"))
        for value in self.dims:
            self._connect(flow, value)
        _, (_, reordered) = nx.minimum_cut(flow, "model", "order")
        return {v for v in self.dims if v in reordered}

    def _connect(self, flow: nx.DiGraph, value: fx.Node) -> None:
        """One value: gathered at most once each way, whoever reads it."""
        weight = _elements(value)
        flow.add_edge(value, ("into", value), capacity=weight)
        flow.add_edge(("back", value), value, capacity=weight)
        if value in self.back and value not in self.fixed:
            flow.add_edge(value, "order")
        elif self.ties[value] is None or value in self.fixed:
            flow.add_edge("model", value)
        for user, _ in parts_of(value):
            if only_shape(user, value):
                continue
            if user in self.into:
                flow.add_edge(("into", value), "order")
            elif value in (self.ties.get(user) or {}):
                if value in self.written and viewed(user) is value:  # one memory, one order
                    flow.add_edge(value, user)
                    flow.add_edge(user, value)
                flow.add_edge(("into", value), user)
                flow.add_edge(user, ("back", value))
            else:
                flow.add_edge("model", ("back", value))
        for first, second in (pair for parts in _siblings(value) for pair in pairwise(parts)):
            flow.add_edge(first, second)
            flow.add_edge(second, first)


def _siblings(value: fx.Node) -> list[list[fx.Node]]:
    """The parts of each split of ``value``."""
    parts: dict[fx.Node, list[fx.Node]] = {}
    for part, split in parts_of(value):
        if part is not split:
            parts.setdefault(split, []).append(part)
    return list(parts.values())


def _elements(value: fx.Node) -> int:
    """Elements to gather; dynamic sizes as on the example inputs."""
    total = 1
    for size in shape_of(value):
        hint = size if isinstance(size, int) else getattr(size.node, "hint", None)
        total *= int(hint or 1)
    return total + 1


class _Edit:
    """Puts the gathers where the cut says."""

    def __init__(self, plan: _Settlement, held: set[fx.Node]) -> None:
        self.plan, self.held, self.graph = plan, held, plan.graph
        self.indices: dict[str, fx.Node] = {}

    def apply(self) -> None:
        """Rewire every reader of a value; what is not read any more is left for a sweep."""
        for node in self.held:
            if node.target is aten.view.default:
                node.target = aten.reshape.default  # a gathered operand has other strides
        for value in [n for n in self.graph.nodes if n in self.plan.dims]:
            for role in ("back", "into"):  # once its gather is gone, a Site reads like any other
                self._gather(value, role)
        for node in self.plan.back & self.held:
            node.replace_all_uses_with(_operand(node))

    def _gather(self, value: fx.Node, role: str) -> None:
        """Give ``value`` to those who read it in the other order."""
        here = value in self.held
        sites = [u for u in value.users if u in self.plan.into]
        if here and role == "into":
            for site in sites:
                site.replace_all_uses_with(value)
        if here == (role == "into"):
            return
        readers = [r for u, r in parts_of(value) if self._crosses(value, u)]
        if here:
            sites = []
        if not readers and len(sites) < 2:
            return
        build = GraphBuilder(self.graph).at(min([*readers, *sites]))
        index = self._index(role)
        gathered = build.call(aten.index_select.default, value, self.plan.dims[value], index)
        gathered.meta[ROLE] = role
        for reader in readers:
            reader.replace_input_with(value, gathered)
        for site in sites:
            site.replace_all_uses_with(gathered)

    def _crosses(self, value: fx.Node, user: fx.Node) -> bool:
        """Does ``user`` read the value in the order that it is not held in?"""
        if only_shape(user, value) or user in self.plan.into:
            return False
        tied = value in (self.plan.ties.get(user) or {})
        return (value in self.held) != (tied and user in self.held)

    def _index(self, role: str) -> fx.Node:
        """The index of a gather, computed at the start of the graph."""
        if role not in self.indices:
            model = next(iter(self.plan.into if role == "into" else self.plan.back))
            old = model.args[2]
            assert isinstance(old, fx.Node)
            start = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
            copies: dict[fx.Node, fx.Node] = {}
            with self.graph.inserting_before(start):
                for node in _ancestors(old):
                    copies[node] = self.graph.node_copy(node, copies.__getitem__)
            self.indices[role] = copies[old]
        return self.indices[role]
