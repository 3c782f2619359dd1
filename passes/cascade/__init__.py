"""Rewrites of cascades: deferral, partitioning and the derivation of one-pass forms.

Public names are lazy (the proofs need sympy, counting needs networkx).  No submodule has the name
of a public function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_rewrite.passes.cascade.deferral import defer_scalar
    from attn_rewrite.passes.cascade.fusion import fuse_reductions, merge_statistics_pass
    from attn_rewrite.passes.cascade.partitioning import partition_rank
    from attn_rewrite.passes.cascade.proof import Fusion, FusionRefusal, Proof
    from attn_rewrite.passes.cascade.separability import Counterexample

_HOME = {
    "Counterexample": "separability",
    "Fusion": "proof",
    "FusionRefusal": "proof",
    "Proof": "proof",
    "defer_scalar": "deferral",
    "fuse_reductions": "fusion",
    "merge_statistics_pass": "fusion",
    "partition_rank": "partitioning",
}

__all__ = [
    "Counterexample",
    "Fusion",
    "FusionRefusal",
    "Proof",
    "defer_scalar",
    "fuse_reductions",
    "merge_statistics_pass",
    "partition_rank",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
