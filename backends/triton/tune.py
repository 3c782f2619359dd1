"""Tune the kernels of an attention on the GPU at hand; later calls find the results on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from attn_rewrite.backends.triton import varlen
from attn_rewrite.backends.triton.autotune import (
    Timer,
    join_space,
    parts_space,
    pressure_of,
    searched,
    space,
    tuned,
)
from attn_rewrite.backends.triton.decode import (
    JOIN,
    Pages,
    SplitForm,
    decode,
    join_tuning,
    parts_for,
    programs_of,
    small,
    split_form,
    tuning,
)
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.launch import check_device, run
from attn_rewrite.backends.triton.ops import backward_operands, backward_programs, tables_of
from attn_rewrite.backends.triton.packed import extents_by_rank
from attn_rewrite.backends.triton.prepare import (
    default_of,
    lanes_of,
    processors_of,
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

    def call(schedule: Schedule) -> Callable[[], object]:
        source = emit(program, widened(schedule, mine), lanes)
        return partial(run, source, mine, tables=tables_of(source, mine))

    size = next(iter(mine.values())).element_size()
    default, key = default_of(program, mine), tuning_key(program, mine)
    return tuned(key, default, lanes, size, _timer(call), pressure_of(program))


def tune_decode(
    cascade: Cascade, inputs: Mapping[str, Tensor], pages: Pages | None = None
) -> dict[str, Schedule]:
    """The fastest schedules of `decode` for ``inputs``, by name, and ``pages``.

    The result has ``part``, which knows how many parts there are, and ``join``, of the kernel that
    folds them.  `decode` and the operators use both from then on, for every length of the class.
    Raises `LowerError` without a GPU, and for an attention without states that merge.
    """
    check_device(list(inputs.values()))
    form = split_form(cascade)
    mine = {n: t.detach() for n, t in inputs.items()}
    part = _tuned_parts(cascade, form, mine, pages)
    rows, width = mine["Q"].shape[2], {"f": mine["V"].shape[3]}

    def near(schedule: Schedule) -> Iterator[Schedule]:
        return join_space(schedule, width, rows)

    key = tuning_key(form.joined, mine, *join_tuning(form, mine, pages))
    call = partial(decode, cascade, mine, pages=pages, schedule=part)
    join = searched(key, JOIN, [near], _timer(lambda s: partial(call, join=s)))
    return {"part": part, "join": join}


def _tuned_parts(
    cascade: Cascade, form: SplitForm, inputs: Mapping[str, Tensor], pages: Pages | None
) -> Schedule:
    """The best schedule of the parts: how many there are, then how each of them runs."""
    program, kind = form.partial, tuning(inputs, pages)
    default = default_of(program, inputs)
    default = default.with_(block_rows=small(program, default, inputs["Q"])["block_rows"])
    sizes = {**extents_by_rank(program.cascade.inputs, inputs), **kind[1]}
    programs, processors = programs_of(program, default, sizes), processors_of(inputs["Q"])
    size, held = inputs["Q"].element_size(), pressure_of(program)
    lanes = lanes_of(program, inputs)

    def parts(best: Schedule) -> Iterator[Schedule]:
        tiles = sizes["kv"] // best.block_along
        plain = parts_for(programs, tiles)
        more = parts_space(best, programs, tiles, processors)
        return (s for s in more if s.parts != plain)

    def near(best: Schedule) -> Iterator[Schedule]:
        return space(best, lanes, size, held, best.block_rows)

    call = partial(decode, cascade, inputs, pages=pages)
    key = tuning_key(program, inputs, *kind)
    return searched(key, default, [parts, near], _timer(lambda s: partial(call, schedule=s)))


def tune_varlen(cascade: Cascade, inputs: Mapping[str, Tensor], sequences: Sequences) -> Schedule:
    """The fastest schedule of `attend_varlen` for ``inputs`` and ``sequences``; as `tune`."""
    check_device(list(inputs.values()))
    program = varlen.program_of(cascade)
    mine = {n: t.detach() for n, t in inputs.items()}
    wide = {n: t[None] if n in ("Q", "K", "V") else t for n, t in mine.items()}
    key = tuning_key(program, wide, "varlen", varlen.tuning(sequences))

    def call(schedule: Schedule) -> Callable[[], object]:
        return partial(attend_varlen, cascade, mine, sequences, schedule)

    lanes, size = lanes_of(program, wide), wide["Q"].element_size()
    default = varlen.default_for(program, wide, sequences.longest_q)
    return tuned(key, default, lanes, size, _timer(call), pressure_of(program))


def _timer(make: Callable[[Schedule], Callable[[], object]]) -> Timer:
    """The time of what ``make`` gives for a schedule; infinite where the GPU cannot hold it."""

    def timer(schedule: Schedule) -> float:
        try:
            return milliseconds(make(schedule))
        except ToolError:
            return math.inf

    return timer


def milliseconds(call: Callable[[], object]) -> float:
    """The time of a call on the GPU, replayed: that of Python and of launches is no part of it."""
    import triton

    return float(triton.testing.do_bench_cudagraph(call, return_mode="median"))
