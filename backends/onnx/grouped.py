"""``GroupQueryAttention`` over a whole sequence: causal attention, or a causal window, no cache.

On the CPU it skips what lies above the diagonal and holds no score matrix, but computes every key
before a window.  It streams only where its present keys and values are used, so they are: an empty
slice of them is appended to the output.

Shapes: q [b, hq, s, d], k and v [b, hkv, s, d] -> [b, hq, s, d].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from attn_rewrite.backends.onnx.cached import DOMAIN, OPERATOR
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.torch.form import linear_score
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.expr import Call, Expr, Extent, Rank, call, conjuncts
from attn_rewrite.cascade.interval import affine

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
_LENGTHS = frozenset((Extent("q"), Extent("kv")))


def window_of(guard: Expr) -> float | None:
    """The size W of ``0 <= q - kv < W``, inf where only the left side bounds it; else None.

    For equal lengths of queries and keys.
    """
    low, high = -math.inf, math.inf
    for term in conjuncts(guard):
        bound = _distance(term)
        if bound is None:
            return None
        sign, number = bound
        if sign > 0:
            low = max(low, -number)
        else:
            high = min(high, number)
    return high + 1 if low == 0 and high >= 0 else None


def _distance(term: Expr) -> tuple[int, float] | None:
    """``sign * (q - kv) + number >= 0`` as sign and number; None for any other condition."""
    match term:
        case Call("not", (Call(op, (left, right)),)) if op in _NEGATED:
            return _distance(call(_NEGATED[op], left, right))
        case Call("ge" | "gt", (left, right)) | Call("le" | "lt", (right, left)):
            form = affine(left).plus(affine(right), -1.0)
        case _:
            return None
    terms = dict(form.terms)
    q, kv = terms.pop(Rank("q"), None), terms.pop(Rank("kv"), None)
    # The lengths are equal, so that a difference of them is nothing.
    if not set(terms) <= _LENGTHS or sum(terms.values()) != 0 or q is None or q not in (1.0, -1.0):
        return None
    return (int(q), form.constant - _is_strict(term)) if kv == -q else None


def _is_strict(term: Expr) -> bool:
    """Whether a comparison (negated or not) leaves out equality."""
    match term:
        case Call("not", (Call(op, _),)):
            return op in ("le", "ge")
        case Call(op, _):
            return op in ("lt", "gt")
    return False


def why_not_whole(form: SoftmaxAttention, inputs: Sequence[ir.Value]) -> str | None:
    """Why the operator does not compute this site over a whole sequence; None: it does."""
    linear = linear_score(form.score)
    if linear is None or any(p is not None for p in (linear.bias, form.weight, form.sink)):
        return f"{OPERATOR} holds all scores where the score is more than a multiple of QK"
    if window_of(form.guard) is None:
        return f"{OPERATOR} takes a causal mask or a causal window, and this mask is another"
    shapes = [x.shape for x in inputs[:3]]
    if len(inputs) != 3 or any(s is None or len(s) != 4 for s in shapes):
        return f"{OPERATOR} takes batch, heads, length and width"
    sizes = [tuple(map(str, s)) for s in shapes if s is not None]
    if len({(s[0], s[2]) for s in sizes}) > 1:
        return f"{OPERATOR} takes one batch and one length of queries and keys without a cache"
    if inputs[0].dtype not in _TYPES:
        return f"{OPERATOR} has no kernel for {inputs[0].dtype}"
    widths, heads = {s[3] for s in sizes}, (sizes[0][1], sizes[1][1])
    if len(widths) > 1 or not all(n.isdigit() for n in (*widths, *heads)) or int(sizes[0][3]) % 8:
        return f"{OPERATOR} takes one head dimension, a multiple of 8, and fixed heads"
    return None


def price_of_whole(form: SoftmaxAttention) -> str:
    """The name in the table of prices."""
    return OPERATOR if window_of(form.guard) == math.inf else f"{OPERATOR} with a window"


def emit_whole(r: Recorder, inputs: Sequence[ir.Value], form: SoftmaxAttention) -> ir.Value:
    """Record the operator for ``form``, which `why_not_whole` has nothing against."""
    q, k, v = inputs
    linear, window = linear_score(form.score), window_of(form.guard)
    assert linear is not None  # `why_not_whole` was asked
    assert window is not None
    heads, keys, width = (_fixed(x, i) for x, i in ((q, 1), (k, 1), (q, 3)))
    length = r.extent(q, 2)
    last = r.op("Expand", r.op("Sub", length, r.integers([1])), r.extent(q, 0))
    counts = r.cast(last, ir.DataType.INT32), r.scalar(r.cast(length, ir.DataType.INT32))
    options: dict[str, object] = {
        "num_heads": heads, "kv_num_heads": keys, "scale": linear.scale
    }  # fmt: skip
    if window != math.inf:
        options["local_window_size"] = int(window)
    flat = [_flat(r, x, n * width) for x, n in ((q, heads), (k, keys), (v, keys))]
    given: list[ir.Value | None] = [*flat, None, None, *counts]
    y, *present = r.ops(OPERATOR, *given, count=3, domain=DOMAIN, **options)
    shape = r.op("Concat", r.integers([0]), length, r.integers([heads * width]), axis=0)
    y = r.op("Concat", y, *(_nothing_of(r, x, shape) for x in present), axis=0)
    apart = r.op("Reshape", y, r.integers([0, 0, heads, width]))
    return r.op("Transpose", apart, perm=[0, 2, 1, 3])


def _nothing_of(r: Recorder, x: ir.Value, shape: ir.Value) -> ir.Value:
    """No example of ``x``, in a shape that can be appended to the output."""
    none = r.op("Slice", x, r.integers([0]), r.integers([0]), r.integers([0]))
    return r.op("Reshape", none, shape, allowzero=1)


def _fixed(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)  # `why_not_whole` was asked
    return size


def _flat(r: Recorder, x: ir.Value, width: int) -> ir.Value:
    """[b, h, s, n] -> [b, s, h * n]."""
    return r.op("Reshape", r.op("Transpose", x, perm=[0, 2, 1, 3]), r.integers([0, -1, width]))
