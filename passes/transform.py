"""What a policy names: transforms of cascades, one per file, listed in `attn_rewrite.passes`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attn_rewrite.cascade.expr import Expr

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Refusal, Site


class Exactness(enum.StrEnum):
    """What a pass may do to the numbers."""

    EXACT = "exact"  # the same numbers
    REASSOCIATED = "reassociated"  # the same mathematics, other rounding
    APPROXIMATE = "approximate"  # other mathematics; runs only when the policy names it


@dataclass(frozen=True)
class Transform:
    """A rewrite Cascade -> Cascade, or a Refusal that says why not.

    Subclasses are frozen dataclasses whose fields are the options users write in a policy, checked
    in ``__post_init__`` (`ValueError` with one sentence).  ``apply`` looks at nothing but its
    arguments.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    source: ClassVar[str] = ""

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Rewrite ``cascade``; the same object if nothing changes."""
        raise TypeError(f"{type(self).__name__} must define apply()")


@dataclass(frozen=True)
class SparsePattern(Transform):
    """A transform that keeps some (q, kv) pairs: subclasses give `mask`, nothing else.

    Which blocks are empty, partial or full is derived from the expression (`cascade.cover`).
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def mask(self, site: Site) -> Expr | Refusal:
        """The pairs to keep, over ``b, h, q, kv`` (True = keep)."""
        raise TypeError(f"{type(self).__name__} must define mask()")

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Restrict the iteration space of the cascade to the mask."""
        from attn_rewrite.cascade.attention import restrict

        mask = self.mask(site)
        return restrict(cascade, mask) if isinstance(mask, Expr) else mask


@dataclass(frozen=True)
class ScoreEdit(Transform):
    """A transform of the score before the softmax: subclasses give `score`, nothing else."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def score(self, s: Expr, site: Site) -> Expr | Refusal:
        """The new score from the old one, over ``b, h, q, kv``."""
        raise TypeError(f"{type(self).__name__} must define score()")

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Replace the score expression of the cascade."""
        from attn_rewrite.cascade.attention import edit_score, score_of

        score = self.score(score_of(cascade), site)
        return edit_score(cascade, score) if isinstance(score, Expr) else score
