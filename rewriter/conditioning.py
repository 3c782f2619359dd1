"""How far rounded scores may move the output of an attention: its condition, from float64 values.

One low-precision evaluation shows the roundings that it happened to make.  Where scores reach the
hundreds, a softmax is decided by few keys, an error of a score is many units in the last place of a
probability, and two correct evaluations that add in another order differ by more than either of
them is off.  So the effect is computed instead of sampled: each score may be off by what a working
precision of u leaves of it, and the output moves by the sum of what each key then gains or loses.

A product of d terms is off by about u sqrt(d) sum |q k| (Higham and Mary 2019, "A new approach to
probabilistic rounding error analysis", theorem 3.1), the exponential of x by u (|x| + 2) of itself:
its argument is rounded before it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_rewrite.cascade.attention import POINT
from attn_rewrite.cascade.expr import Read
from attn_rewrite.cascade.ir import Cascade, Einsum, TensorDecl
from attn_rewrite.cascade.reordered import as_reordered, in_order
from attn_rewrite.cascade.staged import StagedAttention, as_staged
from attn_rewrite.chunked import LIMIT_BYTES, gathered, of_rows, sliced, unstaged
from attn_rewrite.rounding import sink_of, value_of, value_with, values_of_codes

_ROW = ("b", "h", "q")
_POINT = (*_ROW, "kv")


def score_rounding(
    cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES
) -> float | None:
    """The largest change of AV that rounding the scores may make, to first order.

    Rounding is that of float32, or of float64 for such inputs.  It reads the cascade and the
    inputs, never the output of a kernel, so a kernel's bug does not change it.  A map that rounds
    probabilities moves by a step where, and only where, a probability is that close to a tie.
    None for what is no softmax attention, or maps with a statistic of all probabilities.
    """
    found = as_reordered(cascade)
    if found is not None:
        return score_rounding(found.inner, gathered(found, inputs), limit)
    staged = as_staged(cascade)
    if staged is None or staged.peak is not None:
        return None
    dtype = inputs["Q"].dtype
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    cascade, inputs = unstaged(cascade, inputs)
    inputs = values_of_codes(staged, inputs, dtype)

    def evaluate(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return _moved(_probabilities(part, held, staged, unit))

    # Slices of queries and batch entries: whole rows of keys.
    moved = sliced(cascade, inputs, ("b", "q"), limit, evaluate)
    return float(moved.amax()) if moved.numel() else 0.0


def lse_rounding(cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES) -> float:
    """The largest change of a log-sum-exp that rounding the scores may make, for a cascade that has
    one: each key adds its probability times how far it may be off."""
    staged = as_staged(in_order(cascade))
    assert staged is not None
    dtype = inputs["Q"].dtype
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2

    def evaluate(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        rows = _probabilities(part, held, staged, unit)
        moved = (rows.shares * rows.change.expm1()).sum(-1)
        return moved if rows.rest is None else moved + rows.rest[..., 0]

    def each(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return sliced(part, values_of_codes(staged, held, dtype), ("b", "q"), limit, evaluate)

    moved = of_rows(cascade, inputs, each)
    return float(moved.amax()) if moved.numel() else 0.0


@dataclass(frozen=True, eq=False)
class _Rows:
    """Exponentials [b, h, q, kv] below the row maximum, their sums, and how far each may be off.

    ``change`` is relative; ``rest`` is the share of a sink and how far that is off.
    """

    cascade: Cascade
    inputs: Mapping[str, Tensor]
    staged: StagedAttention
    exponentials: Tensor
    sums: Tensor
    change: Tensor
    weight: Tensor | None
    rest: Tensor | None

    @property
    def shares(self) -> Tensor:
        """Probabilities; 0 in a row without keys."""
        return torch.where(self.sums > 0, self.exponentials / self.sums, 0)

    @property
    def values(self) -> Tensor:
        """What they multiply, one for each query head."""
        return self.inputs[self.staged.v].double().repeat_interleave(self.staged.form.group, 1)


def _probabilities(
    cascade: Cascade, inputs: Mapping[str, Tensor], staged: StagedAttention, unit: float
) -> _Rows:
    q, k = (inputs[n].double() for n in (staged.q, staged.k))
    k = k.repeat_interleave(staged.form.group, 1)
    product = q @ k.mT
    off = unit * q.shape[-1] ** 0.5 * (q.abs() @ k.abs().mT)
    einsum = cascade.producer("S")
    assert einsum is not None
    scores, more, less = (
        value_of(cascade, inputs, p, einsum) for p in (product, product + off, product - off)
    )
    top = scores.amax(-1, keepdim=True)
    sink = sink_of(cascade, inputs, product)
    if sink is not None:
        top = torch.maximum(top, sink[..., None])
    top = top.masked_fill(top == -torch.inf, 0)
    exponentials = (scores - top).exp()
    sums, rest = exponentials.sum(-1, keepdim=True), None
    if sink is not None:
        share = (sink[..., None] - top).exp()
        sums = sums + share
        rest = share / sums * unit * ((sink[..., None] - top).abs() + 2)
    change = torch.maximum((more - scores).abs(), (less - scores).abs())
    change = change + unit * (scores.abs() + (scores - top).abs() + 2)
    change = change.masked_fill(exponentials == 0, 0)
    factor, weight = staged.form.weight, None
    if factor is not None and cascade.producer("AV") is not None:
        weight = value_of(cascade, inputs, product, Einsum(Read("S", POINT), factor))
    return _Rows(cascade, inputs, staged, exponentials, sums, change, weight, rest)


def _moved(rows: _Rows) -> Tensor:
    """What each output [b, h, q, f] may move by."""
    if rows.staged.probability is not None:
        return _mapped(rows)
    p, v = rows.shares, rows.values
    share = p * rows.change.expm1()
    output = (p if rows.weight is None else p * rows.weight) @ v
    columns = [
        (share * _gain(rows.weight, v[..., f], output[..., f])).sum(-1) for f in range(v.shape[-1])
    ]
    moved = torch.stack(columns, -1)
    return moved if rows.rest is None else moved + rows.rest * output.abs()


def _gain(weight: Tensor | None, value: Tensor, output: Tensor) -> Tensor:
    """|v - o| for every query and key: what one unit more of a probability adds."""
    column = value[..., None, :] if weight is None else value[..., None, :] * weight
    return (column - output[..., None]).abs()


def _mapped(rows: _Rows) -> Tensor:
    """The same for mapped probabilities: the map at both ends of where each of them may be."""
    share = (rows.shares * rows.change).sum(-1, keepdim=True)
    share = share if rows.rest is None else share + rows.rest
    # A probability takes its own part of the sum with it: one of 1 stays 1.
    apart = rows.change * (1 - 2 * rows.shares) + share
    made, last = rows.cascade.producer("PI"), rows.cascade.producer("AV")
    assert made is not None
    assert last is not None

    def mapped(sign: int) -> Tensor:
        given = {
            TensorDecl("SN", _POINT): rows.exponentials * (sign * rows.change).exp(),
            TensorDecl("A", _POINT): rows.shares * (sign * apart).exp(),
        }
        found = value_with(rows.cascade, rows.inputs, given, made).double()
        found = found.expand(rows.exponentials.shape)
        return found if rows.weight is None else found * rows.weight

    def output(product: Tensor) -> Tensor:
        given = {TensorDecl("PV", (*_ROW, "f")): product, TensorDecl("SD", _ROW): rows.sums[..., 0]}
        return value_with(rows.cascade, rows.inputs, given, last).double()

    middle, high, low = mapped(0), mapped(1), mapped(-1)
    steps = torch.maximum((high - middle).abs(), (low - middle).abs())
    product = middle @ rows.values
    whole = output(product)
    moved = (output(product + steps @ rows.values.abs()) - whole).abs()
    return moved if rows.staged.normalised else moved + share * whole.abs()
