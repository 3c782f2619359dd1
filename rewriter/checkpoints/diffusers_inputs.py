"""Made-up inputs of diffusers models: noisy latents, a time step and what conditions them."""

from __future__ import annotations

import inspect
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
    for name in ("timestep", "timesteps", "timestep_r", "r_timestep"):
        if name in names and (name == "timestep" or names[name].default is names[name].empty):
            yield name, recipe.below(1000, recipe.batch).to(_timestep_dtype(recipe))
    yield from _text(recipe)
    yield from _conditions(recipe)
    yield from _crops(recipe)
    yield from _position_ids(recipe)
    if _video_sequence(recipe):
        frames, side = _video_grid(recipe)
        yield from (("num_frames", frames), ("height", side), ("width", side))
    if "img_shapes" in names and not _flux(recipe):
        side = max(1, math.isqrt(recipe.length))
        yield "img_shapes", [[(1, side, side)]] * recipe.batch


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
    embedded = any(n in recipe.parameters for n in ("img_ids", "img_shapes", "timestep_r"))
    return recipe.dtype if embedded else torch.long


def _latents(recipe: Recipe) -> torch.Tensor:
    channels = int(recipe.setting("in_channels", default=4))
    if _flux(recipe):
        return recipe.floats(recipe.batch, recipe.length, channels)
    if "img_shapes" in recipe.parameters:
        return recipe.floats(recipe.batch, math.isqrt(recipe.length) ** 2, channels)
    if _video_sequence(recipe):
        frames, side = _video_grid(recipe)
        return recipe.floats(recipe.batch, frames * side * side, channels)
    if any(word in type(recipe.model).__name__ for word in ("1D", "Audio")):
        return recipe.floats(recipe.batch, channels, 8 * recipe.length)
    size = recipe.setting("sample_size", default=None)
    height, width = size if isinstance(size, list | tuple) else (size or 32, size or 32)
    height = int(recipe.setting("sample_height", default=height))
    width = int(recipe.setting("sample_width", default=width))
    patch = recipe.setting("patch_size")
    clip = recipe.setting("sample_frames", "num_frames")
    ratio = recipe.setting("temporal_compression_ratio")
    if clip is not None and ratio is not None:  # [B, F, C, H, W], CogVideoX
        return recipe.floats(
            recipe.batch, (int(clip) - 1) // int(ratio) + 1, channels, height, width
        )
    video = isinstance(patch, list | tuple) and len(patch) == 3  # [B, C, F, H, W], Wan and its kin
    if video or clip is not None or _names_video(recipe):
        steps = patch[0] if video else recipe.setting("patch_size_t", default=1)
        return recipe.floats(recipe.batch, channels, 4 * int(steps or 1), height, width)
    return recipe.floats(recipe.batch, channels, height, width)


def _names_video(recipe: Recipe) -> bool:
    return any(word in type(recipe.model).__name__ for word in ("3D", "Motion"))


# Names of the text argument, of its width in the configuration, and of its mask.
_TEXTS = (
    (
        "encoder_hidden_states",
        ("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim",
         "cross_attention_input_dim", "cross_attention_dim", "cap_feat_dim", "context_in_dim",
         "in_text_dim", "text_hidden_dim", "encoder_hidden_size", "cond_token_dim",
         "condition_dim"),
        ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask",
         "encoder_mask"),
    ),
    (
        "encoder_hidden_states_t5",
        ("cross_attention_dim_t5", "text_embed_dim_t5"),
        ("text_embedding_mask_t5",),
    ),
    ("encoder_hidden_states_2", ("text_embed_2_dim",), ("encoder_attention_mask_2",)),
)  # fmt: skip


