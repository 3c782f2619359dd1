"""Sequences of different lengths laid end to end: no padding is stored or computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_rewrite.backends.triton.choose import unlisted
from attn_rewrite.backends.triton.launch import Call, launch, result_dtype, without_gradients
from attn_rewrite.backends.triton.packed import extents_by_rank
from attn_rewrite.backends.triton.prepare import (
    default_of,
    emitted,
    lanes_of,
    stages,
    tuned_for,
    widened,
    with_lse,
)
from attn_rewrite.backends.triton.program import Program
from attn_rewrite.backends.triton.same import Same
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.errors import LowerError


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where sequences begin: ``q_starts`` and ``kv_starts`` int32 [b + 1], and the longest ones."""

    q_starts: Tensor
    kv_starts: Tensor
    longest_q: int
    longest_kv: int


def attend_varlen(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    sequences: Sequences,
    schedule: Schedule | None = None,
    *,
    wrap: bool = False,
) -> dict[str, Tensor]:
    """AV [h, tokens, f] and LSE [h, tokens] of sequences laid end to end.

    ``inputs`` has Q [h, tokens, d], K [hkv, tokens, d], V [hkv, tokens, f] and further inputs of
    the cascade: [1, .., tokens] where they have a batch rank (then not both ranks of the scores),
    else by position, for every sequence alike.  Positions and lengths in the mask are those of each
    sequence.  Reassociated.  ``wrap`` as in
    `launch`.  Without gradients: `LowerError` where one is asked for.
    """
    without_gradients("attend_varlen", inputs)
    both = [t.name for t in cascade.inputs if {"b", "q", "kv"} <= set(t.ranks)]
    if both:
        raise LowerError(
            f"{both[0]} has a value for every pair of each batch entry, which sequences end to end "
            "lack; give one that is the same for all, [h, q, kv]"
        )
    program = program_of(cascade)
    wide = {n: t[None] if n in ("Q", "K", "V") else t for n, t in inputs.items()}
    lanes = lanes_of(program, wide)
    first = wide["Q"]
    chosen = schedule or tuned_for(program, wide, "varlen", tuning(sequences))
    chosen = widened(chosen or default_for(program, wide, sequences.longest_q), wide)
    skipping = unlisted(program, chosen)
    source = emitted(program, chosen.with_(varlen=True, skipping=skipping), lanes, "varlen")
    sizes = {**extents_by_rank(program.cascade.inputs, wide), **tuning(sequences)}
    ranks: dict[str, Sequence[str]] = {t.name: t.ranks for t in program.cascade.inputs}
    outputs = {}
    for o in source.outputs:
        shape = [{"b": 1, "q": first.shape[2]}.get(r, sizes[r]) for r in o.ranks]
        kind = result_dtype(wide.values()) if set(lanes) & set(o.ranks) else torch.float32
        outputs[o.name] = torch.empty(shape, dtype=kind, device=first.device)
        ranks[o.name] = o.ranks
    starts = {"q_starts": sequences.q_starts, "kv_starts": sequences.kv_starts}
    launch(source, Call({**wide, **starts, **outputs}, ranks, sizes), wrap=wrap)
    return {n: t[0] for n, t in outputs.items()}


def default_for(program: Program, wide: Mapping[str, Tensor], longest: int) -> Schedule:
    """The default for sequences of up to ``longest`` queries; ``wide`` have a batch of one."""
    return default_of(program, {**wide, "Q": wide["Q"][:, :, :longest]})


def tuning(sequences: Sequences) -> dict[str, int]:
    """What `tuning_key` needs to know beside the shapes of tensors laid end to end."""
    count = len(sequences.q_starts) - 1
    return {"b": count, "q": sequences.longest_q, "kv": sequences.longest_kv}


def program_of(cascade: Cascade) -> Program:
    """The program of an attention of one kernel, with log-sum-exp."""
    return _program(Same(cascade))


@lru_cache(maxsize=128)
def _program(cascade: Same[Cascade]) -> Program:
    (stage,) = stages(str(with_lse(cascade.value)))
    return stage.program
