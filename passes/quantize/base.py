"""What all quantising transforms share: which Sites they take, and how they rewrite a cascade."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from attn_rewrite.cascade.reordered import as_reordered, reordered_cascade
from attn_rewrite.cascade.staged import StagedAttention, as_staged, staged_cascade
from attn_rewrite.passes.quantize.invariance import mentions_product, rows_sum_to_one
from attn_rewrite.passes.quantize.placement import check_placement
from attn_rewrite.passes.quantize.scheme import Scheme, quantised
from attn_rewrite.passes.transform import Exactness, Transform, spans_text
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Site

# Fewer queries than this beside a longer row of keys are a step of decoding: quantising all keys
# for them costs more than their products.
FEW_QUERIES = 8
# int8 products of more channels than this do not fit the 24 bits of a float32.
LARGEST_HEAD = 1040


@dataclass(frozen=True)
class Quantisation(Transform):
    """A transform of operands: subclasses give `rewrite`, which edits a `StagedAttention`.

    ``decodes``: it is made for few queries over a long cache.  ``maps_only``: it changes the
    probabilities and leaves the operands alone, so it goes with a transform that does not.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    decodes: ClassVar[bool] = False
    maps_only: ClassVar[bool] = False

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """The attention with the operands of ``heads`` (None: all) quantised."""
        raise TypeError(f"{type(self).__name__} must define rewrite()")

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Quantise every head."""
        return self._applied(cascade, site, None)

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """Quantise the given heads; every other head keeps what it has."""
        group = site.hq // site.hkv
        cut = [h for h in heads if not set(range(h - h % group, h - h % group + group)) <= {*heads}]
        if cut:
            reason = (
                f"heads {spans_text(heads)} cut the {group} query heads that share a key head "
                f"(head {cut[0]}); name whole groups"
            )
            return self.refuse(site, "quantise-heads", reason)
        return self._applied(cascade, site, heads)

    def _applied(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...] | None
    ) -> Cascade | Refusal:
        found = as_reordered(cascade)
        if found is not None:
            inner = self._applied(found.inner, site, heads)
            if isinstance(inner, Refusal):
                return inner
            return reordered_cascade(replace(found, inner=inner))
        staged = as_staged(cascade)
        if staged is None:
            reason = f"{self.name} quantises a softmax attention, but {cascade.name} is another one"
            return self.refuse(site, "quantise-form", reason)
        if heads is None and staged.stages and not self.maps_only:
            reason = (
                f"{self.name} finds operands that are quantised already; name one scheme a head"
            )
            return self.refuse(site, "quantise-twice", reason)
        if not mentions_product(staged.form.score):
            reason = f"{self.name}: the score of {cascade.name} is not made of products of Q and K"
            return self.refuse(site, "quantise-score", reason)
        result = self.rewrite(staged, site, heads)
        if not isinstance(result, StagedAttention):
            return result
        new = staged_cascade(result, cascade.name)
        wrong = check_placement(new)
        if wrong is not None:
            return self.refuse(site, wrong.code, f"{self.name}: {wrong.reason}")
        return new

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refuse what is no softmax, drops probabilities, or is a step of decoding."""
        if site.family != "softmax":
            reason = f"{self.name} quantises softmax attention, but this one is {site.family}"
            return self.refuse(site, f"quantise-{site.family}", reason)
        if site.dropout > 0:
            reason = (
                f"{self.name} has no dropout between rounding and product, but this attention "
                f"drops probabilities ({site.dropout}); call eval() first"
            )
            return self.refuse(site, "quantise-dropout", reason)
        if site.d_qk > LARGEST_HEAD:
            reason = (
                f"{self.name} takes head dimensions up to {LARGEST_HEAD}, where sums of codes are "
                f"exact in float32; this one has {site.d_qk}"
            )
            return self.refuse(site, "quantise-head-dim", reason)
        return None if self.decodes else self._decoding(site)

    def _decoding(self, site: Site) -> Refusal | None:
        q_len, kv_len = site.q_len, site.kv_len
        fixed = isinstance(q_len, int) and isinstance(kv_len, int)
        if not fixed or q_len > FEW_QUERIES or q_len >= kv_len:
            return None
        reason = (
            f"{self.name} would quantise {kv_len} keys for {q_len} queries, which costs more than "
            "it saves; kv_int8 quantises a cache once"
        )
        return self.refuse(site, "quantise-decode", reason)

    def schemed(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None, scheme: Scheme
    ) -> StagedAttention | Refusal:
        """``staged`` under a `Scheme`, or why it cannot have it."""
        if scheme.p is not None and staged.form.weight is not None:
            reason = (
                f"{self.name}: the probabilities are multiplied by {staged.form.weight} before the "
                "values, so their codes are no whole product; leave P and V in floating point"
            )
            return self.refuse(site, "quantise-weighted", reason)
        if scheme.smooth_v and not rows_sum_to_one(staged):
            reason = (
                f"{self.name}: the mean of V may be taken off only where the probabilities of a "
                "row sum to one; here they are weighted, or share the row with a sink"
            )
            return self.refuse(site, "smooth-v-rows", reason)
        if scheme.p is not None and staged.probability is not None and staged.normalised:
            reason = f"{self.name}: these probabilities are mapped after the division already"
            return self.refuse(site, "quantise-mapped", reason)
        return quantised(staged, scheme, heads, site.d_qk)
