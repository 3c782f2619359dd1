"""Attention that returns the log-sum-exp of its scores beside its output, as ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import attn_rewrite as ar
from attn_rewrite import export_onnx


class Spelled(torch.nn.Module):
    """Softmax and log-sum-exp of the same masked scores."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = q.shape[2]
        score = (q @ k.mT * 8**-0.5).masked_fill(~torch.ones(n, n).bool().tril(), -torch.inf)
        return score.softmax(-1) @ v, score.logsumexp(-1)


class Fused(torch.nn.Module):
    """torch's operator that returns both."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, 0.0, True)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    score = np.float64(q) @ np.float64(k).swapaxes(-1, -2) / np.sqrt(8)
    score = np.where(np.tri(q.shape[2], dtype=bool), score, -np.inf)
    top = score.max(-1, keepdims=True)
    total = np.exp(score - top).sum(-1, keepdims=True)
    return {"output_0": np.exp(score - top) / total @ v, "output_1": (top + np.log(total))[..., 0]}


@pytest.mark.parametrize("model", [Spelled(), Fused()], ids=["spelled", "fused"])
def test_the_log_sum_exp_leaves_beside_the_output(model: torch.nn.Module, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(2, 3, 37, 8, generator=random) for _ in range(3))
    artifact = export_onnx(
        ar.optimize(model.eval(), "exact", given, dynamic_shapes={}), tmp_path / "m.onnx"
    )
    arrays = [t.numpy() * scale for t, scale in zip(given, (1, 30, 1), strict=True)]
    wanted = reference(*arrays)
    bound = {n: 2e-5 * np.abs(a).max() for n, a in wanted.items()}
    artifact.verify(dict(zip("qkv", arrays, strict=True)), wanted, bound=bound)
    if isinstance(model, Spelled):
        assert [(s.operator, s.form) for s in artifact.sites] == [("tiled_attention", "half")]
