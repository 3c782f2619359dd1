"""A packed cache for `generate` of transformers: ``past_key_values=packed_cache(bits=4)``."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from attn_rewrite.backends.torch.packed_cache import PackedCache


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer, stored in few bits; models get numbers from it.

    The prompt's own step sees its keys and values as they are, as KIVI has it; later steps see
    codes and the window.
    """

    is_croppable = False

    def __init__(self, bits: int, group: int, residual: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.packed = PackedCache(bits, group, residual)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember the type and the device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; all keys and values as numbers."""
        first = not self.packed.length
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.packed.append(key_states, value_states)
        if first:
            return key_states, value_states
        return self.packed.keys(), self.packed.values()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys with the queries' own, and where they begin."""
        return self.packed.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.packed.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.packed.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams."""
        if self.packed.length:
            self.packed.select(beam_idx.to(self.device))


def packed_cache(bits: int = 4, group: int = 32, residual: int = 128) -> Cache:
    """An empty cache of as many layers as the model asks for.  Approximate.

    ``bits`` are 2, 4 or 8; ``group`` tokens (keys) or channels (values) share a scale; the last
    ``residual`` tokens stay as they are.  Raises `ValueError` for other bits.
    """
    PackedCache(bits, group, residual)  # what is wrong is said here, not in the first step
    layer: Any = partial(PackedLayer, bits, group, residual)
    return Cache(layer_class_to_replicate=layer)
