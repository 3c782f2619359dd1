"""combiner: full attention by direct tokens and summaries of groups; it is no mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from attn_rewrite.cascade.attention import QK, SoftmaxAttention, as_softmax
from attn_rewrite.cascade.combined import Shared, axial, fixed, logsparse
from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    Const,
    Q,
    conjuncts,
    ranks_of,
    substitute,
    tensors_of,
)
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.sparse.laid_out import LaidOut
from attn_rewrite.passes.transform import Exactness, Option, Transform
from attn_rewrite.site import Refusal
from attn_rewrite.token_layout import TokenLayout

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Site

_SEGMENT = 64
Kind = Literal["fixed", "logsparse", "axial"]


@dataclass(frozen=True, kw_only=True)
class _Matrix(LaidOut):
    """Finds the rows and columns that the axial form wants."""

    name: ClassVar[str] = "combiner"

    def axes(self) -> int | None:
        """Two."""
        return 2


@dataclass(frozen=True)
class Combiner(Transform):
    """Every query sees some tokens directly and all others through summaries of groups.

    A group is one term of the query's softmax: the maximum of its keys for a key, the attention of
    the maximum of its queries over its own tokens for a value.  ``fixed``: the own segment, and
    every earlier one (causal) or every other one as a group.  ``logsparse``: the query itself, and
    the tokens before it in groups of powers of two; causal only.  ``axial``: the own row and column
    of a grid of two axes, and the rest of every other column as a group.  For attention whose score
    depends on its product alone; heads share one form.
    """

    name: ClassVar[str] = "combiner"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "Ren et al. 2021 (Combiner, 2107.05768), sections 3 and 4"

    kind: Annotated[Kind, Option("which tokens form groups")] = "fixed"
    segment: Annotated[
        int | None,
        Option("fixed: positions of a segment (none: 64); the root of the length costs least", 1),
    ] = None
    layout: Annotated[
        str | None, Option("axial: rows x columns, as grid=32x32; none: from the model")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment is not None and self.kind != "fixed":
            raise ValueError(f"combiner: segment is of kind fixed, not of {self.kind}")
        if self.layout is None:
            return
        if self.kind != "axial":
            raise ValueError(f"combiner: layout is of kind axial, not of {self.kind}")
        try:
            layout = TokenLayout.parse(self.layout)
        except PolicyError as error:
            raise ValueError(f"combiner: {error}") from None
        if problem := _no_matrix(layout):
            raise ValueError(f"combiner: {problem}")

    @property
    def wants_layout(self) -> bool:
        """Does it ask what positions mean?"""
        return self.kind == "axial"

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """The cascade of direct tokens and summaries."""
        form = as_softmax(cascade)
        parts = self._shared(form, site) if form is not None else None
        if parts is None:
            reason = f"combiner starts from plain softmax attention, and {cascade.name} is not"
            return self.refuse(site, "combiner-form", reason)
        return parts if isinstance(parts, Refusal) else self._combined(parts, site)

    def _shared(self, form: SoftmaxAttention, site: Site) -> Shared | Refusal | None:
        """Score, heads and causality; a Refusal where something else than the product matters."""
        if form.weight is not None or form.sink is not None:
            return None
        past = simplify(KV <= Q)
        dropped = tuple(t for t in conjuncts(form.guard) if t != past)
        score = simplify(substitute(form.score, {past: TRUE})) if site.causal else form.score
        beside = substitute(score, {QK: Const(0.0)})
        uses = [*map(str, dropped), *tensors_of(beside), *sorted(ranks_of(beside))]
        if dropped or uses:
            reason = (
                "combiner sums keys up, so that a mask or a bias for a single pair has no meaning, "
                f"but this attention has one (of {', '.join(uses)})"
            )
            return self.refuse(site, "combiner-pairs", reason)
        return Shared(score, form.group, site.causal)

    def _combined(self, parts: Shared, site: Site) -> Cascade | Refusal:
        length = site.kv_len
        if self.kind == "fixed":
            return fixed(parts, self.segment or _SEGMENT)
        if not isinstance(length, int):
            reason = (
                f"combiner(kind={self.kind!r}) is written out for one length, but this one is "
                f"{length}; capture with a fixed length, or take kind='fixed'"
            )
            return self.refuse(site, "combiner-dynamic", reason)
        if self.kind == "logsparse":
            return logsparse(parts, length)
        layout = _Matrix(layout=self.layout).token_layout(site)
        assert layout is not None  # two axes are asked for
        problem = None if isinstance(layout, Refusal) else _no_matrix(layout)
        if problem is not None:
            return self.refuse(site, "combiner-layout", problem)
        return layout if isinstance(layout, Refusal) else axial(parts, *layout.grid)

    def after(self, site: Site) -> Site:
        """What follows in a pipeline finds no softmax over positions any more."""
        return replace(site, family=self.name)

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refuse what is no softmax attention of one sequence over itself."""
        if site.family != "softmax":
            reason = f"combiner rewrites softmax attention, but this one is {site.family}"
            return self.refuse(site, f"combiner-{site.family}", reason)
        own = site.kind == "self" or site.kind in named_kinds or self.layout is not None
        if not own or site.kind == "pooling":
            reason = (
                f"combiner groups the tokens of one sequence, but this is {site.kind} attention"
            )
            return self.refuse(site, f"combiner-{site.kind}", reason)
        if site.offset != "0" or str(site.q_len) != str(site.kv_len):
            reason = (
                f"combiner pools queries and keys alike, but there are {site.q_len} queries for "
                f"{site.kv_len} keys"
            )
            return self.refuse(site, "combiner-lengths", reason)
        if self.kind == "logsparse" and not site.causal:
            reason = "combiner(kind='logsparse') is defined for causal attention; this one is not"
            return self.refuse(site, "combiner-not-causal", reason)
        if site.dropout:
            reason = f"combiner has no place for dropout, and this attention has {site.dropout}"
            return self.refuse(site, "combiner-dropout", reason)
        return None


def _no_matrix(layout: TokenLayout) -> str | None:
    """Why ``layout`` is not just rows and columns, or None."""
    if len(layout.grid) == 2 and layout.q_len == layout.kv_len == layout.tokens:
        return None
    return f"the axial form wants rows x columns and nothing else, but the layout is {layout}"
