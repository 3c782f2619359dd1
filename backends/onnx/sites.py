"""Marked attention replaced, site by site, by what the target has for it.

A marker is replaced once the rest of the model is ONNX (`markers`).  A rewritten site becomes a
function of the model that carries its name and its cascade.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from attn_rewrite.backends.onnx.cached import OPERATOR, Grouped, cache_of, padding_of
from attn_rewrite.backends.onnx.cached import why_not as why_not_grouped
from attn_rewrite.backends.onnx.choice import Ranges
from attn_rewrite.backends.onnx.contrib import DOMAIN
from attn_rewrite.backends.onnx.dense import SdpaOptions
from attn_rewrite.backends.onnx.functions import FUNCTION_DOMAIN, Heading, as_function, parameters
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.lowering import SiteLowering
from attn_rewrite.backends.onnx.mapped import mapping_of
from attn_rewrite.backends.onnx.markers import (
    CODED,
    MARKER_DOMAIN,
    TILED,
    TILED_LSE,
    Origin,
    attribute,
    form_of,
    site_name,
    staged_of,
)
from attn_rewrite.backends.onnx.offers import (
    offer_for_cuda,
    record,
    sdpa_offers,
    tiled_lowering,
    tiled_offers,
)
from attn_rewrite.backends.onnx.options import CPU, CUDA
from attn_rewrite.backends.onnx.repeats import keys_once
from attn_rewrite.backends.onnx.tile_plans import DEFAULT_ROWS, HeadPlan, choose_plan, fixed_lengths
from attn_rewrite.backends.onnx.tiles import emit_attention, emit_with_lse
from attn_rewrite.backends.torch.staged import prepared
from attn_rewrite.cascade.attention import SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import TRUE
from attn_rewrite.cascade.lse import with_lse
from attn_rewrite.errors import LowerError
from attn_rewrite.site import Refusal


@dataclass(frozen=True)
class Destination:
    """What sites are written for: the opset, the target, the lengths that axes may have, the
    names of rewritten sites by graph node, and the provider of ONNX Runtime; without ``kernels``
    none of its own operators on CUDA."""

    opset: int
    target: str = "portable"
    ranges: Ranges = field(default_factory=dict)
    names: Mapping[Origin, str] = field(default_factory=dict)
    provider: str = CPU
    kernels: bool = True


def _expand_one(
    model: ir.Model, node: ir.Node, name: str, prefix: str, to: Destination
) -> SiteLowering:
    r = Recorder(prefix, to.opset)
    _give_keys_once(node, name)
    given, tiled = _given(node), node.op_type == TILED
    cached: list[str] = []
    if tiled and to.target == "onnxruntime" and to.provider == CPU:
        form = form_of(node, name)
        reason = why_not_grouped(form, given)
        if reason is None:
            return _expand_grouped(model, r, node, name, form)
        cached = [reason] if padding_of(form) is not None else []
    formal = parameters(r.prefix, given) if tiled else given
    if tiled:
        rows = attribute(node, "block") or DEFAULT_ROWS
        offers, against = tiled_offers(name, form_of(node, name), formal, given, rows)
    else:
        offers, against = sdpa_offers(name, given, _options_of(node), to.opset)
    if to.provider == CUDA:
        wanted = form_of(node, name) if tiled and to.kernels else None
        offer = offer_for_cuda(offers[0], wanted, formal, given)
        value, lowering = offer.emit(r), offer.lowering
    elif to.target == "onnxruntime":
        value, lowering = record(r, offers, (*cached, *against), given, to.ranges)
    else:
        value, lowering = offers[0].emit(r), offers[0].lowering
    nodes = r.nodes
    if tiled:
        nodes = [_as_function(model, r, node, name, (formal, given), (value,))]
        value = nodes[0].outputs[0]
    _replace(node, name, nodes, {node.outputs[0]: value})
    return lowering


def _expand_coded(
    model: ir.Model, node: ir.Node, name: str, prefix: str, to: Destination
) -> SiteLowering:
    """Attention over codes, or with mapped probabilities: our own tiles on every target."""
    r, given, staged = Recorder(prefix, to.opset), _given(node), staged_of(node)
    form = prepared(staged, fold=False).form
    formal, mapping = parameters(r.prefix, given), mapping_of(staged)
    plan = choose_plan(form, given, attribute(node, "block") or DEFAULT_ROWS)
    if mapping is not None and mapping.whole_peak and isinstance(plan, HeadPlan):
        reason = "one statistic of all heads' probabilities, and its heads differ in their keys"
        raise LowerError(
            f"ONNX: {name}: {reason}; export with fixed lengths (static=True).",
            [Refusal("onnx-statistic", reason, site=name)],
        )
    value = emit_attention(r, formal, form, plan, mapping)
    call = _as_function(model, r, node, name, (formal, given), (value,))
    _replace(node, name, [call], {node.outputs[0]: call.outputs[0]})
    said = tiled_lowering(name, form, plan, None not in fixed_lengths(given))
    coded = [n for x, n in ((given[0], "Q K"), (given[2], "P V")) if x.dtype == ir.DataType.UINT8]
    how = f"; integer products {' and '.join(coded)}" if coded else ""
    kind = "dense" if said.form == "dense mask" and form.guard == TRUE else said.form
    choice = (
        "" if to.target == "portable" else "ONNX Runtime has no operator of mapped probabilities"
    )
    return replace(
        said, operator="coded_attention", form=kind, detail=said.detail + how, choice=choice
    )


def _expand_with_lse(
    model: ir.Model, node: ir.Node, name: str, prefix: str, to: Destination
) -> SiteLowering:
    """Attention whose log-sum-exp is used: our own tiles on every target."""
    r = Recorder(prefix, to.opset)
    _give_keys_once(node, name)
    form, given = form_of(node, name), _given(node)
    formal = parameters(r.prefix, given)
    plan = choose_plan(form, given, attribute(node, "block") or DEFAULT_ROWS)
    values = emit_with_lse(r, formal, form, plan)
    text = str(with_lse(softmax_cascade(form, "site")))
    node.attributes["cascade"] = ir.AttrString("cascade", text)
    call = _as_function(model, r, node, name, (formal, given), values)
    _replace(node, name, [call], dict(zip(node.outputs, call.outputs, strict=True)))
    said = tiled_lowering(name, form, plan, None not in fixed_lengths(given))
    kind = "dense" if said.form == "dense mask" and form.guard == TRUE else said.form
    choice = "" if to.target == "portable" else "no operator of ONNX Runtime gives a log-sum-exp"
    return replace(
        said, form=kind, detail=f"{said.detail}; with the log-sum-exp of rows", choice=choice
    )


def _given(node: ir.Node) -> list[ir.Value]:
    return [i for i in node.inputs if i is not None]


def _options_of(node: ir.Node) -> SdpaOptions:
    """The arguments of torch's operator, from its marker."""
    text = attribute(node, "scale")
    return SdpaOptions(
        causal=bool(attribute(node, "causal")),
        grouped=bool(attribute(node, "gqa")),
        scale=float(text) if text else None,
    )


