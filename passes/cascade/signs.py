"""Signs of values: positive, nonnegative or any, by the form of what makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank, Read
from attn_rewrite.passes.cascade.flow import IDENTITY, Flow

_ORDER = ("any", "nonnegative", "positive")


def sign(flow: Flow, expr: Expr) -> str:
    """``"positive"``, ``"nonnegative"`` or ``"any"``: what is known of every value of ``expr``."""
    match expr:
        case Const(value):
            return "positive" if value > 0 else "nonnegative" if value == 0 else "any"
        case Rank():
            return "nonnegative"
        case Extent():
            return "positive"
        case Read(tensor, _):
            return _tensor_sign(flow, tensor)
        case Call("pow", (base, Const(value))):
            even = isinstance(value, int) and value % 2 == 0
            return _most(sign(flow, base), "nonnegative") if even else sign(flow, base)
        case Call("mul", (a, b)) if a == b:
            return _most("nonnegative", sign(flow, a))
        case Call("where", (_, a, b)):
            return _least(sign(flow, a), sign(flow, b))
        case Call(op, args):
            return _RULES.get(op, _unknown)(*(sign(flow, a) for a in args))
    return "any"


def _most(*signs: str) -> str:
    return max(signs, key=_ORDER.index)


def _least(*signs: str) -> str:
    return min(signs, key=_ORDER.index)


def _sum(a: str, b: str) -> str:
    return "any" if "any" in (a, b) else _most(a, b)


def _quotient(a: str, b: str) -> str:
    # The empty divisor is not touched, so a nonnegative one divides as a positive one does.
    return a if b == "positive" else _least(a, b)


def _unknown(*_: str) -> str:
    return "any"


def _always(found: str) -> Callable[..., str]:
    return lambda *_: found


_RULES: Mapping[str, Callable[..., str]] = {
    **dict.fromkeys(("exp", "exp2", "sigmoid", "softplus"), _always("positive")),
    **dict.fromkeys(("abs", "relu", "sqrt"), _always("nonnegative")),
    **dict.fromkeys(("cast_f64", "cast_f32", "cast_bf16", "cast_f16"), lambda a: _least(a, a)),
    "add": _sum, "mul": _least, "min": _least, "max": _most, "div": _quotient,
    "reciprocal": lambda a: a,
}  # fmt: skip


def _tensor_sign(flow: Flow, tensor: str) -> str:
    declared = flow.decls.get(tensor)
    if declared is not None and declared.sign != "any":
        return declared.sign
    if declared is not None and declared.dtype == "bool":
        return "nonnegative"
    made = flow.producer.get(tensor)
    if made is None:
        return "any"
    found = sign(flow, made.expr)
    folds = {op for _, op in made.reduce} or {"add"}
    untouched = flow.default(tensor) in {0.0, *(IDENTITY[op] for op in folds)}
    # Points that nobody touched hold the default: an empty sum is 0, not positive.
    filtered = made.guard != Const(True)
    if not untouched:
        return "any"
    return "nonnegative" if filtered and found == "positive" else found
