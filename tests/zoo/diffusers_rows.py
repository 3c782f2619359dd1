"""Rows of diffusers: every denoiser class that it exports, shrunk by one rule."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from attn_rewrite.checkpoints.inputs import generate_inputs
from tests.zoo.rows import NotOfferedError, Row

HEADS = 2
# Parameters; the reference takes eight bytes for each.
LARGEST = 150_000_000
# One rule for every constructor: (pattern of an argument that is a number, its new value).  The
# first pattern that matches decides; a number smaller than the new one stays.
_SMALLER: tuple[tuple[str, int], ...] = (
    (r"(^|_)n?layers?$|depth$|_blocks$|layers_per_block", 2),
    (r"^sample_(size|width|height)$|^image_size$", 8),
    (r"sample_frames$|video_length$|^num_frames$", 5),
    (r"seq_length$|sequence_length$|^text_len", 8),
    (r"pos_embed_max_size$|num_embeddings$|image_seq_len", 16),
    (r"norm_num_groups$|^groups$", 8),
    (r"experts$", 4),
    (r"experts_activated|num_activated", 2),
    (r"time_embed_dim$|time_dim$", 32),
    (r"^projection_class_embeddings", 96),
    (r"num_layers_per_block$", 1),
    (r"_gist_tokens$", 4),
    (r"motion_encoder_size$", 16),
    (r"ffn|ff_dim|ff_inner|intermediate|approximator_hidden|moe_", 64),
    (r"vocab_size$|codebook_size$", 99),
    (r"(text|caption|cap_|context|joint|pooled|cond|crossattn|encoder_hid|llm|image_embed|image_proj)"
     r".*(dim|channels|size)|^cross_attention_dim|proj_dim$|^motion_.*dim$", 32),
)  # fmt: skip
# Arguments that have no default and that a model cannot do without.
_MISSING = {
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "num_kv_heads": HEADS,
    "caption_channels": 32,
    "llama_layers": [0, 0, 1, 1],  # one for each block
}
# Parts that are off by default although the forward needs them, and one that needs torchvision.
_SWITCHES = {"has_image_proj": True, "has_clean_x_embedder": True, "concat_padding_mask": False}
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "nheads", "dit_heads")
_WIDTHS = ("hidden_size", "dim", "model_dim", "embed_dim", "dit_dim", "token_dim")


def small_arguments(signature: inspect.Signature) -> dict[str, Any]:
    """Arguments of a constructor, made small: two heads, and every width that the heads decide."""
    default = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    widths = _inner_widths(default)
    out: dict[str, Any] = {}
    for name, value in default.items():
        small = _small(name, value, default, widths)
        if small != value:
            out[name] = small
    if isinstance(signature.parameters.get("caption_channels"), inspect.Parameter):
        out |= _caption(signature.parameters["caption_channels"], default)
    if default.get("rope_scaling", 0) is None and "original_max_position_embeddings" in default:
        half = default["hidden_size"] // default["num_attention_heads"] // 2
        out["rope_scaling"] = {n: [1.0] * half for n in ("short_factor", "long_factor")}
    if default.get("time_embedding_type") == "fourier" and "extra_in_channels" in default:
        # The first block takes the step as channels, and the library's default leaves none for it.
        out["extra_in_channels"] = (
            2 * out.get("block_out_channels", default["block_out_channels"])[0]
        )
    return out


def _caption(parameter: inspect.Parameter, default: dict[str, Any]) -> dict[str, Any]:
    """Of a text that is projected: its width, or two of them, and that which blocks then see."""
    out: dict[str, Any] = {}
    if parameter.default is None and "list" in str(parameter.annotation):
        out["caption_channels"] = [32, 32]
    if default.get("cross_attention_dim", 0) is None:
        out["cross_attention_dim"] = HEADS * default["attention_head_dim"]
    return out


def _inner_widths(default: dict[str, Any]) -> dict[int, int]:
    """What every width that is heads times their width becomes."""
    out: dict[int, int] = {}
    for name, heads in default.items():
        if not isinstance(heads, int) or isinstance(heads, bool) or not name.endswith(_HEADS):
            continue
        start = name.removesuffix("num_attention_heads")
        each = default.get(f"{start}attention_head_dim", default.get(f"{start}head_dim"))
        if isinstance(each, int):
            out[heads * each] = HEADS * each
    heads = next((v for n, v in default.items() if n in _HEADS and isinstance(v, int)), None)
    axes = next((v for n, v in default.items() if re.search(r"axes_dim|rope_(axes_)?dim", n)), None)
    width = next((v for n, v in default.items() if n in _WIDTHS and isinstance(v, int)), None)
    each = default.get("attention_head_dim")
    if width and heads:
        out[width] = HEADS * (each if isinstance(each, int) else width // heads)
    elif width and isinstance(axes, (list, tuple)):
        out[width] = HEADS * sum(axes)
    return out


def _small(name: str, value: Any, default: dict[str, Any], widths: dict[int, int]) -> Any:
    if value is None:
        return _missing(name, default)
    if name in _SWITCHES:
        return _SWITCHES[name]
    if name == "pad_token_id":
        return 0
    if isinstance(value, (list, tuple)):
        return _small_list(name, value, default)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value in widths:
        return widths[value]
    if name == "attention_head_dim" and "block_out_channels" in default:
        return min(value, 8)
    if name.endswith("heads"):
        queries = default.get("num_attention_heads", default.get("n_heads"))
        return HEADS if value == queries or not re.search("kv|key", name) else 1
    rule = (small for pattern, small in _SMALLER if re.search(pattern, name))
    return min(value, next(rule, value))


def _missing(name: str, default: dict[str, Any]) -> Any:
    """What an argument without a default becomes; Transformer2DModel chooses by what is None."""
    chooses = "num_vector_embeds" in default and name != "in_channels"
    return None if chooses else _MISSING.get(name)


def _small_list(name: str, value: Any, default: dict[str, Any]) -> Any:
    kind = type(value)
    if name == "block_out_channels":
        return kind(32 * min(2, round(v / min(value))) for v in value)
    if name.endswith("heads") and "block_out_channels" in default:
        return kind(HEADS for _ in value)
    if re.search(r"layers$|layer_ids$|_blocks$", name) and _numbers(value):
        return kind(v for v in value if v < 2) or kind([0])
    rest = default.get("attention_head_dim", 0)
    if name == "axes_dims_rope" and isinstance(rest, int) and 0 < sum(value) < rest:
        return kind((rest - sum(value), *value))  # the axes of a head fill it
    if name.endswith("num_layers_per_block") and _numbers(value):
        return kind(1 for _ in value)
    return value


def _numbers(value: Any) -> bool:
    return bool(value) and all(type(v) is int for v in value)


def build(kind: str, spelling: str, batch: int = 2, length: int = 16) -> Any:
    """(model, args, kwargs) of a class in its default or its eager spelling."""
    import diffusers

    cls = getattr(diffusers, kind)
    arguments = small_arguments(inspect.signature(cls.__init__))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(**arguments).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters are too many for a test")
    model = cls(**arguments).eval()
    if spelling == "eager":
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        if {type(p) for p in model.attn_processors.values()} != {AttnProcessor2_0}:
            raise NotOfferedError(f"{kind} has no eager attention processor")
        model.set_attn_processor(AttnProcessor())
    for parameter in model.parameters():  # many a gate starts at zero and would hide the attention
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    inputs = generate_inputs(model, batch=batch, length=length).kwargs
    return model, (), inputs


def rows() -> Iterator[Row]:
    """Every transformer and U-Net that ``diffusers`` exports."""
    import diffusers
    from diffusers.models import transformers, unets

    for module in (transformers, unets):
        for kind in sorted(n for n in dir(module) if n[0].isupper() and hasattr(diffusers, n)):
            # Only classes that take the processors of U-Nets have an eager one.
            old = hasattr(getattr(diffusers, kind), "set_default_attn_processor")
            for spelling in ("sdpa", "eager") if old else ("sdpa",):
                yield Row("diffusers", kind, spelling, partial(build, kind, spelling))