def _text(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Each text [B, L, D] that the model has a width for, and its mask of ones where one is
    needed."""
    names = recipe.parameters
    for name, widths, masks in _TEXTS:
        width = recipe.setting(*widths)
        if name not in names or not isinstance(width, int):
            continue
        own = {"encoder_hidden_states": "text_len", "encoder_hidden_states_t5": "text_len_t5"}
        fixed = recipe.setting("max_text_seq_length", own.get(name, ""))
        length = _text_length(recipe) if fixed is None else int(fixed)
        yield name, recipe.floats(recipe.batch, length, width)
        for mask in masks:
            if mask in names and (mask.startswith("text") or _needed(recipe, mask, width)):
                yield mask, torch.ones(recipe.batch, length, dtype=torch.bool)


def _needed(recipe: Recipe, name: str, width: int) -> bool:
    """Whether an argument has no default, or is a second text's."""
    parameter = recipe.parameters[name]
    return parameter.default is parameter.empty or name.endswith("_2")


def _conditions(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    names = recipe.parameters
    classes = recipe.setting("num_embeds_ada_norm", "num_class_embeds")
    if "class_labels" in names and classes is not None:
        yield "class_labels", recipe.below(int(classes), recipe.batch)
    pooled = recipe.setting("pooled_projection_dim", "in_text_dim2")
    if "pooled_projections" in names and pooled is not None:
        yield "pooled_projections", recipe.floats(recipe.batch, int(pooled))
    if "added_cond_kwargs" in names and recipe.setting("caption_channels") is not None:
        yield "added_cond_kwargs", {"resolution": None, "aspect_ratio": None}
    if "guidance" in names and recipe.setting("guidance_embeds"):
        yield "guidance", recipe.floats(recipe.batch)
    image = recipe.setting("image_embed_dim", "image_dim")
    name = next((n for n in ("image_embeds", "encoder_hidden_states_image") if n in names), None)
    if name is not None and image is not None:
        yield name, recipe.floats(recipe.batch, _text_length(recipe), int(image))
    width = recipe.setting("global_states_input_dim", "global_cond_dim")
    if "global_hidden_states" in names and width is not None:
        yield "global_hidden_states", recipe.floats(recipe.batch, 1, int(width))
    if "image_meta_size" in names and recipe.setting("use_style_cond_and_image_meta_size"):
        yield "image_meta_size", recipe.floats(recipe.batch, 6)
        yield "style", torch.zeros(recipe.batch, dtype=torch.long)
    if "proj_embedding" in names:  # the prior of unCLIP: embeddings [B, D]
        width = int(recipe.setting("embedding_dim", default=1))
        yield "hidden_states", recipe.floats(recipe.batch, width)
        yield "proj_embedding", recipe.floats(recipe.batch, width)
        count = int(recipe.setting("num_embeddings", default=1))
        yield "encoder_hidden_states", recipe.floats(recipe.batch, count, width)


def _crops(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Sizes and corners of the image [B, 2], which CogView is told."""
    size = recipe.setting("sample_size", default=32)
    for name in ("original_size", "target_size", "crop_coords"):
        if name in recipe.parameters:
            value = 0 if name == "crop_coords" else 8 * int(size)
            yield name, torch.full((recipe.batch, 2), value, dtype=recipe.dtype)
    if "fps" in recipe.parameters and recipe.parameters["fps"].default is inspect.Parameter.empty:
        yield "fps", torch.full((recipe.batch,), 8, dtype=torch.long)


def _text_length(recipe: Recipe) -> int:
    return max(1, recipe.length // 2)


def _position_ids(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Flux: [S, 3] ids of the image rows and columns, [T, 3] zeros for the text."""
    if _flux(recipe):
        columns = max(1, math.isqrt(recipe.length))
        index = torch.arange(recipe.length)
        axes = recipe.setting("axes_dims_rope", default=(0, 0, 0))
        places = [torch.zeros_like(index), index // columns, index % columns]
        ids = torch.stack((places + [places[0]] * len(axes))[: len(axes)], dim=1)
        yield "img_ids", ids.to(recipe.dtype)
        yield "txt_ids", torch.zeros(_text_length(recipe), len(axes), dtype=recipe.dtype)
