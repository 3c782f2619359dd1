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

import torch
from torch import Tensor

from attn_rewrite.cascade.attention import POINT
from attn_rewrite.cascade.expr import Read
from attn_rewrite.cascade.ir import Cascade, Einsum
from attn_rewrite.cascade.reordered import as_reordered
from attn_rewrite.cascade.staged import StagedAttention, as_staged
from attn_rewrite.chunked import LIMIT_BYTES, gathered, sliced, unstaged
from attn_rewrite.rounding import factor_of, sink_of, value_of, values_of_codes


def score_rounding(
    cascade: Cascade, inputs: Mapping[str, Tensor], limit: int = LIMIT_BYTES
) -> float | None:
    """The largest change of AV that rounding the scores may make, to first order.

    Rounding is that of float32, or of float64 for such inputs.  It reads the cascade and the
    inputs, never the output of a kernel, so a kernel's bug does not change it.  None for what is no
    softmax attention, and for mapped probabilities, whose rounding is not continuous.
    """
    found = as_reordered(cascade)
    if found is not None:
        return score_rounding(found.inner, gathered(found, inputs), limit)
    staged = as_staged(cascade)
    if staged is None or staged.probability is not None:
        return None
    dtype = inputs["Q"].dtype
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    cascade, inputs = unstaged(cascade, inputs)
    inputs = values_of_codes(staged, inputs, dtype)

    def evaluate(part: Cascade, held: Mapping[str, Tensor]) -> Tensor:
        return _moved(part, held, staged, unit)

    # Slices of queries and batch entries: whole rows of keys.
    moved = sliced(cascade, inputs, ("b", "q"), limit, evaluate)
    return float(moved.amax()) if moved.numel() else 0.0


def _moved(
    cascade: Cascade, inputs: Mapping[str, Tensor], staged: StagedAttention, unit: float
) -> Tensor:
    """What each output [b, h, q, f] may move by."""
    q, k, v = (inputs[n].double() for n in (staged.q, staged.k, staged.v))
    if staged.form.group > 1:
        k, v = (x.repeat_interleave(staged.form.group, 1) for x in (k, v))
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
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink[..., None] - top).exp()
    p = torch.where(total > 0, p / total, 0)
    change = torch.maximum((more - scores).abs(), (less - scores).abs())
    change = change + unit * (scores.abs() + (scores - top).abs() + 2)
    share = p * change.masked_fill(p == 0, 0).expm1()
    factor = factor_of(cascade)
    weight = None
    if factor is not None:
        weight = value_of(cascade, inputs, product, Einsum(Read("S", POINT), factor))
    output = (p if weight is None else p * weight) @ v
    moved = torch.stack(
        [
            (share * _gain(weight, v[..., f], output[..., f])).sum(-1) for f in range(v.shape[-1])
        ],
        -1,
    )  # fmt: skip
    if sink is not None:
        rest = unit * ((sink[..., None] - top).abs() + 2) * (1 - p.sum(-1, keepdim=True))
        moved = moved + rest * output.abs()
    return moved


def _gain(weight: Tensor | None, value: Tensor, output: Tensor) -> Tensor:
    """|v - o| for every query and key: what one unit more of a probability adds."""
    column = value[..., None, :] if weight is None else value[..., None, :] * weight
    return (column - output[..., None]).abs()
