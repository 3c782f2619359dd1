"""Attention at the end of a cache: one ``GroupQueryAttention`` that appends and attends.

The operator takes past keys and values and the new ones, and returns the present ones, so that it
streams: no score matrix, no work above the diagonal.  It has no kernel for several new tokens of
several examples on top of a past, and no padding on the left; an ``If`` leaves those calls to tiles
in standard operators.

Shapes: q [b, hq, s, d], new k and v [b, hkv, s, d], past k and v [b, hkv, p, d], mask [b, p + s]
-> [b, hq, s, d] and the present k and v [b, hkv, p + s, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.repeats import source_of
from attn_rewrite.backends.onnx.tile_plans import TilePlan, plan_tiles
from attn_rewrite.backends.onnx.tiles import emit_attention
from attn_rewrite.backends.torch.form import is_causal_with_offset, linear_score
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.expr import KV, B, Read, conjuncts

DOMAIN = "com.microsoft"
OPERATOR = "GroupQueryAttention"
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_CACHE = "attn_rewrite.cache"


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys or values of a site: what came before, what is new, and both (``present``).

    With ``scale`` [1, hkv, 1, d] past and present are codes of 8 bits.
    """

    past: ir.Value
    new: ir.Value
    present: ir.Value
    scale: ir.Value | None = None


def cache_of(value: ir.Value) -> Cache | None:
    """``value`` as an input of the model with new tokens appended, if it is that."""
    value = source_of(value)
    if _CACHE in value.meta:
        held: Cache = value.meta[_CACHE]
        return held
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if node.attributes["axis"].as_int() not in (2, -2) or past is None or new is None:
        return None
    past = source_of(past)
    return Cache(past, new, value) if past.is_graph_input() else None


def remember_codes(value: ir.Value, cache: Cache) -> None:
    """Say that ``value`` is what the codes of ``cache`` stand for."""
    value.meta[_CACHE] = cache


