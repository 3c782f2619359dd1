"""Tune the kernel of an attention on the GPU at hand; later calls find the result on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from attn_rewrite.backends.triton.autotune import cache_key, tuned
from attn_rewrite.backends.triton.emit import emit
from attn_rewrite.backends.triton.launch import check_device, run
from attn_rewrite.backends.triton.ops import tables_of
from attn_rewrite.backends.triton.prepare import (
    default_of,
    device_name,
    lanes_of,
    sizes_of,
    stages,
    with_lse,
)
from attn_rewrite.backends.triton.schedule import Schedule
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
    program = found[0].program
    first = next(iter(inputs.values()))
    lanes = lanes_of(program, inputs)

    def timer(schedule: Schedule) -> float:
        import triton

        source = emit(program, schedule, lanes)
        try:
            tables = tables_of(source, inputs)
            return float(triton.testing.do_bench(lambda: run(source, inputs, tables=tables)))
        except ToolError:  # the GPU cannot hold it
            return math.inf

    key = cache_key(program, sizes_of(program, inputs), str(first.dtype), device_name(first))
    return tuned(key, default_of(program, inputs), lanes, first.element_size(), timer)
