"""Softmax attention as plain ATen operators over the whole [b, h, q, kv] space.

For cascades no kernel takes: any score, weight, sink and guard.  Dynamic lengths, no custom
operator, so it runs wherever the host graph runs.  Sources of truth are the same as the kernels':
statistics in float32 or wider, a query without a finite score gives 0 where the guard can empty it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from attn_rewrite.backends.torch.emit import Emitter, cast, dtype_of, value_of
from attn_rewrite.backends.torch.form import (
    LinearScore,
    is_causal,
    linear_score,
    mentions_product,
)
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import TRUE, Call, Const, Expr, Rank, Read, ranks_of
from attn_rewrite.cascade.staged import A
from attn_rewrite.graph import Builder, aten

FRAME = ("b", "h", "q", "kv")


@dataclass(frozen=True)
class DenseSpace:
    """All points of a product of ranks, one dimension per rank of ``frame``."""

    build: Builder
    device: torch.device
    dtype: torch.dtype
    frame: tuple[str, ...]
    extents: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def coordinate(self, rank: str) -> Any:
        """``arange`` over the rank, placed in its dimension."""
        if rank not in self.frame:
            raise ValueError(f"rank {rank} is not iterated here; the ranks are {self.frame}")
        line = self.build.call(
            aten.arange.default, self.extents[rank], dtype=torch.int64, device=self.device
        )
        shape = [-1 if r == rank else 1 for r in self.frame]
        return self.build.call(aten.reshape.default, line, shape)

    def extent(self, rank: str) -> Any:
        """The extent of a rank: an int, or a size of the graph."""
        return self.extents[rank]

    def read(self, read: Read, emitter: Emitter) -> Any:
        """A rearranged view where the indices are different ranks, else an indexed read."""
        tensor = self.tensors[read.tensor]
        names = [i.name if isinstance(i, Rank) else "" for i in read.index]
        plain = all(n in self.frame for n in names) and len(set(names)) == len(names)
        if plain and not self._is_part(tensor, names):
            return self.placed(tensor, names)
        return self._indexed(tensor, read.index, emitter)

    def _is_part(self, tensor: Any, names: Sequence[str]) -> bool:
        """True where a rank is known to be shorter than the dimension it reads; "" is no rank."""
        sizes = [(value_of(tensor).shape[d], self.extents[r]) for d, r in enumerate(names) if r]
        return any(
            isinstance(have, int) and isinstance(want, int) and 1 != have != want
            for have, want in sizes
        )

    def placed(self, tensor: Any, names: Sequence[str]) -> Any:
        """``tensor``, whose dimensions are the ranks ``names``, over the frame."""
        order = sorted(range(len(names)), key=lambda d: self.frame.index(names[d]))
        if order != list(range(len(names))):
            tensor = self.build.call(aten.permute.default, tensor, order)
        for at, rank in enumerate(self.frame):
            if rank not in names:
                tensor = self.build.call(aten.unsqueeze.default, tensor, at)
        return tensor

    def _indexed(self, tensor: Any, index: Sequence[Expr], emitter: Emitter) -> Any:
        """Read at computed indices, clamped: points outside the guard may be outside the tensor."""
        tensor, index = self._joined(tensor, index)
        computed = [d for d, i in enumerate(index) if not isinstance(i, Rank)]
        plain = [i.name for i in index if isinstance(i, Rank)]
        names = [i.name if isinstance(i, Rank) else "" for i in index]
        whole = set(plain) <= set(self.frame) and not self._is_part(tensor, names)
        if whole and len(set(plain)) == len(plain):
            if not computed and plain:
                return self.placed(tensor, plain)
            if len(computed) == 1 and not ranks_of(index[computed[0]]) & set(plain):
                return self._selected(tensor, index, computed[0], emitter)
        places = [self._place(tensor, dim, expr, emitter) for dim, expr in enumerate(index)]
        return self.build.call(aten.index.Tensor, tensor, places) if places else tensor

    def _place(self, tensor: Any, dim: int, expr: Expr, emitter: Emitter) -> Any:
        """Coordinates along one dimension, over the frame."""
        last = self.build.call(operator.sub, size(self.build, tensor, dim), 1)
        here = emitter.as_tensor(0 if last == 0 else emitter.emit(expr))
        here = cast(self.build, here, torch.int64)
        if last == 0 or isinstance(expr, Const):
            return here
        return self.build.call(aten.clamp.default, here, 0, last)

    def _joined(self, tensor: Any, index: Sequence[Expr]) -> tuple[Any, Sequence[Expr]]:
        """Two dimensions read at ``r // n`` and ``r % n`` are one that is read at r."""
        for dim, pair in enumerate(pairwise(index)):
            match pair:
                case (Call("floordiv", (Rank(r), Const(n))), Call("mod", (Rank(other), Const(m)))):
                    if r == other and r in self.frame and n == m == value_of(tensor).shape[dim + 1]:
                        flat = self.build.call(aten.flatten.using_ints, tensor, dim, dim + 1)
                        cut = self._first(flat, dim, self.extents[r])
                        return cut, (*index[:dim], Rank(r), *index[dim + 2 :])
        return tensor, index

    def _first(self, tensor: Any, dim: int, count: Any) -> Any:
        """The first entries along ``dim``: the last block may be cut.

        A copy where lengths are dynamic: whether a view is contiguous would depend on them.
        """
        if isinstance(count, int):
            return self.build.call(aten.slice.Tensor, tensor, dim, 0, count)
        line = self.build.call(aten.arange.default, count, dtype=torch.int64, device=self.device)
        return self.build.call(aten.index_select.default, tensor, dim, line)

    def _selected(self, tensor: Any, index: Sequence[Expr], dim: int, emitter: Emitter) -> Any:
        """Whole slices along ``dim``: far cheaper than an index for every element."""
        used = [r for r in self.frame if r in ranks_of(index[dim])]
        extents = [self.extents[r] for r in used]
        here = self._place(tensor, dim, index[dim], emitter)
        if used:
            over = [self.extents[r] if r in used else 1 for r in self.frame]
            here = self.build.call(aten.expand.default, here, over)
        here = self.build.call(aten.reshape.default, here, [-1])
        taken = self.build.call(aten.index_select.default, tensor, dim, here)
        sizes = [size(self.build, tensor, d) for d in range(len(index))]
        taken = self.build.call(
            aten.reshape.default, taken, [*sizes[:dim], *extents, *sizes[dim + 1 :]]
        )
        names = [i.name if isinstance(i, Rank) else "" for i in index]
        return self.placed(taken, [*names[:dim], *used, *names[dim + 1 :]])


