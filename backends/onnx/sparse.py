"""``SparseAttention`` of ONNX Runtime's own domain: causal block lists per head, for CUDA.

Its CUDA kernels take heads of 128 in float16 or bfloat16 and blocks of 64, which is less than its
schema allows.  The CPU's computes every score and is wrong where a list holds a block above the
diagonal, so a file for the CPU never has it.  The operator appends to caches and demands that past
and present ones are the same memory: here both are a tensor of the site's own size, which it fills,
and the CUDA kernel declares the pair as in place.

Shapes: q [b, hq, s, d], k and v [b, hkv, s, d] -> [b, hq, s, d] with s fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from attn_rewrite.backends.onnx.contrib import DOMAIN
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.grouped import window_of
from attn_rewrite.backends.onnx.lowering import SPARSE as OPERATOR
from attn_rewrite.backends.torch.form import linear_score
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.cover import Cover, block_cover
from attn_rewrite.cascade.expr import Expr, conjuncts, tensors_of

BLOCK, WIDTH = 64, 128
_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Kept = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The key blocks of every query block of ``heads`` heads, which take the ``layouts``
    [layouts, blocks, blocks] in turn: head h has layout ``h % len(layouts)``."""

    heads: int
    layouts: Kept

    @property
    def kept(self) -> int:
        """Blocks that are kept, over all heads."""
        return int(self.layouts.sum()) * self.heads // len(self.layouts)

    @property
    def total(self) -> int:
        """Blocks of all heads."""
        return int(self.layouts[0].size) * self.heads

    def __str__(self) -> str:
        share = self.kept / self.total
        return (
            f"ONNX Runtime's operator, blocks of {BLOCK}: {self.kept} of {self.total} "
            f"({share:.1%}) in {len(self.layouts)} layouts"
        )


def as_csr(layouts: Kept) -> tuple[Ints, Ints]:
    """Row offsets [layouts, blocks + 1] and columns [layouts, most] of block lists.

    Every layout's offsets start at 0, and its columns are padded with -1 at the right.
    """
    counts = layouts.sum(2)
    rows = np.zeros((len(layouts), layouts.shape[1] + 1), np.int32)
    rows[:, 1:] = counts.cumsum(1)
    columns = np.full((len(layouts), int(rows[:, -1].max())), -1, np.int32)
    for own, layout in zip(columns, layouts, strict=True):
        found = np.nonzero(layout)[1]
        own[: len(found)] = found
    return rows, columns


def cycle_of(keep: Kept) -> Kept:
    """The fewest layouts that the heads [h, n, n] take in turn."""
    heads = len(keep)
    size = next(
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and all((keep[h] == keep[h % n]).all() for h in range(heads))
    )
    return keep[:size]


def block_lists(
    form: SoftmaxAttention, inputs: Sequence[ir.Value], shared: bool = False
) -> BlockLists | str:
    """The lists with which the operator is exactly ``form`` over ``inputs``, or why there are none.

    ``inputs`` are q, k, v and the reads, constants among them known; ``shared``: keys and values
    are one tensor.
    """
    against = _why_not(form, inputs, shared)
    if against is not None:
        return against
    terms = conjuncts(form.guard)
    rest = [t for t in terms if window_of(t) != math.inf]
    if len(rest) == len(terms):
        return f"{OPERATOR} takes a causal mask, and this one is not"
    if not rest:
        return f"{OPERATOR} is for block lists, and this causal mask has none"
    guard = rest[0]
    for term in rest[1:]:
        guard = guard & term
    return _lists(guard, form, inputs)


