"""Sliding window: each query sees the keys near its own position, and the first few ("sinks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from attn_rewrite.cascade.expr import KV, Expr, call
from attn_rewrite.passes.transform import Option, SparsePattern, position

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Window(SparsePattern):
    """Keep the keys within a window around each query's position.

    Query i has position i + offset (`Site.offset`).  Causal: ``0 <= pos - kv < size``.  Symmetric:
    ``left = size // 2`` keys before and ``right = size - 1 - left`` after, clipped at the borders.
    ``sinks`` keys at the start are kept in addition to ``size``.  A causal Site stays causal
    whatever is asked, because masks only ever take pairs away.
    """

    name: ClassVar[str] = "window"
    source: ClassVar[str] = (
        "Beltagy et al. 2020 (Longformer), section 3.1; sinks: Xiao et al. 2024 (StreamingLLM), "
        "section 3.2"
    )

    size: Annotated[int | None, Option("keys each query sees, its own included", minimum=1)] = None
    sinks: Annotated[int, Option("first keys that every query sees besides", minimum=0)] = 0
    causal: Annotated[bool | None, Option("none: as the Site is")] = None
    left: Annotated[int | None, Option("keys before the query, instead of size", minimum=0)] = None
    right: Annotated[int | None, Option("keys after the query, instead of size", minimum=0)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = (self.left is not None, self.right is not None)
        if self.size is None and not all(sides):
            raise ValueError("window: size is missing (or both left and right)")
        if self.size is not None and any(sides):
            raise ValueError("window: give size, or left and right, not both")

    def reach(self, causal: bool) -> tuple[int, int]:
        """How many keys before and after its own position a query sees."""
        if self.size is None:
            assert self.left is not None
            assert self.right is not None
            return self.left, 0 if causal else self.right
        if causal:
            return self.size - 1, 0
        return self.size // 2, self.size - 1 - self.size // 2

    def mask(self, site: Site) -> Expr | Refusal:
        """The window over ``q, kv`` as a conjunction of bounds on the distance."""
        causal = site.causal if self.causal is None else self.causal
        left, right = self.reach(causal)
        distance = position(site) - KV
        near = distance < left + 1
        ahead = distance >= -right
        if not self.sinks:
            return ahead & near
        sink = call("lt", KV, self.sinks)
        # Sinks never reach into the future of a causal window.
        return ahead & (near | sink) if causal else (ahead & near) | sink