def size(build: Builder, value: Any, dim: int) -> Any:
    """The extent of a dimension: an int where it is fixed, else a size of the graph."""
    found = value_of(value).shape[dim]
    return found if isinstance(found, int) else build.call(aten.sym_size.int, value, dim)


def attention_space(
    build: Builder, form: SoftmaxAttention, inputs: Sequence[Any], dtype: torch.dtype
) -> DenseSpace:
    """The space of the scores, with the extents that the inputs [q, k, v, *reads] show."""
    q, k, v, *reads = inputs
    extents: dict[str, Any] = {}
    for decl, tensor in zip(form.reads, reads, strict=True):
        for dim, rank in enumerate(decl.ranks):
            if value_of(tensor).shape[dim] != 1:
                extents[rank] = size(build, tensor, dim)
    for tensor, ranks in (
        (v, ("", "hkv", "kv", "f")),
        (k, ("", "hkv", "kv", "d")),
        (q, ("b", "h", "q", "d")),
    ):
        extents |= {r: size(build, tensor, i) for i, r in enumerate(ranks) if r}
    tensors = {
        decl.name: cast(build, t, dtype) if _is_narrow(t, dtype) else t
        for decl, t in zip(form.reads, reads, strict=True)
    }
    return DenseSpace(build, value_of(q).device, dtype, FRAME, extents, tensors)


def _is_narrow(tensor: Any, dtype: torch.dtype) -> bool:
    have = dtype_of(tensor)
    return have is not None and have.is_floating_point and have != dtype


def working_type(value: Any) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype_of(value) == torch.float64 else torch.float32


