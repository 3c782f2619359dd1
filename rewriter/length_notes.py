"""What reports say of masks that were made for one length, where lengths may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from attn_rewrite.cascade.attention import usual_length
from attn_rewrite.cascade.expr import conjunction

if TYPE_CHECKING:
    from attn_rewrite.driver import Decision


def notes(decisions: Iterable[Decision]) -> tuple[str, ...]:
    """One sentence for each rewritten Site whose mask drops pairs at the length of its layout only.

    A layout says what positions mean at its own length; at any other the mask keeps every pair.
    """
    found = []
    for item in decisions:
        cascade = item.cascade
        if cascade is None or cascade is item.site.cascade:
            continue
        length = usual_length(conjunction(cascade.guard_terms()))
        if length is not None:
            found.append(
                f"{item.site.name}: its mask is made for {length} keys, the length of its layout; "
                "at any other length every pair is attended"
            )
    return tuple(found)
