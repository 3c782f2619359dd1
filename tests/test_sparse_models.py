"""Sparse patterns on real architectures with random weights: layouts found, errors, tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import attn_rewrite as ar
from attn_rewrite.passes.token_grid import found_layout

Case = tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]


def vit() -> Case:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=64, patch_size=4,
    )  # fmt: skip
    return ViTModel(config), (torch.randn(1, 3, 64, 64),), {}


def swin() -> Case:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=64, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=16
    )
    return SwinModel(config), (torch.randn(1, 3, 64, 64),), {}


def wan() -> Case:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1,
    )  # fmt: skip
    return model, (torch.randn(1, 4, 8, 16, 24), torch.tensor([1]), torch.randn(1, 8, 16)), {}


def cogvideo() -> Case:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=1, sample_width=24, sample_height=16,
        sample_frames=29, patch_size=2, max_text_seq_length=8,
    )  # fmt: skip
    return model, (torch.randn(1, 8, 4, 16, 24), torch.randn(1, 8, 16), torch.tensor([1])), {}


def pixart() -> Case:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=32, sample_size=32, caption_channels=16,
    )  # fmt: skip
    inputs = (torch.randn(1, 4, 32, 48), torch.randn(1, 8, 16), torch.tensor([1]))
    return model, inputs, {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def llama(implementation: str) -> Callable[[], Case]:
    def make() -> Case:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, vocab_size=100, attn_implementation=implementation,
        )  # fmt: skip
        tokens = torch.randint(0, 100, (1, 512))
        return LlamaModel(config), (), {"input_ids": tokens, "use_cache": False}

    return make


CASES: list[tuple[Callable[[], Case], str | None, str]] = [
    (vit, "grid=16x16,text=1", "neighborhood(window=[5, 5])"),
    (swin, "grid=16x16", "clear(radius=4)"),
    (wan, "grid=8x8x12", "gna(window=[3, 4, 4], stride=[1, 2, 2])"),
    (wan, "grid=8x8x12", "tile(references=1)"),
    (cogvideo, "grid=8x8x12,text=8", "gna(window=[2, 4, 6])"),
    (pixart, "grid=16x24", "sta(window=[8, 8], tile=[4, 8])"),
    (llama("sdpa"), None, "s2(block=32, local=2, vertical=4)"),
    (llama("eager"), None, "chunked(size=64)"),
    (llama("eager"), None, "longlora(size=128, sinks=4)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "layout", "policy"), CASES)
def test_patterns_on_models(make: Callable[[], Case], layout: str | None, policy: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = make()
    model.eval()
    rule = ar.Rule(where=ar.Where(kind=("self", "joint")), apply=policy)
    rewritten = ar.optimize(model, ar.Policy([rule]), args, kwargs)
    site = next(s for s in rewritten.sites if s.kind in ("self", "joint"))
    found = found_layout(site)
    assert layout is None or str(found) == layout
    measured = next(s for s in rewritten.report.sites if s.name == site.name)
    assert measured.approximation is not None, measured.refusals
    assert measured.cost_after is not None
    executed, total = measured.cost_after.tiles
    assert 0 < executed < total
    with torch.no_grad():
        before, after = model(*args, **kwargs)[0], rewritten(*args, **kwargs)[0]
    assert before.shape == after.shape
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


class Tokens(nn.Module):
    """Attention over tokens of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_a_layout_holds_at_its_own_length_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 64, 16)
    dynamic = {"x": {1: torch.export.Dim("n", max=512)}}
    policy = "neighborhood(window=[3, 3], layout='grid=8x8')"
    free = ar.optimize(model, policy, (x,), dynamic_shapes=dynamic)
    (note,) = [n for n in free.report.notes if "64 keys" in n]
    assert free.sites[0].name in note
    fixed = ar.optimize(model, policy, (x,), dynamic_shapes={})
    assert not any("keys" in n for n in fixed.report.notes)
    with torch.no_grad():
        torch.testing.assert_close(free(x), fixed(x))
        other = torch.randn(2, 80, 16)
        torch.testing.assert_close(free(other), model(other))
        assert not torch.equal(free(x), model(x))
    # A pattern of positions alone is made for every length.
    window = ar.optimize(model, "window(size=8)", (x,), dynamic_shapes=dynamic)
    assert not any("keys" in n for n in window.report.notes)
    with torch.no_grad():
        near = (torch.arange(80)[:, None] - torch.arange(80) <= 4) & (
            torch.arange(80) - torch.arange(80)[:, None] <= 3
        )
        q, k, v = model.project(other).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        torch.testing.assert_close(window(other), want)
