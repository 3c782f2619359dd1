"""The log-sum-exp of the scores, where it is used beside the output of an attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from attn_rewrite.graph import arguments, is_call, live_users, origin, shape_of, through
from attn_rewrite.passes.find.axes import Atoms
from attn_rewrite.site import Refusal, Site

Lse = tuple[fx.Node, tuple[Atoms, ...]]


def of_flex(results: Mapping[Any, fx.Node]) -> fx.Node | str | None:
    """The log-sum-exp of ``flex_attention`` that is used, if one is; or why its results cannot be
    had together.

    The operator gives it to the base 2, and what is returned to the user is that times ln 2.
    """
    if 0 not in results:
        return "the output of flex_attention is not used, only what else it gives"
    if 2 in results and live_users(results[2]):
        return "the row maximum of flex_attention is used, which no rewritten attention gives"
    users = live_users(results[1]) if 1 in results else []
    if not users:
        return None
    natural = users[0]
    factor = natural.args[1] if is_call(natural, "mul") else None
    if len(users) > 1 or not isinstance(factor, float) or not math.isclose(factor, math.log(2)):
        return "the log-sum-exp of flex_attention is used to the base 2, before it is scaled"
    return natural


def of_softmax(scores: fx.Node, dims: tuple[Atoms, ...], place: int) -> Lse | str | None:
    """The ``logsumexp`` that is taken of the argument of a softmax and used, with its axes.

    ``dims`` are those of the scores, ``place`` the one that is normalised; casts in between are
    looked through.
    """
    source = through(scores, "to")
    same = [source]
    for node in same:
        same += [u for u in node.users if is_call(u, "to") and through(u, "to") is source]
    found = [u for node in same for u in node.users if _is_over(u, node, place, len(dims))]
    if len(found) > 1:
        return "the log-sum-exp of the scores is taken and used in several places"
    if not found:
        return None
    kept = bool(arguments(found[0])["keepdim"])
    return found[0], (*dims[:place], *(((),) if kept else ()), *dims[place + 1 :])


def _is_over(node: fx.Node, scores: fx.Node, place: int, rank: int) -> bool:
    """A ``logsumexp`` of ``scores`` over their axis ``place`` alone that something reads."""
    if not is_call(node, "logsumexp") or node.args[0] is not scores or not live_users(node):
        return False
    named = arguments(node)["dim"]
    over = [named] if isinstance(named, int) else list(named)
    return len(over) == 1 and over[0] % rank == place and len(shape_of(scores)) == rank


def in_time(site: Site) -> Site:
    """A site whose log-sum-exp is read before its output is there, and its operands are, stays as
    it is; the same object otherwise."""
    if site.lse is None:
        return site
    output, lse = (origin(o.node) or o.node for o in (site.output, site.lse))
    if all(user > output for user in lse.users):
        return site
    operands = [origin(o.node) or o.node for o in site.inputs.values()]
    late = [n for n in operands if not n < min(lse, output)]
    if not late:
        return site
    reason = (
        f"the log-sum-exp of the scores is used before {late[0]}, which the attention reads, is "
        "computed: one kernel cannot give both"
    )
    refusal = Refusal("logsumexp-used", reason, str(site.anchor), site.source, site.name)
    return replace(site, refusals=(*site.refusals, refusal))
