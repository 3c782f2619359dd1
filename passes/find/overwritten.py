"""Operands that are written to while their attention is computed.

A kernel stands where the output of a site does, and reads there what the site read earlier, piece
by piece; a write in between would reach it.
"""

from __future__ import annotations

from attn_rewrite.graph import origin
from attn_rewrite.memory import sharing, written
from attn_rewrite.passes.find.anchor import refuse
from attn_rewrite.site import Refusal, Site


def overwritten(site: Site) -> Refusal | None:
    """Refuse a site that reads a tensor before a write to it and gives its result after it."""
    end = origin(site.output.node) or site.output.node
    own = {origin(n) or n for n in site.nodes}
    for name, operand in site.inputs.items():
        node = origin(operand.node) or operand.node
        memory = dict.fromkeys(sharing(node))
        users = [(u, m) for m in memory for u in m.users]
        first = min((u for u, _ in users if u in own and u not in memory), default=node)
        for write in (u for u, m in users if m in written(u)):
            if first < write < end:
                reason = (
                    f"{name} ({node}) is written to by {write} after the scores read it and before "
                    "the output is computed"
                )
                return refuse("written-meanwhile", reason, site.anchor)
    return None
