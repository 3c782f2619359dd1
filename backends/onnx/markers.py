"""Attention in an exported graph, marked while torch translates it.

torch's exporter calls a translation per operator but keeps the recorder of nested bodies to itself,
and its optimiser would see half-built loops.  So the translations here only leave one marker node
per attention, which `sites.expand` replaces once the rest of the model is ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx.defs
import onnx_ir as ir
import torch
from onnxscript import values

from attn_rewrite.backends.onnx.statistics import flash_attention_with_statistics
from attn_rewrite.cascade.attention import SoftmaxAttention, as_softmax
from attn_rewrite.cascade.staged import StagedAttention, as_staged
from attn_rewrite.errors import LowerError
from attn_rewrite.site import Refusal
from attn_rewrite.site_marks import CASCADE_KEY, SITE_KEY

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MARKER_DOMAIN = "attn_rewrite.export"
TILED, SDPA = "TiledAttention", "ScaledDotProductAttention"
CODED, TILED_LSE = "CodedAttention", "TiledAttentionWithLse"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
_ANY = [*_FLOATS, "tensor(bool)", *(f"tensor(int{n})" for n in (8, 16, 32, 64)), "tensor(uint8)"]


def _marker(
    name: str, attributes: Sequence[tuple[str, Any]], outputs: Sequence[str] = ("output",)
) -> values.Op:
    """An operator of the marker domain: any number of tensors in, the ``outputs`` out."""
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
        outputs=[
            schema.FormalParameter(n, f"T{i}", param_option=option.Single)
            for i, n in enumerate(outputs)
        ],
        type_constraints=[
            ("M", _ANY, ""),
            *((f"T{i}", _FLOATS, "") for i, _ in enumerate(outputs)),
        ],
        attributes=[schema.Attribute(n, t, required=True) for n, t in attributes],
    )
    return values.Op(values.Opset(MARKER_DOMAIN, 1), name, built)


def _translate_tiled() -> Callable[..., Any]:
    kinds = onnx.defs.OpSchema.AttrType
    marker = _marker(TILED, [("cascade", kinds.STRING), ("block", kinds.INT)])

    def tiled_attention(q: Any, k: Any, v: Any, reads: Any, cascade: str, block: int) -> Any:
        return marker(q, k, v, *reads, cascade=cascade, block=block)

    return tiled_attention


def _translate_tiled_lse() -> Callable[..., Any]:
    kinds = onnx.defs.OpSchema.AttrType
    attributes = [("cascade", kinds.STRING), ("block", kinds.INT)]
    marker = _marker(TILED_LSE, attributes, ("output", "lse"))

    def tiled_attention_lse(q: Any, k: Any, v: Any, reads: Any, cascade: str, block: int) -> Any:
        return marker(q, k, v, *reads, cascade=cascade, block=block)

    return tiled_attention_lse


def _translate_coded() -> Callable[..., Any]:
    kinds = onnx.defs.OpSchema.AttrType
    marker = _marker(CODED, [("cascade", kinds.STRING), ("block", kinds.INT)])

    def coded_attention(operands: Any, cascade: str, block: int) -> Any:
        return marker(*operands, cascade=cascade, block=block)

    return coded_attention


def _translate_sdpa() -> Callable[..., Any]:
    kinds = onnx.defs.OpSchema.AttrType
    flags = [("causal", kinds.INT), ("gqa", kinds.INT), ("scale", kinds.STRING)]
    marker = _marker(SDPA, flags)

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
        torch.ops.aten.scaled_dot_product_attention.default: _translate_sdpa(),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (
            flash_attention_with_statistics
        ),
    }
    if hasattr(torch.ops.attn_rewrite, "tiled_attention"):
        table[torch.ops.attn_rewrite.tiled_attention.default] = _translate_tiled()
    if hasattr(torch.ops.attn_rewrite, "tiled_attention_lse"):
        table[torch.ops.attn_rewrite.tiled_attention_lse.default] = _translate_tiled_lse()
    if hasattr(torch.ops.attn_rewrite, "coded_attention"):
        table[torch.ops.attn_rewrite.coded_attention.default] = _translate_coded()
    return table


Origin = tuple[int, str]  # a node by the identity of its graph and its name


def _origins(sources: Sequence[Any]) -> Iterator[Origin]:
    """The nodes a traced node came from, nearest first (torch's ``from_node`` chain)."""
    for source in sources:
        yield source.graph_id, source.name
        yield from _origins(source.from_node or ())


def _meta(node: ir.Node) -> Mapping[str, Any]:
    """What torch says of the graph node that ``node`` was made for."""
    return getattr(node.meta.get("node"), "meta", {})


def origin_of(node: ir.Node, given: Mapping[Origin, str]) -> str | None:
    """The site among those ``given`` by graph node that ``node`` was made for, if any.

    A graph that it came from through several others has names of its own, which may be those of
    other nodes here: names count only where no graph of the chain is known.
    """
    origins = list(_origins(_meta(node).get("from_node") or ()))
    graphs = {graph for graph, _ in given}
    if any(graph in graphs for graph, _ in origins):
        return next((given[origin] for origin in origins if origin in given), None)
    by_name = {name: site for (_, name), site in given.items()}
    return next((by_name[name] for _, name in origins if name in by_name), None)


def site_name(node: ir.Node, given: Mapping[Origin, str], taken: Sequence[str]) -> str:
    """The name the rewrite gave to the graph node, else its module path with an index."""
    found = origin_of(node, given)
    if found is not None:
        return found
    meta = _meta(node)
    stack = list((meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("L['self'].") if stack else ""
    base = path or "attention"
    return f"{base}.{sum(n.rpartition('.')[0] == base for n in taken)}"


def site_names(program: ExportedProgram) -> dict[Origin, str]:
    """Site names by graph node, as splicing left them on the nodes of rewritten attention."""
    nodes = _nodes(program)
    return {(id(n.graph), n.name): n.meta[SITE_KEY] for n in nodes if SITE_KEY in n.meta}


def site_cascades(program: ExportedProgram) -> dict[str, str]:
    """The texts of the cascades of rewritten sites, as splicing left them."""
    both = (SITE_KEY, CASCADE_KEY)
    found = (n.meta for n in _nodes(program) if all(key in n.meta for key in both))
    return {meta[SITE_KEY]: meta[CASCADE_KEY] for meta in found}


def _nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def attribute(node: ir.Node, name: str) -> Any:
    """The value of a marker's attribute."""
    return node.attributes[name].value


def staged_of(node: ir.Node) -> StagedAttention:
    """The staged attention of a coded marker, which `coded` has made."""
    from attn_rewrite.cascade.text import parse

    staged = as_staged(parse(attribute(node, "cascade")))
    assert staged is not None
    return staged


def form_of(node: ir.Node, name: str) -> SoftmaxAttention:
    """The softmax attention of a tiled marker; `LowerError` where its cascade is another."""
    from attn_rewrite.cascade.text import parse

    text = attribute(node, "cascade")
    form = as_softmax(parse(text))
    if form is None:
        reason = "the cascade is not softmax attention, which is all this backend emits so far"
        raise LowerError(
            f"ONNX: {name}: {reason}; keep this site exact or use the torch backend.",
            [Refusal("onnx-cascade", reason, node=text.splitlines()[0], site=name)],
        )
    return form
