"""Made-up inputs of transformers models: text, images, audio, and pairs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from attn_rewrite.checkpoints.recipe import Recipe, caches, configs

DEFAULT_IMAGE = 224


def transformers_inputs(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Arguments by name: token ids [B, L], images [B, C, H, W], audio [B, T] or [B, mel, T]."""
    names = recipe.parameters
    if "input_ids" in names:
        yield from _text_inputs(recipe)
    if {"grid_thw", "target_sizes"} & names.keys() and "input_ids" not in names:
        yield from _patches(recipe)
    elif "pixel_values" in names and not _images_are_optional(recipe):
        yield "pixel_values", _images(recipe)
    if "pixel_values_videos" in names and "pixel_values" not in names:
        yield "pixel_values_videos", _videos(recipe)
    if "input_features" in names and not _audio_is_optional(recipe):
        yield from _sound(recipe)
    if "input_values" in names:
        yield "input_values", _waveform(recipe)
    yield from _series(recipe)
    if _wants_decoder_ids(recipe):
        yield "decoder_input_ids", _token_ids(recipe, max(1, recipe.length // 2))
    if "use_cache" in names and caches(recipe.model):
        yield "use_cache", False


def _series(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Embedded tokens [B, L, D], sound of Gemma [B, T, mel], numbers over time [B, T, channels]."""
    names = recipe.parameters
    embedded = names.get("inputs_embeds")
    if embedded is not None and embedded.default is embedded.empty and "input_ids" not in names:
        width = int(recipe.setting("hidden_size", default=1))
        yield "inputs_embeds", recipe.floats(recipe.batch, recipe.length, width)
    if "audio_mel" in names:  # the mask is True where there is no sound
        frames = 8 * recipe.length
        yield (
            "audio_mel",
            recipe.floats(recipe.batch, frames, int(recipe.setting("input_feat_size"))),
        )
        yield "audio_mel_mask", torch.zeros(recipe.batch, frames, dtype=torch.bool)
    if "past_values" in names and (steps := recipe.setting("context_length")) is not None:
        channels = int(recipe.setting("num_input_channels", "input_size", default=1))
        yield "past_values", recipe.floats(recipe.batch, int(steps), channels)


def _wants_decoder_ids(recipe: Recipe) -> bool:
    """Classifiers make the decoder's input from the encoder's; other seq2seq models take it."""
    classifies = type(recipe.model).__name__.endswith(("Classification", "QuestionAnswering"))
    seq2seq = bool(getattr(recipe.model.config, "is_encoder_decoder", False))
    return seq2seq and not classifies and "decoder_input_ids" in recipe.parameters


def _images_are_optional(recipe: Recipe) -> bool:
    """A language model that can also see: text alone is a valid input, and the simpler one."""
    return recipe.setting("image_token_id", "image_token_index", "boi_token_id") is not None


def _audio_is_optional(recipe: Recipe) -> bool:
    """A language model that can also hear."""
    hears = recipe.setting("audio_token_id", "audio_token_index") is not None
    return hears and "input_ids" in recipe.parameters


def _text_inputs(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    yield "input_ids", _token_ids(recipe, recipe.length)
    if "attention_mask" in recipe.parameters:
        yield "attention_mask", torch.ones(recipe.batch, recipe.length, dtype=torch.long)
    if (
        "token_type_ids" in recipe.parameters
        and int(recipe.setting("type_vocab_size", default=0)) > 1
    ):
        yield "token_type_ids", torch.zeros(recipe.batch, recipe.length, dtype=torch.long)
    if "bbox" in recipe.parameters:
        yield "bbox", torch.zeros(recipe.batch, recipe.length, 4, dtype=torch.long)


def _token_ids(recipe: Recipe, length: int) -> torch.Tensor:
    """Random ordinary tokens [B, L]; the last is the end token, which some models pool at."""
    vocabulary = int(recipe.setting("vocab_size", default=100))
    special = {
        value
        for part in configs(recipe.model.config)
        for name, value in vars(part).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ids = recipe.below(vocabulary, recipe.batch, length)
    ordinary = [i for i in range(min(vocabulary, 2 * len(special) + 2)) if i not in special]
    for token in special if ordinary else ():
        ids[ids == token] = ordinary[-1]
    end = recipe.setting("eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _patches(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Flat patches [B * H * W, C * F * P * P] of images in one sequence, and their grids [B, 3]."""
    side = 4 * int(recipe.setting("spatial_merge_size", default=1))
    patch = int(recipe.setting("patch_size", default=14))
    width = int(recipe.setting("in_channels", "num_channels", default=3)) * patch * patch
    if "hidden_states" in recipe.parameters:  # frames are within a patch
        width *= int(recipe.setting("temporal_patch_size", default=1))
    name = "hidden_states" if "hidden_states" in recipe.parameters else "pixel_values"
    if "target_sizes" in recipe.parameters:  # MiniCPM: patches side by side in one image
        channels = int(recipe.setting("num_channels", default=3))
        yield name, recipe.floats(1, channels, patch, recipe.batch * side * side * patch)
        yield "target_sizes", torch.tensor([[side, side]] * recipe.batch)
        return
    yield name, recipe.floats(recipe.batch * side * side, width)
    yield "grid_thw", torch.tensor([[1, side, side]] * recipe.batch)


def _images(recipe: Recipe) -> torch.Tensor:
    """[B, C, H, W], [B, F, C, H, W] of a clip, [B, 2, C, H, W] where two images are matched."""
    size = recipe.setting("image_size", "input_size", "max_img_size", default=DEFAULT_IMAGE)
    height, width = size[-2:] if isinstance(size, list | tuple) else (size, size)
    channels = int(recipe.setting("num_channels", "in_channels", default=3))
    pair = 2 if recipe.setting("fine_matching_slice_dim") is not None else None
    frames = recipe.setting("num_frames", default=pair)
    video = (int(frames),) if frames is not None else ()
    return recipe.floats(recipe.batch, *video, channels, int(height), int(width))


def _videos(recipe: Recipe) -> torch.Tensor:
    """[B, F, C, H, W]."""
    size = int(recipe.setting("image_size", "crop_size", default=DEFAULT_IMAGE))
    frames = int(recipe.setting("frames_per_clip", "num_frames", default=2))
    channels = int(recipe.setting("num_channels", "in_channels", "in_chans", default=3))
    return recipe.floats(recipe.batch, frames, channels, size, size)


def _sound(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Features, and a mask of ones [B, T] where the model asks for one."""
    features = _spectrogram(recipe)
    yield "input_features", features
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in recipe.parameters:
            frames = features.shape[2 if _mel_first(recipe) else 1]
            yield name, torch.ones(recipe.batch, frames, dtype=torch.bool)


def _mel_first(recipe: Recipe) -> bool:
    """Whether the first convolution runs over time with a channel for each mel bin (Whisper)."""
    bins = recipe.setting("num_mel_bins")
    first = next((m for m in recipe.model.modules() if isinstance(m, torch.nn.Conv1d)), None)
    return first is not None and first.in_channels == bins and first.kernel_size[0] > 1


def _spectrogram(recipe: Recipe) -> torch.Tensor:
    """[B, mel, T], with the fixed T of Whisper where the model has one, else [B, T, features]."""
    if _mel_first(recipe):
        positions = recipe.setting("max_source_positions", default=4 * recipe.length)
        return recipe.floats(recipe.batch, int(recipe.setting("num_mel_bins")), 2 * int(positions))
    features = recipe.setting(
        "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_dim",
        default=80,
    )  # fmt: skip
    frames = recipe.length * int(recipe.setting("subsampling_factor", default=1))
    return recipe.floats(recipe.batch, frames, int(features))


def _waveform(recipe: Recipe) -> torch.Tensor:
    """[B, T] samples that give about ``length`` frames, [B, C, T] where the model knows of
    channels, or the [B, T, mel] of AST."""
    strides = recipe.setting("conv_stride")
    if strides is None and recipe.setting("num_mel_bins") is not None:
        frames = int(recipe.setting("max_length", default=recipe.length))
        return recipe.floats(recipe.batch, frames, int(recipe.setting("num_mel_bins")))
    samples = recipe.length * math.prod(strides or (320,))
    first = next((m for m in recipe.model.modules() if isinstance(m, torch.nn.Conv1d)), None)
    if strides is None and first is not None:
        return recipe.floats(recipe.batch, first.in_channels, samples)
    return recipe.floats(recipe.batch, samples)
