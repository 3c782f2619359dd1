"""Find the attention in a module of your own, rewrite it, and read what was measured.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

import attn_rewrite as ar
from attn_rewrite.report import render


class Block(nn.Module):
    """Causal self-attention as many people write it: no fused operator, scores in the open."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


def main() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 384, 64)

    (site,) = ar.find_attention(model, (x,)).sites
    print(f"{site.name or 'the model'}: {site.kind}, causal={site.causal}, {site.hq} heads")
    assert site.causal, "that queries see no later key is proved from the graph"

    exact = ar.optimize(model, "exact", (x,))
    torch.testing.assert_close(exact(x), model(x))

    local = ar.optimize(model, "window(size=64, sinks=4)", (x,))
    render(local.report, Console(width=160))
    (measured,) = local.report.sites
    assert measured.approximation is not None
    assert measured.cost_after is not None
    executed, total = measured.cost_after.tiles
    assert executed < total, "the window skips tiles"

    strict = ar.optimize(model, "window(size=64)", (x,), budget="cosine>=0.999999")
    assert strict.report.sites[0].reverted, "a budget that is not met sends the site back to exact"
    torch.testing.assert_close(strict(x), model(x))


if __name__ == "__main__":
    main()
