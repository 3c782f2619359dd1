"""Attention in an exported graph: marked while torch translates it, replaced afterwards.

torch's exporter calls a translation per operator but keeps the recorder of nested bodies to itself,
and its optimiser would see half-built loops.  So the translations here only leave one marker node
per attention, and `expand` replaces every marker once the rest of the model is ONNX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx.defs
import onnx_ir as ir
import torch
from onnxscript import values

from attn_rewrite.backends.onnx.blocks import BlockPlan
from attn_rewrite.backends.onnx.cached import OPERATOR, Grouped, cache_of, padding_of
from attn_rewrite.backends.onnx.cached import why_not as why_not_grouped
from attn_rewrite.backends.onnx.contrib import DOMAIN, NOT_BLOCKS, emit_multi_head, why_not
from attn_rewrite.backends.onnx.dense import SdpaOptions, causal_half, emit_sdpa, fits_tiles
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.repeats import keys_once
from attn_rewrite.backends.onnx.tiles import (
    DEFAULT_ROWS,
    HeadPlan,
    TilePlan,
    choose_plan,
    emit_attention,
)
from attn_rewrite.cascade.attention import SoftmaxAttention, as_softmax, softmax_cascade
from attn_rewrite.errors import LowerError
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SITE_KEY = "attn_rewrite_site"  # set by attn_rewrite.apply on the nodes it splices in
FUNCTION_DOMAIN = "attn_rewrite"
MARKER_DOMAIN = "attn_rewrite.export"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
_ANY = [*_FLOATS, "tensor(bool)", *(f"tensor(int{n})" for n in (8, 16, 32, 64)), "tensor(uint8)"]


@dataclass(frozen=True)
class SiteLowering:
    """How one attention left for ONNX.

    ``form`` is ``"tiles"`` (keys outside the mask's bands are never read), ``"half"`` (keys beyond
    the one side that the mask bounds, as the upper half under a causal one), ``"blocks"`` (only the
    blocks of ``tiles``, executed and total over all heads, are computed), ``"dense mask"`` (every
    key is read and the mask applied: nothing is saved), ``"dense"`` (MatMul and Softmax over all
    keys), ``"operators"`` (the graph's own) or the name of an operator
    (``GroupQueryAttention`` skips what lies above the diagonal).  ``detail`` says more in words;
    ``rows`` and ``width`` are the queries and keys of a step of the tiled form; ``choice`` says,
    for the target ``onnxruntime``, why this form and not one of its own operators.
    """

    name: str
    operator: str
    form: str
    detail: str
    rows: int | None = None
    width: int | None = None
    tiles: tuple[int, int] | None = None
    choice: str = ""

    @property
    def skips(self) -> bool:
        """True where the lowering really leaves out what the mask excludes."""
        return self.form in ("tiles", "half", "blocks", OPERATOR)

    def to_json(self) -> dict[str, Any]:
        """Plain values for metadata and reports."""
        return {
            "name": self.name,
            "operator": self.operator,
            "form": self.form,
            "detail": self.detail,
            "rows": self.rows,
            "width": self.width,
            "tiles": None if self.tiles is None else list(self.tiles),
            "skips": self.skips,
            "choice": self.choice,
        }


def _marker(name: str, attributes: Sequence[tuple[str, Any]]) -> values.Op:
    """An operator of the marker domain: any number of tensors in, one out."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    tensors = schema.FormalParameter(
        "inputs", "M", param_option=option.Variadic, is_homogeneous=False
    )
    built = schema(
        name,
        MARKER_DOMAIN,
        1,
        inputs=[tensors],
        outputs=[schema.FormalParameter("output", "T", param_option=option.Single)],
        type_constraints=[("M", _ANY, ""), ("T", _FLOATS, "")],
        attributes=[schema.Attribute(n, t, required=True) for n, t in attributes],
    )
    return values.Op(values.Opset(MARKER_DOMAIN, 1), name, built)


def _translate_tiled() -> Callable[..., Any]:
    kinds = onnx.defs.OpSchema.AttrType
    marker = _marker("TiledAttention", [("cascade", kinds.STRING), ("block", kinds.INT)])

    def tiled_attention(q: Any, k: Any, v: Any, reads: Any, cascade: str, block: int) -> Any:
        return marker(q, k, v, *reads, cascade=cascade, block=block)

    return tiled_attention


def _translate_sdpa() -> Callable[..., Any]:
    kinds = onnx.defs.OpSchema.AttrType
    flags = [("causal", kinds.INT), ("gqa", kinds.INT), ("scale", kinds.STRING)]
    marker = _marker("ScaledDotProductAttention", flags)

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout_p:
            raise LowerError(
                f"ONNX: an attention has dropout {dropout_p}, expected 0; "
                "call model.eval() before the export."
            )
        inputs = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        # A string keeps all digits of the scale; a float attribute is 32 bits wide.
        text = "" if scale is None else repr(float(scale))
        return marker(*inputs, causal=int(is_causal), gqa=int(enable_gqa), scale=text)

    return scaled_dot_product_attention


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx.export takes as ``custom_translation_table``."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.scaled_dot_product_attention.default: _translate_sdpa()
    }
    if hasattr(torch.ops.attn_rewrite, "tiled_attention"):
        table[torch.ops.attn_rewrite.tiled_attention.default] = _translate_tiled()
    if hasattr(torch.ops.attn_rewrite, "mapped_attention"):
        table[torch.ops.attn_rewrite.mapped_attention.default] = _refuse_mapped
    return table


