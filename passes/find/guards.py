"""What a mask keeps: its guard, whether it is causal, and where its queries are among the keys."""

from __future__ import annotations

from typing import Any

from torch import fx

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, call, conjuncts
from attn_rewrite.cascade.simplify import is_causal_term, mask_value, rows_kept, simplify
from attn_rewrite.passes.find.cached import appended_to_cache, written_at
from attn_rewrite.passes.find.masks import removing
from attn_rewrite.site import UNKNOWN_OFFSET, Operand
from attn_rewrite.sizes import as_size, same_size


def split_guard(score: Expr) -> tuple[Expr, tuple[Expr, ...]]:
    """Split ``where(mask, s, -inf)`` and ``s + where(mask, 0, -inf)`` into (s, kept terms).

    A finite mask value is moved to the guard only where every row is proved to keep a key: on an
    empty row it gives the mean of V, which a guard would not.
    """
    match score:
        case Call("where", (condition, yes, no)):
            if mask_value(yes) and not mask_value(no):
                condition, yes, no = simplify(call("not", condition)), no, yes
            if mask_value(no) and _removes(no, condition):
                inner, terms = split_guard(yes)
                return inner, (*conjuncts(condition), *terms)
        case Call("add", (a, b)):
            left, terms = split_guard(a)
            right, more = split_guard(b)
            if terms or more:
                return simplify(call("add", left, right)), (*terms, *more)
        case Const(0) | Const(0.0):
            return score, ()
    return score, ()


def _removes(value: Expr, condition: Expr) -> bool:
    assert isinstance(value, Const)
    return value.value == -float("inf") or (value.value <= -1e30 and rows_kept(condition))


def causal_offset(guard: Expr, score: Expr) -> Expr | None:
    """The offset of a proved causal mask (in the guard, or as a removing term of the score), or
    None."""
    terms = (*conjuncts(guard), *removing(score))
    return next((o for t in terms if (o := is_causal_term(t)) is not None), None)


def positions(
    offset: Expr | None, key: Operand, kind: str, q_len: Any, kv_len: Any
) -> tuple[str | fx.Node, bool]:
    """(offset of a query's position, causal): from the mask, else from how the keys were cached.

    A node is the tensor of positions [q].  One newest query sees what was cached at or before its
    own position: that is causal without a mask that says so.
    """
    if offset is not None:
        return _diagonal(offset, as_size(q_len), as_size(kv_len))
    if kind != "self":
        return "0", False
    single = same_size(as_size(q_len), 1)
    if appended_to_cache(key, q_len):
        return str(Extent("kv") - (1 if single else Extent("q"))), single
    index = written_at(key, q_len)
    if index is not None:
        return index, single
    return ("0" if same_size(as_size(q_len), as_size(kv_len)) else UNKNOWN_OFFSET), False


def _diagonal(offset: Expr, q_len: Any, kv_len: Any) -> tuple[str, bool]:
    """(offset, causal) of a mask ``kv <= q + offset``.

    A query is not ahead of the newest key: where it may look further than that, the mask hides no
    future.  Where queries and keys are the same positions, one that looks less far stays where it
    is.
    """
    whole = simplify(offset)
    room = as_size(kv_len - q_len)
    if not isinstance(whole, Const):
        return str(offset), True
    seen = int(whole.value)
    if seen > (max(room, 0) if isinstance(room, int) else 0):
        return ("0" if room == 0 else UNKNOWN_OFFSET), False
    return ("0" if room == 0 else str(offset)), True
