"""Levels of `torch.vmap` that a rewrite leaves empty, and those that something still needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_rewrite as ar
from attn_rewrite.errors import ToolError
from attn_rewrite.graph import op_name

N, HEADS, WIDTH = 40, 2, 16


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def halved(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score * 0.5, -torch.inf)


class Flex(nn.Module):
    """Flex attention; its mask or its score function is mapped over positions inside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv, self.kind = nn.Linear(WIDTH, 3 * WIDTH), kind
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "score":
            return flex_attention(q, k, v, score_mod=halved)
        mask = create_block_mask(causal, None, None, N, N, device="cpu")
        if self.kind == "lse":
            return flex_attention(q, k, v, block_mask=mask, return_lse=True)
        return flex_attention(q, k, v, block_mask=mask)


class Mapped(nn.Module):
    """Attention under a mask of `torch.vmap`; the mask, or one that it does not read, is given."""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = torch.arange(x.shape[2])

        def keep(i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j < 9)

        mask = torch.vmap(torch.vmap(keep, (None, 0)), (0, None))(n, n)
        scores = (x @ x.mT).masked_fill(~mask, -torch.inf)
        other = torch.vmap(lambda i: i % 3 == 1)(n)
        return scores.softmax(-1) @ x, mask if self.given == "mask" else other


def levels(module: ar.OptimizedModule) -> int:
    return sum(op_name(n) == "_vmap_increment_nesting" for n in module.program.graph.nodes)


def outputs(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["score", "mask", "lse"])
@pytest.mark.parametrize("policy", ["exact", "window(size=8)"])
def test_rewritten_flex_attention_is_saved_and_loaded(
    kind: str, policy: str, tmp_path: Path
) -> None:
    x = torch.randn(2, N, WIDTH)
    done = ar.optimize(Flex(kind).eval(), policy, (x,))
    assert [s.status for s in done.report.sites] == [
        "rewritten" if policy == "exact" else "unbudgeted"
    ]
    assert levels(done) == 0
    ar.save(done, tmp_path / "out")
    loaded = ar.load(tmp_path / "out")
    for mine, wanted in zip(outputs(loaded(x)), outputs(done(x)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    done = ar.optimize(Flex("mask").eval(), "keep", (torch.randn(2, N, WIDTH),))
    with pytest.raises(ToolError, match=r"cannot save (the operator flex_attention|torch\.vmap),"):
        ar.save(done, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["mask", "other"])
def test_levels_that_are_used_stay(given: str, tmp_path: Path) -> None:
    x = torch.randn(2, HEADS, N, WIDTH)
    model = Mapped(given).eval()
    done = ar.optimize(model, "exact", (x,))
    assert [s.status for s in done.report.sites] == ["rewritten"]
    assert levels(done) == (2 if given == "mask" else 1)
    for mine, wanted in zip(done(x), model(x), strict=True):
        torch.testing.assert_close(mine, wanted)
    if torch.__version__ < (2, 12):  # has no record for levels, and says so
        with pytest.raises(
            ToolError, match=r"cannot save torch\.vmap, which the model still calls"
        ):
            ar.save(done, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    ar.save(done, tmp_path / "out")
    loaded = ar.load(tmp_path / "out")
    for mine, again in zip(done(x), loaded(x), strict=True):
        torch.testing.assert_close(again, mine, rtol=0, atol=0)


class Documents(nn.Module):
    """A mask of documents, mapped over batch, queries and keys: it reads ids at positions."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        def keep(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            read = torch.ops.aten.index.Tensor
            return (read(ids, [b, i]) == read(ids, [b, j])) & (j <= i)

        n, b = torch.arange(x.shape[2]), torch.arange(x.shape[0])
        over_keys = torch.vmap(keep, (None, None, 0))
        mask = torch.vmap(torch.vmap(over_keys, (None, 0, None)), (0, None, None))(b, n, n)
        scores = (x @ x.mT).masked_fill(~mask[:, None], -torch.inf)
        return scores.softmax(-1) @ x


@pytest.mark.parametrize("policy", ["exact", "window(left=7, right=0)"])
def test_masks_that_are_mapped_over_data(policy: str, tmp_path: Path) -> None:
    x, ids = torch.randn(2, HEADS, N, WIDTH), torch.arange(N).div(12).long().expand(2, -1).clone()
    model = Documents().eval()
    done = ar.optimize(model, policy, (x, ids))
    (site,) = done.report.sites
    assert site.status == ("rewritten" if policy == "exact" else "unbudgeted")
    n = torch.arange(N)
    keep = (ids[:, :, None] == ids[:, None]) & (n <= n[:, None])
    if policy != "exact":
        keep &= n[:, None] - n < 8
    wide = x.double()
    scores = (wide @ wide.mT).masked_fill(~keep[:, None], -torch.inf)
    torch.testing.assert_close(
        done(x, ids).double(), scores.softmax(-1) @ wide, rtol=1e-5, atol=1e-5
    )
