"""When a term that is constant along a row of scores may be left out."""

from __future__ import annotations

from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import Call, Const, Expr, Read, ranks_of, walk
from attn_rewrite.cascade.staged import StagedAttention

# A finite mask value at most this swallows any score it is added to.
_ABSORBING = -1e30


def drops_row_constants(staged: StagedAttention) -> bool:
    """True if adding a row constant to the product of queries and keys changes no probability.

    The score must be affine in the product with one slope along the row, and nothing else may
    enter the denominator (a sink logit would not shift with the row).
    """
    return staged.form.sink is None and _affine(staged.form.score)


def rows_sum_to_one(staged: StagedAttention) -> bool:
    """True if the probabilities of a query that keeps a key sum to one: no factor, no sink."""
    return staged.form.weight is None and staged.form.sink is None


def _affine(score: Expr) -> bool:
    if score == QK:
        return True
    if not isinstance(score, Call) or sum(n == QK for n in walk(score)) != 1:
        return False
    match score:
        case Call("cast_f32" | "cast_f64" | "neg", (inner,)):
            return _affine(inner)
        case Call("add" | "sub", (a, b)):
            return _affine(a) if _holds(a) else _affine(b)
        case Call("mul", (a, b)):
            inner, factor = (a, b) if _holds(a) else (b, a)
            return _affine(inner) and _same_along_row(factor)
        case Call("div", (a, b)):
            return _holds(a) and _affine(a) and _same_along_row(b)
        case Call("where", (keep, inner, Const(fill))):
            return not _holds(keep) and _affine(inner) and float(fill) <= _ABSORBING
    return False


def _holds(expr: Expr) -> bool:
    return any(n == QK for n in walk(expr))


def _same_along_row(factor: Expr) -> bool:
    return not _holds(factor) and "kv" not in ranks_of(factor)


def mentions_product(expr: Expr) -> bool:
    """Does the product of queries and keys occur in ``expr``?"""
    return any(isinstance(n, Read) and n == QK for n in walk(expr))
