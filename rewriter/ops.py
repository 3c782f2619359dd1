"""Registers every operator that a saved program may call: ``import attn_rewrite.ops``.

Enough before a bare ``torch.export.load``.
"""

from attn_rewrite.backends.torch.mapped import mapped_attention
from attn_rewrite.backends.torch.ops import tile_counts, tiled_attention

__all__ = ["mapped_attention", "tile_counts", "tiled_attention"]
