"""Made-up inputs of diffusers models: noisy latents, a time step and what conditions them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from attn_rewrite.checkpoints.recipe import Recipe


def diffusers_inputs(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Arguments by name: latents in the layout of the class, time steps [B], text [B, L, D]."""
    names = recipe.parameters
    main = next((n for n in ("hidden_states", "sample") if n in names), None)
    if main is not None:
        yield main, _latents(recipe)
    if "timestep" in names:
        yield "timestep", recipe.below(1000, recipe.batch).to(_timestep_dtype(recipe))
    yield from _conditions(recipe)
    yield from _position_ids(recipe)
    if _video_sequence(recipe):
        frames, side = _video_grid(recipe)
        yield from (("num_frames", frames), ("height", side), ("width", side))


def _flux(recipe: Recipe) -> bool:
    """Whether latents come as a sequence [B, S, C] with position ids and a floating timestep."""
    return "img_ids" in recipe.parameters


def _video_sequence(recipe: Recipe) -> bool:
    """Whether latents come as a sequence [B, F * H * W, C] with their grid as numbers (LTX)."""
    return {"num_frames", "height", "width"} <= recipe.parameters.keys()


def _video_grid(recipe: Recipe) -> tuple[int, int]:
    """Frames and side of a grid of about ``length`` positions."""
    return 2, max(1, math.isqrt(recipe.length // 2))


def _timestep_dtype(recipe: Recipe) -> torch.dtype:
    return recipe.dtype if _flux(recipe) else torch.long


def _latents(recipe: Recipe) -> torch.Tensor:
    channels = int(recipe.setting("in_channels", default=4))
    if _flux(recipe):
        return recipe.floats(recipe.batch, recipe.length, channels)
    if _video_sequence(recipe):
        frames, side = _video_grid(recipe)
        return recipe.floats(recipe.batch, frames * side * side, channels)
    size = recipe.setting("sample_size", default=None)
    height, width = size if isinstance(size, list | tuple) else (size or 32, size or 32)
    height = int(recipe.setting("sample_height", default=height))
    width = int(recipe.setting("sample_width", default=width))
    patch = recipe.setting("patch_size")
    clip = recipe.setting("sample_frames", "num_frames")
    if isinstance(patch, list | tuple) and len(patch) == 3:  # [B, C, F, H, W], Wan and its kin
        return recipe.floats(recipe.batch, channels, 4 * int(patch[0]), height, width)
    if clip is not None:  # [B, F, C, H, W], CogVideoX
        ratio = int(recipe.setting("temporal_compression_ratio", default=1))
        count = (int(clip) - 1) // ratio + 1
        return recipe.floats(recipe.batch, count, channels, height, width)
    return recipe.floats(recipe.batch, channels, height, width)


def _conditions(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    names = recipe.parameters
    classes = recipe.setting("num_embeds_ada_norm", "num_class_embeds")
    if "class_labels" in names and classes is not None:
        yield "class_labels", recipe.below(int(classes), recipe.batch)
    width = recipe.setting(
        "joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim",
        "cross_attention_dim", "cap_feat_dim",
    )  # fmt: skip
    if "encoder_hidden_states" in names and isinstance(width, int):
        length = int(recipe.setting("max_text_seq_length", default=_text_length(recipe)))
        yield "encoder_hidden_states", recipe.floats(recipe.batch, length, width)
        mask = names.get("encoder_attention_mask")
        if mask is not None and mask.default is mask.empty:
            yield "encoder_attention_mask", torch.ones(recipe.batch, length, dtype=torch.bool)
    pooled = recipe.setting("pooled_projection_dim")
    if "pooled_projections" in names and pooled is not None:
        yield "pooled_projections", recipe.floats(recipe.batch, int(pooled))
    if "added_cond_kwargs" in names and recipe.setting("caption_channels") is not None:
        yield "added_cond_kwargs", {"resolution": None, "aspect_ratio": None}
    if "guidance" in names and recipe.setting("guidance_embeds"):
        yield "guidance", recipe.floats(recipe.batch)


def _text_length(recipe: Recipe) -> int:
    return max(1, recipe.length // 2)


def _position_ids(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Flux: [S, 3] ids of the image rows and columns, [T, 3] zeros for the text."""
    if _flux(recipe):
        columns = max(1, math.isqrt(recipe.length))
        index = torch.arange(recipe.length)
        ids = torch.stack([torch.zeros_like(index), index // columns, index % columns], dim=1)
        yield "img_ids", ids.to(recipe.dtype)
        yield "txt_ids", torch.zeros(_text_length(recipe), 3, dtype=recipe.dtype)
