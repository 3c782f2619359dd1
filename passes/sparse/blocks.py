"""blocks: the blocks of pairs that a table lists, one list per head."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.expr import KV, TRUE, Expr, H, Q, Read, conjuncts, where
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.reordered import as_reordered, reordered_cascade
from attn_rewrite.cascade.staged import as_staged, staged_cascade
from attn_rewrite.passes.transform import Option, SparsePattern, outside
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.site import Site

Semantics = Literal["renormalised", "post-mask"]


@dataclass(frozen=True)
class Blocks(SparsePattern):
    """Keep the blocks of a table of truths [head, block of queries, block of keys].

    The table belongs to the plan (``plan.safetensors``) under the name ``site/table``; positions
    are those of the sequence as it stands in the pipeline, after a ``reorder`` those of its order.
    ``renormalised``: probabilities of the kept pairs sum to one.  ``post-mask``: the softmax is
    over all pairs, and the shares of dropped ones are left out, so rows sum to what was kept.
    """

    name: ClassVar[str] = "blocks"
    source: ClassVar[str] = "static block masks: Zhao et al. 2025 (PAROAttention, 2506.16054)"
    positional: ClassVar[bool] = False

    table: Annotated[str, Option("name of the table in the plan")]
    block: Annotated[int, Option("positions of a block", minimum=1)] = 64
    semantics: Annotated[Semantics, Option("what dropped pairs do to the rest of a row")] = (
        "renormalised"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z_]\w*", self.table, re.ASCII):
            raise ValueError(f"blocks: table is {self.table!r}, expected a name such as paro")

    def mask(self, site: Site) -> Expr | Refusal:
        """The entry of a pair's block."""
        return Read(self.table, (H, Q // self.block, KV // self.block))

    def shape(self, site: Site) -> tuple[int, int, int] | None:
        """What the table must measure; None where a length is dynamic."""
        q_len, kv_len = site.q_len, site.kv_len
        if not isinstance(q_len, int) or not isinstance(kv_len, int):
            return None
        return site.hq, -(-q_len // self.block), -(-kv_len // self.block)

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Restrict every head to its list."""
        return self._applied(cascade, site, TRUE)

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """Restrict the given heads."""
        return self._applied(cascade, site, outside(heads))

    def _applied(self, cascade: Cascade, site: Site, rest: Expr) -> Cascade | Refusal:
        """``rest`` holds for the heads that keep what they have."""
        found = as_reordered(cascade)
        inner = cascade if found is None else found.inner
        staged = as_staged(inner)
        mask = self.mask(site)
        if staged is None or not isinstance(mask, Expr):
            reason = f"blocks restrict a softmax attention, but {cascade.name} is another one"
            return self.refuse(site, "blocks-form", reason)
        form = staged.form
        decl = TensorDecl(self.table, ("h", f"{self.table}_q", f"{self.table}_kv"), dtype="bool")
        if decl not in form.reads:
            if any(t.name == self.table for t in (*inner.inputs, *inner.tensors)):
                reason = (
                    f"the attention has a tensor {self.table} already; name the table otherwise"
                )
                return self.refuse(site, "blocks-name", reason)
            form = replace(form, reads=(*form.reads, decl))
        if self.semantics == "post-mask":
            kept = where(mask if rest == TRUE else mask | rest, 1.0, 0.0)
            weight = kept if form.weight is None else form.weight * kept
            form = replace(form, weight=weight)
        else:
            term = mask if rest == TRUE else mask | rest
            terms = (*conjuncts(form.guard), term)
            form = replace(form, guard=_all(terms))
        inner = staged_cascade(replace(staged, form=form), inner.name)
        return inner if found is None else reordered_cascade(replace(found, inner=inner))


def _all(terms: tuple[Expr, ...]) -> Expr:
    from attn_rewrite.cascade.expr import conjunction

    return conjunction(tuple(dict.fromkeys(terms)))
