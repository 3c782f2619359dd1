"""Fusion of attention whose operands are computed first: the stages stay, the rest is fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attn_rewrite.cascade.count import count_passes
from attn_rewrite.cascade.ir import Cascade, TensorDecl
from attn_rewrite.cascade.staged import as_staged, core_of, stages_of
from attn_rewrite.passes.cascade.proof import Fusion
from attn_rewrite.site import Refusal


def fused_after_stages(
    cascade: Cascade, rank: str, fuse: Callable[[Cascade], Fusion | Refusal]
) -> Fusion | Refusal | None:
    """``fuse`` on what follows the stages of ``cascade``; None where it has no stages.

    Scales of blocks of keys are complete before the first product, so for the rules they are inputs
    like any other.  Passes are those of the stages and of the rest together.
    """
    staged = as_staged(cascade)
    if staged is None or not staged.stages:
        return None
    first = stages_of(staged, cascade.name)
    found = fuse(core_of(staged, cascade.name))
    if isinstance(found, Refusal):
        return found
    before = count_passes(cascade, rank)
    whole = _joined(cascade, first, found.cascade)
    after = count_passes(first, rank) + found.passes
    return replace(found, cascade=whole, passes_before=before, passes=after)


def _joined(cascade: Cascade, first: Cascade, rest: Cascade) -> Cascade:
    """The stages, and then the fused rest, on the inputs of the whole."""
    names = {r.name for r in rest.ranks}
    ranks = (*rest.ranks, *(r for r in cascade.ranks if r.name not in names))
    have = {t.name for t in rest.tensors}
    tensors: tuple[TensorDecl, ...] = tuple(t for t in first.tensors if t.name not in have)
    return replace(
        rest, ranks=ranks, inputs=cascade.inputs, body=(*first.body, *rest.body),
        tensors=(*tensors, *rest.tensors),
    )  # fmt: skip
