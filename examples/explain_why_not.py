"""What is not attention, and what is but must not be rewritten: both say why.

python examples/explain_why_not.py
"""

from __future__ import annotations

import torch
from torch import nn

import attn_rewrite as ar


class Router(nn.Module):
    """A softmax that is no attention: it weighs experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tde,te->td", x[..., None].expand(-1, -1, 4), x[:, :4].softmax(-1))


class Shown(nn.Module):
    """Attention that also returns its probabilities: without them there is nothing to return."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return probabilities @ v, probabilities


def main() -> None:
    router = ar.find_attention(Router(), (torch.randn(16, 8),))
    assert not router.sites
    for refusal in router.refusals:
        print(f"not attention: {refusal}")
    assert router.refusals, "the softmax was looked at, and there is a reason"

    q, k, v = torch.randn(3, 2, 4, 32, 16)
    shown = ar.find_attention(Shown(), (q, k, v))
    reasons = [*shown.refusals, *(r for site in shown.sites for r in site.refusals)]
    for refusal in reasons:
        print(f"not rewritten: {refusal}")
    assert reasons
    assert all(refusal.source and "explain_why_not.py" in refusal.source for refusal in reasons)

    # A rewrite of such a model changes nothing, and the report says so.
    kept = ar.optimize(Shown(), "window(size=8)", (q, k, v))
    assert all(site.kernel is None for site in kept.report.sites)
    for got, expected in zip(kept(q, k, v), Shown()(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)


if __name__ == "__main__":
    main()
