"""Attention whose maps are mixed over heads or added up, in the ways people write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LENGTH = 16, 4, 6


class Heads(nn.Module):
    """Projections to [batch, heads, length, width] with whatever the maps need; a subclass
    attends."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(heads, heads)
        self.other = nn.Linear(heads, heads, bias=False)
        self.conv = nn.Conv2d(heads, heads, 1)
        self.square = nn.Parameter(torch.randn(heads, heads))
        self.gate = nn.Parameter(torch.randn(heads))
        self.lam = nn.Parameter(torch.tensor(0.3))
        self.dynamic = nn.Linear(WIDTH, heads * heads)
        self.register_buffer("distances", torch.randn(1, heads, LENGTH, LENGTH))
        self.register_buffer("padding", torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("a subclass attends")

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / math.sqrt(q.shape[-1])


def over_heads(layer: nn.Module, maps: Tensor) -> Tensor:
    return layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def causal(s: Tensor) -> Tensor:
    q, kv = (torch.arange(n) for n in s.shape[-2:])
    return s.masked_fill(kv[None, :] > q[:, None], -torch.inf)


class LinearBefore(Heads):
    def attend(self, q, k, v, x):
        return over_heads(self.mix, self.scores(q, k)).softmax(-1) @ v


class LinearAfter(Heads):
    def attend(self, q, k, v, x):
        return over_heads(self.mix, self.scores(q, k).softmax(-1)) @ v


class LinearBoth(Heads):
    """CaiT."""

    def attend(self, q, k, v, x):
        s = over_heads(self.mix, (q * 0.5) @ k.mT)
        return over_heads(self.other, s.softmax(-1)) @ v


class ConvBoth(Heads):
    def attend(self, q, k, v, x):
        return self.conv(self.conv(self.scores(q, k)).softmax(-1)) @ v


class EinsumBefore(Heads):
    def attend(self, q, k, v, x):
        s = torch.einsum("bhij,hk->bkij", self.scores(q, k), self.square)
        return s.softmax(-1) @ v


class EinsumAfter(Heads):
    def attend(self, q, k, v, x):
        p = torch.einsum("hk,bhij->bkij", self.square, self.scores(q, k).softmax(-1))
        return torch.einsum("bkij,bkjd->bkid", p, v)


class EinsumBothOtherOrder(Heads):
    """Heads last, the weights on either side."""

    def attend(self, q, k, v, x):
        s = torch.einsum("bhid,bhjd->bijh", q, k) / 2
        s = torch.einsum("gh,bijh->bijg", self.square, s).softmax(2)
        p = torch.einsum("bijg,ge->bije", s, self.square)
        return torch.einsum("bije,bejd->beid", p, v)


class MatmulAfter(Heads):
    def attend(self, q, k, v, x):
        p = self.scores(q, k).softmax(-1)
        p = (p.permute(0, 2, 3, 1) @ self.square).permute(0, 3, 1, 2)
        return p @ v


class MatmulLeft(Heads):
    """The weights on the left of flattened maps."""

    def attend(self, q, k, v, x):
        b, h, n, _ = q.shape
        s = (self.square @ self.scores(q, k).reshape(b, h, n * n)).view(b, h, n, n)
        return s.softmax(-1) @ v


class TensordotAfter(Heads):
    def attend(self, q, k, v, x):
        p = torch.tensordot(self.scores(q, k).softmax(-1), self.square, dims=([1], [0]))
        return p.permute(0, 3, 1, 2) @ v


class SoftmaxedWeights(Heads):
    """The weights are made of parameters by more than a transpose."""

    def attend(self, q, k, v, x):
        return (
            torch.einsum("bhij,hk->bkij", self.scores(q, k).softmax(-1), self.square.softmax(0)) @ v
        )


class DynamicAfter(Heads):
    """Weights of the mixing for every query (composed attention)."""

    def attend(self, q, k, v, x):
        b, n, _ = x.shape
        w = self.dynamic(x).view(b, n, self.heads, self.heads)
        p = torch.einsum("bhij,bihk->bkij", self.scores(q, k).softmax(-1), w)
        return p @ v


class MoreHeads(Heads):
    """Four heads of scores, six of probabilities, two of values."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, HEADS))
        self.down = nn.Parameter(torch.randn(2, 6))

    def attend(self, q, k, v, x):
        s = torch.einsum("ih,bhqk->biqk", self.up, self.scores(q, k)).softmax(-1)
        p = torch.einsum("ji,biqk->bjqk", self.down, s)
        return p @ v.reshape(v.shape[0], 2, LENGTH, -1)


class Masked(Heads):
    """Causal with padding and a bias: the mask after the mixing."""

    def attend(self, q, k, v, x):
        s = over_heads(self.mix, self.scores(q, k)) + self.distances
        s = s.masked_fill(~self.padding[:, None, None, :], -torch.inf)
        return over_heads(self.other, causal(s).softmax(-1)) @ v


class Capped(Heads):
    def attend(self, q, k, v, x):
        s = over_heads(self.mix, 5 * torch.tanh(self.scores(q, k) / 5) + self.distances)
        return causal(s).softmax(-1) @ v


class UpcastDropped(Heads):
    """float32 softmax, a dropout, a mask of the probabilities."""

    def attend(self, q, k, v, x):
        p = causal(self.scores(q, k)).softmax(-1, dtype=torch.float32).to(q.dtype)
        p = F.dropout(over_heads(self.other, p), 0.25, self.training)
        return (p * self.padding[:, None, None, :]) @ v


class GatedSum(Heads):
    """ConViT."""

    def attend(self, q, k, v, x):
        gate = self.gate.view(1, -1, 1, 1).sigmoid()
        p = (1.0 - gate) * self.scores(q, k).softmax(-1) + gate * self.distances.softmax(-1)
        p = p / p.sum(dim=-1).unsqueeze(-1)
        return p @ v


class GatedSumKept(Heads):
    """The same with a row sum that keeps its dimension, by a reciprocal."""

    def attend(self, q, k, v, x):
        gate = self.gate.view(-1, 1, 1).sigmoid()
        p = torch.lerp(self.scores(q, k).softmax(-1), self.distances.softmax(-1), gate)
        return (p * p.sum(-1, keepdim=True).reciprocal()) @ v


class DifferenceOfHalves(Heads):
    def attend(self, q, k, v, x):
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        first, second = (causal(self.scores(*pair)).softmax(-1) for pair in ((q1, k1), (q2, k2)))
        return (first - self.lam * second) @ v


class DifferenceStacked(Heads):
    """Differential attention as published: one softmax over twice the heads."""

    def attend(self, q, k, v, x):
        b, h, n, d = q.shape
        q, k = (t.transpose(1, 2).reshape(b, n, 2 * h, d // 2).transpose(1, 2) for t in (q, k))
        p = causal(self.scores(q, k)).softmax(-1).view(b, h, 2, n, n)
        p = p[:, :, 0] - self.lam.exp() * p[:, :, 1]
        return p @ v


class DifferenceChunked(Heads):
    """One softmax; the second half of the heads is taken from the first."""

    def attend(self, q, k, v, x):
        first, second = self.scores(q, k).softmax(-1).chunk(2, 1)
        v = v.transpose(1, 2).reshape(x.shape[0], -1, 2, 8).transpose(1, 2)
        return (first - self.lam * second) @ v


class DifferenceOfSharedKeys(Heads):
    """Two of the query heads of each key head."""

    def attend(self, q, k, v, x):
        k, v = k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)
        return (self.scores(q, k).softmax(-1) - self.lam * self.scores(k, q).softmax(-1)) @ v


class SumOfThree(Heads):
    def attend(self, q, k, v, x):
        p = self.scores(q, k).softmax(-1) + 0.5 * self.scores(v, k).softmax(-1)
        return (p + self.distances) @ v


class MixedSum(Heads):
    """Talking heads with an identity beside."""

    def attend(self, q, k, v, x):
        p = self.scores(q, k).softmax(-1)
        return (p + over_heads(self.other, p)) @ v


class OneHead(Heads):
    def __init__(self) -> None:
        super().__init__(1)

    def attend(self, q, k, v, x):
        return over_heads(self.mix, self.scores(q, k)).softmax(-1) @ v


class KeySoftmax(Heads):
    def attend(self, q, k, v, x):
        return q @ (k.softmax(2).mT @ v)


class KeySoftmaxScaled(Heads):
    """Scales and a padding mask in every place."""

    def attend(self, q, k, v, x):
        k = (k * 0.5).masked_fill(~self.padding[:, None, :, None], -torch.inf).softmax(2)
        context = (k * 0.7).mT @ (v / LENGTH)
        return (q * 0.25).softmax(-1) @ (context * self.gate.view(1, -1, 1, 1)) * 2


class KeySoftmaxEinsum(Heads):
    def attend(self, q, k, v, x):
        context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=2), v)
        return torch.einsum("bhnd,bhde->bhne", q.softmax(dim=-1) * 0.5, context)


TALKING = (
    LinearBefore, LinearAfter, LinearBoth, ConvBoth, EinsumBefore, EinsumAfter,
    EinsumBothOtherOrder, MatmulAfter, MatmulLeft, TensordotAfter, SoftmaxedWeights, DynamicAfter,
    MoreHeads, Masked, Capped, UpcastDropped, MixedSum, OneHead,
)  # fmt: skip
SUMMED = (
    GatedSum, GatedSumKept, DifferenceOfHalves, DifferenceStacked, DifferenceChunked,
    DifferenceOfSharedKeys, SumOfThree,
)  # fmt: skip
LINEAR = (KeySoftmax, KeySoftmaxScaled, KeySoftmaxEinsum)
