"""Rows of transformers: every model type of ``MODEL_MAPPING``, shrunk by one rule."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from attn_rewrite.checkpoints.inputs import generate_inputs
from tests.zoo.rows import NotOfferedError, Row
from tests.zoo.stand_in import timm_for_transformers

timm_for_transformers()

_WIDTHS = (
    r"hidden_size|d_model|n_embd|embed_dim|embedding_size|^dim$|hidden_dim|projection_(dim|size)|"
    r"d_embed|width$"
)

# What is made smaller where every width stays: numbers that no other number goes with.
_NO_WIDTH = r"layers?$|n_layer|num_blocks|depth$|vocab_size$|(num|n)_(local_|routed_)?experts$"
# How much of the widths is kept: none, that of a head, all.  The first that runs is taken.
WIDTHS = ("narrow", "heads", "default")
# Parameters of a model whose widths are kept; the reference takes eight bytes for each.
LARGEST = 60_000_000
# Arguments without a default that a model cannot do without.
_MISSING = {
    "vocab_size": 99,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "projector_scale_factors": [1.0],
    "vocabulary_map": {"<image>": 7, "IMGIMGA<eos>": 8},
}
# What a backbone is by name, and where it comes from.
_KEPT = ("out_features", "out_indices", "backbone")

# One rule for every configuration: (pattern of an attribute that is a number, its new value).
# The first pattern that matches decides; a number smaller than the new one stays.
_SMALLER: tuple[tuple[str, int], ...] = (
    (r"^num_windows$", 16),  # of an image: a square
    (r"window|sliding", 8),
    (r"max.*position|n_positions|max_seq|max_source|max_target|context_length$|seq_length$", 256),
    (r"vocab_size$|num_embeddings$", 99),
    (r"n_group$|num_group$", 2),
    (r"(num|n)_.*experts.*tok|top_?k|experts_per|moe_k$", 2),
    (r"(num|n)_(local_|routed_)?experts|(num|n)_shared_experts", 4),
    (r"(key_value|kv|_kv_).*heads|num_kv", 2),
    (r"heads?$|n_head|num_heads", 4),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"head_dim$|rotary_dim$|d_kv$|_dim_head$|qk_nope|qk_rope|v_head|kv_channels|head_size", 8),
    (r"lora_rank$|_rank$", 16),
    (r"layers?$|n_layer|num_blocks|depth$|num_hidden_layers", 2),
    (r"ffn|intermediate|d_ff|inner|mlp_dim|feed_forward|n_inner", 64),
    (_WIDTHS, 32),
    (r"mel_bins|num_queries|num_latents|num_query", 16),
    (r"image_size$|input_size$|^resolution$", 64),
    (r"^base_channels$", 32),
)  # fmt: skip


def smaller(default: Any, widths: str = "narrow") -> Any:
    """A configuration like ``default``, made again from small arguments, nested ones included.

    Made again and not changed in place, so that what a configuration derives from its arguments
    stays derived.  ``widths`` is one of `WIDTHS`.
    """
    out: dict[str, Any] = {}
    fields = {f.name: _argument(f) for f in dataclasses.fields(default)}
    # A list of heads per stage goes with a width that they divide.
    staged = any(isinstance(v, (list, tuple)) and "heads" in n for n, v in fields.items())
    for name, value in fields.items():
        now = vars(default).get(name)
        if isinstance(now, PreTrainedConfig):
            out[name] = smaller(now, widths)
        elif isinstance(value, int) and not isinstance(value, bool):
            kept = staged and re.search(_WIDTHS + r"|image_size", name)
            if not kept and (widths != "default" or re.search(_NO_WIDTH, name)):
                out[name] = _small(name, value, fields)
        elif name in ("depths", "num_layers") and isinstance(value, (list, tuple)):
            out[name] = type(value)(min(v, 2) for v in value)
        elif name in _KEPT and now != value:
            out[name] = now  # what a model takes from its backbone
        elif name == "attention_types" and value and isinstance(value[0], list):
            out[name] = [[value[0][0], 1]]  # GPT-Neo: kinds of layers, and how often
        elif name in _MISSING and not now and not value and type(now) is not int:
            out[name] = _MISSING[name]
    if widths == "heads":
        out |= _wide(default)
    out |= _layers(default, fields) | _fixed(fields)
    return _rope_axes(_ordinary_tokens(type(default)(**out)))


def _argument(field: dataclasses.Field[Any]) -> Any:
    missing = dataclasses.MISSING
    return field.default_factory() if field.default_factory is not missing else field.default


def _wide(default: Any) -> dict[str, Any]:
    """The width of ``default``'s heads, and of a model with four of them."""
    own = vars(default)
    width, heads = own.get("hidden_size"), own.get("num_attention_heads")
    known = own.get("head_dim")
    if not (isinstance(width, int) and isinstance(heads, int)):
        return {}
    each = known if isinstance(known, int) else width // heads
    names = {f.name for f in dataclasses.fields(default)}
    return {n: v for n, v in (("hidden_size", 4 * each), ("head_dim", each)) if n in names}


