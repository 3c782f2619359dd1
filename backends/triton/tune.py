"""Tune the kernels of an attention on the GPU at hand; later calls find the results on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attn_rewrite.backends.triton import varlen
from attn_rewrite.backends.triton.autotune import pressure_of, tuned
from attn_rewrite.backends.triton.decode import Pages, decode, small, split_form, tuning
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.launch import check_device, run
from attn_rewrite.backends.triton.ops import backward_operands, backward_programs, tables_of
from attn_rewrite.backends.triton.prepare import (
    default_of,
    lanes_of,
    stages,
    tuning_key,
    widened,
    with_lse,
)
from attn_rewrite.backends.triton.program import Program
from attn_rewrite.backends.triton.schedule import Schedule
from attn_rewrite.backends.triton.varlen import Sequences, attend_varlen
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.errors import LowerError, ToolError


def tune(cascade: Cascade, inputs: Mapping[str, Tensor]) -> Schedule:
    """The fastest schedule for ``inputs`` (by name), timed once for their class of shapes.

    The operators use it from then on, in this process and in later ones.  Raises `LowerError`
    without a GPU, and for a cascade of more than one kernel.
    """
    check_device(list(inputs.values()))
    found = stages(str(with_lse(cascade)))
    if len(found) != 1:
        raise LowerError(f"cascade {cascade.name} takes {len(found)} kernels; one is tuned")
    return _tuned(found[0].program, inputs)


def tune_backward(
    cascade: Cascade, inputs: Mapping[str, Tensor], wanted: Sequence[str] = ()
) -> dict[str, Schedule]:
    """The fastest schedules of the backward kernels, as `tune` finds them for the forward one.

    ``wanted`` names the tensors beside Q, K and V whose gradients are trained.  The result has
    ``queries``, ``keys``, and ``reads`` where something is wanted.  Raises `LowerError` without a
    GPU, and where the attention has no gradient.
    """
    check_device(list(inputs.values()))
    text = str(cascade)
    with torch.no_grad():
        out, lse = torch.ops.attn_rewrite.triton_cascade(list(inputs.values()), None, text, "", 0.0)
        operands = backward_operands(inputs, out, out, lse, torch.zeros_like(lse))
    programs = backward_programs(text, tuple(wanted))
    return {part: _tuned(program, operands) for part, program in programs.items()}


def _tuned(program: Program, operands: Mapping[str, Tensor]) -> Schedule:
    """The best schedule of one program, from disk or timed now."""
    names = {t.name for t in program.cascade.inputs}
    mine = {n: t.detach() for n, t in operands.items() if n in names}
    lanes = lanes_of(program, mine)

    def timer(schedule: Schedule) -> float:
        source = emit(program, widened(schedule, mine), lanes)
        try:
            tables = tables_of(source, mine)
            return milliseconds(lambda: run(source, mine, tables=tables))
        except ToolError:  # the GPU cannot hold it
            return math.inf

    size = next(iter(mine.values())).element_size()
    default, key = default_of(program, mine), tuning_key(program, mine)
    return tuned(key, default, lanes, size, timer, pressure_of(program))


def tune_decode(
    cascade: Cascade, inputs: Mapping[str, Tensor], pages: Pages | None = None
) -> Schedule:
    """The fastest schedule of the parts of `decode` for ``inputs``, by name, and ``pages``.

    `decode` and the operators use it from then on, for every length of its class.  Raises
    `LowerError` without a GPU, and for an attention without states that merge.
    """
    check_device(list(inputs.values()))
    program = split_form(cascade).partial
    mine = {n: t.detach() for n, t in inputs.items()}
    default = default_of(program, mine)
    low = small(program, default, mine["Q"])["block_rows"]
    key = tuning_key(program, mine, *tuning(mine, pages))

    def call(schedule: Schedule) -> object:
        return decode(cascade, mine, pages=pages, schedule=schedule)

    return _fastest(key, default.with_(block_rows=low), program, mine, call, low)


def tune_varlen(cascade: Cascade, inputs: Mapping[str, Tensor], sequences: Sequences) -> Schedule:
    """The fastest schedule of `attend_varlen` for ``inputs`` and ``sequences``; as `tune`."""
    check_device(list(inputs.values()))
    program = varlen.program_of(cascade)
    mine = {n: t.detach() for n, t in inputs.items()}
    wide = {n: t[None] if n in ("Q", "K", "V") else t for n, t in mine.items()}
    rows = {**wide, "Q": wide["Q"][:, :, : sequences.longest_q]}
    key = tuning_key(program, wide, "varlen", varlen.tuning(sequences))

    def call(schedule: Schedule) -> object:
        return attend_varlen(cascade, mine, sequences, schedule)

    return _fastest(key, default_of(program, rows), program, wide, call)


def _fastest(
    key: str,
    default: Schedule,
    program: Program,
    operands: Mapping[str, Tensor],
    call: Callable[[Schedule], object],
    rows: int | None = None,
) -> Schedule:
    """The best schedule of calls that take one, from disk or timed now."""

    def timer(schedule: Schedule) -> float:
        try:
            return milliseconds(lambda: call(schedule))
        except ToolError:  # the GPU cannot hold it
            return math.inf

    lanes = lanes_of(program, operands)
    return tuned(
        key, default, lanes, operands["Q"].element_size(), timer, pressure_of(program), rows
    )


def milliseconds(call: Callable[[], object]) -> float:
    """The time of a call on the GPU."""
    import triton

    return float(triton.testing.do_bench(call))
