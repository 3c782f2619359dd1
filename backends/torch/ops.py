"""The operators ``attn_rewrite::*`` that lowered programs call; importing this file registers them.

``tiled_attention(q, k, v, reads, cascade, block)`` runs the softmax attention that the text
``cascade`` writes down over ``q [b, hq, q_len, d_qk]``, ``k [b, hkv, kv_len, d_qk]`` and
``v [b, hkv, kv_len, d_v]``, and gives ``[b, hq, q_len, d_v]`` in the type of q.  ``reads`` are the
cascade's inputs after Q, K and V, in order; a dimension of extent 1 broadcasts.  Any strides;
float16, bfloat16 and float32 compute in float32, float64 in float64.  A query that keeps no key
gives 0.  ``tiled_attention_lse`` gives the log-sum-exp of each row as well, ``[b, hq, q_len]`` in
float32 (float64 for such operands): over the kept keys, -inf where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from attn_rewrite.backends.torch.gradient import by_argument, gradients, keep_for_gradient
from attn_rewrite.backends.torch.kernel import attend, attend_with_lse
from attn_rewrite.backends.torch.schedule import TileCounts, make_schedule
from attn_rewrite.backends.torch.tiles import prepare
from attn_rewrite.cascade.attention import SoftmaxAttention, as_softmax
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.staged import attention_form
from attn_rewrite.cascade.text import parse
from attn_rewrite.errors import LowerError

NAME = "attn_rewrite::tiled_attention"


@lru_cache(maxsize=512)
def softmax_form(text: str) -> SoftmaxAttention:
    """The softmax attention that ``text`` writes down; `LowerError` if it is another cascade."""
    form = as_softmax(parse(text))
    if form is None:
        raise LowerError(
            "tiled_attention takes the text of a softmax attention cascade, not this one; "
            f"lower it with attn_rewrite.backends.torch.lower instead:\n{text}"
        )
    return form


def _check(
    form: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor]
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(
                f"tiled_attention: {name} has shape {list(tensor.shape)}, expected 4 dimensions"
            )
    if len(reads) != len(form.reads):
        names = ", ".join(t.name for t in form.reads) or "none"
        raise ValueError(
            f"tiled_attention got {len(reads)} reads, the cascade has {len(form.reads)}: {names}"
        )
    for decl, tensor in zip(form.reads, reads, strict=True):
        if tensor.ndim != len(decl.ranks):
            raise ValueError(
                f"tiled_attention: read {decl.name} has shape {list(tensor.shape)}, expected one "
                f"dimension for each of [{', '.join(decl.ranks)}]"
            )
    if q.shape[1] != k.shape[1] * form.group:
        raise ValueError(
            f"tiled_attention: q has {q.shape[1]} heads and k {k.shape[1]}, but the cascade has "
            f"{form.group} query heads for each key head"
        )


@torch.library.custom_op(NAME, mutates_args=())
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], cascade: str, block: int
) -> Tensor:
    """Softmax attention that skips blocks of keys the guard leaves out; see the module."""
    return run(softmax_form(cascade), q, k, v, reads, block)


def run(
    form: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], block: int
) -> Tensor:
    """`tiled_attention` of a form that is at hand."""
    _check(form, q, k, v, reads)
    return attend(prepare(form, q, k, v, reads, block), q.dtype)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], cascade: str, block: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@torch.library.custom_op(f"{NAME}_lse", mutates_args=())
def tiled_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], cascade: str, block: int
) -> tuple[Tensor, Tensor]:
    """`tiled_attention` and the log-sum-exp of its rows; see the module."""
    form = softmax_form(cascade)
    _check(form, q, k, v, reads)
    if form.sink is not None:
        raise ValueError(
            "tiled_attention_lse: the cascade has a sink, whose logit is no score of a key; use "
            "tiled_attention, or leave the sink out"
        )
    return attend_with_lse(prepare(form, q, k, v, reads, block), q.dtype)


@tiled_attention_lse.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, reads: Sequence[Tensor], cascade: str, block: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[1], q.shape[2], dtype=dtype)


# The gradient is an operator too, so that traced backward graphs hold one node and no lengths.  It
# is defined without an autograd kernel: recomputation needs autograd inside.
torch.library.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] reads, str cascade, int block, "
    "int[] wanted, Tensor? grad_lse=None) -> Tensor[]",
)


@torch.library.impl(f"{NAME}_backward", ["cpu", "cuda"])
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    cascade: str,
    block: int,
    wanted: Sequence[int],
    grad_lse: Tensor | None = None,
) -> list[Tensor]:
    form = softmax_form(cascade)
    detached = [t.detach() for t in reads]
    problem = prepare(form, q.detach(), k.detach(), v.detach(), detached, block)
    names = [form.reads[i].name for i in wanted]
    sums = None if grad_lse is None else grad_lse.detach()
    found = gradients(problem, grad.detach(), names, sums)
    parts = [
        t.to(like.dtype) for t, like in zip((found.q, found.k, found.v), (q, k, v), strict=True)
    ]
    return parts + [found.reads[n].to(reads[i].dtype) for n, i in zip(names, wanted, strict=True)]


@torch.library.register_fake(f"{NAME}_backward")  # type: ignore[untyped-decorator]
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Sequence[Tensor],
    cascade: str,
    block: int,
    wanted: Sequence[int],
    grad_lse: Tensor | None = None,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, *(reads[i] for i in wanted))]


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
    q, k, v, *reads = ctx.saved_tensors
    found = torch.ops.attn_rewrite.tiled_attention_backward(
        grad, q, k, v, reads, ctx.cascade, ctx.block, ctx.wanted, grad_lse
    )
    return by_argument(ctx, found)


tiled_attention.register_autograd(_differentiate, setup_context=keep_for_gradient)
tiled_attention_lse.register_autograd(_differentiate, setup_context=keep_for_gradient)


def tile_counts(
    cascade: Cascade,
    q_len: int,
    kv_len: int,
    block: int,
    heads: int,
    tables: Mapping[str, npt.NDArray[Any]] | None = None,
) -> TileCounts:
    """Blocks that `tiled_attention` executes for one batch entry, over all ``heads`` query heads.

    ``tables`` are values of block lists that the guard reads.  Raises `LowerError` if the cascade
    is not a softmax attention.
    """
    form = attention_form(cascade)
    if form is None:
        raise LowerError(f"cascade {cascade.name} is not a softmax attention: it has no tiles")
    schedule = make_schedule(
        form.guard, q_len=q_len, kv_len=kv_len, block=block, heads=heads, group=form.group,
        tables=tables,
    )  # fmt: skip
    return schedule.counts()