def _why_not(form: SoftmaxAttention, inputs: Sequence[ir.Value], shared: bool) -> str | None:
    """What of the site, but for its mask, the operator does not take."""
    linear = linear_score(form.score)
    plain = linear is not None and linear.bias is None and linear.scale > 0
    if not plain or form.weight is not None or form.sink is not None:
        return f"{OPERATOR} takes a positive multiple of QK as score"
    shapes = [None if x.shape is None else tuple(x.shape) for x in inputs[:3]]
    if any(s is None or len(s) != 4 for s in shapes):
        return f"{OPERATOR} takes batch, heads, length and width"
    q, k, v = (s for s in shapes if s is not None)
    if not all(isinstance(n, int) for n in (q[1], k[1], q[2], k[2])):
        return f"{OPERATOR} takes lists of one length: export with fixed lengths (static=True)"
    if (str(q[0]), q[2]) != (str(k[0]), k[2]) or k != v:
        return f"{OPERATOR} takes queries, keys and values of one batch and length, without a past"
    if q[2] % BLOCK:
        return f"{OPERATOR} takes blocks of {BLOCK} on CUDA, which {q[2]} tokens are no multiple of"
    if (q[3], k[3]) != (WIDTH, WIDTH):
        return f"{OPERATOR} takes heads of {WIDTH} on CUDA, and these have {q[3]}"
    if inputs[0].dtype not in _TYPES:
        return f"{OPERATOR} takes float16 or bfloat16 on CUDA, and this site has {inputs[0].dtype}"
    return f"{OPERATOR} takes keys and values in memory of their own" if shared else None


def _lists(guard: Expr, form: SoftmaxAttention, inputs: Sequence[ir.Value]) -> BlockLists | str:
    """The lists of the mask that is causal and ``guard``."""
    length, heads = (_size(inputs[0], i) for i in (2, 1))
    tables = {}
    for value, declared in zip(inputs[3:], form.reads, strict=True):
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None and declared.name in tensors_of(guard):
            tables[declared.name] = tensor.numpy()
    cells = np.stack(
        [
            block_cover(
                guard, q_len=length, kv_len=length, block_q=BLOCK, block_kv=BLOCK, head=h,
                extents={"h": heads}, tables=tables,
            )
            for h in range(heads)
        ]
    )  # fmt: skip
    lower = np.tri(length // BLOCK, dtype=bool)  # what is above it is not causal
    if (cells[:, lower] == Cover.PARTIAL).any():
        return (
            f"{OPERATOR} takes whole blocks of {BLOCK}, and this mask cuts some or has them from "
            "run-time values"
        )
    keep = (cells == Cover.FULL) & lower
    if not keep.diagonal(axis1=1, axis2=2).all():
        return f"{OPERATOR} takes lists with every diagonal block, and this mask leaves some out"
    if keep[:, lower].all():
        return f"{OPERATOR} is for block lists, and this mask leaves out no causal block of {BLOCK}"
    return BlockLists(heads, cycle_of(keep))


def emit_sparse(
    r: Recorder, inputs: Sequence[ir.Value], form: SoftmaxAttention, lists: BlockLists
) -> ir.Value:
    """Record the operator for ``form`` with the ``lists`` that `block_lists` found."""
    q, k, v = inputs[:3]
    linear = linear_score(form.score)
    assert linear is not None  # `block_lists` was asked
    assert q.dtype is not None
    length, heads, keys = _size(q, 2), _size(q, 1), _size(k, 1)
    flat = [_flat(r, x, n * WIDTH) for x, n in ((q, heads), (k, keys), (v, keys))]
    # Any tensor of the right shape: the operator fills all of it.  A product keeps the names of
    # its axes, by which the runtime sees that past and present have one size.
    past = [r.op("Mul", x, r.number(0.0, q.dtype)) for x in (k, v)]
    counts = r.op("Expand", r.constant(np.array([length], np.int32)), r.extent(q, 0))
    y, *_ = r.ops(
        OPERATOR, *flat, *past, *map(r.constant, as_csr(lists.layouts)),
        r.constant(np.array(length, np.int32)), counts, count=3, domain=DOMAIN,
        num_heads=heads, kv_num_heads=keys, scale=linear.scale, sparse_block_size=BLOCK,
    )  # fmt: skip
    apart = r.op("Reshape", y, r.integers([0, 0, heads, WIDTH]))
    return r.op("Transpose", apart, perm=[0, 2, 1, 3])


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)  # `block_lists` was asked
    return size


def _flat(r: Recorder, x: ir.Value, width: int) -> ir.Value:
    """[b, h, s, n] -> [b, s, h * n]."""
    return r.op("Reshape", r.op("Transpose", x, perm=[0, 2, 1, 3]), r.integers([0, -1, width]))