def _layers(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, two at least."""
    lists = {
        name: list(value)
        for name in ("layer_types", "mlp_layer_types", "attention_types", "layers_block_type")
        if name in fields
        and isinstance(value := vars(default).get(name), (list, tuple))
        and value
        and isinstance(value[0], str)
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=False))
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    places = first if len(first) > 1 else [0, min(1, len(kinds) - 1)]
    out: dict[str, Any] = {name: [values[i] for i in places] for name, values in lists.items()}
    return out | ({"num_hidden_layers": len(places)} if "num_hidden_layers" in fields else {})


def _small(name: str, value: int, around: dict[str, Any]) -> int:
    if name.endswith(("_id", "_index", "_ids")) or name in ("num_channels", "patch_size"):
        return value
    if name == "num_key_value_heads" and value == around.get("num_attention_heads"):
        name = "num_attention_heads"  # as many keys as queries stay as many
    for pattern, small in _SMALLER:
        if re.search(pattern, name):
            if name == "image_size" and isinstance(around.get("patch_size"), int):
                small = max(small, 4 * around["patch_size"])
            return min(value, small) if value > 0 else value
    return value


def _fixed(fields: dict[str, Any]) -> dict[str, Any]:
    """Weights that are not fetched, and a token that is checked against the vocabulary as the
    configuration is made."""
    out: dict[str, Any] = {"use_pretrained_backbone": False, "blank_token_id": 98}
    return {n: v for n, v in out.items() if isinstance(fields.get(n), int) and fields[n] > v}


def _rope_axes(config: Any) -> Any:
    """Of a rotary embedding over time, rows and columns: parts that fill a head, as the library's
    own parts fill the library's heads."""
    rope, own = vars(config).get("rope_parameters"), vars(config)
    modeling = type(config).__module__.replace("configuration_", "modeling_")
    if isinstance(rope, dict) and "mrope_section" in _source(modeling):
        heads = own.get("num_attention_heads") or 1
        width = own.get("head_dim") or own["hidden_size"] // heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        part = half * 3 // 8
        config.rope_parameters = {**rope, "mrope_section": [half - 2 * part, part, part]}
    return config


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    return Path(found.origin).read_text() if found is not None and found.origin else ""


def _ordinary_tokens(config: Any) -> Any:
    """Special tokens within the small vocabulary."""
    limit = vars(config).get("vocab_size", 99)
    limit = limit if isinstance(limit, int) else 99
    place = limit - 1
    for name, value in list(vars(config).items()):
        special = name.endswith(("_token_id", "_token_index", "_token_ids"))
        if special and isinstance(value, int) and value >= limit:
            _assign(config, name, place)
            place -= 1
    return config


def _assign(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, ValueError):
        return  # a read-only alias of another attribute


def build(kind: str, spelling: str, batch: int = 2, length: int = 12) -> Any:
    """(model, args, kwargs) of a model type: with narrow heads, or with as
    much of its own widths as it needs."""
    default = AutoConfig.for_model(kind)
    failure: Exception | None = None
    for widths in WIDTHS:
        try:
            model = _make(smaller(default, widths), spelling, widths)
            inputs = generate_inputs(model, batch=batch, length=length).kwargs
            with torch.no_grad():
                model(**copy.deepcopy(inputs))
        except NotOfferedError:
            raise
        except Exception as error:  # whatever the library raises of sizes that do not fit
            failure = failure or error
        else:
            return model, (), inputs
    assert failure is not None
    raise failure


def _make(config: Any, spelling: str, widths: str) -> Any:
    if widths == "default":
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters with the widths of the library are too many")
    try:
        # The default experts are a kernel that takes no float64, which the reference needs.
        model = AutoModel.from_config(
            config, attn_implementation=spelling, experts_implementation="batched_mm"
        )
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            raise NotOfferedError(f"the library has no {spelling} spelling of it") from error
        raise
    return model.eval().to(torch.float32)


def rows() -> Iterator[Row]:
    """Every model type, eager and sdpa."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for kind in MODEL_MAPPING_NAMES:
        for spelling in ("eager", "sdpa"):
            yield Row("transformers", kind, spelling, partial(build, kind, spelling))
