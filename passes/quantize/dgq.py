"""dgq: probabilities as powers of two of their largest, the start token in floating point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.expr import KV, TRUE, Expr, Read, call, conjunction, conjuncts, where
from attn_rewrite.cascade.ir import Einsum, TensorDecl
from attn_rewrite.cascade.staged import PV, ROW, A, StagedAttention
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.quantize.quantisers import Log2
from attn_rewrite.passes.transform import Option, outside

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site

_EVERY = ("b", "h", "q", "kv")


@dataclass(frozen=True)
class Dgq(Quantisation):
    """Round probabilities to s * 2^-code, s their largest value without the start token (DGQ).

    The first ``start`` keys of cross-attention (a text's start token, which takes most of each row)
    stay in floating point and do not count in s.  s is the largest of the whole call
    (``per="tensor"``, as published) or of each row.  Zeros stay zeros: the format has no code for
    them, and masked keys would add up.  Needs complete rows: two passes over the keys.
    """

    name: ClassVar[str] = "dgq"
    maps_only: ClassVar[bool] = True
    source: ClassVar[str] = "Ryu et al. 2025 (DGQ), section 4.2; steps=2: Li et al. 2023 (RepQ-ViT)"

    bits: Annotated[int, Option("bits of a code", minimum=2, maximum=8)] = 8
    start: Annotated[
        int | None, Option("first keys left alone; none: 1 in cross-attention, else 0", minimum=0)
    ] = None
    steps: Annotated[
        Literal[1, 2], Option("codes for each halving; 2: powers of the root of one half")
    ] = 1
    per: Annotated[Literal["tensor", "row"], Option("what shares one largest value")] = "tensor"

    def rewrite(
        self, staged: StagedAttention, site: Site, heads: tuple[int, ...] | None
    ) -> StagedAttention | Refusal:
        """Two passes: normalise, then round to powers of two."""
        if staged.probability is not None:
            reason = f"{self.name}: these probabilities are mapped already; name one map a Site"
            return self.refuse(site, "quantise-mapped", reason)
        start = self.start if self.start is not None else int(site.kind == "cross")
        others = TRUE if heads is None else outside(heads)
        row = self.per == "row"
        peak = Read("PS", ROW if row else ())
        counted = (*conjuncts(staged.form.guard), *((start <= KV,) if start else ()))
        counted += () if heads is None else (~others,)
        statistic = Einsum(
            peak, A, tuple((r, "max") for r in (("kv",) if row else _EVERY)), conjunction(counted)
        )
        coded: Expr = Log2(self.bits, self.steps).value(A, peak)
        alone = (
            *((call("lt", KV, start),) if start else ()),
            *(() if heads is None else (others,)),
        )
        for case in alone:
            coded = where(case, A, coded)
        ranks = ("b", "h", "q") if row else ()
        return replace(
            staged, probability=coded, peak=statistic, output=PV,
            tensors=(*staged.tensors, TensorDecl("PS", ranks)),
        )  # fmt: skip
