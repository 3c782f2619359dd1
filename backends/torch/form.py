"""Questions about the score of a softmax attention that decide which kernel takes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_rewrite.cascade.attention import QK
from attn_rewrite.cascade.expr import (
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    call,
    conjuncts,
    walk,
    where,
)
from attn_rewrite.cascade.interval import affine

# A finite mask value at most this swallows any score it is added to, so choosing and adding agree.
_ABSORBING = -1e30

_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
# Length of the cache before the first query.
_CACHED: dict[Expr, float] = {Extent("kv"): 1.0, Extent("q"): -1.0}


@dataclass(frozen=True)
class LinearScore:
    """``scale * QK + bias``; ``bias`` is over ranks and reads, None where there is none."""

    scale: float
    bias: Expr | None = None


def mentions_product(expr: Expr) -> bool:
    """True if the raw product `QK` occurs."""
    return any(node == QK for node in walk(expr))


def linear_score(score: Expr) -> LinearScore | None:
    """The score as ``scale * QK + bias`` if it is that, else None.

    ``where(m, S, -inf)`` becomes the additive ``where(m, 0, -inf)``; so does a finite mask value
    that swallows every score (finfo.min of float32 or bfloat16; not that of float16).
    """
    if score == QK:
        return LinearScore(1.0)
    if not isinstance(score, Call):
        return None
    match score:
        case Call("cast_f32" | "cast_f64", (inner,)):
            return linear_score(inner)
        case Call("add", (a, b)):
            return _sum(a, b, 1) if mentions_product(a) else _sum(b, a, 1)
        case Call("sub", (a, b)) if mentions_product(a):
            return _sum(a, b, -1)
        case Call("mul", (a, Const(c))) | Call("mul", (Const(c), a)):
            return _scaled(a, float(c))
        case Call("div", (a, Const(c))) if c:
            return _scaled(a, 1 / float(c))
        case Call("where", (keep, inner, Const(fill))):
            return _masked(keep, inner, float(fill))
    return None


def _sum(inner: Expr, other: Expr, sign: int) -> LinearScore | None:
    found = linear_score(inner)
    if found is None or mentions_product(other):
        return None
    if found.bias is None:
        return LinearScore(found.scale, other if sign > 0 else -other)
    return LinearScore(found.scale, call("add" if sign > 0 else "sub", found.bias, other))


def _scaled(inner: Expr, factor: float) -> LinearScore | None:
    found = linear_score(inner)
    if found is None or not math.isfinite(factor):
        return None
    bias = None if found.bias is None else found.bias * factor
    return LinearScore(found.scale * factor, bias)


def _masked(keep: Expr, inner: Expr, fill: float) -> LinearScore | None:
    found = linear_score(inner)
    if found is None or mentions_product(keep) or not fill <= _ABSORBING:
        return None
    return LinearScore(found.scale, where(keep, 0.0 if found.bias is None else found.bias, fill))


def bias_as_mask(bias: Expr) -> Expr | None:
    """The mask m of a bias ``where(m, 0, -inf)``, or of several of them nested; else None."""
    match bias:
        case Call("where", (keep, Const(zero), Const(fill))) if zero == 0 and fill == -math.inf:
            return keep
        case Call("where", (keep, inner, Const(fill))) if fill == -math.inf:
            rest = bias_as_mask(inner)
            return None if rest is None else keep & rest
    return None


def is_causal(mask: Expr, *, square: bool = False) -> bool:
    """True if ``mask`` is provably ``kv <= q`` (top-left); ``square``: q and kv have one extent."""
    terms = conjuncts(mask)
    return len(terms) == 1 and _causal_offset(terms[0], square) == 0


def is_causal_with_offset(mask: Expr) -> bool:
    """True if ``mask`` is ``kv <= q + #kv - #q``: causal, the queries at the end of a cache."""
    terms = conjuncts(mask)
    return len(terms) == 1 and _causal_form(terms[0]) == (_CACHED, 0)


def _causal_offset(term: Expr, square: bool) -> float | None:
    found = _causal_form(term)
    if found is None:
        return None
    extents, constant = found
    if square and extents == _CACHED:
        return constant
    return None if extents else constant


def _causal_form(term: Expr) -> tuple[dict[Expr, float], float] | None:
    """``q - kv + extents + constant >= 0``: the extents with their factors, and the constant."""
    match term:
        case Call("not", (Call(op, (left, right)),)) if op in _NEGATED:
            return _causal_form(call(_NEGATED[op], left, right))
        case Call("ge" | "gt", (left, right)) | Call("le" | "lt", (right, left)):
            form = affine(left).plus(affine(right), -1.0)
            strict = term.op in ("gt", "lt")
        case _:
            return None
    terms = dict(form.terms)
    if terms.pop(Rank("q"), None) != 1 or terms.pop(Rank("kv"), None) != -1:
        return None
    if any(not isinstance(t, Extent) for t in terms):
        return None
    return terms, form.constant - strict


def depends_only_on_distance(mask: Expr) -> bool:
    """True if the mask is a function of ``q - kv``: equal on blocks shifted along the diagonal."""
    form = affine(mask)
    if set(form.terms) != {mask}:
        factors = [form.terms.get(Rank(r), 0.0) for r in ("q", "kv")]
        rest = [t for t in form.terms if t not in (Rank("q"), Rank("kv"))]
        return factors[0] == -factors[1] and all(map(depends_only_on_distance, rest))
    if isinstance(mask, Rank | Read):
        return False
    if isinstance(mask, Call) and mask.op in ("lt", "le", "gt", "ge", "eq", "ne"):
        return depends_only_on_distance(mask.args[0] - mask.args[1])
    return all(map(depends_only_on_distance, mask.children))
