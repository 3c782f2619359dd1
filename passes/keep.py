"""The two transforms that change no mathematics: ``keep`` and ``exact``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attn_rewrite.passes.transform import Exactness, Transform

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Identity(Transform):
    """A transform that leaves every cascade as it is."""

    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """The same object."""
        return cascade

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """The same object."""
        return cascade


@dataclass(frozen=True)
class Exact(Identity):
    """Same mathematics: the Site is lowered again to the backend's fastest exact kernel."""

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Keep(Identity):
    """The Site is left untouched, node for node (next to rewritten heads: computed exactly)."""

    name: ClassVar[str] = "keep"