def _refuse_mapped(q: Any, k: Any, v: Any, reads: Any, cascade: str, block: int) -> Any:
    raise LowerError(
        "ONNX: a site rounds its probabilities before they multiply V, which this exporter has no "
        "operators for; quantise only Q and K there (int8), or run it with the torch backend."
    )


def _origins(sources: Sequence[Any]) -> Iterator[str]:
    """Names of the nodes a traced node came from, nearest first (torch's ``from_node`` chain)."""
    for source in sources:
        yield source.name
        yield from _origins(source.from_node or ())


def _site_name(node: ir.Node, given: Mapping[str, str], taken: Sequence[str]) -> str:
    """The name the rewrite gave to the graph node, else its module path with an index."""
    meta = getattr(node.meta.get("node"), "meta", {})
    for origin in _origins(meta.get("from_node") or ()):
        if origin in given:
            return given[origin]
    stack = list((meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("L['self'].") if stack else ""
    base = path or "attention"
    return f"{base}.{sum(n.rpartition('.')[0] == base for n in taken)}"


def site_names(program: ExportedProgram) -> dict[str, str]:
    """Site names by graph node, as splicing left them on the nodes of rewritten attention."""
    nodes = [
        n
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for n in module.graph.nodes
    ]
    return {n.name: n.meta[SITE_KEY] for n in nodes if SITE_KEY in n.meta}


def _attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def _form_of(node: ir.Node, name: str) -> SoftmaxAttention:
    from attn_rewrite.cascade.text import parse

    text = _attribute(node, "cascade")
    form = as_softmax(parse(text))
    if form is None:
        reason = "the cascade is not softmax attention, which is all this backend emits so far"
        raise LowerError(
            f"ONNX: {name}: {reason}; keep this site exact or use the torch backend.",
            [Refusal("onnx-cascade", reason, node=text.splitlines()[0], site=name)],
        )
    return form


def _expand_tiled(
    r: Recorder, node: ir.Node, name: str, target: str, formal: Sequence[ir.Value]
) -> tuple[ir.Value, SiteLowering]:
    out, lowering = _tiled(r, node, name, formal)
    return out, replace(lowering, choice=NOT_BLOCKS) if target == "onnxruntime" else lowering


def _tiled(
    r: Recorder, node: ir.Node, name: str, formal: Sequence[ir.Value]
) -> tuple[ir.Value, SiteLowering]:
    form = _form_of(node, name)
    inputs = [i for i in node.inputs if i is not None]
    plan = choose_plan(form, inputs, _attribute(node, "block") or DEFAULT_ROWS)
    out = emit_attention(r, formal, form, plan)
    if isinstance(plan, BlockPlan):
        counts = (plan.executed, plan.total)
        return out, SiteLowering(
            name, "tiled_attention", "blocks", str(plan), plan.block, tiles=counts
        )
    form_name, detail = "half" if plan.reach else "tiles", str(plan)
    if plan.dense:
        form_name = "dense mask"
        detail = f"every key of {_rows(plan)} queries a step: no fixed band in {form.guard}"
    width = plan.width if isinstance(plan, TilePlan) else None
    return out, SiteLowering(name, "tiled_attention", form_name, detail, _rows(plan), width)


def _rows(plan: TilePlan | HeadPlan) -> int:
    return plan.rows if isinstance(plan, TilePlan) else plan.parts[0][1].rows


def _expand_sdpa(
    r: Recorder, node: ir.Node, name: str, target: str
) -> tuple[ir.Value, SiteLowering]:
    text = _attribute(node, "scale")
    options = SdpaOptions(
        causal=bool(_attribute(node, "causal")),
        grouped=bool(_attribute(node, "gqa")),
        scale=float(text) if text else None,
    )
    inputs = [i for i in node.inputs if i is not None]
    operator = "scaled_dot_product_attention"
    choice = why_not(inputs, options) if target == "onnxruntime" else ""
    if choice is None:
        out = emit_multi_head(r, inputs, options)
        why = "a streaming kernel: no scores in memory, faster than MatMul and Softmax"
        detail = "ONNX Runtime's operator, no mask"
        return out, SiteLowering(name, operator, "MultiHeadAttention", detail, choice=why)
    if options.causal and fits_tiles(inputs):
        form, plan = causal_half(inputs, options)
        out = emit_attention(r, inputs, form, plan)
        return out, SiteLowering(name, operator, "half", str(plan), plan.rows, choice=choice)
    out, form_name, detail = emit_sdpa(r, inputs, options)
    return out, SiteLowering(name, operator, form_name, detail, choice=choice)


def _parameters(r: Recorder, node: ir.Node) -> list[ir.Value]:
    """The inputs of a function that stands for ``node``: of the same types and shapes."""
    given = [i for i in node.inputs if i is not None]
    return [
        ir.Value(name=f"{r.prefix}/input_{i}", shape=x.shape, type=x.type)
        for i, x in enumerate(given)
    ]


def _expand_one(
    model: ir.Model, node: ir.Node, name: str, prefix: str, opset: int, target: str
) -> SiteLowering:
    r = Recorder(prefix, opset)
    _give_keys_once(node, name)
    if node.op_type == "TiledAttention" and target == "onnxruntime":
        form = _form_of(node, name)
        reason = why_not_grouped(form, [i for i in node.inputs if i is not None])
        if reason is None:
            return _expand_grouped(model, r, node, name, form)
    else:
        form, reason = None, ""
    tiled = node.op_type == "TiledAttention"
    formal = _parameters(r, node) if tiled else []
    if tiled:
        value, lowering = _expand_tiled(r, node, name, target, formal)
        if form is not None and padding_of(form) is not None:
            lowering = replace(lowering, choice=str(reason))
    else:
        value, lowering = _expand_sdpa(r, node, name, target)
    if tiled:
        given = [i for i in node.inputs if i is not None]
        nodes = [_as_function(model, r, node, name, (formal, given), (value,))]
        value = nodes[0].outputs[0]
    else:
        nodes = r.nodes
    _replace(node, name, nodes, {node.outputs[0]: value})
    return lowering


def _give_keys_once(node: ir.Node, name: str) -> None:
    """Let the marker read keys and values before their heads were repeated, and say so in it."""
    inputs, times = keys_once([i for i in node.inputs if i is not None])
    if times == 1:
        return
    if node.op_type == "TiledAttention":
        form = _form_of(node, name)
        if form.group > 1:
            return
        cascade = softmax_cascade(replace(form, group=times))
        node.attributes["cascade"] = ir.AttrString("cascade", str(cascade))
    elif _attribute(node, "gqa") or any(x.shape is None or len(x.shape) != 4 for x in inputs[:3]):
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
    q, k, v, *masks = [i for i in node.inputs if i is not None]
    found = cache_of(k), cache_of(v)
    assert found[0] is not None  # `why_not_grouped` was asked
    assert found[1] is not None
    given = [q, *(x for c in found if c for x in (c.past, c.new, c.scale) if x is not None), *masks]
    formal = [
        ir.Value(name=f"{r.prefix}/input_{i}", shape=x.shape, type=x.type)
        for i, x in enumerate(given)
    ]
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
    """What was recorded as a function of the model under the site's name; the call of it.

    ``inputs`` are the function's own and the values given for them.  A runtime that knows the
    operator may use its own kernel; every other one runs the body.
    """
    formal, given = inputs
    body = ir.Graph(formal, outputs, nodes=r.nodes, opset_imports={"": r.opset}, name=name)
    text = _attribute(node, "cascade")
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    operator = f"site_{plain}" if plain[:1].isdigit() else plain
    function = ir.Function(FUNCTION_DOMAIN, operator, "", graph=body, attributes=[])
    if function.identifier() in model.functions:  # "a.b" and "a_b" are one operator name
        function.name = f"{operator}_{r.prefix}"
    function.doc_string = text
    function.metadata_props["attn_rewrite.cascade"] = text
    model.functions[function.identifier()] = function
    call = ir.node(
        function.name, given, domain=FUNCTION_DOMAIN, name=f"{r.prefix}/call",
        num_outputs=len(outputs),
    )  # fmt: skip
    for i, value in enumerate(call.outputs):
        value.name = f"{r.prefix}/output" + (f"_{i}" if i else "")
    return call


def expand(
    model: ir.Model,
    opset: int,
    given: Mapping[str, str] | None = None,
    target: str = "portable",
) -> tuple[SiteLowering, ...]:
    """Replace every marker in the model, its functions and nested graphs by the target's operators.

    ``given`` are site names by graph node (`site_names`); a named site without a marker was left as
    plain operators, and the result says so.
    """
    given = given or {}
    found: list[SiteLowering] = []
    for owner in (model.graph, *tuple(model.functions.values())):
        markers = [
            n for n in ir.traversal.RecursiveGraphIterator(owner) if n.domain == MARKER_DOMAIN
        ]
        for node in markers:
            name = _site_name(node, given, [s.name for s in found])
            found.append(_expand_one(model, node, name, f"attention_{len(found)}", opset, target))
        owner.opset_imports.pop(MARKER_DOMAIN, None)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    if any(domain == FUNCTION_DOMAIN for domain, *_ in model.functions):
        model.opset_imports[FUNCTION_DOMAIN] = 1
    if any(s.form in ("MultiHeadAttention", OPERATOR) for s in found):
        for owner in (model, *model.functions.values()):
            owner.opset_imports[DOMAIN] = 1
    marked = {s.name for s in found}
    plain = [name for name in dict.fromkeys(given.values()) if name not in marked]
    return (*found, *(SiteLowering(n, "aten", "operators", "as in the graph") for n in plain))
