"""Sending rows of any size to PyTorch's fused kernel, and seeing which ones ran."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from attn_rewrite.backends.torch import fused, pieces


def fused_rows(monkeypatch: pytest.MonkeyPatch) -> list[fused.Unit]:
    """The units that run from here on, also of rows that are too short to pay."""
    ran: list[fused.Unit] = []
    pieces.plan_of.cache_clear()
    original = fused.FusedKernel.run

    def spy(self: Any, unit: fused.Unit, *results: Tensor | None) -> None:
        ran.append(unit)
        original(self, unit, *results)

    monkeypatch.setattr(fused.FusedKernel, "run", spy)
    monkeypatch.setattr(fused, "WORTH_ROW", 0)
    return ran
