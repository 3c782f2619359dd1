"""Rows of transformers: every model type of ``MODEL_MAPPING``, shrunk by one rule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from attn_rewrite.checkpoints.inputs import generate_inputs
from tests.zoo.rows import Row

_WIDTHS = (
    r"hidden_size|d_model|n_embd|embed_dim|embedding_size|^dim$|hidden_dim|projection_dim|"
    r"d_embed|width$"
)

# One rule for every configuration: (pattern of an attribute that is a number, its new value).
# The first pattern that matches decides; a number smaller than the new one stays.
_SMALLER: tuple[tuple[str, int], ...] = (
    (r"window|sliding", 8),
    (r"max.*position|n_positions|max_seq|max_source|max_target|context_length$|seq_length$", 256),
    (r"vocab_size$|num_embeddings$", 99),
    (r"(num|n)_.*experts.*tok|top_?k|experts_per", 2),
    (r"(num|n)_(local_|routed_)?experts|(num|n)_shared_experts", 4),
    (r"(key_value|kv|_kv_).*heads|num_kv", 2),
    (r"heads?$|n_head|num_heads", 4),
    (r"head_dim$|d_kv$|_dim_head$|qk_nope|qk_rope|v_head|kv_channels|head_size", 8),
    (r"lora_rank$|_rank$", 16),
    (r"layers?$|n_layer|num_blocks|depth$|num_hidden_layers", 2),
    (r"ffn|intermediate|d_ff|inner|mlp_dim|feed_forward|n_inner", 64),
    (_WIDTHS, 32),
    (r"mel_bins|num_queries|num_latents|num_query", 16),
    (r"image_size$|input_size$", 64),
)  # fmt: skip


def shrink(config: Any, seen: set[int] | None = None) -> Any:
    """Make a configuration small, and those nested in it."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return config
    seen.add(id(config))
    # A list of heads per stage goes with a width that they divide.
    staged = any(isinstance(v, (list, tuple)) and "heads" in n for n, v in vars(config).items())
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            shrink(value, seen)
        elif isinstance(value, int) and not isinstance(value, bool):
            if not (staged and re.search(_WIDTHS, name)):
                _assign(config, name, _small(name, value, vars(config)))
        elif name in ("depths", "num_layers") and isinstance(value, (list, tuple)):
            _assign(config, name, [min(v, 2) for v in value])
        elif name in ("layer_types", "mlp_layer_types", "attention_types") and isinstance(
            value, list
        ):
            _assign(config, name, _mixed(value))
    _ordinary_tokens(config)
    return config


def _assign(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, ValueError):
        return  # a read-only alias of another attribute


def _small(name: str, value: int, around: dict[str, Any]) -> int:
    if name.endswith(("_id", "_index", "_ids")) or name in ("num_channels", "patch_size"):
        return value
    for pattern, small in _SMALLER:
        if re.search(pattern, name):
            if name == "image_size" and isinstance(around.get("patch_size"), int):
                small = max(small, 4 * around["patch_size"])
            return min(value, small) if value > 0 else value
    return value


def _mixed(kinds: list[Any]) -> list[Any]:
    """Two layers that show as many kinds as two layers can."""
    return [kinds[0], next((k for k in kinds if k != kinds[0]), kinds[0])]


def _ordinary_tokens(config: Any) -> None:
    """Special tokens within the small vocabulary."""
    limit = vars(config).get("vocab_size", 99)
    limit = limit if isinstance(limit, int) else 99
    place = limit - 1
    for name, value in list(vars(config).items()):
        special = name.endswith(("_token_id", "_token_index", "_token_ids"))
        if special and isinstance(value, int) and value >= limit:
            _assign(config, name, place)
            place -= 1


def build(kind: str, spelling: str, batch: int = 2, length: int = 12) -> Any:
    """(model, args, kwargs) of a model type."""
    from transformers import AutoConfig, AutoModel

    config = shrink(AutoConfig.for_model(kind))
    # The default experts are a kernel that takes no float64, which the reference needs.
    model = AutoModel.from_config(
        config, attn_implementation=spelling, experts_implementation="batched_mm"
    )
    model.eval()
    inputs = generate_inputs(model, batch=batch, length=length).kwargs
    return model.to(torch.float32), (), inputs


def rows() -> Iterator[Row]:
    """Every model type, eager and sdpa."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind in MODEL_MAPPING_NAMES:
        for spelling in ("eager", "sdpa"):
            yield Row("transformers", kind, spelling, partial(build, kind, spelling))
