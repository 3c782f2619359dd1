"""Cascades lowered to PyTorch operators: `lower`, and `lower_cascade_to_callable` for any one."""

from attn_rewrite.backends.torch.einsums import lower_cascade_to_callable
from attn_rewrite.backends.torch.lower import Kernel, lower
from attn_rewrite.backends.torch.ops import tile_counts, tiled_attention

__all__ = ["Kernel", "lower", "lower_cascade_to_callable", "tile_counts", "tiled_attention"]
