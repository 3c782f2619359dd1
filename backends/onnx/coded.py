"""Attention over integer codes, as one operator in the program that torch's exporter gets.

Rewriting writes codes and scales with plain operators and multiplies them back before the kernel,
since no kernel of torch multiplies integers faster than floats.  An ONNX file can say what is
meant: codes multiply as integers (``MatMulInteger``) and their scales multiply the score.  Here the
program is put in that form: codes of queries and keys, and the numbers that a score or an output
reads, are operands of one `coded_attention`, a marker like the others (`markers`).  Mapped
probabilities (``attn_rewrite::mapped_attention``) hide their stages; they are written out first.

Codes travel as bytes with 128 added.  ONNX Runtime multiplies unsigned bytes by unsigned bytes
exactly and three times as fast as signed ones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from attn_rewrite.backends.onnx.products import ZERO
from attn_rewrite.backends.onnx.strides import with_graph
from attn_rewrite.backends.torch.einsums import emit_stages
from attn_rewrite.backends.torch.mapped import mapped_form
from attn_rewrite.backends.torch.ops import softmax_form
from attn_rewrite.backends.torch.staged import rounds
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    B,
    Call,
    Const,
    Expr,
    H,
    Q,
    Read,
    call,
    substitute,
    walk,
)
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import LowerError
from attn_rewrite.graph import GraphBuilder, aten
from attn_rewrite.site import Refusal
from attn_rewrite.site_marks import SITE_KEY

NAME = "attn_rewrite::coded_attention"
LARGEST = 127.0
_ATTENTIONS = ("scaled_dot_product_attention", "tiled_attention")
_INTEGERS = ("i4", "i8")
_SPACE = (B, H, Q, KV)


@torch.library.custom_op(NAME, mutates_args=())
def coded_attention(operands: Sequence[Tensor], cascade: str, block: int) -> Tensor:
    """The attention ``cascade`` over ``operands`` (its q, k and v, then what it reads); a marker in
    programs on their way to ONNX, never run."""
    raise AssertionError("a marker of the ONNX export was run; this is a bug")


@coded_attention.register_fake
def _(operands: Sequence[Tensor], cascade: str, block: int) -> Tensor:
    q, _, v, *_ = operands
    dtype = v.dtype if v.is_floating_point() else torch.float64
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3], dtype=dtype)


def with_codes(program: ExportedProgram, products: bool) -> ExportedProgram:
    """``program`` with a marker for every attention over codes; the same object without any.

    Mapped probabilities always become markers; attention over codes whose probabilities are plain
    only where integer ``products`` are wanted, since ONNX Runtime's own operators multiply floats.
    """
    _refuse_floats(program)
    graph = copy.deepcopy(program.graph)
    found = False
    for node in list(graph.nodes):
        name = str(getattr(node.target, "_opname", ""))
        if name == "mapped_attention":
            _write_out(graph, node)
            found = True
        elif products and name in _ATTENTIONS and (site := _site_of(node)) is not None:
            _mark(graph, node, site)
            found = True
    if not found:
        return program
    graph.eliminate_dead_code()
    return with_graph(program, graph)


def over_codes(program: ExportedProgram) -> set[str]:
    """Names of the sites whose queries and keys are codes times scales."""
    nodes = [n for n in program.graph.nodes if _name(n) in _ATTENTIONS and _site_of(n) is not None]
    return {n.meta[SITE_KEY] for n in nodes if SITE_KEY in n.meta}


def _refuse_floats(program: ExportedProgram) -> None:
    """`LowerError` where a site rounds to floats of 4 or 8 bits: no provider's kernel multiplies
    them in an attention, and exported they would be arithmetic that imitates a format."""
    for node in program.graph.nodes:
        mapped = _name(node) == "mapped_attention" and "cast_f8" in str(node.args[4])
        if not mapped and not (_name(node) == "frexp" and SITE_KEY in node.meta):
            continue
        site = node.meta.get(SITE_KEY, node.name)
        reason = "its operands are rounded to floats of 8 bits or less, which ONNX Runtime has no "
        reason += "products of"
        raise LowerError(
            f"ONNX: {site}: {reason}; use int8 there, or run it with the torch or triton backend.",
            [Refusal("onnx-float8", reason, site=site)],
        )


# Mapped probabilities


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    """Stages as plain operators in float64, as the operator itself computes them; a map without
    steps in the type of the operands."""
    q, k, v, reads, text, block = node.args
    staged, held, names = mapped_form(str(text))
    if not held.stages.body and not any(map(rounds, walk(staged.probability))):  # type: ignore[arg-type]
        _replace(GraphBuilder(graph).at(node), node, ([q, k, v, *reads], text, block))  # type: ignore[misc]
        return
    build = GraphBuilder(graph).at(node)
    given = dict(zip(names, (q, k, v, *reads), strict=True))  # type: ignore[misc]
    wide = {n: _double(build, t) for n, t in given.items()}
    needed = {t.name: wide[t.name] for t in held.stages.inputs}
    made = emit_stages(build, held.stages, needed) if needed else {}
    tensors = {**wide, **made}
    operands = []
    for position, name in enumerate(held.operands):
        coded = position < 3 and staged.declaration(name).dtype in _INTEGERS
        operands.append(_bytes(build, tensors[name]) if coded else _double(build, tensors[name]))
    operands += [wide[t.name] for t in held.form.reads[len(held.operands) - 3 :]]
    _replace(build, node, (operands, text, block))


def _double(build: GraphBuilder, value: fx.Node) -> fx.Node:
    kind = value.meta["val"].dtype
    if not kind.is_floating_point or kind == torch.float64:
        return value
    return build.call(aten.to.dtype, value, torch.float64)  # type: ignore[no-any-return]


def _bytes(build: GraphBuilder, codes: fx.Node) -> fx.Node:
    shifted = build.call(aten.add.Scalar, codes, ZERO)
    return build.call(aten.to.dtype, shifted, torch.uint8)  # type: ignore[no-any-return]


def _replace(build: GraphBuilder, node: fx.Node, args: tuple[Any, ...]) -> None:
    """The marker in the place of ``node``, with its name's metadata and its type."""
    made = build.call(torch.ops.attn_rewrite.coded_attention.default, *args)
    kind = node.meta["val"].dtype
    value = made.meta["val"]
    made.meta = {**node.meta, "val": value}
    out = made if value.dtype == kind else build.call(aten.to.dtype, made, kind)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    out.name = node.name  # a signature names what the program returns


