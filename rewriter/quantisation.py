"""What the report says of quantised sites: passes over the keys, and that a CPU gains nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from attn_rewrite.cascade.count import count_passes
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.reordered import in_order
from attn_rewrite.cascade.staged import StagedAttention, as_staged, core_of, stages_of
from attn_rewrite.passes.cascade.fusion import fuse_reductions
from attn_rewrite.site import Refusal

if TYPE_CHECKING:
    from attn_rewrite.driver import Decision
    from attn_rewrite.plan import Plan

_NO_GAIN = (
    "quantised attention gains no time on a CPU: codes are made and multiplied exactly, to measure "
    "accuracy and to export; no plan chooses it for speed here"
)


def notes(decisions: Iterable[Decision], plan: Plan) -> Iterator[str]:
    """One sentence per policy and cascade that quantises, and one on speed where a CPU runs it."""
    decisions = tuple(decisions)
    yield from _gates(decisions)
    counted: dict[tuple[str, str], int] = {}
    on_cpu = False
    for item in decisions:
        if item.cascade is None or item.kernel is None:
            continue
        staged = as_staged(in_order(item.cascade))
        if staged is None or (not staged.stages and staged.probability is None):
            continue
        label = "; ".join(step.label for step in plan.of(item.site.name))
        key = (label, _passes(in_order(item.cascade)))
        counted[key] = counted.get(key, 0) + 1
        on_cpu |= item.site.inputs["Q"].node.meta["val"].device.type == "cpu"
    for (label, passes), sites in counted.items():
        yield f"{label}, {sites} site{'s' * (sites > 1)}: {passes}"
    if on_cpu:
        yield _NO_GAIN


def _gates(decisions: Iterable[Decision]) -> Iterator[str]:
    """How many heads have a gate, and where its error is found."""
    heads = [len(g.heads) for d in decisions if d.kernel is not None for g in d.gates]
    if heads:
        yield (
            f"gated: {sum(heads)} heads of {len(heads)} sites got a gate with parameters of its "
            "own; errors of a site are those of the attention before its gate, the end-to-end "
            "error has both"
        )


@lru_cache(maxsize=256)
def _passes(cascade: Cascade) -> str:
    """``4 passes over the keys, 3 of them to make scales and codes``, and what stays apart."""
    staged = as_staged(cascade)
    assert staged is not None
    first = count_passes(stages_of(staged), "kv") if _touches_keys(staged) else 0
    core = core_of(staged, cascade.name)
    fused = fuse_reductions(core, "kv")
    refused = isinstance(fused, Refusal)
    rest = count_passes(core, "kv") if isinstance(fused, Refusal) else fused.passes
    text = f"{first + rest} passes over the keys, {first} of them to make scales and codes"
    if refused:
        text += "; rounding depends on the row maximum, so the attention itself is not one pass"
    return text


def _touches_keys(staged: StagedAttention) -> bool:
    return any(r.tensor in ("K", "V") for e in staged.stages for r in e.reads())
