"""Dense softmax attention written out by hand, and attentions to check kernels with.

Nothing here is shared with the code under test but the notation of cascades: every case gives its
mask and its scores twice, as expressions and as plain tensor functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import KV, TRUE, B, Expr, Extent, H, Q, Read, call, eq
from attn_rewrite.cascade.ir import TensorDecl

Inputs = Mapping[str, Tensor]
Mask = Callable[[Tensor, Tensor, Inputs], Tensor]
Score = Callable[[Tensor, Tensor, Tensor, Inputs], Tensor]
NQ, NKV = Extent("q"), Extent("kv")


@dataclass(frozen=True)
class Case:
    """An attention as expressions (`form`) and as functions of positions [q, 1] and [1, kv]."""

    guard: Expr = TRUE
    mask: Mask | None = None
    score: Expr = field(default=QK * 0.25)
    scores: Score | None = None  # of the scaled product
    weight: Expr | None = None
    weights: Mask | None = None
    sink: bool = False
    reads: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    skipping: str = "none"

    def form(self, group: int) -> SoftmaxAttention:
        """The attention with ``group`` query heads per key head."""
        decls = [TensorDecl(n, r, dtype=d) for n, r, d in self.reads]
        decls += [TensorDecl("logit", ("h",))] if self.sink else []
        sink = Read("logit", (H,)) if self.sink else None
        return SoftmaxAttention(self.score, self.guard, self.weight, sink, group, tuple(decls))


def _window(size: int) -> Mask:
    return lambda q, k, x: (q - k >= 0) & (q - k < size)


def _positions(x: Inputs) -> int:
    return x["K"].shape[2] - x["Q"].shape[2]


CASES: dict[str, Case] = {
    "dense": Case(),
    "causal": Case(Q - KV >= 0, lambda q, k, x: q >= k, skipping="bounds"),
    "cached": Case(
        KV <= Q + NKV - NQ, lambda q, k, x: k <= q + _positions(x), skipping="bounds"
    ),
    "window": Case((Q - KV >= 0) & (Q - KV < 20), _window(20), skipping="bounds"),
    "symmetric": Case(
        call("abs", Q - KV) <= 9, lambda q, k, x: (q - k).abs() <= 9, skipping="bounds"
    ),
    "sinks": Case(
        (Q - KV >= 0) & ((Q - KV < 18) | (KV < 5)),
        lambda q, k, x: (q >= k) & ((q - k < 18) | (k < 5)),
        skipping="bounds",
    ),
    "chunks": Case(
        eq(Q // 24, KV // 24), lambda q, k, x: q // 24 == k // 24, skipping="bounds"
    ),
    "neighbourhood": Case(
        (call("clip", Q - 5, 0, NKV - 11) <= KV) & (call("clip", Q - 5, 0, NKV - 11) + 11 > KV),
        lambda q, k, x: (k >= (q - 5).clamp(0, x["K"].shape[2] - 11))
        & (k < (q - 5).clamp(0, x["K"].shape[2] - 11) + 11),
        skipping="bounds",
    ),
    "late": Case(Q - KV >= 7, lambda q, k, x: q - k >= 7, skipping="bounds"),  # empty rows
    "lengths": Case(
        (Read("lens", (B,)) > KV) & (KV <= Q),
        lambda q, k, x: (k < x["lens"][:, None, None, None]) & (k <= q),
        reads=(("lens", ("b",), "i32"),), skipping="bounds",
    ),
    "documents": Case(
        (KV <= Q) & eq(Read("doc", (B, Q)), Read("doc", (B, KV))),
        lambda q, k, x: (k <= q) & (x["doc"][:, None, :, None] == x["doc"][:, None, None]),
        reads=(("doc", ("b", "q"), "i32"),), skipping="bounds",
    ),
    "dilated": Case(
        (Q - KV >= 0) & eq((Q - KV) % 3, 0),
        lambda q, k, x: (q >= k) & ((q - k) % 3 == 0),
    ),
    "dilated ahead": Case(
        eq((Q - KV) // 8 % 2, 0), lambda q, k, x: torch.div(q - k, 8, rounding_mode="floor") % 2 == 0,
        skipping="lists",
    ),
    "per head": Case(
        (Q - KV >= 0) & (Q - KV < H * 12 + 3),
        lambda q, k, x: (q >= k) & (q - k < _heads(x) * 12 + 3), skipping="lists",
    ),
    "blocks": Case(
        Read("keep", (H, Q // 16, KV // 16)),
        lambda q, k, x: x["keep"][:, q[:, 0] // 16][:, :, k[0] // 16][None],
        reads=(("keep", ("h", "q", "kv"), "bool"),), skipping="lists",
    ),
    "soft cap": Case(
        score=call("tanh", QK * (0.25 / 5.0)) * 5.0,
        scores=lambda s, q, k, x: 5.0 * torch.tanh(s / 5.0),
    ),
    "bias": Case(
        Q - KV >= 0, lambda q, k, x: q >= k,
        score=QK * 0.25 + Read("bias", (B, H, Q, KV)),
        scores=lambda s, q, k, x: s + x["bias"],
        reads=(("bias", ("b", "h", "q", "kv"), "float"),), skipping="bounds",
    ),
    "alibi": Case(
        score=QK * 0.25 - Read("slope", (H,)) * call("abs", Q - KV),
        scores=lambda s, q, k, x: s - x["slope"][:, None, None] * (q - k).abs(),
        reads=(("slope", ("h",), "float"),),
    ),
    "factor": Case(
        Q - KV >= 0, lambda q, k, x: q >= k,
        weight=Read("toeplitz", (H, Q - KV + NKV)),
        weights=lambda q, k, x: x["toeplitz"][:, q - k + x["K"].shape[2]],
        reads=(("toeplitz", ("h", "r"), "float"),), skipping="bounds",
    ),
    "sink logit": Case(
        (Q - KV >= 0) & (Q - KV < 20), _window(20), sink=True, skipping="bounds"
    ),
}  # fmt: skip


def _heads(x: Inputs) -> Tensor:
    return torch.arange(x["Q"].shape[1])[:, None, None]


def inputs_for(
    case: Case, sizes: Mapping[str, int], dtype: torch.dtype, seed: int, spread: float = 1.0
) -> dict[str, Tensor]:
    """Random operands; ``spread`` multiplies Q, so that scores grow with it."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    b, h, group, q, kv = (sizes[n] for n in ("b", "h", "group", "q", "kv"))
    # Positions before heads, as projections give them: strided operands without a copy.
    found = {
        "Q": (normal(b, q, h, sizes["d"]) * spread).transpose(1, 2),
        "K": normal(b, kv, h // group, sizes["d"]).transpose(1, 2),
        "V": normal(b, h // group, kv, sizes["f"]),
    }
    found = {n: t.to(dtype) for n, t in found.items()}
    others = {
        "lens": lambda: torch.randint(0, kv + 1, (b,), generator=make, dtype=torch.int32),
        "doc": lambda: torch.randint(0, 3, (b, max(q, kv)), generator=make, dtype=torch.int32),
        "keep": lambda: torch.rand(h, -(-q // 16), -(-kv // 16), generator=make) < 0.5,
        "bias": lambda: normal(b, 1, q, kv),
        "slope": lambda: torch.rand(h, generator=make),
        "toeplitz": lambda: normal(h, q + kv),
        "logit": lambda: normal(h),
    }
    names = [n for n, _, _ in case.reads] + (["logit"] if case.sink else [])
    return found | {n: others[n]() for n in names}


def reference(case: Case, x: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """AV [b, h, q, f] and LSE [b, h, q], every operation in ``dtype``, rows without keys 0."""
    group = x["Q"].shape[1] // x["K"].shape[1]
    q, k, v = (x[n].to(dtype) for n in "QKV")
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    x = {n: t.to(dtype) if t.is_floating_point() else t for n, t in x.items()}
    at_q, at_k = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    s = (q @ k.mT) * 0.25
    if case.scores is not None:
        s = case.scores(s, at_q, at_k, x)
    if case.mask is not None:
        s = s.masked_fill(~case.mask(at_q, at_k, x), -math.inf)
    terms = (
        s
        if not case.sink
        else torch.cat([s, x["logit"].view(-1, 1, 1).expand(*s.shape[:3], 1)], -1)
    )
    lse = terms.logsumexp(-1)
    p = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    if case.weights is not None:
        p = p * case.weights(at_q, at_k, x)
    return p @ v, lse


def bound(exact: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """max(2 x the error of a plain evaluation in the same type, 4 eps x max|reference|)."""
    finite = exact.isfinite() & plain.isfinite()
    error = (plain.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    top = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    return max(2 * error, 4 * torch.finfo(dtype).eps * top)
