"""`flex_attention` that stays what it is, with its log-sum-exp or without, as ONNX."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.flex import without_flex

HEADS, KEY_HEADS, D, F, SINK = 4, 2, 8, 5, 3


@pytest.fixture(scope="module", autouse=True)
def translations_read_once() -> Iterator[None]:
    import onnxscript._framework_apis.torch_2_5 as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


SIZES = ((HEADS, D), (KEY_HEADS, D), (KEY_HEADS, F))


def heads(x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values [b, h, n, d] side by side in ``x`` [b, n, width]."""
    parts = x.split([math.prod(size) for size in SIZES], -1)
    return [p.unflatten(-1, s).transpose(1, 2) for p, s in zip(parts, SIZES, strict=True)]


class Flex(torch.nn.Module):
    """A penalty per head that is a buffer; keys before the query but the first few: row 0 to
    ``SINK`` are empty.  ``statistic`` says whether the log-sum-exp is returned."""

    def __init__(self, statistic: bool) -> None:
        super().__init__()
        self.statistic = statistic
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        slopes, n = self.slopes, x.shape[1]
        q, k, v = heads(x)
        mask = create_block_mask(
            lambda _b, _h, q, kv: (q > kv) & (kv >= SINK), None, None, n, n, device="cpu"
        )
        return flex_attention(
            q, k, v, score_mod=lambda s, _b, h, q, kv: s - slopes[h] * (q - kv),
            block_mask=mask, enable_gqa=True, return_lse=self.statistic,
        )  # fmt: skip


def given(length: int, batch: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, sum(map(math.prod, SIZES)), generator=random)


def reference(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = (part.double().numpy() for part in heads(x))
    k, v = (np.repeat(x, HEADS // KEY_HEADS, 1) for x in (k, v))
    at = np.arange(q.shape[2])
    distance = at[:, None] - at
    slopes = np.array([0.5, 0.25, 0.125, 0.0625]).reshape(4, 1, 1)
    score = q @ k.swapaxes(-1, -2) / np.sqrt(D) - slopes * distance
    weights = np.where((distance > 0) & (at >= SINK), np.exp(score), 0)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights / np.where(total == 0, 1, total) @ v, np.log(total)[..., 0]


def test_a_log_sum_exp_that_is_used_leaves_with_its_attention(tmp_path: Path) -> None:
    done = ar.optimize(Flex(True).eval(), "keep", (given(150),))
    assert [s.status for s in done.report.sites] == ["kept"]
    artifact = export_onnx(done, tmp_path / "m.onnx")
    assert max(artifact.errors.values()) < 1e-5
    # torch's lists of blocks want more than one.
    for length, batch in ((150, 1), (131, 3), (260, 2)):
        x = given(length, batch)
        out, statistic = reference(x)
        assert np.isneginf(statistic[..., : SINK + 1]).all()
        found = artifact.run({"x": x.numpy()})
        np.testing.assert_allclose(found["output_0"], out, atol=3e-6)
        np.testing.assert_allclose(found["output_1"], statistic, rtol=1e-5, atol=3e-6)


def test_kept_flex_attention_leaves(tmp_path: Path) -> None:
    done = ar.optimize(Flex(False).eval(), "keep", (given(40),), dynamic_shapes={})
    assert [s.status for s in done.report.sites] == ["kept"]
    artifact = export_onnx(done, tmp_path / "m.onnx")
    x = given(40)
    np.testing.assert_allclose(artifact.run({"x": x.numpy()})["output"], reference(x)[0], atol=3e-6)


def test_a_program_without_the_operator_is_the_same_object() -> None:
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.ones(2, 3),))
    assert without_flex(program) is program
