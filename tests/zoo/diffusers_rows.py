"""Rows of diffusers: every denoiser class that it exports, shrunk by one rule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from attn_rewrite.checkpoints.inputs import generate_inputs
from tests.zoo.rows import Row

_LAYERS = ("layers", "depth", "layers_per_block", "num_blocks")
_TEXT = (
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "caption_channels",
    "pooled_projection_dim",
    "cross_attention_dim",
    "cap_feat_dim",
    "cross_attention_dim_t5",
    "pooled_projection_dim",
)
_FIXED = {
    "sample_size": 8,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "ffn_dim": 64,
    "max_text_seq_length": 8,
    "pos_embed_max_size": 16,
    "norm_num_groups": 8,
    "time_embed_dim": 32,
    "intermediate_size": 64,
}
HEADS = 2


def small_arguments(signature: inspect.Signature) -> dict[str, Any]:
    """Arguments of a constructor, made small: two heads, and every width that the heads decide."""
    default = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    heads = next(
        (
            default[n]
            for n in ("num_attention_heads", "num_heads", "n_heads")
            if isinstance(default.get(n), int)
        ),
        None,
    )
    width = default.get("attention_head_dim", default.get("head_dim"))
    inner = heads * width if heads and isinstance(width, int) else None
    out: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, bool) or value is None:
            continue
        small = _small(name, value, heads, inner, width)
        if small != value:
            out[name] = small
    return out


def _small(name: str, value: Any, heads: int | None, inner: int | None, width: Any) -> Any:
    if name == "block_out_channels":
        return tuple(16 * min(2, round(v / min(value))) for v in value)
    if not isinstance(value, int):
        return value
    if inner is not None and value == inner:
        return HEADS * width
    if heads is not None and value == heads and "heads" in name:
        return HEADS
    if name in _FIXED:
        return min(value, _FIXED[name])
    if name in _TEXT:
        return 32
    return min(value, 2) if name.endswith(_LAYERS) else value


def build(kind: str, spelling: str, batch: int = 2, length: int = 16) -> Any:
    """(model, args, kwargs) of a class in its default or its eager spelling."""
    import diffusers

    cls = getattr(diffusers, kind)
    model = cls(**small_arguments(inspect.signature(cls.__init__))).eval()
    if spelling == "eager":
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        if {type(p) for p in model.attn_processors.values()} != {AttnProcessor2_0}:
            raise ValueError(f"{kind} has no eager attention processor")
        model.set_attn_processor(AttnProcessor())
    for parameter in model.parameters():  # many a gate starts at zero and would hide the attention
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    inputs = generate_inputs(model, batch=batch, length=length).kwargs
    latents = inputs.get("hidden_states")
    if "3D" in kind and isinstance(latents, torch.Tensor) and latents.dim() == 4:
        inputs["hidden_states"] = latents.unsqueeze(2).repeat(1, 1, 2, 1, 1)  # [B, C, F, H, W]
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
