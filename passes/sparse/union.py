"""Union and intersection of patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import Expr
from attn_rewrite.passes.transform import Option, SparsePattern

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class _Combined(SparsePattern):
    """Several patterns as one."""

    of: Annotated[tuple[SparsePattern, ...], Option("patterns, as [window(size=64), ...]")]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of:
            raise ValueError(f"{self.name}: of is empty, expected at least one pattern")

    def join(self, first: Expr, second: Expr) -> Expr:
        """Both masks as one."""
        raise TypeError(f"{type(self).__name__} must define join()")

    def mask(self, site: Site) -> Expr | Refusal:
        """The masks of all patterns, joined; the first refusal where there is one."""
        total: Expr | None = None
        for pattern in self.of:
            mask = pattern.mask(site)
            if not isinstance(mask, Expr):
                return mask
            total = mask if total is None else self.join(total, mask)
        assert total is not None
        return total

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refused where one of the patterns is."""
        refusals = (p.admits(site, named_kinds) for p in self.of)
        return next((r for r in refusals if r is not None), None)


@dataclass(frozen=True)
class Union(_Combined):
    """Keep the pairs that any of the patterns keeps."""

    name: ClassVar[str] = "union"

    def join(self, first: Expr, second: Expr) -> Expr:
        """Either."""
        return first | second


@dataclass(frozen=True)
class Intersection(_Combined):
    """Keep the pairs that all of the patterns keep (as ``A | B`` in a pipeline does)."""

    name: ClassVar[str] = "intersection"

    def join(self, first: Expr, second: Expr) -> Expr:
        """Both."""
        return first & second
