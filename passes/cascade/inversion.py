"""Construct the repair function by inverting the body (Neptune, Theorem C of the derivation).

If ``y = g(a, x)`` can be solved for x, ``h(t) = g(b, solution(a, t))`` re-bases single terms; it
repairs an accumulated value if it is proved to distribute over the reduction.
"""

from __future__ import annotations

import sympy

from attn_rewrite.cascade.expr import Expr, Read
from attn_rewrite.cascade.ir import Einsum
from attn_rewrite.passes.cascade.algebra import from_sympy, symbols_for, to_sympy
from attn_rewrite.passes.cascade.deferral import Deferred, accumulator, declared
from attn_rewrite.passes.cascade.flow import Flow
from attn_rewrite.passes.cascade.proof import Proof
from attn_rewrite.passes.cascade.separability import Body


def repaired(flow: Flow, e: Einsum, whole: Einsum, body: Body) -> Deferred | None:
    """Accumulate a product at state 1 and repair it once at the end; None where that is not proved.

    Sums and extrema with a distributing repair are separable or monotone and are placed before this
    is asked; what is left is the product, over which powers distribute.
    """
    if (
        flow.operation(e) != "mul"
        or len(body.items) != 1
        or not body.state
        or e.guard != whole.guard
    ):
        return None
    symbols = symbols_for(body.leaves, body.positive)
    (item,) = (symbols[i] for i in body.items)
    if not item.is_positive:
        return None  # powers of negative terms are not real
    states = [symbols[s] for s in body.state]
    term = to_sympy(body.expr, symbols)
    start = term.subs(dict.fromkeys(states, sympy.Integer(1)))
    t, u = sympy.symbols("t u", positive=True)
    try:
        solutions = sympy.solve(sympy.Eq(start, t), item)
    except NotImplementedError:
        return None
    if len(solutions) != 1:
        return None
    h = sympy.simplify(term.subs(item, solutions[0]))
    distributes = sympy.simplify(h.subs(t, t * u) - h * h.subs(t, u)) == 0
    if not distributes or sympy.simplify(h.subs(t, 1)) != 1:
        return None
    leaves: dict[sympy.Symbol, Expr] = {symbol: leaf for leaf, symbol in symbols.items()}
    partial = accumulator(flow, whole, from_sympy(sympy.simplify(start), leaves))
    result = from_sympy(h, {**leaves, t: partial.out})
    names = tuple(dict.fromkeys(s.tensor for s in body.state if isinstance(s, Read)))
    proof = Proof(
        "C (inversion)", e.out.tensor, flow.rank, names, partial.expr, result, "mul",
        side_conditions=("h(t u) = h(t) h(u) and h(1) = 1 are proved",),
    )  # fmt: skip
    return Deferred((partial, Einsum(e.out, result)), declared(partial, "mul"), proof)
