"""What is known of a model when inputs for it are made up: signature, configuration, sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Recipe:
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
        for config in configs(getattr(self.model, "config", None)):
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


def configs(config: Any) -> Iterator[Any]:
    """A configuration, then those nested in it: of text, vision and audio first."""
    if config is None:
        return
    yield config
    if isinstance(config, Mapping):
        return
    first = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
    for name in dict.fromkeys((*first, *vars(config))):
        part = vars(config).get(name)
        if part is not None and hasattr(part, "to_dict"):
            yield part


def position_limit(model: torch.nn.Module) -> int | None:
    """The longest sequence that the learned positions of ``model`` allow, None without a limit."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, Mapping):
        return None
    limits = [
        value
        for part in configs(config)
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


def caches(model: torch.nn.Module) -> bool:
    """Whether ``model`` returns its keys and values for the next step unless told otherwise."""
    return any(vars(part).get("use_cache") for part in _all_configs(model))


def stop_caching(model: torch.nn.Module) -> bool:
    """Turn the key/value cache of ``model`` off in its configuration; whether it was on."""
    was_on = caches(model)
    for part in _all_configs(model):
        if vars(part).get("use_cache"):
            part.use_cache = False
    return was_on


def _all_configs(model: torch.nn.Module) -> Iterator[Any]:
    """Configurations of the model and of its parts: a decoder may hold a copy of its own (T5)."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or isinstance(config, Mapping):  # the latter: of a diffusers model
            continue
        for part in configs(config):
            if id(part) not in seen:
                seen.add(id(part))
                yield part
