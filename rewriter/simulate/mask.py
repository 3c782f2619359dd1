"""Count the blocks a policy keeps on a layout of tokens, without a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.cover import BlockCounts, block_counts, heads_differ
from attn_rewrite.cascade.expr import KV, TRUE, Expr, Q, tensors_of
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.cascade.staged import attention_form
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import SparsePattern, Transform
from attn_rewrite.policy_text import parse_pipeline
from attn_rewrite.site import Refusal, Site
from attn_rewrite.token_layout import TokenLayout


@dataclass(frozen=True)
class MaskCount:
    """Blocks of all heads, and the mask they are of; ``per_head`` has one entry if heads agree."""

    policy: str
    layout: TokenLayout
    block: int
    per_head: tuple[BlockCounts, ...]

    def to_json(self) -> dict[str, Any]:
        """Counts as means over heads where heads differ (densities) and sums (blocks)."""
        heads = self.per_head
        total, kept = sum(c.total for c in heads), sum(c.kept for c in heads)
        known = [c.elements for c in heads if c.elements is not None]
        pairs = sum(c.pairs for c in heads)
        return {
            "policy": self.policy,
            "layout": str(self.layout),
            "block": self.block,
            "heads_counted": len(heads),
            "blocks_kept": kept,
            "blocks_total": total,
            "blocks_full": sum(c.full for c in heads),
            "block_density": kept / total if total else 0.0,
            "element_density": sum(known) / pairs if len(known) == len(heads) and pairs else None,
        }


def count_mask(
    policy: str, layout: TokenLayout, *, block: int = 128, heads: int = 1, causal: bool = False
) -> MaskCount:
    """Count the blocks of ``block`` x ``block`` pairs that ``policy`` keeps.

    Raises `PolicyError` where the policy is refused on such an attention.
    """
    if block < 1 or heads < 1:
        raise PolicyError(f"block is {block} and heads is {heads}; both are at least 1")
    guard = mask_of(policy, layout, heads=heads, causal=causal)
    count = heads if heads_differ(guard) else 1
    counts = tuple(
        block_counts(
            guard, q_len=layout.q_len, kv_len=layout.kv_len, block_q=block, block_kv=block,
            head=head if count > 1 else None, extents={"h": heads},
        )
        for head in range(count)
    )  # fmt: skip
    return MaskCount(policy, layout, block, counts)


def mask_of(policy: str, layout: TokenLayout, *, heads: int = 1, causal: bool = False) -> Expr:
    """The pairs kept by ``policy`` on an attention over ``layout``, over ``h, q, kv``.

    After a ``reorder`` these are positions of the new order.
    """
    site = stand_in(layout, heads=heads, causal=causal)
    cascade = site.cascade
    for transform in with_layout(parse_pipeline(policy), layout):
        refusal = transform.admits(site)
        result = refusal if refusal is not None else transform.apply(cascade, site)
        if isinstance(result, Refusal):
            raise PolicyError(f"{transform}: {result.reason}")
        cascade, site = result, transform.after(site)
    form = attention_form(cascade)
    if form is None:
        raise PolicyError(f"{policy} leaves no mask to count: it does not keep or drop pairs")
    if tables := tensors_of(form.guard):
        raise PolicyError(f"{policy} keeps what the table {tables[0]} lists, which a plan holds")
    return form.guard


def with_layout(transforms: Iterable[Transform], layout: TokenLayout) -> tuple[Transform, ...]:
    """Transforms that want a layout and have none get this one, inside others too."""
    return tuple(_laid_out(t, layout) for t in transforms)


def _laid_out(transform: Transform, layout: TokenLayout) -> Transform:
    given: dict[str, Any] = {}
    for field in fields(transform):
        value = getattr(transform, field.name)
        if field.name == "layout" and value is None and transform.wants_layout:
            given["layout"] = str(layout)
        elif isinstance(value, tuple) and any(isinstance(v, SparsePattern) for v in value):
            given[field.name] = with_layout(value, layout)
    try:
        return replace(transform, **given) if given else transform
    except ValueError as error:  # what it names is not in this layout
        raise PolicyError(str(error)) from None


def stand_in(layout: TokenLayout, *, heads: int = 1, causal: bool = False) -> Site:
    """A self-attention over ``layout`` that no graph holds, to ask a policy about."""
    if layout.q_len != layout.kv_len and causal:
        raise PolicyError("causal attention has as many queries as keys; leave out extra keys")
    guard = simplify(KV <= Q) if causal else TRUE
    nowhere = cast(Any, None)
    return Site(
        name="mask", module="mask", kind="self", family="softmax", causal=causal, hq=heads,
        hkv=heads, q_len=layout.q_len, kv_len=layout.kv_len, d_qk=1, d_v=1, scale=1.0, dropout=0.0,
        rope=False, layout="bhqd", cascade=softmax_cascade(SoftmaxAttention(score=QK, guard=guard)),
        graph=nowhere, anchor=nowhere, nodes=(), inputs={}, output=nowhere, factors=(),
    )  # fmt: skip
