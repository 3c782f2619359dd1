"""Splice kernels into the host graph in the place of the attention they were lowered from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx

from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.gates import Gate, emit_gates
from attn_rewrite.graph import (
    Builder,
    GraphBuilder,
    arrange,
    aten,
    copy_graph,
    extents,
    has_effect,
    op_name,
    restore,
)
from attn_rewrite.memory import is_dead_write
from attn_rewrite.passes.find.vmapped import drop_empty_levels
from attn_rewrite.passes.reorder.settle import Gathers, count_gathers, settle_orders
from attn_rewrite.site import Operand, Site
from attn_rewrite.site_marks import CASCADE_KEY, SITE_KEY
from attn_rewrite.tables import Table

_PROVENANCE = ("nn_module_stack", "stack_trace", "torch_fn")


class Emits(Protocol):
    """What splicing needs of a kernel."""

    @property
    def name(self) -> str:
        """How the cascade is computed."""

    @property
    def cascade(self) -> Cascade:
        """What is computed."""

    def emit(self, build: Builder, inputs: Sequence[Any]) -> Any:
        """Compute AV from Q, K, V and the reads, all in canonical layout."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """A site and the kernel that takes its place; ``tables`` follow the site's own inputs, and
    ``gates`` multiply its output."""

    site: Site
    kernel: Emits
    tables: Mapping[str, Table] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()


def splice(host: fx.GraphModule, replacements: Iterable[Replacement]) -> fx.GraphModule:
    """A copy of ``host`` with each site computed by its kernel; ``host`` itself if there are none.

    The sites may have been found in a canonicalised copy: operands are looked up by origin, and
    what only exists in the copy is brought over.  Parameters are shared.
    """
    replacements = list(replacements)
    if not replacements:
        return host
    twins = _copy_all(host)
    root = twins.modules[host]
    builders: dict[fx.Graph, GraphBuilder] = {}
    for point, item in _in_graph_order(replacements, twins):
        build = builders.setdefault(point.graph, GraphBuilder(point.graph))
        provenance = {
            k: item.site.anchor.meta[k] for k in _PROVENANCE if k in item.site.anchor.meta
        }
        marks = {SITE_KEY: item.site.name, CASCADE_KEY: str(item.kernel.cascade)}
        build.at(point, **marks, **provenance)
        made = compute(build, item, twins)
        for operand, value in made:
            twins.local(operand.node).replace_all_uses_with(value)
            relax_views(value)
    for module in twins.modules.values():
        sweep(module.graph)
        module.graph.lint()
        module.recompile()
    return root


def settle(module: fx.GraphModule) -> tuple[Gathers, Gathers]:
    """Move the gathers of reordered Sites in the copy that `splice` made; counts before and after.

    Every graph by itself: nothing moves into or out of a graph that a higher-order operator calls.
    """
    before, after = Gathers(), Gathers()
    for inner in module.modules():
        if not isinstance(inner, fx.GraphModule):
            continue
        here = count_gathers(inner.graph)
        if here.total:
            settle_orders(inner.graph)
            sweep(inner.graph)
            inner.graph.lint()
            inner.recompile()
        before, after = before + here, after + count_gathers(inner.graph)
    return before, after


def fold_into_kernels(module: fx.GraphModule) -> Gathers:
    """Gathers that Triton kernels can make themselves become theirs; what is left is counted."""
    from attn_rewrite.backends.triton.quantise import fold_gathers

    left = Gathers()
    for inner in module.modules():
        if not isinstance(inner, fx.GraphModule):
            continue
        if fold_gathers(inner.graph):
            sweep(inner.graph)
            inner.graph.lint()
            inner.recompile()
        left = left + count_gathers(inner.graph)
    return left


def relax_views(node: fx.Node) -> None:
    """Turn ``view`` into ``reshape`` behind ``node``: a kernel's output may have other strides."""
    queue = [node]
    while queue:
        for user in queue.pop().users:
            if user.target is aten.view.default:
                user.target = aten.reshape.default
            if op_name(user) in _VIEWS:
                queue.append(user)


# Operators whose result has the strides of their input.
_VIEWS = frozenset(
    "reshape transpose permute unsqueeze squeeze expand slice select split chunk unbind getitem t "
    "detach alias dropout to _to_copy mul add sub div".split()
)


def sweep(graph: fx.Graph) -> None:
    """Remove what is no longer used: assertions on dead values, dropouts, pure operators, writes
    to memory that is not read any more, and levels of `torch.vmap` around nothing."""
    for node in reversed(list(graph.nodes)):
        if op_name(node) == "_assert_tensor_metadata":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if all(map(_asserts, source.users)):
                graph.erase_node(node)
        elif all(map(_asserts, node.users)) and (not _has_effect(node) or is_dead_write(node)):
            for assertion in list(node.users):  # those behind what else read the value
                graph.erase_node(assertion)
            graph.erase_node(node)
    drop_empty_levels(graph)