def emit_dense(
    build: Builder,
    form: SoftmaxAttention,
    inputs: Sequence[Any],
    dropout: float = 0.0,
    probability: Expr | None = None,
) -> Any:
    """The attention output [b, h, q, f] in the type of q, from [q, k, v, *reads].

    ``probability`` is an expression over `A` that takes the place of the probabilities.
    """
    dtype = working_type(inputs[0])
    space = attention_space(build, form, inputs, dtype)
    q, k, v = (cast(build, t, dtype) for t in inputs[:3])
    k, v = (repeat_heads(build, t, form.group) for t in (k, v))
    product = build.call(aten.matmul.default, q, build.call(aten.transpose.int, k, 2, 3))
    emitter = Emitter(build, space)
    scores = _scores(build, form, product, emitter)
    p = _probabilities(build, form, scores, emitter)
    if probability is not None:
        emitter.know(A, p)
        p = emitter.tensor(probability, dtype)
    if dropout:
        p = build.call(aten.dropout.default, p, dropout, True)
    if form.weight is not None:
        p = build.call(aten.mul.Tensor, p, emitter.tensor(form.weight))
    out = build.call(aten.matmul.default, p, v)
    kind = dtype_of(inputs[0])
    assert kind is not None
    return cast(build, out, kind)


def _probabilities(build: Builder, form: SoftmaxAttention, scores: Any, emitter: Emitter) -> Any:
    """Softmax of the scores that the guard keeps; the rest is 0."""
    if form.guard != TRUE:
        dropped = build.call(aten.logical_not.default, emitter.truth(form.guard))
        scores = build.call(aten.masked_fill.Scalar, scores, dropped, -math.inf)
    if form.sink is not None:
        return _softmax_with_sink(build, scores, emitter.tensor(form.sink, emitter.space.dtype))
    may_be_empty = _may_empty_rows(form.guard, linear_score(form.score))
    return _softmax(build, scores, may_be_empty=may_be_empty)


def repeat_heads(build: Builder, tensor: Any, group: int) -> Any:
    """[b, hkv, n, d] with every head repeated ``group`` times in a row."""
    if group == 1:
        return tensor
    b, heads, n, d = (size(build, tensor, i) for i in range(4))
    wide = build.call(aten.unsqueeze.default, tensor, 2)
    wide = build.call(aten.expand.default, wide, [b, heads, group, n, d])
    return build.call(aten.reshape.default, wide, [b, build.call(operator.mul, heads, group), n, d])


def _scores(build: Builder, form: SoftmaxAttention, product: Any, emitter: Emitter) -> Any:
    linear = linear_score(form.score)
    if linear is None:
        if not mentions_product(form.score):
            zero = build.call(aten.mul.Scalar, product, 0.0)
            return build.call(aten.add.Tensor, zero, emitter.tensor(form.score))
        known: dict[Expr, Any] = {QK: product}
        return Emitter(build, emitter.space, known).tensor(form.score, emitter.space.dtype)
    scores = product
    if linear.scale != 1.0:
        scores = build.call(aten.mul.Scalar, scores, linear.scale)
    if linear.bias is not None:
        scores = build.call(aten.add.Tensor, scores, emitter.tensor(linear.bias))
    return scores


def _may_empty_rows(guard: Expr, score: LinearScore | None) -> bool:
    """False where every query provably keeps a key, or there is no guard to take keys away."""
    if guard == TRUE:
        return False
    if score is None or score.bias is not None:
        return True  # a term of -inf may drop the keys that the guard keeps
    # At the end of a cache the first queries keep no key where there are more queries than keys.
    return not is_causal(guard)


def _softmax(build: Builder, scores: Any, *, may_be_empty: bool) -> Any:
    if not may_be_empty:
        return build.call(aten.softmax.int, scores, -1)
    top = build.call(aten.amax.default, scores, [-1], True)
    empty = build.call(aten.eq.Scalar, top, -math.inf)
    # Filled before as well as after, so that no NaN arises and gradients stay finite.
    scores = build.call(aten.masked_fill.Scalar, scores, empty, 0.0)
    p = build.call(aten.softmax.int, scores, -1)
    return build.call(aten.masked_fill.Scalar, p, empty, 0.0)


def _softmax_with_sink(build: Builder, scores: Any, sink: Any) -> Any:
    """One more term in the denominator, the exponential of the sink."""
    top = build.call(aten.amax.default, scores, [-1], True)
    top = build.call(aten.maximum.default, top, sink)
    empty = build.call(aten.eq.Scalar, top, -math.inf)
    top = build.call(aten.masked_fill.Scalar, top, empty, 0.0)
    numerator = build.call(aten.exp.default, build.call(aten.sub.Tensor, scores, top))
    total = build.call(aten.sum.dim_IntList, numerator, [-1], True)
    extra = build.call(aten.exp.default, build.call(aten.sub.Tensor, sink, top))
    total = build.call(aten.add.Tensor, total, extra)
    total = build.call(aten.masked_fill.Scalar, total, empty, 1.0)
    return build.call(aten.div.Tensor, numerator, total)
