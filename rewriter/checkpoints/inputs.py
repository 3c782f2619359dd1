"""Inputs to capture and measure a model with: generated from its configuration, or from a file."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_rewrite.errors import CheckpointError, PolicyError

DEFAULT_BATCH = 2
DEFAULT_LENGTH = 128
DEFAULT_IMAGE = 224


@dataclass(frozen=True, eq=False)
class Inputs:
    """Keyword arguments of a forward, and sentences on how they were made."""

    kwargs: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Recipe:
    """What a generator needs: the model, its configuration and the sizes asked for."""

    model: torch.nn.Module
    parameters: Mapping[str, inspect.Parameter]
    batch: int
    length: int
    random: torch.Generator

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weights."""
        floats = (p.dtype for p in self.model.parameters() if p.dtype.is_floating_point)
        return next(floats, torch.float32)

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of ``names`` that the configuration, or one nested in it, has."""
        for config in _configs(getattr(self.model, "config", None)):
            for name in names:
                value = config.get(name) if isinstance(config, Mapping) else vars(config).get(name)
                if value is not None:
                    return value
        return default

    def floats(self, *shape: int) -> torch.Tensor:
        """Normal values [*shape] in the model's dtype."""
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def below(self, limit: int, *shape: int) -> torch.Tensor:
        """Whole numbers from 0 up to ``limit`` (exclusive) [*shape]."""
        return torch.randint(max(limit, 1), shape, generator=self.random)


def _configs(config: Any) -> Iterator[Any]:
    """A configuration, then those of its text, vision and audio parts."""
    if config is None:
        return
    yield config
    if not isinstance(config, Mapping):
        for name in ("text_config", "vision_config", "audio_config", "encoder", "decoder"):
            part = vars(config).get(name)
            if part is not None and hasattr(part, "__dict__"):
                yield part


def generate_inputs(
    model: torch.nn.Module, *, batch: int | None, length: int | None, seed: int = 0
) -> Inputs:
    """Random inputs that suit a transformers or diffusers model, by its signature and config.

    Token ids are [B, L], images [B, C, H, W], audio [B, T] or [B, mel, T], latents as the class of
    the model wants them.  Raises `CheckpointError` where an argument that the model needs is
    unknown, `PolicyError` where ``length`` is over the positions that the model has.
    """
    parameters = inspect.signature(model.forward).parameters
    limit = position_limit(model)
    if length is not None and limit is not None and length > limit:
        raise PolicyError(
            f"length {length} is over the {limit} positions of {type(model).__name__}; "
            f"ask for at most {limit}"
        )
    rows = DEFAULT_BATCH if batch is None else batch
    tokens = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH) if length is None else length
    recipe = _Recipe(model, parameters, rows, tokens, torch.Generator().manual_seed(seed))
    diffusion = hasattr(model, "config") and isinstance(model.config, Mapping)
    kwargs = dict(_diffusion_inputs(recipe) if diffusion else _transformers_inputs(recipe))
    _check_complete(model, parameters, kwargs)
    shown = ", ".join(_shape_text(name, value) for name, value in kwargs.items())
    return Inputs(
        kwargs, (f"inputs generated: batch {rows}, length {tokens}, seed {seed}: {shown}",)
    )


def _shape_text(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{name} {'x'.join(str(size) for size in value.shape)}"
    return f"{name}={value}"


def _check_complete(
    model: torch.nn.Module, parameters: Mapping[str, inspect.Parameter], kwargs: Mapping[str, Any]
) -> None:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    lacking = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in variable and name not in kwargs
    ]
    if lacking or not kwargs:
        raise CheckpointError(
            f"inputs for {type(model).__name__} cannot be generated: nothing is known about "
            f"{', '.join(lacking) or 'its arguments'}; give them with --inputs FILE.safetensors "
            f"(names: {', '.join(parameters)})"
        )


