"""Made-up inputs of diffusers models by the name of the argument: what only some classes take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attn_rewrite.checkpoints.recipe import Recipe

Made = Mapping[str, Any]
Maker = Callable[[Recipe, Made], Any]


def named_inputs(recipe: Recipe, made: dict[str, Any]) -> dict[str, Any]:
    """``made`` and every further argument of the forward that is known by name and needed.

    Needed is what has no default, and what a class calls optional but cannot run without
    (`_ALWAYS`).  An argument may be made from those before it.
    """
    known = dict(made)
    if "vision_tokens" in recipe.parameters:
        known["input_ids"] = _input_ids(recipe, known)[0]
        known |= _packed(recipe, known)
    for name, maker in _MAKERS.items():
        parameter = recipe.parameters.get(name)
        if parameter is None or name in known:
            continue
        if parameter.default is inspect.Parameter.empty or name in _ALWAYS:
            known[name] = maker(recipe, known)
    return {name: value for name, value in known.items() if value is not None}


def _text(*settings: str) -> Maker:
    """A text [B, L, D] whose width is the first of ``settings``."""

    def make(recipe: Recipe, made: Made) -> torch.Tensor | None:
        width = recipe.setting(*settings)
        return None if width is None else recipe.floats(recipe.batch, _half(recipe), int(width))

    return make


def _vector(*settings: str) -> Maker:
    """One vector [B, D] whose width is the first of ``settings``."""

    def make(recipe: Recipe, made: Made) -> torch.Tensor | None:
        width = recipe.setting(*settings)
        return None if width is None else recipe.floats(recipe.batch, int(width))

    return make


def _half(recipe: Recipe) -> int:
    return max(1, recipe.length // 2)


def _like_latents(recipe: Recipe, made: Made) -> torch.Tensor:
    latents = made["sample" if "sample" in made else "hidden_states"]
    return recipe.floats(*latents.shape)


def _rest_of_channels(recipe: Recipe, made: Made) -> torch.Tensor:
    """What the model concatenates with the latents [B, L, C] to fill its channels."""
    latents = made["hidden_states"]
    rest = int(recipe.setting("in_channels", default=0)) - latents.shape[-1]
    return recipe.floats(*latents.shape[:-1], max(rest, 1))


def _text_layers(recipe: Recipe, made: Made) -> list[torch.Tensor]:
    """A text for each block."""
    width = int(recipe.setting("text_encoder_dim"))
    blocks = sum(int(recipe.setting(n, default=0)) for n in ("num_layers", "num_single_layers"))
    return [recipe.floats(recipe.batch, _half(recipe), width) for _ in range(blocks)]


def _llama_layers(recipe: Recipe, made: Made) -> list[torch.Tensor]:
    """The layers of a text encoder, as many as the model takes from it."""
    width, chosen = recipe.setting("caption_channels")[1], recipe.setting("llama_layers")
    count = 1 + max(chosen)
    return [recipe.floats(recipe.batch, _half(recipe), int(width)) for _ in range(count)]


def _t5_text(recipe: Recipe, made: Made) -> torch.Tensor | None:
    """The text of HiDream, whose configuration lists two widths."""
    widths = recipe.setting("caption_channels")
    if not isinstance(widths, list | tuple):
        return None
    return recipe.floats(recipe.batch, _half(recipe), int(widths[0]))


def _patches(recipe: Recipe, made: Made) -> int:
    """Patches of the latents [B, C, H, W]."""
    patch = int(recipe.setting("patch_size", default=1))
    height, width = (int(size) // patch for size in made["hidden_states"].shape[-2:])
    return height * width


def _prior_tokens(recipe: Recipe, made: Made) -> torch.Tensor:
    limit = int(recipe.setting("prior_vq_quantizer_codebook_size", default=1))
    return recipe.below(limit, recipe.batch, _patches(recipe, made))


def _position_ids(recipe: Recipe, made: Made) -> torch.Tensor:
    """[B, S] where the model reads text too, [B, S, 3] of Ideogram, else [S, 3]: text and then
    what else there is, one after the other."""
    if "input_ids" in made:  # OmniGen: text, the time, the image
        count = made["input_ids"].shape[1] + 1 + _patches(recipe, made)
        return torch.arange(count).repeat(recipe.batch, 1)
    parts = ("hidden_states", "audio_hidden_states", "encoder_hidden_states")
    count = sum(made[n].shape[1] for n in parts if n in made)
    if "indicator" in recipe.parameters:
        places = torch.arange(made["hidden_states"].shape[1])
        return torch.stack((places,) * 3, dim=-1).repeat(recipe.batch, 1, 1)
    return torch.stack((torch.arange(count),) * 3, dim=-1)


def _indicator(recipe: Recipe, made: Made) -> torch.Tensor:
    """Which of a sequence is text (3) and which is image (2), as Ideogram counts them."""
    places = torch.arange(made["hidden_states"].shape[1])
    return torch.where(places < _half(recipe), 3, 2).repeat(recipe.batch, 1)


def _ranges(*parts: str) -> Maker:
    """Places of the last of ``parts`` in a sequence that holds them in this order."""

    def make(recipe: Recipe, made: Made) -> torch.Tensor:
        sizes = [made[name].shape[1] for name in parts]
        return torch.arange(sum(sizes[:-1]), sum(sizes))

    return make


def _tags(recipe: Recipe, made: Made) -> torch.Tensor:
    """Text, video and audio in a sequence that holds them in this order, by number."""
    parts = ("encoder_hidden_states", "hidden_states", "audio_hidden_states")
    counts = torch.tensor([made[name].shape[1] for name in parts])
    return torch.arange(3).repeat_interleave(counts)


def _visual_places(recipe: Recipe, made: Made) -> tuple[torch.Tensor, ...]:
    """Places along each axis of the patches of latents [B, F, H, W, C]."""
    sizes = made["hidden_states"].shape[1:4]
    patch = recipe.setting("patch_size", default=(1, 1, 1))
    return tuple(torch.arange(s // int(p)) for s, p in zip(sizes, patch, strict=True))


def _rotation(recipe: Recipe, made: Made) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B, S, heads x D] of a rotary embedding."""
    heads, width = (int(recipe.setting(n)) for n in ("num_attention_heads", "attention_head_dim"))
    angles = recipe.floats(recipe.batch, made["hidden_states"].shape[1], heads * width)
    return angles.cos(), angles.sin()


