"""Attention with stages on torch: codes and scales first, then the kernel that suits the rest.

Probabilities that are not mapped leave a plain softmax attention over codes.  No fused kernel of
PyTorch multiplies integers, so scales are folded into the codes (`folded`: they are constant along
the summed channels, which the placement rule has checked) and every kernel there is can take it.
Mapped probabilities that round run in ``attn_rewrite::mapped_attention``, tile by tile; others are
plain operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_rewrite.backends.torch.dense import emit_dense
from attn_rewrite.backends.torch.einsums import emit_stages
from attn_rewrite.backends.torch.emit import cast, dtype_of
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import (
    KV,
    B,
    Call,
    D,
    Expr,
    H,
    Q,
    Read,
    ranks_of,
    substitute,
    tensors_of,
    walk,
)
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.cascade.staged import StagedAttention, core_reads, read_stages, stages_of
from attn_rewrite.graph import Builder


@dataclass(frozen=True)
class Prepared:
    """A plain softmax attention and where its inputs [Q, K, V, *reads] come from."""

    form: SoftmaxAttention
    stages: Cascade
    operands: tuple[str, ...]


def folded(staged: StagedAttention) -> StagedAttention:
    """``staged`` with the scales of the score multiplied into the operands they belong to.

    Reassociated.  A factor of the product that depends on queries alone goes into Q, on keys alone
    into K; the same object where there is none.
    """
    while (found := _factor(staged)) is not None:
        product, factor = found
        score = substitute(staged.form.score, {product: QK})
        staged = replace(_multiplied(staged, factor), form=replace(staged.form, score=score))
    return staged


def _factor(staged: StagedAttention) -> tuple[Expr, Expr] | None:
    """The innermost ``QK * factor`` of the score whose factor belongs to one operand."""
    score = staged.form.score
    if sum(n == QK for n in walk(score)) != 1:
        return None
    for node in walk(score):
        match node:
            case Call("mul", (inner, factor)) if inner == QK and tensors_of(factor):
                return (node, factor) if _side(staged, factor) else None
    return None


def _side(staged: StagedAttention, factor: Expr) -> str | None:
    """``"q"`` or ``"k"``, whose operand the factor can be multiplied into."""
    ranks = ranks_of(factor)
    if "kv" not in ranks:
        return "q"
    own = substitute(factor, {staged.kv_head: staged.head})
    shared = staged.form.group > 1 and "h" in ranks_of(own)
    return None if "q" in ranks or shared else "k"


def _multiplied(staged: StagedAttention, factor: Expr) -> StagedAttention:
    if _side(staged, factor) == "q":
        operand, space = staged.q, (B, H, Q, D)
    else:
        operand, space = staged.k, (B, staged.head, KV, D)
        factor = substitute(factor, {staged.kv_head: staged.head})
    taken = {e.out.tensor for e in staged.stages}
    name = f"{operand[0]}D"
    while name in taken:
        name += "'"
    ranks = tuple(r.name for r in space)
    stage = Einsum(Read(name, space), Read(operand, space) * factor)
    more = replace(
        staged, stages=(*staged.stages, stage), tensors=(*staged.tensors, TensorDecl(name, ranks))
    )
    return replace(more, q=name) if operand == staged.q else replace(more, k=name)


def prepared(staged: StagedAttention, *, fold: bool = True) -> Prepared:
    """The plain attention that is left once the stages of ``staged`` are computed.

    ``fold``: the scales of the score go into the operands.
    """
    staged = folded(staged) if fold else staged
    operands = (staged.q, staged.k, staged.v)
    made = tuple(t for t in read_stages(staged) if t not in operands)
    raw = tuple(t for t in ("Q", "K", "V") if t not in operands and t in core_reads(staged))
    extra = tuple(replace(staged.declaration(t), scale=None, dtype="float") for t in (*made, *raw))
    form = replace(staged.form, reads=(*extra, *staged.form.reads))
    return Prepared(form, stages_of(staged), (*operands, *made, *raw))


def emit_prepared(
    build: Builder, held: Prepared, decls: Sequence[TensorDecl], inputs: Sequence[Any]
) -> tuple[list[Any], torch.dtype]:
    """The inputs of the plain attention, and the type its output should have.

    ``decls`` are the inputs of the staged cascade, in the order of ``inputs``.
    """
    named: Mapping[str, Any] = dict(zip((t.name for t in decls), inputs, strict=True))
    kind = dtype_of(named["Q"])
    assert kind is not None
    # Codes times scales are no numbers of a half type.
    work = torch.float64 if kind == torch.float64 else torch.float32
    given = {t.name: named[t.name] for t in held.stages.inputs}
    made = emit_stages(build, held.stages, given) if given else {}
    first = [cast(build, made.get(n, named.get(n)), work) for n in held.operands]
    reads = [named[t.name] for t in decls[3:]]
    return [*first, *reads], kind


def rounds(node: Expr) -> bool:
    """Is the operator a step function, where an error of rounding becomes one of a whole step?"""
    if not isinstance(node, Call):
        return False
    return node.op in ("round", "floor", "ceil", "cast_i8", "cast_f8e4m3", "cast_f8e5m2")


def emit_mapped(
    decls: Sequence[TensorDecl], staged: StagedAttention, build: Builder, inputs: Sequence[Any]
) -> Any:
    """A continuous map of normalised probabilities, as plain operators with gradients."""
    held = prepared(staged)
    operands, kind = emit_prepared(build, held, decls, inputs)
    if not held.stages.body:
        operands = list(inputs)
    out = emit_dense(build, held.form, operands, probability=staged.probability)
    return cast(build, out, kind)
