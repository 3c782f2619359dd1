"""Find attention by meaning: softmax-anchored, symbolic-axis matching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx

from attn_rewrite.graph import module_path
from attn_rewrite.passes.find.anchor import is_anchor, refuse
from attn_rewrite.passes.find.families import recognise
from attn_rewrite.passes.find.lse import in_time
from attn_rewrite.passes.find.match import match
from attn_rewrite.passes.find.overwritten import overwritten
from attn_rewrite.passes.find.quotients import near_miss
from attn_rewrite.passes.find.vmapped import mapped
from attn_rewrite.site import Findings, Refusal, Site


def graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The module and every graph called from it by a higher-order operator (autocast, no_grad)."""
    yield module
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(
            inner := getattr(module, str(node.target), None), fx.GraphModule
        ):
            yield from graphs(inner)


def _in_vmap(node: fx.Node, inside: frozenset[fx.Node]) -> Refusal | None:
    if node not in inside:
        return None
    reason = "the attention is inside torch.vmap, where batch or heads are not axes of a tensor"
    return refuse("inside-vmap", f"{reason}; write them as axes", node)


def find(module: fx.GraphModule) -> Findings:
    """Every attention in a canonicalised graph, and every softmax (or quotient like one) that is
    not, with the reason."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    counts: Counter[str] = Counter()
    for graph in graphs(module):
        parts: set[fx.Node] = set()  # what belongs to a Site of several softmaxes
        inside = mapped(graph.graph)
        for node in graph.graph.nodes:
            if node in parts:
                continue
            if not is_anchor(node):
                missed = near_miss(node)
                refusals += [missed] if missed is not None else []
                continue
            path = module_path(node) or "attention"
            name = f"{path}#{counts[path]}"
            found = match(node, graph, name)
            other = recognise(node, found, graph, name)
            found = found if other is None else other
            if isinstance(found, Site):
                found = _in_vmap(node, inside) or overwritten(found) or in_time(found)
            if isinstance(found, Site):
                counts[path] += 1
                sites.append(found)
                parts.update(() if other is None else found.nodes)
            else:
                refusals.append(found)
    return Findings(tuple(sites), tuple(refusals))