def _give_keys_once(node: ir.Node, name: str) -> None:
    """Let the marker read keys and values before their heads were repeated, and say so in it."""
    inputs, times = keys_once(_given(node))
    if times == 1:
        return
    if node.op_type in (TILED, TILED_LSE):
        form = form_of(node, name)
        if form.group > 1:
            return
        cascade = softmax_cascade(replace(form, group=times))
        node.attributes["cascade"] = ir.AttrString("cascade", str(cascade))
    elif attribute(node, "gqa") or any(x.shape is None or len(x.shape) != 4 for x in inputs[:3]):
        return
    else:
        node.attributes["gqa"] = ir.AttrInt64("gqa", 1)
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _replace(
    node: ir.Node, name: str, nodes: list[ir.Node], values: Mapping[ir.Value, ir.Value]
) -> None:
    """``nodes`` in the place of ``node``, their ``values`` in that of the old ones."""
    for new in nodes:
        new.metadata_props["attn_rewrite.site"] = name
        new.meta.update(node.meta)
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], nodes, list(values), list(values.values())
    )


def _expand_grouped(
    model: ir.Model, r: Recorder, node: ir.Node, name: str, form: SoftmaxAttention
) -> SiteLowering:
    """The site and the caches it extends as one function; the present caches become its results."""
    q, k, v, *masks = _given(node)
    found = cache_of(k), cache_of(v)
    assert found[0] is not None  # `why_not_grouped` was asked
    assert found[1] is not None
    given = [q, *(x for c in found if c for x in (c.past, c.new, c.scale) if x is not None), *masks]
    formal = parameters(r.prefix, given)
    mine = dict(zip(given, formal, strict=True))
    caches = [
        replace(c, past=mine[c.past], new=mine[c.new], scale=c.scale and mine[c.scale])
        for c in found
        if c is not None
    ]
    mask = mine[masks[0]] if masks else None
    keys, numbers = caches
    values, plan = Grouped(r, form, mine[q], keys, numbers, mask).emit()
    call = _as_function(model, r, node, name, (formal, given), values)
    present = [c.present for c in found if c is not None]
    old = [node.outputs[0], *present]
    for new, was in zip(call.outputs, old, strict=True):
        new.shape, new.type = was.shape, was.type
    _replace(node, name, [call], dict(zip(old, call.outputs, strict=True)))
    why = "it appends to the cache and streams; padding, and several new tokens of several "
    return SiteLowering(
        name, "tiled_attention", OPERATOR, f"ONNX Runtime's operator, or by a run-time If {plan}",
        plan.rows, choice=why + "examples after a past, take the tiles",
    )  # fmt: skip


