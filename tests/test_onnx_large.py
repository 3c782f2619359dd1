"""A model of more than 2 GB, which no protobuf message holds: weights beside the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_rewrite as ar

ROWS, WIDTH, HEADS = 560_000, 1024, 4


class Large(nn.Module):
    """Attention on embeddings of 2.3 GB."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 192), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.table(ids)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / 4).softmax(-1) @ v
        return self.out(a.transpose(1, 2).flatten(2))


@pytest.mark.matrix
def test_a_model_above_two_gigabytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Large().eval(), torch.randint(0, ROWS, (2, 40))
    optimized = ar.optimize(model, "window(size=16)", (ids,))
    artifact = ar.export_onnx(optimized, tmp_path / "m.onnx")
    assert artifact.bytes > 2**31
    assert artifact.path.stat().st_size < 2**20
    assert [s.skips for s in artifact.sites] == [True]
    longer = torch.randint(0, ROWS, (1, 75))
    artifact.verify((longer,))
