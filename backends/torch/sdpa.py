"""PyTorch's ``scaled_dot_product_attention`` for a softmax attention, with a mask or a bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from attn_rewrite.backends.torch.dense import attention_space, working_type
from attn_rewrite.backends.torch.emit import Emitter, cast, dtype_of
from attn_rewrite.backends.torch.form import LinearScore, bias_as_mask, is_causal, linear_score
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.expr import TRUE, Expr, ranks_of, tensors_of
from attn_rewrite.graph import Builder, aten


@dataclass(frozen=True)
class Plan:
    """A kernel by name, the reason for it, and what emits it."""

    name: str
    why: str
    emit: Any


@dataclass(frozen=True)
class _Mask:
    """What ``scaled_dot_product_attention`` gets besides Q, K, V and the scale."""

    causal: bool = False
    keep: Expr | None = None
    bias: Expr | None = None


def plain_score(form: SoftmaxAttention) -> LinearScore | None:
    """The linear score of a form without weight and sink."""
    if form.weight is not None or form.sink is not None:
        return None
    return linear_score(form.score)


def is_square(extents: Mapping[str, int | None]) -> bool:
    """True where there are as many queries as keys, and it is known."""
    return extents.get("q") is not None and extents.get("q") == extents.get("kv")


def plan_sdpa(form: SoftmaxAttention, extents: Mapping[str, int | None]) -> Plan | None:
    """SDPA where its fused kernels see the whole mask: none, causal, or a bias without guard."""
    linear = plain_score(form)
    if linear is None:
        return None
    causal = is_causal(form.guard, square=is_square(extents))
    if linear.bias is None and (causal or form.guard == TRUE):
        why = "the guard is causal" if causal else "the score is a multiple of QK"
        return Plan("sdpa", why, partial(_emit, form, linear.scale, _Mask(causal)))
    if linear.bias is None or form.guard != TRUE:
        return None
    keep = bias_as_mask(linear.bias)
    if keep is not None and is_causal(keep, square=is_square(extents)):
        return Plan("sdpa", "the mask is causal", partial(_emit, form, linear.scale, _Mask(True)))
    if tensors_of(linear.bias):
        mask = _Mask(bias=linear.bias) if keep is None else _Mask(keep=keep)
        why = "the score is a multiple of QK plus a mask"
        return Plan("sdpa", why, partial(_emit, form, linear.scale, mask))
    return None


def plan_masked_sdpa(form: SoftmaxAttention) -> Plan | None:
    """SDPA with the guard as a mask, where tiles would skip nothing."""
    linear = plain_score(form)
    if linear is None:
        return None
    keep = None if linear.bias is None else bias_as_mask(linear.bias)
    if linear.bias is None or keep is not None:
        both = form.guard if keep is None else keep if form.guard == TRUE else form.guard & keep
        mask = _Mask(keep=both)
    else:
        mask = _Mask(keep=None if form.guard == TRUE else form.guard, bias=linear.bias)
    why = "the guard leaves out no whole blocks worth skipping"
    return Plan("sdpa", why, partial(_emit, form, linear.scale, mask))


def _emit(
    form: SoftmaxAttention,
    scale: float,
    mask: _Mask,
    dropout: float,
    build: Builder,
    inputs: Sequence[Any],
) -> Any:
    options: dict[str, Any] = {"scale": scale}
    if form.group > 1:
        options["enable_gqa"] = True
    attn_mask = _attn_mask(build, form, mask, inputs)
    return build.call(
        aten.scaled_dot_product_attention.default,
        *inputs[:3], attn_mask, dropout, mask.causal, **options,
    )  # fmt: skip


def _attn_mask(build: Builder, form: SoftmaxAttention, mask: _Mask, inputs: Sequence[Any]) -> Any:
    """The mask as a tensor [b or 1, h or 1, q, kv]: bool, or a bias in the type of q."""
    if mask.keep is None and mask.bias is None:
        return None
    space = attention_space(build, form, inputs, working_type(inputs[0]))
    emitter = Emitter(build, space)
    if mask.bias is None:
        assert mask.keep is not None
        value = emitter.truth(mask.keep)
    else:
        value = emitter.tensor(mask.bias, space.dtype)
        if mask.keep is not None:
            dropped = build.call(aten.logical_not.default, emitter.truth(mask.keep))
            value = build.call(aten.masked_fill.Scalar, value, dropped, float("-inf"))
        kind = dtype_of(inputs[0])
        assert kind is not None
        value = cast(build, value, kind)
    parts = [e for e in (mask.keep, mask.bias) if e is not None]
    ranks = frozenset().union(*map(ranks_of, parts))
    shape = [space.extents[r] if r in ranks or r in ("q", "kv") else 1 for r in space.frame]
    return build.call(aten.expand.default, value, shape)
