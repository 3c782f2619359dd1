"""Sites without a graph: facts and a cascade, for tests of policies, plans and transforms."""

from __future__ import annotations

from typing import Any

from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, TRUE, Q
from attn_rewrite.cascade.simplify import simplify
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.site import Findings, Site


def make_site(name: str = "layer.0.attn#0", **facts: Any) -> Site:
    """A softmax attention of 4 heads, 32 long unless told; a causal one has its guard."""
    known: dict[str, Any] = {
        "name": name, "module": name.partition("#")[0], "kind": "self", "family": "softmax",
        "causal": False, "hq": 4, "hkv": 4, "q_len": 32, "kv_len": 32, "d_qk": 8, "d_v": 8,
        "scale": 0.5, "dropout": 0.0, "rope": False, "layout": "bhqd", "offset": "0",
        "graph": None, "anchor": None, "nodes": (), "inputs": {}, "output": None, "factors": (),
    }  # fmt: skip
    known |= facts
    if "cascade" not in known:
        ahead = Q + parse_expr(known["offset"]) - KV
        guard = simplify(ahead >= 0) if known["causal"] else TRUE
        form = SoftmaxAttention(score=QK * 0.5, guard=guard, group=known["hq"] // known["hkv"])
        known["cascade"] = softmax_cascade(form)
    return Site(**known)


def findings(*sites: Site) -> Findings:
    """Findings of the given Sites alone."""
    return Findings(sites, ())
