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
    if "pixel_values" in names and not _images_are_optional(recipe):
        yield "pixel_values", _images(recipe)
    if "input_features" in names:
        yield "input_features", _spectrogram(recipe)
    if "input_values" in names:
        yield "input_values", _waveform(recipe)
    if _wants_decoder_ids(recipe):
        yield "decoder_input_ids", _token_ids(recipe, max(1, recipe.length // 2))
    if "use_cache" in names and caches(recipe.model):
        yield "use_cache", False


def _wants_decoder_ids(recipe: Recipe) -> bool:
    """Classifiers make the decoder's input from the encoder's; other seq2seq models take it."""
    classifies = type(recipe.model).__name__.endswith(("Classification", "QuestionAnswering"))
    seq2seq = bool(getattr(recipe.model.config, "is_encoder_decoder", False))
    return seq2seq and not classifies and "decoder_input_ids" in recipe.parameters


def _images_are_optional(recipe: Recipe) -> bool:
    """A language model that can also see: text alone is a valid input, and the simpler one."""
    return recipe.setting("image_token_id", "image_token_index", "boi_token_id") is not None


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


def _images(recipe: Recipe) -> torch.Tensor:
    size = recipe.setting("image_size", "input_size", default=DEFAULT_IMAGE)
    height, width = size[-2:] if isinstance(size, list | tuple) else (size, size)
    channels = int(recipe.setting("num_channels", "in_channels", default=3))
    frames = recipe.setting("num_frames")
    video = (int(frames),) if frames is not None else ()
    return recipe.floats(recipe.batch, *video, channels, int(height), int(width))


def _spectrogram(recipe: Recipe) -> torch.Tensor:
    """[B, mel, T] with the fixed T of Whisper, else [B, T, features]."""
    bins = recipe.setting("num_mel_bins")
    positions = recipe.setting("max_source_positions")
    if bins is not None and getattr(recipe.model.config, "model_type", "") == "whisper":
        return recipe.floats(recipe.batch, int(bins), 2 * int(positions))
    features = recipe.setting(
        "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", default=80
    )
    return recipe.floats(recipe.batch, recipe.length, int(features))


def _waveform(recipe: Recipe) -> torch.Tensor:
    """[B, T] samples that give about ``length`` frames, or the [B, T, mel] of AST."""
    strides = recipe.setting("conv_stride")
    if strides is None and recipe.setting("num_mel_bins") is not None:
        frames = int(recipe.setting("max_length", default=recipe.length))
        return recipe.floats(recipe.batch, frames, int(recipe.setting("num_mel_bins")))
    return recipe.floats(recipe.batch, recipe.length * math.prod(strides or (320,)))
