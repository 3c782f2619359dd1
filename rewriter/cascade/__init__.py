"""Cascades of Einsums: what every attention is raised to, and what can be asked of it.

Public names are lazy: importing this package imports neither torch nor sympy nor networkx.  No
submodule has the name of a public function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_rewrite.backends.torch.einsums import lower_cascade_to_callable
    from attn_rewrite.cascade.canonical import diff, equivalent, normal_form
    from attn_rewrite.cascade.count import count_passes, live_footprint, pass_analysis
    from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, TensorDecl
    from attn_rewrite.cascade.named import NAMED
    from attn_rewrite.cascade.operations import operation_counts
    from attn_rewrite.cascade.oracle import interpret
    from attn_rewrite.cascade.picture import to_svg
    from attn_rewrite.cascade.text import parse, parse_expr
    from attn_rewrite.passes.cascade import (
        defer_scalar,
        fuse_reductions,
        merge_statistics_pass,
        partition_rank,
    )

_HOME = {
    "Cascade": "attn_rewrite.cascade.ir",
    "Einsum": "attn_rewrite.cascade.ir",
    "Loop": "attn_rewrite.cascade.ir",
    "RankDecl": "attn_rewrite.cascade.ir",
    "TensorDecl": "attn_rewrite.cascade.ir",
    "NAMED": "attn_rewrite.cascade.named",
    "parse": "attn_rewrite.cascade.text",
    "parse_expr": "attn_rewrite.cascade.text",
    "interpret": "attn_rewrite.cascade.oracle",
    "count_passes": "attn_rewrite.cascade.count",
    "live_footprint": "attn_rewrite.cascade.count",
    "pass_analysis": "attn_rewrite.cascade.count",
    "fuse_reductions": "attn_rewrite.passes.cascade",
    "merge_statistics_pass": "attn_rewrite.passes.cascade",
    "defer_scalar": "attn_rewrite.passes.cascade",
    "partition_rank": "attn_rewrite.passes.cascade",
    "normal_form": "attn_rewrite.cascade.canonical",
    "equivalent": "attn_rewrite.cascade.canonical",
    "diff": "attn_rewrite.cascade.canonical",
    "operation_counts": "attn_rewrite.cascade.operations",
    "to_svg": "attn_rewrite.cascade.picture",
    "lower_cascade_to_callable": "attn_rewrite.backends.torch.einsums",
}

__all__ = [
    "NAMED",
    "Cascade",
    "Einsum",
    "Loop",
    "RankDecl",
    "TensorDecl",
    "count_passes",
    "defer_scalar",
    "diff",
    "equivalent",
    "fuse_reductions",
    "interpret",
    "live_footprint",
    "lower_cascade_to_callable",
    "merge_statistics_pass",
    "normal_form",
    "operation_counts",
    "parse",
    "parse_expr",
    "partition_rank",
    "pass_analysis",
    "to_svg",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
