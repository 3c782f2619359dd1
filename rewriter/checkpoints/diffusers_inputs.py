"""Made-up inputs of diffusers models: noisy latents, a time step and what conditions them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch

from attn_rewrite.checkpoints.diffusers_named import named_inputs
from attn_rewrite.checkpoints.recipe import Recipe


def diffusers_inputs(recipe: Recipe) -> dict[str, Any]:
    """Arguments by name: latents in the layout of the class, time steps [B], text [B, L, D], and
    what else the class is known by name to need."""
    return named_inputs(recipe, dict(_usual_inputs(recipe)))


def _usual_inputs(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    names = recipe.parameters
    main = next((n for n in ("hidden_states", "sample") if n in names), None)
    if main is not None:
        yield main, _latents(recipe)
    first = "timestep" if "timestep" in names else "timesteps"
    for name in (first, "timesteps", "timestep_r", "r_timestep"):
        if name in names and (name == first or _required(recipe, name)):
            yield name, recipe.below(1000, *_timestep_shape(recipe)).to(_timestep_dtype(recipe))
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
    return {"img_ids", "txt_ids"} <= recipe.parameters.keys()


def _video_sequence(recipe: Recipe) -> bool:
    """Whether latents come as a sequence [B, F * H * W, C] with their grid as numbers (LTX)."""
    return {"num_frames", "height", "width"} <= recipe.parameters.keys()


def _video_grid(recipe: Recipe) -> tuple[int, int]:
    """Frames and side of a grid of about ``length`` positions."""
    return 2, max(1, math.isqrt(recipe.length // 2))


def _timestep_shape(recipe: Recipe) -> tuple[int, ...]:
    """[B], or a step for each frame: [B, F] of AnyFlow, [B, 1, F] of SANA-WM."""
    if "r_timestep" in recipe.parameters:
        return recipe.batch, 4
    return (recipe.batch, 1, 4) if "frame_valid_mask" in recipe.parameters else (recipe.batch,)


def _timestep_dtype(recipe: Recipe) -> torch.dtype:
    """Floating where the class embeds the step in the type that it comes in."""
    embedded = {"img_ids", "img_shapes", "timestep_r", "style", "latent_cond", "text_bth",
                "indicator"}  # fmt: skip
    return recipe.dtype if embedded & recipe.parameters.keys() else torch.long


def _latents(recipe: Recipe) -> torch.Tensor:
    """Noise in the layout of the class: a sequence, a clip or an image."""
    channels = _channels(recipe)
    if (positions := _sequence_length(recipe)) is not None:
        return recipe.floats(recipe.batch, positions, channels)
    if any(word in type(recipe.model).__name__ for word in ("1D", "Audio")):
        return recipe.floats(recipe.batch, channels, 8 * recipe.length)
    size = recipe.setting("sample_size", default=None)
    side = 32 if recipe.length >= 64 else 16
    height, width = size if isinstance(size, list | tuple) else (size or side, size or side)
    height = int(recipe.setting("sample_height", default=height))
    width = int(recipe.setting("sample_width", default=width))
    patch = recipe.setting("patch_size", "all_patch_size")
    if "shape_list" in recipe.parameters:  # patches on their own [B, N, C, F, H, W]
        return recipe.floats(recipe.batch, _square(recipe) ** 2, channels, *patch)
    clip = recipe.setting("sample_frames", "num_frames", "video_length")
    ratio = recipe.setting("temporal_compression_ratio")
    if clip is not None and ratio is not None:  # [B, F, C, H, W], CogVideoX
        return recipe.floats(
            recipe.batch, (int(clip) - 1) // int(ratio) + 1, channels, height, width
        )
    video = isinstance(patch, list | tuple) and len(patch) == 3  # [B, C, F, H, W], Wan and its kin
    if not (video or clip is not None or _names_video(recipe)):
        return recipe.floats(recipe.batch, channels, height, width)
    steps = patch[0] if video else recipe.setting("patch_size_t", default=1)
    frames = 4 * int(steps or 1) if recipe.setting("video_length") is None else int(clip)
    if recipe.setting("in_visual_dim") is not None:  # [B, F, H, W, C], Kandinsky
        return recipe.floats(recipe.batch, frames, height, width, channels)
    if "r_timestep" in recipe.parameters or "SpatioTemporal" in type(recipe.model).__name__:
        return recipe.floats(recipe.batch, frames, channels, height, width)
    return recipe.floats(recipe.batch, channels, frames, height, width)


def _channels(recipe: Recipe) -> int:
    """Channels of the latents; of Kandinsky with those that the condition adds to them."""
    patch = recipe.setting("patch_size", default=1)
    area = math.prod(patch) if isinstance(patch, list | tuple) else int(patch)
    if recipe.setting("in_visual_dim") is not None:
        return _first_linear(recipe, "visual_embeddings").in_features // area
    names = ("audio_acoustic_hidden_dim", "latent_dim", "in_channels", "io_channels")
    width = int(recipe.setting(*names, default=4))
    return width * area if "token_tags" in recipe.parameters else width


def _first_linear(recipe: Recipe, part: str) -> torch.nn.Linear:
    """The first linear layer in the modules whose name starts with ``part``."""
    return next(
        module
        for name, module in recipe.model.named_modules()
        if name.startswith(part) and isinstance(module, torch.nn.Linear)
    )


def _square(recipe: Recipe) -> int:
    """The side of a square of about ``length`` positions."""
    return max(1, math.isqrt(recipe.length))


def _sequence_length(recipe: Recipe) -> int | None:
    """Positions of latents that come as a sequence [B, S, C]; None of those that do not."""
    names = recipe.parameters
    if _video_sequence(recipe) or "video_rotary_emb" in names:
        frames, side = _video_grid(recipe)
        return frames * side * side
    if "img_shapes" in names:
        return (2 * (_square(recipe) // 2) if "img_mask" in names else _square(recipe)) ** 2
    packed = any(_required(recipe, n) for n in ("context_latents", "indicator", "position_ids"))
    images = "input_img_latents" in names  # OmniGen, which makes the sequence itself
    flat = _flux(recipe) or (packed and not images) or "latent_cond" in names
    return recipe.length if flat else None


def _required(recipe: Recipe, name: str) -> bool:
    """Whether ``name`` is an argument without a default."""
    parameter = recipe.parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


def _names_video(recipe: Recipe) -> bool:
    words = ("3D", "Motion", "I2V", "SpatioTemporal")
    return any(word in type(recipe.model).__name__ for word in words)


# Names of the text argument, of its width in the configuration, and of its mask.
_TEXTS = (
    (
        "encoder_hidden_states",
        ("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim",
         "cross_attention_input_dim", "cross_attention_dim", "cap_feat_dim", "context_in_dim",
         "in_text_dim", "text_hidden_dim", "encoder_hidden_size", "cond_token_dim",
         "dit_text_dim", "llm_features_dim", "encoder_hid_dim", "condition_dim"),
        ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask",
         "encoder_mask", "mask"),
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
        if name not in names or not isinstance(width := recipe.setting(*widths), int):
            continue
        length = _text_length(recipe, name)
        yield name, recipe.floats(*_text_shape(recipe, length, width))
        for mask in masks:
            if mask in names and _mask_needed(recipe, mask):
                yield mask, torch.ones(recipe.batch, length, dtype=torch.bool)


def _mask_needed(recipe: Recipe, name: str) -> bool:
    """Whether the mask of a text has no default, or is one that a class cannot do without."""
    kandinsky = name == "encoder_attention_mask" and recipe.setting("encoder_hid_dim") is not None
    second = name == "mask" or name.startswith("text") or name.endswith("_2")
    return kandinsky or second or _required(recipe, name)


def _text_shape(recipe: Recipe, length: int, width: int) -> tuple[int, ...]:
    """[B, L, D], with a dimension for the layers of the text encoder where the class takes
    several of them."""
    layers, bundles = recipe.setting("num_text_layers"), recipe.setting("injection_layer_ids")
    if layers is not None:  # Krea
        return recipe.batch, length, int(layers), width
    if bundles is not None:  # Bria: one for the model, then one for each layer
        return recipe.batch, 1 + len(bundles), length, width
    if "indicator" in recipe.parameters:  # beside the image, in one sequence
        return recipe.batch, recipe.length, width
    if "Motion" in type(recipe.model).__name__:  # one for each frame
        return recipe.batch * 4, length, width
    if "frame_valid_mask" in recipe.parameters:  # SANA-WM
        return recipe.batch, 1, length, width
    return recipe.batch, length, width


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
    image = recipe.setting("image_embed_dim", "image_dim", "image_proj_dim")
    name = next((n for n in ("image_embeds", "encoder_hidden_states_image") if n in names), None)
    if name is not None and image is not None:
        yield name, recipe.floats(recipe.batch, _text_length(recipe), int(image))
    if "global_hidden_states" in names:
        width, known = recipe.setting("global_states_input_dim"), recipe.setting("global_cond_dim")
        shape = (int(known),) if width is None else (1, int(width))
        yield "global_hidden_states", recipe.floats(recipe.batch, *shape)
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


def _text_length(recipe: Recipe, name: str = "") -> int:
    """Tokens of a text: as many as the class is made for where it says so."""
    own = {"encoder_hidden_states": "text_len", "encoder_hidden_states_t5": "text_len_t5"}
    fixed = recipe.setting("max_text_seq_length", own.get(name, ""))
    if name and fixed is not None:
        return int(fixed)
    beside = recipe.setting("fourier_embedding_dim") is not None  # a channel of the audio
    return 8 * recipe.length if name and beside else max(1, recipe.length // 2)


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