# Codes times scales


@dataclass(frozen=True, eq=False)
class _Coded:
    """Codes [b, h, n, d] (whole numbers in a float type) and scales [b or 1, h or 1, n or 1, 1]
    that multiply them, as nodes."""

    codes: fx.Node
    scales: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, eq=False)
class _Site:
    q: _Coded
    k: _Coded
    v: fx.Node
    form: SoftmaxAttention
    reads: tuple[fx.Node, ...]
    block: int


def _site_of(node: fx.Node) -> _Site | None:
    """The attention at ``node`` if its queries and keys are codes times scales."""
    q, k = (_coded(x) for x in node.args[:2])
    if q is None or k is None:
        return None
    v = node.args[2]
    if len(v.meta["val"].shape) != 4:  # type: ignore[union-attr]
        return None
    if getattr(node.target, "_opname", "") == "tiled_attention":
        reads, text, block = node.args[3:]
        return _Site(q, k, v, softmax_form(str(text)), tuple(reads), int(block))  # type: ignore[arg-type]
    return _of_sdpa(node, q, k)


def _of_sdpa(node: fx.Node, q: _Coded, k: _Coded) -> _Site | None:
    """``scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=, enable_gqa=)``."""
    names = ("attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
    if given.get("dropout_p"):
        return None  # said where the operator is translated
    sizes = [x.meta["val"].shape for x in node.args[:2]]  # type: ignore[union-attr]
    group = 1 if sizes[0][1] == sizes[1][1] else int(sizes[0][1]) // int(sizes[1][1])
    scale, mask = given.get("scale"), given.get("attn_mask")
    score: Expr = QK * (sizes[0][-1] ** -0.5 if scale is None else float(scale))  # type: ignore[arg-type]
    form = SoftmaxAttention(score, Q >= KV if given.get("is_causal") else TRUE, group=group)
    if mask is None:
        return _Site(q, k, node.args[2], form, (), 128)  # type: ignore[arg-type]
    return None if not isinstance(mask, fx.Node) else _masked(node, q, k, form, mask)


def _masked(
    node: fx.Node, q: _Coded, k: _Coded, form: SoftmaxAttention, mask: fx.Node
) -> _Site | None:
    value = mask.meta["val"]
    if value.dim() > 4:
        return None
    ranks = _SPACE[4 - value.dim() :]
    # What has one element along a rank is read at 0 there.
    index = tuple(Const(0) if n == 1 else r for n, r in zip(value.shape, ranks, strict=True))
    names = tuple(f"one{i}" if isinstance(r, Const) else str(r) for i, r in enumerate(index))
    kind = "bool" if value.dtype == torch.bool else "float"
    read = Read("MASK", index)
    form = replace(form, reads=(TensorDecl("MASK", names, dtype=kind),))
    if kind == "bool":
        form = replace(form, guard=call("and", form.guard, read) if form.guard != TRUE else read)
    else:
        form = replace(form, score=form.score + read)
    return _Site(q, k, node.args[2], form, (mask,), 128)  # type: ignore[arg-type]


def _coded(value: Any) -> _Coded | None:
    """``value`` as codes and the scales of its rows; None where it is no such product."""
    value = _before(value, ("to", "expand", "clone"))
    if _is_small(value):
        return _Coded(value)
    if _name(value) != "mul":
        return None
    left, right = value.args
    for part, scale in ((left, right), (right, left)):
        sizes: Sequence[Any] = scale.meta["val"].shape if isinstance(scale, fx.Node) else ()
        found = _coded(part) if len(sizes) == 4 and sizes[-1] == 1 else None
        if found is not None:
            return _Coded(found.codes, (*found.scales, scale))
    return None


def _name(node: Any) -> str:
    return str(getattr(getattr(node, "target", None), "_opname", ""))


def _before(value: Any, names: Sequence[str]) -> Any:
    while isinstance(value, fx.Node) and _name(value) in names:
        value = value.args[0]
    return value


def _is_small(value: Any) -> bool:
    """Whether ``value`` is a whole number of -127 to 127, saturated to a range."""
    high = _before(value, ("expand",))
    low = high.args[0] if _name(high) == "minimum" else None
    if not isinstance(low, fx.Node) or _name(low) != "maximum":
        return False
    top, bottom = _constant(high.args[1]), _constant(low.args[1])
    if top is None or bottom is None or not -LARGEST <= bottom <= top <= LARGEST:
        return False
    return top.is_integer() and bottom.is_integer() and _is_whole(low.args[0])


def _constant(node: Any) -> float | None:
    if _name(node) == "scalar_tensor" and isinstance(node.args[0], int | float):
        return float(node.args[0])
    return float(node) if isinstance(node, int | float) else None


def _is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number: rounded, also through ``x + (rounded - x)``."""
    value = _before(value, ("expand",))
    match _name(value), getattr(value, "args", ()):
        case ("round" | "floor" | "sign", _):
            return True
        case "mul", (a, b):
            return _is_whole(a) and _is_whole(b)
        case "add", (x, gap):
            inner = _before(gap, ("detach", "alias"))
            return _name(inner) == "sub" and inner.args[1] is x and _is_whole(inner.args[0])
    return False


def _mark(graph: fx.Graph, node: fx.Node, site: _Site) -> None:
    """The marker in the place of ``node``: its score reads the scales of queries and keys."""
    build, form = GraphBuilder(graph).at(node), site.form
    head: Expr = H if form.group == 1 else call("floordiv", H, form.group)
    places_of_keys: tuple[Expr, ...] = (B, head, KV)
    sides = (
        (site.q, "QSCALE", (B, H, Q), ("b", "h", "q")),
        (site.k, "KSCALE", places_of_keys, ("b", "h" if head == H else "hkv", "kv")),
    )
    whole, number = _multiple(form.score)
    product: Expr = QK
    decls, scales = [], []
    for side, name, index, ranks in sides:
        if not side.scales:
            continue
        # Together in float64: what each score is multiplied by is rounded once.
        scale = side.scales[0]
        for factor in side.scales[1:]:
            scale = build.call(aten.mul.Tensor, scale, factor)
        if number is not None and side is site.q:
            scale = build.call(aten.mul.Scalar, scale, number)
        # What has one element along a rank is read at 0 there.
        one = [size == 1 for size in scale.meta["val"].shape[:3]]
        places = tuple(Const(0) if o else i for o, i in zip(one, index, strict=True))
        named = (f"{name.lower()}{r}" if o else r for o, r in zip(one, ranks, strict=True))
        product = product * Read(name, places)
        decls.append(TensorDecl(name, tuple(named)))
        scales.append(build.call(aten.squeeze.dims, scale, [3]))
    if not site.q.scales and number is not None:
        product = product * number
    form = replace(
        form, score=substitute(form.score, {whole: product}), reads=(*decls, *form.reads)
    )
    codes = [_bytes(build, side.codes) for side in (site.q, site.k)]
    operands = [*codes, site.v, *scales, *site.reads]
    _replace(build, node, (operands, str(softmax_cascade(form)), site.block))


def _multiple(score: Expr) -> tuple[Expr, float | None]:
    """``QK * c`` in ``score`` and the number c; `QK` and None where it is no such product."""
    for node in walk(score):
        match node:
            case Call("mul", (a, Const(float(number)))) if a == QK:
                return node, number
    return QK, None
