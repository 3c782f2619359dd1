"""Attention over tokens in another order, as index maps on the ranks of queries and keys.

A `Reordered` cascade gathers Q, K and V, attends in the new order and puts the rows back::

    QP[b, h, q, d]  = Q[b, h, source(h, q), d]
    KP, VP          likewise, by key head
    ...             the attention of QP, KP, VP, every mask and bias read at source(q), source(kv)
    AV[b, h, q, f]  = AVP[b, h, place(h, q), f]

With ``place`` the inverse of ``source`` that is the same attention, whatever its masks are: softmax
attention is equivariant to permutations of queries and invariant to joint ones of keys and values.
What is added afterwards, as a block list, is about the new order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attn_rewrite.cascade.expr import (
    KV,
    B,
    Call,
    D,
    Expr,
    F,
    H,
    Q,
    Rank,
    Read,
    call,
    rebuild,
    substitute,
)
from attn_rewrite.cascade.fold_digits import fold_digits
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.cascade.rename import Names
from attn_rewrite.cascade.simplify import simplify

_GATHERED = {"Q": "QP", "K": "KP", "V": "VP", "AV": "AVP"}
_OUTPUT = Read("AV", (B, H, Q, F))


@dataclass(frozen=True)
class Reordered:
    """The parts of a reordered attention.

    ``inner`` is the attention in the new order, over operands Q, K and V and its output AV.
    ``q`` and ``kv`` are the tokens at position ``q`` (of query head ``h``) and ``kv`` (of the key
    head); ``place`` the position of token ``q`` in the new order.
    """

    inner: Cascade
    q: Expr
    kv: Expr
    place: Expr

    def gathers(self) -> tuple[Einsum, ...]:
        """The Einsums that bring Q, K and V into the new order."""
        key_head = Rank(_key_head(self.inner))
        index = {
            "Q": ((B, H, Q, D), (B, H, self.q, D)),
            "K": ((B, key_head, KV, D), (B, key_head, self.kv, D)),
            "V": ((B, key_head, KV, F), (B, key_head, self.kv, F)),
        }
        return tuple(Einsum(Read(_GATHERED[n], o), Read(n, i)) for n, (o, i) in index.items())

    def restoring(self) -> Einsum:
        """The Einsum that puts the rows of the output back."""
        return Einsum(_OUTPUT, Read("AVP", (B, H, self.place, F)))

    def before(self) -> Cascade:
        """The gathers alone: Q, K, V to QP, KP, VP."""
        gathers = self.gathers()
        outputs = tuple(e.out.tensor for e in gathers)
        return replace(
            self.inner, inputs=self.inner.inputs[:3], body=gathers, outputs=outputs,
            tensors=_declared(self.inner)[:3],
        )  # fmt: skip

    def after(self) -> Cascade:
        """The last step alone: AVP to AV."""
        given = _declared(self.inner)[3:]
        return replace(self.inner, inputs=given, body=(self.restoring(),), tensors=())


def _key_head(cascade: Cascade) -> str:
    return cascade.inputs[1].ranks[1]


def _declared(cascade: Cascade) -> tuple[TensorDecl, ...]:
    key_head = _key_head(cascade)
    return (
        TensorDecl("QP", ("b", "h", "q", "d")),
        TensorDecl("KP", ("b", key_head, "kv", "d")),
        TensorDecl("VP", ("b", key_head, "kv", "f")),
        TensorDecl("AVP", ("b", "h", "q", "f")),
    )


def reordered_cascade(parts: Reordered) -> Cascade:
    """The cascade of ``parts``."""
    inner = parts.inner
    body = tuple(Names(tensors=_GATHERED).statement(s) for s in inner.body)
    tensors = tuple(map(Names(tensors=_GATHERED).declaration, inner.tensors))
    return replace(
        inner,
        body=(*parts.gathers(), *body, parts.restoring()),
        tensors=(*tensors, *_declared(inner)),
    )


def as_reordered(cascade: Cascade) -> Reordered | None:
    """The parts of ``cascade`` if it is exactly what `reordered_cascade` writes, else None."""
    if len(cascade.body) < 5 or cascade.outputs != ("AV",):
        return None
    first, last = cascade.body[:3], cascade.body[-1]
    gathers = [e.expr for e in (*first, last) if isinstance(e, Einsum) and isinstance(e.expr, Read)]
    if [r.tensor for r in gathers] != ["Q", "K", "V", "AVP"] or len(cascade.tensors) < 4:
        return None
    if any(len(r.index) != 4 for r in gathers):
        return None
    back = Names(tensors={new: old for old, new in _GATHERED.items()})
    inner = replace(
        cascade,
        body=tuple(map(back.statement, cascade.body[3:-1])),
        tensors=tuple(map(back.declaration, cascade.tensors[:-4])),
    )
    parts = Reordered(inner, gathers[0].index[2], gathers[1].index[2], gathers[3].index[2])
    return parts if reordered_cascade(parts) == cascade else None


def in_order(cascade: Cascade) -> Cascade:
    """The attention itself, without what brings its tokens into another order and back."""
    found = as_reordered(cascade)
    return cascade if found is None else found.inner


def reorder(cascade: Cascade, q: Expr, kv: Expr, place: Expr, lengths: tuple[int, int]) -> Cascade:
    """``cascade`` in another order of its tokens; exact.

    ``q`` and ``kv`` give the token at a position, ``place`` the position of token ``q``; ``kv`` is
    over the key head ``hkv`` (``h`` where every query head has its own).  Orders compose: the
    positions of a cascade that was reordered before are those it has.  ``lengths`` are the extents
    of q and kv.
    """
    before = as_reordered(cascade)
    inner = cascade if before is None else before.inner
    form_head = H if _key_head(inner) == "h" else call("floordiv", H, _group(inner))
    at: dict[Expr, Expr] = {Q: q, KV: substitute(kv, {Rank("hkv"): form_head})}
    own = {t.name for t in inner.inputs[:3]} | {e.out.tensor for e in inner.einsums()}
    bounds = {"q": lengths[0], "kv": lengths[1]}

    def moved(expr: Expr) -> Expr:
        return fold_digits(_moved(expr, at, own), bounds)

    def einsum(e: Einsum) -> Einsum:
        guard = moved(e.guard)
        guard = e.guard if guard == e.guard else simplify(guard)
        return replace(e, expr=moved(e.expr), guard=guard)

    body = tuple(einsum(s) if isinstance(s, Einsum) else s for s in inner.body)
    inner = inner.with_body(*body)
    if before is not None:
        q = fold_digits(substitute(before.q, {Q: q}), bounds)
        kv = fold_digits(substitute(before.kv, {KV: kv}), bounds)
        place = fold_digits(substitute(place, {Q: before.place}), bounds)
    return reordered_cascade(Reordered(inner, q, kv, place))


def _group(cascade: Cascade) -> int:
    """Query heads of a key head, from the product of queries and keys."""
    product = cascade.producer("QK")
    assert product is not None
    head = next(r.index[1] for r in product.reads() if r.tensor == "K")
    match head:
        case Call("floordiv", (_, divisor)):
            return int(divisor.value)  # type: ignore[attr-defined]
    return 1


def _moved(expr: Expr, at: Mapping[Expr, Expr], own: set[str]) -> Expr:
    """``expr`` at the tokens of the new order; what the cascade computes is in it already."""
    if expr in at:
        return at[expr]
    if isinstance(expr, Read) and expr.tensor in own:
        return expr
    return rebuild(expr, tuple(_moved(child, at, own) for child in expr.children))


def per_head(orders: Mapping[int, Expr], head: Expr, default: Expr) -> Expr:
    """The expression of each head in one: heads of equal expressions are asked for together."""
    from attn_rewrite.cascade.expr import FALSE, eq, where

    groups: dict[Expr, list[int]] = {}
    for number, expr in sorted(orders.items()):
        groups.setdefault(expr, []).append(number)
    result = default
    for expr, heads in groups.items():
        if expr == default:
            continue
        chosen: Expr = FALSE
        for first, last in _spans(heads):
            one = eq(head, first) if first == last else (head >= first) & (head <= last)
            chosen = one if chosen == FALSE else chosen | one
        result = where(chosen, expr, result)
    return result


def _spans(numbers: list[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1] = (spans[-1][0], n)
        else:
            spans.append((n, n))
    return spans
