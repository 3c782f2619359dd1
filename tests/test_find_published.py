"""Attention as published code spells it: axes that only queries have, masks of other products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attn_rewrite as ar

HEADS, WIDTH, TOKENS = 4, 8, 12


class Projected(nn.Module):
    """Linear maps to queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each [b, h, n, d]."""
        return tuple(
            f(x).view(x.shape[0], -1, HEADS, WIDTH).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )


class LatentKeys(Projected):
    """Keys and values are one latent that all heads share; queries are mapped into it head by head
    (DeepSeek-V2, absorbed)."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.rotary = nn.Linear(32, 10), nn.Linear(32, 6)
        self.q_rotary = nn.Linear(32, HEADS * 6)
        self.up_k = nn.Parameter(torch.randn(HEADS, WIDTH, 10))
        self.up_v = nn.Parameter(torch.randn(HEADS, 10, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        latent, rotary = self.latent(x), self.rotary(x)
        q = torch.einsum("bshd,hdc->bshc", self.q(x).view(b, n, HEADS, WIDTH), self.up_k)
        scores = torch.einsum("bshc,btc->bsht", q, latent)
        scores += torch.einsum("bshr,btr->bsht", self.q_rotary(x).view(b, n, HEADS, 6), rotary)
        scores = scores * 14**-0.5 + torch.full((n, n), -math.inf).triu_(1).unsqueeze(1)
        y = torch.einsum("bsht,btc->bshc", scores.softmax(-1), latent)
        return self.out(torch.einsum("bshc,hcd->bshd", y, self.up_v).flatten(2))


class Pooled(nn.Module):
    """Every pixel attends to pooled pixels, one head (non-local networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(32, 8, 1) for _ in range(3))
        self.out, self.pool = nn.Conv2d(8, 32, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).reshape(x.shape[0], 32, 3, 4)
        q = self.q(image).flatten(2).transpose(1, 2)
        k = self.pool(self.k(image)).flatten(2)
        v = self.pool(self.v(image)).flatten(2).transpose(1, 2)
        y = ((q @ k).softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 8, 3, 4)
        return self.out(y)


class Channels(Projected):
    """The largest score less each score: softmax forgets which (dual attention)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x).transpose(1, 2)
        energy = torch.bmm(x, x.transpose(1, 2))
        energy = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
        return self.out(torch.bmm(energy.softmax(-1), x).transpose(1, 2))


class BoundedScores(Projected):
    """A bound keeps the largest score from cancelling (Grounding DINO)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2)
        scores = torch.clamp(scores - scores.amax(-1, keepdim=True), min=-1.5)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Neighbours(Projected):
    """The mask is a comparison of another product (graph transformers)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        edges = (x @ x.transpose(1, 2) > 0).unsqueeze(1)
        scores = q @ k.transpose(-1, -2)
        scores = torch.where(edges, scores, -9e15 * torch.ones_like(scores))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PackedWithPositions(Projected):
    """Heads packed into the batch, terms of rows and columns from the queries (SAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.rows, self.columns = (nn.Parameter(torch.randn(n, n, WIDTH)) for n in (3, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * HEADS, n, WIDTH).unbind(0)
        grid = q.reshape(b * HEADS, 3, 4, WIDTH)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, self.rows)
        columns = torch.einsum("bhwc,wkc->bhwk", grid, self.columns)
        scores = (q @ k.transpose(-2, -1)).view(-1, 3, 4, 3, 4)
        scores = (scores + rows[..., None] + columns[..., None, :]).view(-1, n, n)
        return self.out((scores.softmax(-1) @ v).view(b, HEADS, n, -1).transpose(1, 2).flatten(2))


class NearestOnly(Projected):
    """Every query has keys of its own: the nearest tokens, gathered."""

    def forward(self, x: Tensor) -> Tensor:
        nearest = (x @ x.transpose(1, 2)).topk(2, -1)[1]
        row = torch.arange(x.shape[0])[:, None, None]
        k, v = self.k(x)[row, nearest], self.v(x)[row, nearest]
        p = torch.einsum("bnd,bnkd->bnk", self.q(x), k).softmax(-1)
        return self.out(torch.einsum("bnk,bnkd->bnd", p, v))


class MaskOfBytes(Projected):
    """The mask is made of bytes, and compared twice."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        mask = torch.triu(torch.ones(1, n, n), diagonal=1).type(torch.uint8) == 0
        scores = (q @ k.transpose(-2, -1)).masked_fill(mask.unsqueeze(1) == 0, -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# hq, hkv, q_len (None: as many as tokens), kv_len, d_qk, kind, family, causal; what is dynamic.
EXPECTED = {
    LatentKeys: ((4, 1, None, None, 10, "self", "softmax", True), True),
    Pooled: ((1, 1, 12, 2, 8, "self", "softmax", False), False),
    Channels: ((1, 1, 32, 32, 12, "self", "channel", False), False),
    BoundedScores: ((4, 4, None, None, 8, "self", "softmax", False), True),
    Neighbours: ((4, 4, None, None, 8, "self", "softmax", False), True),
    PackedWithPositions: ((4, 4, 12, 12, 8, "self", "softmax", False), False),
    MaskOfBytes: ((4, 4, None, None, 8, "self", "softmax", True), True),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", EXPECTED, ids=lambda k: k.__name__)
def test_published_spellings(kind: type[nn.Module], dynamic: bool) -> None:
    torch.manual_seed(0)
    (*sizes, width, what, family, causal), lengths_vary = EXPECTED[kind]
    model, x = kind().eval(), torch.randn(2, TOKENS, 32)
    batch = torch.export.Dim("b", min=2, max=8)
    length = torch.export.Dim("n", min=2, max=64)
    shapes = ({0: batch, **({1: length} if lengths_vary else {})},) if dynamic else {}
    done = ar.optimize(model, "exact", (x,), dynamic_shapes=shapes)
    (site,) = done.sites
    assert (site.hq, site.hkv) == tuple(sizes[:2])
    for found, wanted in zip((site.q_len, site.kv_len), sizes[2:], strict=True):
        if wanted is not None or not dynamic:
            assert found == (TOKENS if wanted is None else wanted)
    assert (site.d_qk, site.kind, site.family, site.causal) == (width, what, family, causal)
    wanted = model.double()(x.double())
    own = (model.float()(x).double() - wanted).abs().max()
    error = (done(x).double() - wanted).abs().max()
    assert error <= max(2 * own, 4 * torch.finfo(torch.float32).eps * wanted.abs().max())


def test_a_mask_that_compares_scores_with_their_largest_is_refused() -> None:
    class Close(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2)
            far = scores < scores.amax(-1, keepdim=True) - 1
            return scores.masked_fill(far, -math.inf).softmax(-1) @ v

    torch.manual_seed(0)
    found = ar.find_attention(Close(), tuple(torch.randn(2, 3, 7, 4) for _ in range(3)))
    assert not found.sites
    assert [r.code for r in found.refusals] == ["score-dependent-mask"]


def test_a_row_less_scores_is_shifted_only_along_the_softmax() -> None:
    """The largest of each column is no shift of a row."""

    class Columns(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2)
            return (scores.amax(-2, keepdim=True) - scores).softmax(-1) @ v

    torch.manual_seed(0)
    args = tuple(torch.randn(2, 3, 7, 4) for _ in range(3))
    found = ar.find_attention(Columns(), args)
    assert not found.sites
    assert [r.code for r in found.refusals] == ["score-dependent-mask"]


def test_queries_with_keys_of_their_own_are_a_batch() -> None:
    torch.manual_seed(0)
    model, x = NearestOnly().eval(), torch.randn(2, TOKENS, 32)
    shapes = ({1: torch.export.Dim("n", min=4, max=64)},)
    done = ar.optimize(model, "exact", (x,), dynamic_shapes=shapes)
    (site,) = done.sites
    assert (site.hq, site.q_len, site.kv_len) == (1, 1, 2)
    longer = torch.randn(2, 2 * TOKENS, 32)
    assert (done(longer) - model(longer)).abs().max() <= 1e-5
