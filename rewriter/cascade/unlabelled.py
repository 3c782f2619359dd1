"""An iterative rank written without labels: which Einsums are its init block and its body.

The paper writes ``S[0] = 0 ; S[i+1] = S[i] + A[i] ; stop when i >= K``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_rewrite.cascade.expr import ranks_of
from attn_rewrite.cascade.ir import Einsum


@dataclass(frozen=True)
class LoopParts:
    """Einsums before, in the init block of, in the body of and after an iterative rank."""

    before: tuple[Einsum, ...]
    init: tuple[Einsum, ...]
    body: tuple[Einsum, ...]
    after: tuple[Einsum, ...]


def split_loop(einsums: Sequence[Einsum], rank: str) -> LoopParts:
    """Tell the parts of a loop over ``rank`` apart.

    The body reaches from the first to the last Einsum that uses the coordinate; what stands ahead
    of it and writes a tensor that the body writes as well gives that tensor its initial value.
    """
    steps = [n for n, e in enumerate(einsums) if _uses(e, rank)]
    if not steps:
        return LoopParts((), tuple(einsums), (), ())
    first, last = steps[0], steps[-1] + 1
    body = tuple(einsums[first:last])
    states = {e.out.tensor for e in body}
    ahead = einsums[:first]
    return LoopParts(
        tuple(e for e in ahead if e.out.tensor not in states),
        tuple(e for e in ahead if e.out.tensor in states),
        body,
        tuple(einsums[last:]),
    )


def _uses(e: Einsum, rank: str) -> bool:
    parts = (e.expr, e.guard, *e.out.index)
    return any(rank in ranks_of(p) for p in parts) or any(r == rank for r, _ in e.reduce)
