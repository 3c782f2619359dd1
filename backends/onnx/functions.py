"""Functions of a file: each carries the name of a rewritten site and the text of its cascade.

A runtime that knows the operator may use its own kernel; every other one runs the body.  The body
is what an emitter recorded, or, for a site whose cascade has no emitter, the plain operators that
torch's exporter made of its Einsums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attn_rewrite.backends.onnx.lowering import SiteLowering
from attn_rewrite.backends.onnx.markers import MARKER_DOMAIN, Origin, origin_of
from attn_rewrite.cascade.attention import as_softmax
from attn_rewrite.cascade.expr import ranks_of
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.reordered import in_order
from attn_rewrite.cascade.staged import attention_form
from attn_rewrite.cascade.text import parse

FUNCTION_DOMAIN = "attn_rewrite"


@dataclass(frozen=True)
class Heading:
    """What a function says of itself: the site's name and the text of its cascade; ``prefix`` is
    that of names in its body, unique in the model."""

    name: str
    prefix: str
    text: str


def as_function(
    model: ir.Model,
    heading: Heading,
    nodes: Sequence[ir.Node],
    inputs: tuple[Sequence[ir.Value], Sequence[ir.Value]],
    outputs: Sequence[ir.Value],
    imports: Mapping[str, int],
) -> ir.Node:
    """``nodes`` as a function of the model; the call of it.

    ``inputs`` are the function's own and the values given for them.
    """
    formal, given = inputs
    name = heading.name
    body = ir.Graph(formal, outputs, nodes=nodes, opset_imports=dict(imports), name=name)
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    operator = f"site_{plain}" if plain[:1].isdigit() else plain
    function = ir.Function(FUNCTION_DOMAIN, operator, "", graph=body, attributes=[])
    if function.identifier() in model.functions:  # "a.b" and "a_b" are one operator name
        function.name = f"{operator}_{heading.prefix}"
    function.doc_string = heading.text
    function.metadata_props["attn_rewrite.cascade"] = heading.text
    model.functions[function.identifier()] = function
    call = ir.node(
        function.name, given, domain=FUNCTION_DOMAIN, name=f"{heading.prefix}/call",
        num_outputs=len(outputs),
    )  # fmt: skip
    for i, value in enumerate(call.outputs):
        value.name = f"{heading.prefix}/output" + (f"_{i}" if i else "")
    return call


def parameters(prefix: str, given: Sequence[ir.Value]) -> list[ir.Value]:
    """The inputs of a function for ``given``: of the same types and shapes."""
    return [
        ir.Value(name=f"{prefix}/input_{i}", shape=x.shape, type=x.type)
        for i, x in enumerate(given)
    ]


def gather_sites(
    model: ir.Model, names: Mapping[Origin, str], cascades: Mapping[str, str]
) -> tuple[SiteLowering, ...]:
    """Make a function of every rewritten site that left as plain operators of the main graph.

    ``names`` are the sites of graph nodes, ``cascades`` the texts of rewritten sites.
    """
    groups: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        site = origin_of(node, names)
        if site is not None and site in cascades:
            groups.setdefault(site, []).append(node)
    found: list[SiteLowering] = []
    for name, nodes in groups.items():
        if any(n.domain == MARKER_DOMAIN for n in nodes):
            continue
        region = _region(model.graph, nodes)
        if region is None:
            continue
        heading = Heading(name, f"einsums_{len(found)}", cascades[name])
        _move(model, heading, region)
        found.append(_said(name, parse(cascades[name])))
    return tuple(found)


def _said(name: str, cascade: Cascade) -> SiteLowering:
    """What is said of a site that left Einsum by Einsum."""
    form = attention_form(cascade)
    if form is not None:
        masked, mapped = bool(cascade.guard_terms()), as_softmax(in_order(cascade)) is None
        detail = f"MatMul and Softmax, {'a mask' if masked else 'no mask'}"
        detail += ", probabilities mapped" if mapped else ""
        kind = "dense mask" if masked else "dense"
        # Of plain ones `lower` makes tiles wherever their mask leaves out blocks enough.
        return SiteLowering(name, "aten", kind, detail, covered=masked and not mapped)
    if over_pairs(cascade):
        return SiteLowering(name, "aten", "operators", "its Einsums one by one, over every pair")
    detail = "its Einsums one by one, none of them over every pair of a query and a key"
    return SiteLowering(name, "aten", "einsums", detail)


def over_pairs(cascade: Cascade) -> bool:
    """Whether an Einsum iterates over every pair of a query and a key."""
    digits = {r.name: frozenset(r.parts) or frozenset({r.name}) for r in cascade.ranks}
    wanted = digits.get("q", frozenset({"q"})) | digits.get("kv", frozenset({"kv"}))

    def iterated(ranks: frozenset[str]) -> frozenset[str]:
        return ranks.union(*(digits[r] for r in ranks if r in digits))

    return any(
        wanted <= iterated(frozenset().union(*map(ranks_of, (e.out, e.expr, e.guard))))
        for e in cascade.einsums()
    )


def _used(node: ir.Node) -> Iterator[ir.Value]:
    """What a node and the graphs in it read."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _used(inner)


def _region(graph: ir.Graph, nodes: Sequence[ir.Node]) -> list[ir.Node] | None:
    """``nodes`` and what stands between them: nodes that torch's decompositions made without saying
    from what.  None where a node with graphs in it is among them."""
    behind, ahead, inside = set(nodes), set(nodes), set(nodes)
    order = list(graph)
    for node in order:
        if any(v.producer() in behind for v in _used(node)):
            behind.add(node)
    for node in reversed(order):
        if any(u.node in ahead for v in node.outputs for u in v.uses()):
            ahead.add(node)
    region = [n for n in order if n in inside or (n in behind and n in ahead)]
    plain = all(set(_used(n)) == {v for v in n.inputs if v is not None} for n in region)
    return region if plain else None


def _move(model: ir.Model, heading: Heading, nodes: Sequence[ir.Node]) -> None:
    """Put ``nodes`` into a function, and a call of it in their place."""
    graph, inside = model.graph, set(nodes)
    reads = dict.fromkeys(v for n in nodes for v in n.inputs if v is not None)
    given = [v for v in reads if v.producer() not in inside]
    formal = parameters(heading.prefix, given)
    for own, value in zip(formal, given, strict=True):
        for use in [u for u in value.uses() if u.node in inside]:
            use.node.replace_input_with(use.idx, own)
    users = {v: [u for u in v.uses() if u.node not in inside] for n in nodes for v in n.outputs}
    results = [v for v, outside in users.items() if outside or v.is_graph_output()]
    places = {v: [i for i, out in enumerate(graph.outputs) if out is v] for v in results}
    for value, held in places.items():
        for place in held:
            graph.outputs[place] = ir.Value(name=value.name)  # until the call is there
    graph.remove(nodes)
    call = as_function(model, heading, nodes, (formal, given), results, graph.opset_imports)
    call.metadata_props["attn_rewrite.site"] = heading.name
    for new, old in zip(call.outputs, results, strict=True):
        new.shape, new.type = old.shape, old.type
        for use in users[old]:
            use.node.replace_input_with(use.idx, new)
        for place in places[old]:
            graph.outputs[place] = new
    graph.append(call)
    graph.sort()
