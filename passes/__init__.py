"""Passes over FX graphs and cascades; one pass, pattern or scheme per file.

`TRANSFORMS` maps every name a policy may use to its class.
"""

from collections.abc import Mapping

from attn_rewrite.passes.edit import EDITS
from attn_rewrite.passes.quantize import SCHEMES
from attn_rewrite.passes.reorder import ORDERS
from attn_rewrite.passes.sparse import PATTERNS
from attn_rewrite.passes.transform import Transform, collect

TRANSFORMS: Mapping[str, type[Transform]] = collect(
    "attn_rewrite.passes",
    (
        "keep:Keep",
        "keep:Exact",
        *(f"reorder.{entry}" for entry in ORDERS),
        *(f"sparse.{entry}" for entry in PATTERNS),
        *(f"edit.{entry}" for entry in EDITS),
        *(f"quantize.{entry}" for entry in SCHEMES),
    ),
)
