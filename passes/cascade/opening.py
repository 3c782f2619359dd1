"""Open complete values that are made of others, so that a test sees the reductions themselves."""

from __future__ import annotations

from dataclasses import replace

from attn_rewrite.cascade.expr import TRUE, Expr, Rank, substitute
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.flow import Flow, iteration_ranks
from attn_rewrite.passes.cascade.stability import direction


def opened_states(flow: Flow, e: Einsum) -> Einsum:
    """``e`` with every pointwise state whose direction is unknown replaced by what it is made of.

    ``exp(x - LSE)`` with ``LSE = GM + log(SD)`` becomes ``exp(x - (GM + log(SD)))``: there the part
    of SD is a factor that defers, and the part of GM a range guard over a monotone state.
    """
    while True:
        found: dict[Expr, Expr] = {}
        for state in flow.states(e.expr):
            made = flow.producer[state.tensor]
            names = [i.name for i in made.out.index if isinstance(i, Rank)]
            plain = len(names) == len(made.out.index) and iteration_ranks(made) <= set(names)
            if flow.is_reduction(made) or not plain or made.guard != TRUE:
                continue
            if direction(flow, state) is None:
                at: dict[Expr, Expr] = dict(zip(made.out.index, state.index, strict=True))
                found[state] = substitute(made.expr, at)
        if not found:
            return e
        e = replace(e, expr=substitute(e.expr, found))