def _as_function(
    model: ir.Model,
    r: Recorder,
    node: ir.Node,
    name: str,
    inputs: tuple[list[ir.Value], list[ir.Value]],
    outputs: tuple[ir.Value, ...],
) -> ir.Node:
    """What was recorded as a function of the model under the site's name; the call of it."""
    heading = Heading(name, r.prefix, attribute(node, "cascade"))
    return as_function(model, heading, r.nodes, inputs, outputs, {"": r.opset})


_EXPANDED = {CODED: _expand_coded, TILED_LSE: _expand_with_lse}


def expand(
    model: ir.Model, to: Destination, whole: Sequence[SiteLowering] = ()
) -> tuple[SiteLowering, ...]:
    """Replace every marker in the model, its functions and nested graphs by the target's operators.

    ``whole`` are sites that are functions already.  A named site that is neither was left as plain
    operators, and the result says so.
    """
    found: list[SiteLowering] = []
    for owner in (model.graph, *tuple(model.functions.values())):
        markers = [
            n for n in ir.traversal.RecursiveGraphIterator(owner) if n.domain == MARKER_DOMAIN
        ]
        for node in markers:
            name = site_name(node, to.names, [s.name for s in found])
            expanded = _EXPANDED.get(node.op_type, _expand_one)
            found.append(expanded(model, node, name, f"attention_{len(found)}", to))
        owner.opset_imports.pop(MARKER_DOMAIN, None)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    if any(domain == FUNCTION_DOMAIN for domain, *_ in model.functions):
        model.opset_imports[FUNCTION_DOMAIN] = 1
    for owner in (model.graph, *model.functions.values()):
        if any(n.domain == DOMAIN for n in ir.traversal.RecursiveGraphIterator(owner)):
            owner.opset_imports[DOMAIN] = model.opset_imports[DOMAIN] = 1
    marked = {s.name for s in (*found, *whole)}
    plain = [name for name in dict.fromkeys(to.names.values()) if name not in marked]
    left = (SiteLowering(n, "aten", "operators", "as in the graph") for n in plain)
    return (*found, *whole, *left)
