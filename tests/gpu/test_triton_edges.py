"""The edge cases of the interpreter, compiled and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.interpreted import edges

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU"),
]


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(edges, "DEVICE", "cuda")


globals().update({n: f for n, f in vars(edges).items() if n.startswith("test_")})