def _rotation_table(recipe: Recipe, made: Made) -> torch.Tensor:
    """Complex rotations [384, 384, D / 2] of rows and columns, the first half of each."""
    width = int(recipe.setting("hidden_size")) // int(recipe.setting("num_attention_heads"))
    angle = torch.arange(384)[:, None] / 10000 ** (torch.arange(0, width, 4) / width)
    rows = angle[:, None].expand(384, 384, -1)
    both = torch.stack((rows, rows.transpose(0, 1)), dim=-1).flatten(2)
    return torch.polar(torch.ones_like(both), both)


def _no_options(recipe: Recipe, made: Made) -> dict[str, Any] | None:
    """Lumina unpacks its options, none too."""
    return {} if "image_rotary_emb" in made else None


def _packed(recipe: Recipe, made: Made) -> dict[str, Any]:
    """A text, and then a clip, in one sequence without a batch (Cosmos 3)."""
    text, patch = made["input_ids"].shape[0], int(recipe.setting("latent_patch_size"))
    side = 2 * patch
    clip = recipe.floats(1, int(recipe.setting("latent_channel")), 2, side, side)
    places = torch.arange(text, text + 8)
    return {
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(text + 8).repeat(3, 1),
        "und_len": text,
        "sequence_length": text + 8,
        "vision_tokens": [clip],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((8,), 500, dtype=recipe.dtype),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def _control(recipe: Recipe, made: Made) -> torch.Tensor:
    shape = list(made["hidden_states"].shape)
    shape[1] = int(recipe.setting("vace_in_channels"))
    return recipe.floats(*shape)


def _pose(recipe: Recipe, made: Made) -> torch.Tensor:
    """[B, C, F - 1, H, W]: a pose for every frame but the first."""
    batch, _, frames, height, width = made["hidden_states"].shape
    channels = int(recipe.setting("latent_channels"))
    return recipe.floats(batch, channels, frames - 1, height, width)


def _faces(recipe: Recipe, made: Made) -> torch.Tensor:
    """[B, 3, F, size, size], four for each pose."""
    frames = 4 * (made["hidden_states"].shape[2] - 1)
    size = int(recipe.setting("motion_encoder_size"))
    return recipe.floats(recipe.batch, 3, frames, size, size)


def _history(frames: int) -> Maker:
    """Earlier latents [B, C, frames, H, W] that the model sees beside those it denoises."""

    def make(recipe: Recipe, made: Made) -> torch.Tensor:
        batch, channels, _, height, width = made["hidden_states"].shape
        return recipe.floats(batch, channels, frames, height, width)

    return make


def _frames(count: int) -> Maker:
    """Numbers of ``count`` frames; of those in the latents where it is 0."""

    def make(recipe: Recipe, made: Made) -> torch.Tensor:
        return torch.arange(count or made["hidden_states"].shape[2])

    return make


def _image_slots(recipe: Recipe, made: Made) -> torch.Tensor:
    """[B, T + N / 4]: text, then a slot for every four positions of the image."""
    text, image = (int(made[n].shape[1]) for n in ("encoder_hidden_states", "hidden_states"))
    return torch.arange(text + image // 4).ge(text).repeat(recipe.batch, 1)


def _clips(recipe: Recipe, made: Made) -> list[torch.Tensor]:
    """One clip [C, F, H, W] for each example."""
    channels = int(recipe.setting("in_channels", default=4))
    return [recipe.floats(channels, 1, 16, 16) for _ in range(recipe.batch)]


def _captions(recipe: Recipe, made: Made) -> list[torch.Tensor]:
    """One text [L, D] for each example."""
    width = int(recipe.setting("cap_feat_dim"))
    return [recipe.floats(recipe.length, width) for _ in range(recipe.batch)]


def _encodings(recipe: Recipe, made: Made) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An encoding [B, L, D] with its mask of ones."""
    text = recipe.floats(recipe.batch, _half(recipe), int(recipe.setting("d_model")))
    return [(text, torch.ones(recipe.batch, _half(recipe), dtype=recipe.dtype))]


def _input_ids(recipe: Recipe, made: Made) -> torch.Tensor:
    """Codes of an image [B, H, W], or tokens [B, L]."""
    if (codes := recipe.setting("codebook_size")) is not None:
        return recipe.below(int(codes), recipe.batch, 8, 8)
    return recipe.below(int(recipe.setting("vocab_size", default=2)), recipe.batch, _half(recipe))


def _causal(recipe: Recipe, made: Made) -> torch.Tensor:
    """[B, S, S]: what a position sees, itself and all before it."""
    count = made["position_ids"].shape[1]
    return torch.ones(count, count).tril().to(recipe.dtype).repeat(recipe.batch, 1, 1)


def _chunks(recipe: Recipe, made: Made) -> list[int]:
    """The frames of the latents [B, F, C, H, W], the first on its own."""
    return [1, made["hidden_states"].shape[1] - 1]


def _shapes(recipe: Recipe, made: Made) -> list[list[tuple[int, int, int]]]:
    side = math.isqrt(made["hidden_states"].shape[1])
    return [[(1, side, side)]] * recipe.batch


# In the order in which they are made.
_MAKERS: dict[str, Maker] = {
    "input_ids": _input_ids,
    "inputs_embeds": _text("hidden_size"),
    "encoder_hidden_states": _text("in_text_dim", "hidden_size"),
    "text_bth": _text("text_in_dim"),
    "text_lens": lambda recipe, made: torch.full((recipe.batch,), made["text_bth"].shape[1]),
    "encoder_hidden_states_llama3": _llama_layers,
    "encoder_hidden_states_t5": _t5_text,
    "text_encoder_layers": _text_layers,
    "pooled_embeds": _vector("text_emb_dim"),
    "pooled_text_emb": _vector("cond_embed_dim"),
    "image_embeddings": _vector("cross_attention_dim"),
    "micro_conds": lambda recipe, made: recipe.floats(
        recipe.batch,
        recipe.setting("micro_cond_embed_dim") // recipe.setting("micro_cond_encode_dim"),
    ),
    "clip_text_pooled": lambda recipe, made: recipe.floats(
        recipe.batch, 1, int(recipe.setting("clip_text_pooled_in_channels"))
    ),
    "timestep_ratio": lambda recipe, made: recipe.floats(recipe.batch).abs(),
    "added_time_ids": lambda recipe, made: torch.ones(recipe.batch, 3, dtype=recipe.dtype),
    "image_latents": _like_latents,
    "context_latents": _rest_of_channels,
    "audio_hidden_states": _text("audio_in_channels"),
    "audio_encoder_hidden_states": _text("caption_channels"),
    "audio_num_frames": lambda recipe, made: made["audio_hidden_states"].shape[1],
    "prior_token_id": _prior_tokens,
    "prior_token_drop": lambda recipe, made: torch.zeros(recipe.batch, dtype=torch.bool),
    "position_ids": _position_ids,
    "indicator": _indicator,
    "segment_ids": lambda recipe, made: torch.zeros_like(made["indicator"]),
    "input_img_latents": lambda recipe, made: [],
    "input_image_sizes": lambda recipe, made: {},
    "attention_mask": _causal,
    "text_indices": _ranges("encoder_hidden_states"),
    "video_indices": _ranges("encoder_hidden_states", "hidden_states"),
    "audio_indices": _ranges("encoder_hidden_states", "hidden_states", "audio_hidden_states"),
    "token_tags": _tags,
    "timestep_indices": lambda recipe, made: torch.zeros_like(made["token_tags"]),
    "visual_rope_pos": _visual_places,
    "text_rope_pos": lambda recipe, made: torch.arange(made["encoder_hidden_states"].shape[1]),
    "image_rotary_emb": _rotation_table,
    "cross_attention_kwargs": _no_options,
    "video_rotary_emb": _rotation,
    "control_hidden_states": _control,
    "pose_hidden_states": _pose,
    "face_pixel_values": _faces,
    "indices_latents": _frames(0),
    "latents_clean": _history(1),
    "indices_latents_clean": _frames(1),
    "latents_history_2x": _history(2),
    "indices_latents_history_2x": _frames(2),
    "latents_history_4x": _history(4),
    "indices_latents_history_4x": _frames(4),
    "img_mask": _image_slots,
    "shape_list": _shapes,
    "chunk_partition": _chunks,
    "x": _clips,
    "t": lambda recipe, made: recipe.floats(recipe.batch).sigmoid(),
    "cap_feats": _captions,
    "encodings_and_masks": _encodings,
    "decoder_input_tokens": lambda recipe, made: recipe.floats(
        recipe.batch, recipe.length, int(recipe.setting("input_dims"))
    ),
    "decoder_noise_time": lambda recipe, made: recipe.floats(recipe.batch).sigmoid(),
}

# Optional by signature only.
_ALWAYS = frozenset(
    "encoder_hidden_states_llama3 encoder_hidden_states_t5 text_encoder_layers pooled_embeds "
    "image_embeddings audio_num_frames control_hidden_states pose_hidden_states "
    "face_pixel_values cross_attention_kwargs latents_clean indices_latents_clean "
    "latents_history_2x indices_latents_history_2x latents_history_4x "
    "indices_latents_history_4x shape_list".split()
)