def joined(
    r: Recorder, past: ir.Value, new: ir.Value, scale: ir.Value | None, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """The present cache, and the numbers in it, of type ``dtype``."""
    if scale is None:
        present = r.op("Concat", past, new, axis=2)
        return present, present
    steps = r.op("Round", r.op("Div", new, scale))
    inside = r.op("Clip", steps, r.number(-128.0, dtype), r.number(127.0, dtype))
    present = r.op("Concat", past, r.cast(inside, ir.DataType.INT8), axis=2)
    return present, r.op("Mul", r.cast(present, dtype), scale)


def why_not(form: SoftmaxAttention, inputs: Sequence[ir.Value]) -> str | None:
    """Why the operator does not compute this site; None: it does."""
    if padding_of(form) is None:
        return f"{OPERATOR} takes a causal mask and padding, and this mask is another"
    linear = linear_score(form.score)
    parts = (form.weight, form.sink, linear and linear.bias)
    if linear is None or any(part is not None for part in parts):
        return f"{OPERATOR} holds all scores where the score is more than a multiple of QK"
    caches = [cache_of(x) for x in inputs[1:3]]
    q, k, v = inputs[:3]
    if not all(caches) or any(c is None or not _same(c.new, q, 2) for c in caches):
        return f"{OPERATOR} streams only where its caches are inputs and results of the graph"
    if q.dtype not in _TYPES:
        return f"{OPERATOR} has no kernel for {q.dtype}"
    width = None if q.shape is None else q.shape[3]
    if not isinstance(width, int) or width % 8 or not _same(k, v, 3):
        return f"{OPERATOR} takes one head dimension, a multiple of 8"
    return None


def _same(a: ir.Value, b: ir.Value, axis: int) -> bool:
    if a.shape is None or b.shape is None:
        return False
    return str(a.shape[axis]) == str(b.shape[axis])


def padding_of(form: SoftmaxAttention) -> tuple[str, ...] | None:
    """The reads [b, kv] that mask padding beside the causal mask; None for any other mask."""
    rest = [term for term in conjuncts(form.guard) if not is_causal_with_offset(term)]
    if len(rest) == len(conjuncts(form.guard)) or len(rest) > 1:
        return None
    names = []
    for term in rest:
        if not isinstance(term, Read) or term.index != (B, KV):
            return None
        names.append(term.tensor)
    boolean = all(d.dtype == "bool" for d in form.reads)
    return tuple(names) if boolean and len(form.reads) == len(names) else None


@dataclass(frozen=True)
class Grouped:
    """A site being recorded: its form and the values of a function that stands for it."""

    r: Recorder
    form: SoftmaxAttention
    q: ir.Value
    k: Cache
    v: Cache
    mask: ir.Value | None

    def emit(self) -> tuple[tuple[ir.Value, ir.Value, ir.Value], TilePlan]:
        """The output and the present caches, and the tiles of the calls that are left to tiles."""
        r, plan = self.r, plan_tiles(self.form)
        branches: list[ir.Graph] = []
        for record in (self._operator, lambda inner: self._tiles(inner, plan)):
            inner = r.inner()
            values = record(inner)
            outputs = [inner.op("Identity", value) for value in values]
            for out, like in zip(outputs, (self.q, self.k.past, self.v.past), strict=True):
                out.dtype = like.dtype
            name = f"{r.prefix}/{'tiles' if branches else 'operator'}"
            imports = {"": r.opset, DOMAIN: 1}
            branches.append(
                ir.Graph([], outputs, nodes=inner.nodes, name=name, opset_imports=imports)
            )
        chosen = r.ops(
            "If", self._fits(), count=3, then_branch=branches[0], else_branch=branches[1]
        )
        return (chosen[0], chosen[1], chosen[2]), plan

    def _fits(self) -> ir.Value:
        """No padding, and one example, no past or one new token."""
        r, one = self.r, self.r.integers([1])
        few = r.op("Equal", r.extent(self.q, 0), one)
        few = r.op("Or", few, r.op("Equal", r.extent(self.q, 2), one))
        few = r.op("Or", few, r.op("Equal", r.extent(self.k.past, 2), r.integers([0])))
        if self.mask is not None:
            every = r.op("ReduceMin", r.cast(self.mask, ir.DataType.INT32), keepdims=0)
            few = r.op("And", few, r.cast(every, ir.DataType.BOOL))
        return r.scalar(few)

    def _operator(self, r: Recorder) -> tuple[ir.Value, ...]:
        q, k, v = self.q, self.k, self.v
        heads, keys, width = (_fixed(x, i) for x, i in ((q, 1), (k.new, 1), (q, 3)))
        length = r.op("Add", r.extent(k.past, 2), r.extent(q, 2))
        last = r.op("Expand", r.op("Sub", length, r.integers([1])), r.extent(q, 0))
        counts = r.cast(last, ir.DataType.INT32), r.scalar(r.cast(length, ir.DataType.INT32))
        flat = [_flat(r, x, n * width) for x, n in ((q, heads), (k.new, keys), (v.new, keys))]
        linear = linear_score(self.form.score)
        assert linear is not None  # `why_not` was asked
        options: dict[str, object] = {
            "num_heads": heads, "kv_num_heads": keys, "scale": linear.scale
        }  # fmt: skip
        given: list[ir.Value | None] = [*flat, k.past, v.past, *counts]
        if k.scale is not None:
            given += [None] * 5 + [k.scale, v.scale]
            kind = "PER_CHANNEL"
            options |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
        y, *present = r.ops(OPERATOR, *given, count=3, domain=DOMAIN, **options)
        apart = r.op("Reshape", y, r.integers([0, 0, heads, width]))
        return r.op("Transpose", apart, perm=[0, 2, 1, 3]), *present

    def _tiles(self, r: Recorder, plan: TilePlan) -> tuple[ir.Value, ...]:
        dtype = self.q.dtype
        assert dtype is not None
        present, numbers = zip(
            *(joined(r, c.past, c.new, c.scale, dtype) for c in (self.k, self.v)), strict=True
        )
        reads = [] if self.mask is None else [self.mask]
        return emit_attention(r, [self.q, *numbers, *reads], self.form, plan), *present


def _fixed(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)  # `why_not` was asked
    return size


def _flat(r: Recorder, x: ir.Value, width: int) -> ir.Value:
    """[b, h, s, n] -> [b, s, h * n]."""
    return r.op("Reshape", r.op("Transpose", x, perm=[0, 2, 1, 3]), r.integers([0, -1, width]))