def _asserts(node: fx.Node) -> bool:
    return op_name(node) == "_assert_tensor_metadata"


def _has_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or (
        has_effect(node) and op_name(node) not in _RANDOM
    )


# Random only where they drop; unused, they have no effect that a caller could see.
_RANDOM = frozenset({"dropout", "native_dropout", "alpha_dropout", "scaled_dot_product_attention"})


def _place(site: Site, twins: _Twins) -> fx.Node:
    """What the kernel stands before: the output, unless the log-sum-exp is read before that."""
    output = twins.local(site.output.node)
    if site.lse is None:
        return output
    lse = twins.local(site.lse.node)
    return output if all(user > output for user in lse.users) else min(lse, output)


def compute(
    build: GraphBuilder, item: Replacement, twins: _Twins
) -> tuple[tuple[Operand, Any], ...]:
    """Build the kernel call and its layout changes; the values are laid out as the site's
    results."""
    site = item.site
    values = {n: (o, twins.local(o.node, build)) for n, o in site.inputs.items()}
    sizes = extents(build, values)
    inputs = [arrange(build, o, v, site.groups(n), sizes) for n, (o, v) in values.items()]
    inputs += [_constant(build, item, name, twins) for name in item.tables]
    result, lse = item.kernel.emit(build, inputs), None
    if site.lse is not None:
        result, lse = result
    if item.gates:
        assert build.point is not None
        unmarked = {k: v for k, v in build.meta.items() if k not in (SITE_KEY, CASCADE_KEY)}
        build.at(build.point, **unmarked)
        local = partial(twins.local, build=build)
        module = twins.module_of(build.graph)
        result = emit_gates(build, site, item.gates, module, result, local, sizes)
    made = [_laid_out(build, site, "AV", site.output, result, sizes)]
    if site.lse is not None:
        made.append(_laid_out(build, site, "LSE", site.lse, lse, sizes))
    return tuple(made)


def _laid_out(
    build: GraphBuilder, site: Site, name: str, operand: Operand, value: Any, sizes: Any
) -> tuple[Operand, Any]:
    dtype = operand.node.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = build.call(aten.to.dtype, value, dtype)
    return operand, restore(build, value, site.groups(name), operand, sizes)


def _constant(build: GraphBuilder, item: Replacement, name: str, twins: _Twins) -> fx.Node:
    """A table of the plan as a buffer of the graph, not one of the model's state."""
    module = twins.module_of(build.graph)
    place = "attn_rewrite_table_" + re.sub(r"\W", "_", f"{item.site.name}_{name}")
    device = item.site.inputs["Q"].node.meta["val"].device
    table = torch.from_numpy(item.tables[name]).to(device)
    module.register_buffer(place, table, persistent=False)
    assert build.point is not None
    with build.graph.inserting_before(build.point):
        node = build.graph.get_attr(place)
    mode = build.fake_mode
    node.meta["val"] = table if mode is None else mode.from_tensor(table)
    return node


def _in_graph_order(
    replacements: Iterable[Replacement], twins: _Twins
) -> list[tuple[fx.Node, Replacement]]:
    """Kernels and what they stand before, in that order, so that what one site builds stands before
    the next one that shares it."""
    items = [(_place(r.site, twins), r) for r in replacements]
    graphs = dict.fromkeys(point.graph for point, _ in items)
    place = {n: i for graph in graphs for i, n in enumerate(graph.nodes)}
    return sorted(items, key=lambda item: place[item[0]])


@dataclass(frozen=True, eq=False)
class _Twins:
    """Copies of a module and of the graphs it calls, and the copy of every node."""

    modules: dict[fx.GraphModule, fx.GraphModule]
    nodes: dict[fx.Node, fx.Node]

    def module_of(self, graph: fx.Graph) -> fx.GraphModule:
        """The copied module that ``graph`` belongs to."""
        return next(m for m in self.modules.values() if m.graph is graph)

    def local(self, node: fx.Node, build: GraphBuilder | None = None) -> fx.Node:
        """The copy of ``node`` (a node of the host, or of a canonicalised copy of it)."""
        here: fx.Node | None = node
        while here is not None and here not in self.nodes:
            here = here.meta.get("origin")
        if here is not None:
            return self.nodes[here]
        assert build is not None, f"{node} has no counterpart in the host graph"
        args = fx.node.map_arg(node.args, lambda n: self.local(n, build))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.local(n, build))
        assert callable(node.target)
        copied: fx.Node = build.call(node.target, *args, **kwargs)
        return copied


def _copy_all(host: fx.GraphModule) -> _Twins:
    copy, nodes = copy_graph(host)
    modules = {host: copy}
    for name, inner in host.named_children():
        if isinstance(inner, fx.GraphModule) and hasattr(copy, name):
            twins = _copy_all(inner)
            setattr(copy, name, twins.modules[inner])
            modules |= twins.modules
            nodes |= twins.nodes
    return _Twins(modules, nodes)
