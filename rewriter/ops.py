"""Registers every operator that a saved program may call: ``import attn_rewrite.ops``.

Enough before a bare ``torch.export.load``.  The Triton operators are registered where triton is
installed.
"""

import importlib.util

from attn_rewrite.backends.torch.mapped import mapped_attention
from attn_rewrite.backends.torch.ops import tile_counts, tiled_attention, tiled_attention_lse

if importlib.util.find_spec("triton") is not None:
    import attn_rewrite.backends.triton.ops
    import attn_rewrite.backends.triton.serving_ops  # noqa: F401

__all__ = ["mapped_attention", "tile_counts", "tiled_attention", "tiled_attention_lse"]
