"""A sparse pattern of your own: one class with options and one expression, and nothing else.

    python examples/add_a_pattern.py

The mask is an expression over positions, not a tensor: which tiles are empty, which kernel runs,
what it costs and how far off it is all follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn

import attn_rewrite as ar
from attn_rewrite.cascade.expr import KV, Expr, Q, eq
from attn_rewrite.passes.transform import Option, SparsePattern


@dataclass(frozen=True)
class Blocks(SparsePattern):
    """Each query sees the keys of its own block of positions."""

    name: ClassVar[str] = "blocks"
    size: Annotated[int, Option("positions per block", minimum=1)] = 128

    def mask(self, site: ar.Site) -> Expr:
        """Same block, counted from the first position."""
        return eq(Q // self.size, KV // self.size)


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def main() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    policy = ar.Policy([ar.Rule(apply=Blocks(size=128))])
    rewritten = ar.optimize(Attention(), policy, (q, k, v))
    (site,) = rewritten.report.sites
    assert site.cost_after is not None
    print(f"{site.steps[0]}: kernel {site.kernel}, tiles {site.cost_after.tiles}")

    # Four independent attentions of 128 positions each are the same thing.
    parts = [t.unflatten(2, (4, 128)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    expected = Attention()(*parts).unflatten(0, (1, 4)).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(rewritten(q, k, v), expected)
    executed, total = site.cost_after.tiles
    assert 4 * executed == total, "only the blocks on the diagonal are computed"


if __name__ == "__main__":
    main()