def position_limit(model: torch.nn.Module) -> int | None:
    """The longest sequence that the learned positions of ``model`` allow, None without a limit."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, Mapping):
        return None
    limits = [
        value
        for part in _configs(config)
        for name in ("max_position_embeddings", "n_positions", "max_source_positions")
        if isinstance(value := vars(part).get(name), int) and value > 0
    ]
    for name, module in model.named_modules():
        table = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if (
            table and module.padding_idx is not None
        ):  # RoBERTa counts positions from padding_idx + 1
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


# transformers


def _transformers_inputs(recipe: _Recipe) -> Iterator[tuple[str, Any]]:
    names = recipe.parameters
    if "input_ids" in names:
        yield from _text_inputs(recipe)
    if "pixel_values" in names and not _images_are_optional(recipe):
        yield "pixel_values", _images(recipe)
    if "input_features" in names:
        yield "input_features", _spectrogram(recipe)
    if "input_values" in names:
        yield "input_values", _waveform(recipe)
    if _is_encoder_decoder(recipe) and "decoder_input_ids" in names:
        yield "decoder_input_ids", _token_ids(recipe, max(1, recipe.length // 2))
    if "use_cache" in names:
        yield "use_cache", False


def _is_encoder_decoder(recipe: _Recipe) -> bool:
    return bool(getattr(recipe.model.config, "is_encoder_decoder", False))


def _images_are_optional(recipe: _Recipe) -> bool:
    """A language model that can also see: text alone is a valid input, and the simpler one."""
    return recipe.setting("image_token_id", "image_token_index", "boi_token_id") is not None


def _text_inputs(recipe: _Recipe) -> Iterator[tuple[str, Any]]:
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


def _token_ids(recipe: _Recipe, length: int) -> torch.Tensor:
    """Random ordinary tokens [B, L]; the last is the end token, which some models pool at."""
    vocabulary = int(recipe.setting("vocab_size", default=100))
    special = {
        value
        for part in _configs(recipe.model.config)
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


def _images(recipe: _Recipe) -> torch.Tensor:
    size = recipe.setting("image_size", "input_size", default=DEFAULT_IMAGE)
    height, width = size[-2:] if isinstance(size, list | tuple) else (size, size)
    channels = int(recipe.setting("num_channels", "in_channels", default=3))
    frames = recipe.setting("num_frames")
    video = (int(frames),) if frames is not None else ()
    return recipe.floats(recipe.batch, *video, channels, int(height), int(width))


def _spectrogram(recipe: _Recipe) -> torch.Tensor:
    """[B, mel, T] with the fixed T of Whisper, else [B, T, features]."""
    bins = recipe.setting("num_mel_bins")
    positions = recipe.setting("max_source_positions")
    if bins is not None and getattr(recipe.model.config, "model_type", "") == "whisper":
        return recipe.floats(recipe.batch, int(bins), 2 * int(positions))
    features = recipe.setting(
        "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", default=80
    )
    return recipe.floats(recipe.batch, recipe.length, int(features))


def _waveform(recipe: _Recipe) -> torch.Tensor:
    """[B, T] samples that give about ``length`` frames, or the [B, T, mel] of AST."""
    strides = recipe.setting("conv_stride")
    if strides is None and recipe.setting("num_mel_bins") is not None:
        frames = int(recipe.setting("max_length", default=recipe.length))
        return recipe.floats(recipe.batch, frames, int(recipe.setting("num_mel_bins")))
    return recipe.floats(recipe.batch, recipe.length * math.prod(strides or (320,)))


# diffusers


def _diffusion_inputs(recipe: _Recipe) -> Iterator[tuple[str, Any]]:
    names = recipe.parameters
    main = next((n for n in ("hidden_states", "sample") if n in names), None)
    if main is not None:
        yield main, _latents(recipe)
    if "timestep" in names:
        yield "timestep", recipe.below(1000, recipe.batch).to(_timestep_dtype(recipe))
    yield from _conditions(recipe)
    yield from _position_ids(recipe)


def _packed(recipe: _Recipe) -> bool:
    """Whether latents come as a sequence [B, S, C] with explicit position ids (Flux)."""
    return "img_ids" in recipe.parameters


def _timestep_dtype(recipe: _Recipe) -> torch.dtype:
    return recipe.dtype if _packed(recipe) else torch.long


def _latents(recipe: _Recipe) -> torch.Tensor:
    channels = int(recipe.setting("in_channels", default=4))
    if _packed(recipe):
        return recipe.floats(recipe.batch, recipe.length, channels)
    size = recipe.setting("sample_size", default=None)
    height, width = size if isinstance(size, list | tuple) else (size or 32, size or 32)
    height = int(recipe.setting("sample_height", default=height))
    width = int(recipe.setting("sample_width", default=width))
    patch = recipe.setting("patch_size")
    frames = recipe.setting("sample_frames", "num_frames")
    if isinstance(patch, list | tuple) and len(patch) == 3:  # [B, C, F, H, W], Wan and its kin
        return recipe.floats(recipe.batch, channels, 4 * int(patch[0]), height, width)
    if frames is not None:  # [B, F, C, H, W], CogVideoX
        ratio = int(recipe.setting("temporal_compression_ratio", default=1))
        count = (int(frames) - 1) // ratio + 1
        return recipe.floats(recipe.batch, count, channels, height, width)
    return recipe.floats(recipe.batch, channels, height, width)


def _conditions(recipe: _Recipe) -> Iterator[tuple[str, Any]]:
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
    pooled = recipe.setting("pooled_projection_dim")
    if "pooled_projections" in names and pooled is not None:
        yield "pooled_projections", recipe.floats(recipe.batch, int(pooled))
    if "added_cond_kwargs" in names and recipe.setting("use_additional_conditions") is not True:
        yield "added_cond_kwargs", {"resolution": None, "aspect_ratio": None}
    if "guidance" in names and recipe.setting("guidance_embeds"):
        yield "guidance", recipe.floats(recipe.batch)


def _text_length(recipe: _Recipe) -> int:
    return max(1, recipe.length // 2)


def _position_ids(recipe: _Recipe) -> Iterator[tuple[str, Any]]:
    """Flux: [S, 3] ids of the image rows and columns, [T, 3] zeros for the text."""
    if _packed(recipe):
        columns = max(1, math.isqrt(recipe.length))
        index = torch.arange(recipe.length)
        ids = torch.stack([torch.zeros_like(index), index // columns, index % columns], dim=1)
        yield "img_ids", ids.to(recipe.dtype)
        yield "txt_ids", torch.zeros(_text_length(recipe), 3, dtype=recipe.dtype)


# from a file


def read_inputs(path: Path, model: torch.nn.Module) -> Inputs:
    """The tensors of a safetensors file as arguments of ``model.forward``.

    Raises `CheckpointError` for an unreadable file, a name that is no argument (with the nearest
    one), a rank or kind of number that the argument cannot have, or a needed argument that lacks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read the inputs {path} ({error}); expected a safetensors file"
        ) from error
    parameters = inspect.signature(model.forward).parameters
    _check_names(path, model, parameters, tensors)
    _check_kinds(path, model, tensors)
    kwargs: dict[str, Any] = dict(tensors)
    if "use_cache" in parameters and "use_cache" not in kwargs:
        kwargs["use_cache"] = False
    _check_complete(model, parameters, kwargs)
    shown = ", ".join(_shape_text(name, value) for name, value in tensors.items())
    return Inputs(kwargs, (f"inputs from {path.name}: {shown}",))


def _check_names(
    path: Path,
    model: torch.nn.Module,
    parameters: Mapping[str, inspect.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in tensors:
        near = difflib.get_close_matches(name, parameters, n=1)
        if name not in parameters and (near or not open_ended):
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(
                f"{path} has a tensor {name!r}, which is no argument of "
                f"{type(model).__name__}.forward{hint or ' (' + ', '.join(parameters) + ')'}"
            )


def _check_kinds(path: Path, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare with generated inputs, where some can be generated for this model."""
    if not hasattr(model, "config"):
        return
    try:
        expected = generate_inputs(model, batch=None, length=None).kwargs
    except CheckpointError:
        return
    for name, tensor in tensors.items():
        like = expected.get(name)
        if not isinstance(like, torch.Tensor):
            continue
        if tensor.dim() != like.dim():
            raise CheckpointError(
                f"{path}: {name} has {tensor.dim()} dimensions {list(tensor.shape)}, expected "
                f"{like.dim()} as in {list(like.shape)}"
            )
        if tensor.is_floating_point() and not like.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} has {tensor.dtype} values, expected whole numbers ({like.dtype})"
            )
