"""What each elementwise operator, and each maker of positions or constants, is as an expression.

A rule takes the lifter, the node, the coordinates it is read at and the depth; None says that
nothing is known, and the node is read as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attn_rewrite.cascade.expr import Call, Const, Expr, Rank, Read, call, walk, where
from attn_rewrite.cascade.simplify import is_boolean
from attn_rewrite.graph import arguments, is_tensor, op_name, shape_of, value_of
from attn_rewrite.passes.find.layout import Coord, Dims, coordinate
from attn_rewrite.sizes import as_size, same_size

if TYPE_CHECKING:
    from attn_rewrite.passes.find.lift import Lifter


def literal(value: Any) -> Const:
    """A Python number as a literal; numpy's and torch's scalars become floats."""
    if isinstance(value, bool):
        return Const(value)
    return Const(value if isinstance(value, int) else float(value))


Rule = Callable[["Lifter", fx.Node, Dims, int], Expr | None]


def _elementwise(op: str) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        args = [lifter.operand(a, node, dims, depth) for a in node.args]
        if any(a is None for a in args) or node.kwargs:
            return None
        return call(op, *(a for a in args if a is not None))

    return rule


def _scaled_sum(sign: str) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        named = arguments(node)
        a = lifter.operand(named["self"], node, dims, depth)
        b = lifter.operand(named["other"], node, dims, depth)
        alpha = named.get("alpha")
        if a is None or b is None:
            return None
        if alpha not in (None, 1):
            b = b * alpha
        if sign == "rsub":
            return b - a
        return call(sign, a, b)

    return rule


def _divide(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    named = arguments(node)
    a = lifter.operand(named["self"], node, dims, depth)
    b = lifter.operand(named["other"], node, dims, depth)
    if a is None or b is None:
        return None
    mode = named.get("rounding_mode")
    if mode == "trunc":
        return None
    return call("div" if mode is None else "floordiv", a, b)


def _where(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    named = arguments(node)
    if "self" not in named or "other" not in named:
        return None
    parts = [lifter.operand(named[n], node, dims, depth) for n in ("condition", "self", "other")]
    return None if any(p is None for p in parts) else where(*(p for p in parts if p is not None))


def _masked_fill(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    named = arguments(node)
    x, m, v = (lifter.operand(named[n], node, dims, depth) for n in ("self", "mask", "value"))
    return None if x is None or m is None or v is None else where(m, v, x)


def _arange(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    named = arguments(node)
    start = lifter.operand(named.get("start", 0) or 0, node, (), depth)
    step = named.get("step", 1)
    place = coordinate(dims[0], lifter.axes)
    if start is None or place is None or not isinstance(step, int):
        return None
    return start + (place if step == 1 else place * step)


def _filled(name: str) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        fixed = {"ones": 1, "zeros": 0}.get(name)
        named = arguments(node)
        value = fixed if fixed is not None else named.get("fill_value", named.get("s"))
        if not isinstance(value, (bool, int, float)):
            return lifter.operand(value, node, (), depth)
        dtype = value_of(node).dtype
        if dtype == torch.bool:
            return Const(bool(value))
        return Const(float(value) if dtype.is_floating_point else int(value))

    return rule


def _triangular(lower: bool) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        named = arguments(node)
        row, column = (coordinate(d, lifter.axes) for d in dims[-2:])
        inner = lifter.operand(named["self"], node, dims, depth)
        diagonal = lifter.operand(named["diagonal"], node, (), depth)
        if row is None or column is None or inner is None or diagonal is None:
            return None
        kept = call("le", column, row + diagonal) if lower else call("ge", column, row + diagonal)
        zero: Expr = Const(False) if value_of(node).dtype == torch.bool else Const(0)
        if is_boolean(inner):
            return call("and", kept, inner)
        return where(kept, inner, zero)

    return rule


def _index(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """Advanced indexing whose indices are plain coordinates: a read at other axes."""
    named = arguments(node)
    return _read_at(lifter, node, named["self"], list(named["indices"]), dims, depth)


def _flat_apply(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """Indexing as it is captured inside the functions of ``flex_attention``."""
    _, _, kind, source, *indices = node.args
    if not getattr(kind, "__name__", str(kind)).endswith("ModIndex"):
        return None
    return _read_at(lifter, node, source, indices, dims, depth)


def _read_at(
    lifter: Lifter, node: fx.Node, source: Any, indices: list[Any], dims: Dims, depth: int
) -> Expr | None:
    if not is_tensor(source) or any(i is None for i in indices):
        return None
    shape = shape_of(source)
    own: list[Coord] = []
    for size, index in zip(shape, indices, strict=False):
        place = lifter.operand(index, node, dims, depth)
        if place is None:
            return None
        line = lifter.places.get(place)
        if line and same_size(lifter.axes.extent(line), as_size(size)):
            own.append(line)
            continue
        atom = int(place.name[1:]) if isinstance(place, Rank) else None
        if atom is not None and same_size(lifter.axes.size(atom), as_size(size)):
            own.append((atom,))
        elif isinstance(place, Const) and place.value == 0:
            own.append(() if same_size(as_size(size), 1) else place)
        elif atom is not None and _covers(lifter.axes.size(atom), size):
            own.append((atom,))
        else:
            own.append(place)
    rest = dims[len(dims) - (len(shape) - len(indices)) :] if len(shape) > len(indices) else ()
    return lifter.lift(source, (*own, *rest), depth + 1)


def _covers(size: Any, symbol: Any) -> bool:
    """Two lone symbols: an index over one axis of the model into another (``s72`` rows, ``s43``
    mask)."""
    other = as_size(symbol)
    return (
        not isinstance(size, int)
        and not isinstance(other, int)
        and size.is_Symbol
        and other.is_Symbol
    )


def _cumulated(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """The running sum of a constant is its position times the constant; that of a diagonal is 1
    from there on."""
    named = arguments(node)
    place = named["dim"] % max(len(dims), 1)
    inner = lifter.operand(named["self"], node, dims, depth)
    at = coordinate(dims[place], lifter.axes) if dims else None
    if inner is None or at is None:
        return None
    match inner:
        case Const(value):
            return (at + 1) * int(value) if float(value).is_integer() else None
        case Call("where", (Call("eq", (a, b)), Const(one), Const(zero))) if zero == 0:
            other = b if a == at else a if b == at else None
            if isinstance(at, Rank) and isinstance(other, Rank):
                return where(call("le", other, at), one, zero)
    return None


def _log_two(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    inner = lifter.operand(node.args[0], node, dims, depth)
    return None if inner is None else call("log", inner) * (1 / math.log(2))


def _sign(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    x = lifter.operand(node.args[0], node, dims, depth)
    if x is None or not _of_positions(x):
        return None
    one = 1.0 if value_of(node).dtype.is_floating_point else 1
    return where(call("gt", x, 0), one, where(call("lt", x, 0), -one, type(one)(0)))


def _of_positions(x: Expr) -> bool:
    """True if nothing is read in it: a product with the scores stays one expression."""
    return not any(isinstance(n, Read) for n in walk(x))


def _step(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """``heaviside``: 0 below zero, 1 above, and what is given at zero."""
    named = arguments(node)
    x, v = (lifter.operand(named[n], node, dims, depth) for n in ("self", "values"))
    if x is None or v is None:
        return None
    return where(call("gt", x, 0), 1.0, where(call("eq", x, 0), v, 0.0))


def _outer(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """Positions times positions; the product of two activations is a score."""
    named = arguments(node)
    parts = [
        lifter.lift(named[n], (d,), depth + 1) for n, d in zip(("self", "vec2"), dims, strict=True)
    ]
    if any(p is None or not _of_positions(p) for p in parts):
        return None
    return call("mul", *(p for p in parts if p is not None))


_JOINED = {"all": "and", "any": "or", "prod": "mul", "sum": "add", "amax": "max", "amin": "min"}


def _over_stack(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """A reduction over the axis along which tensors were stacked is that of the tensors."""
    named = arguments(node)
    stack, over = named["self"], named.get("dim")
    over = [over] if isinstance(over, int) else list(over or ())
    if not is_tensor(stack) or op_name(stack) != "stack" or len(over) != 1 or named.get("dtype"):
        return None
    rank, place = len(shape_of(stack)), arguments(stack)["dim"] % len(shape_of(stack))
    if over[0] % rank != place:
        return None
    own = (*dims[:place], *dims[place + 1 :]) if named.get("keepdim") else dims
    parts = [lifter.lift(t, own, depth + 1) for t in arguments(stack)["tensors"]]
    if any(p is None for p in parts):
        return None
    truths = [p is not None and is_boolean(p) for p in parts]
    op = _JOINED[op_name(node)]
    if op in ("and", "or") and not all(truths):
        return None
    total = parts[0]
    for part in parts[1:]:
        assert total is not None
        assert part is not None
        total = call(op, total, part)
    return total


def _filled_in(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """``x.fill_(value)``, made functional: the value."""
    return lifter.operand(arguments(node)["value"], node, (), depth)


def _exclusive(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    parts = [lifter.operand(a, node, dims, depth) for a in node.args[:2]]
    if any(p is None or not is_boolean(p) for p in parts):
        return None
    a, b = (p for p in parts if p is not None)
    return call("or", call("and", a, call("not", b)), call("and", call("not", a), b))


def _logical_not(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    inner = lifter.operand(node.args[0], node, dims, depth)
    if inner is None or (op_name(node) == "bitwise_not" and value_of(node).dtype != torch.bool):
        return None
    return call("not", inner)


def _logical(op: str) -> Rule:
    plain = _elementwise(op)

    def rule(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
        return plain(lifter, node, dims, depth) if value_of(node).dtype == torch.bool else None

    return rule


def _interpolated(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    """``lerp``: from the first to the second by a weight."""
    named = arguments(node)
    a, b, w = (lifter.operand(named[n], node, dims, depth) for n in ("self", "end", "weight"))
    return None if a is None or b is None or w is None else a + w * (b - a)


def _power_of_two(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    inner = lifter.operand(node.args[0], node, dims, depth)
    return None if inner is None else call("pow", 2.0, inner)


def _diagonal(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    row, column = (coordinate(d, lifter.axes) for d in dims)
    if row is None or column is None:
        return None
    dtype = value_of(node).dtype
    if dtype == torch.bool:
        return call("eq", row, column)
    one = 1.0 if dtype.is_floating_point else 1
    return where(call("eq", row, column), one, type(one)(0))


def _clamp(lifter: Lifter, node: fx.Node, dims: Dims, depth: int) -> Expr | None:
    named = arguments(node)
    inner = lifter.operand(named["self"], node, dims, depth)
    low, high = named.get("min"), named.get("max")
    if inner is None or any(isinstance(v, fx.Node) for v in (low, high)):
        return None
    return call(
        "clip", inner, -math.inf if low is None else low, math.inf if high is None else high
    )


RULES: Mapping[str, Rule] = {
    "add": _scaled_sum("add"),
    "sub": _scaled_sum("sub"),
    "rsub": _scaled_sum("rsub"),
    "div": _divide,
    "where": _where,
    "masked_fill": _masked_fill,
    "arange": _arange,
    "index": _index,
    "flat_apply": _flat_apply,
    "exp2": _power_of_two,
    "eye": _diagonal,
    "clamp": _clamp,
    "lerp": _interpolated,
    "cumsum": _cumulated,
    "log2": _log_two,
    "heaviside": _step,
    **dict.fromkeys(("sign", "sgn"), _sign),
    "outer": _outer,
    **dict.fromkeys(_JOINED, _over_stack),
    "fill": _filled_in,
    **dict.fromkeys(("__xor__", "logical_xor", "bitwise_xor"), _exclusive),
    "tril": _triangular(lower=True),
    "triu": _triangular(lower=False),
    "logical_not": _logical_not,
    "bitwise_not": _logical_not,
    **{n: _filled("ones") for n in ("ones", "ones_like", "new_ones")},
    **{n: _filled("zeros") for n in ("zeros", "zeros_like", "new_zeros")},
    **{n: _filled("full") for n in ("full", "full_like", "new_full", "scalar_tensor")},
    **{n: _logical("and") for n in ("logical_and", "bitwise_and", "__and__")},
    **{n: _logical("or") for n in ("logical_or", "bitwise_or", "__or__")},
    **{
        ours: _elementwise(op)
        for ours, op in (
            ("mul", "mul"),
            ("floor_divide", "floordiv"),
            ("remainder", "mod"),
            ("neg", "neg"),
            ("exp", "exp"),
            ("tanh", "tanh"),
            ("sigmoid", "sigmoid"),
            ("relu", "relu"),
            ("abs", "abs"),
            ("sqrt", "sqrt"),
            ("rsqrt", "rsqrt"),
            ("reciprocal", "reciprocal"),
            ("pow", "pow"),
            ("log", "log"),
            ("maximum", "max"),
            ("minimum", "min"),
            ("eq", "eq"),
            ("ne", "ne"),
            ("lt", "lt"),
            ("le", "le"),
            ("gt", "gt"),
            ("ge", "ge"),
            ("multiply", "mul"),
        )
    },
}
