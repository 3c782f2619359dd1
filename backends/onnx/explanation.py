"""Whether roundings explain an error that is over its bound: what other ones do is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch.export import ExportedProgram

from attn_rewrite.backends.onnx.oracle import Arrays, Expected, by_row, draw, output_types

DRAWS = 8


def explained(
    program: ExportedProgram,
    inputs: Mapping[str, Any],
    found: Expected,
    got: Mapping[str, np.ndarray[Any, Any]],
    errors: Mapping[str, float],
    held: Arrays | None = None,
) -> Expected:
    """``found``, with more allowed where an output in ``got`` is over its bound and roundings
    explain that.

    They do where every row of the output (along its last dimension) is off by no more than twice
    the largest of the draws moves that row: near ties make some rows uncertain, and a fault shows
    in the others.  Draws are made one after the other, until they explain it or are used up.
    """
    floats = {n for n, dtype in output_types(program).items() if dtype and dtype.is_floating_point}
    # What is infinite or not a number, or whole, no rounding explains.
    over = {n for n, e in errors.items() if n in floats and found.bounds[n] < e < math.inf}
    rows = {n: np.full(1, found.floors[n]) for n in over}
    appended: dict[str, float] = dict.fromkeys(found.appended, 0.0)
    left = over
    for seed in range(DRAWS if over else 0):
        drawn = draw(program, inputs, held, seed)
        for n in over:
            moved = 2 * by_row(drawn.outputs[n], found.outputs[n])
            rows[n] = np.maximum(rows[n], moved)
        for n, array in found.appended.items():
            appended[n] = max(appended[n], float(by_row(drawn.appended[n], array).max(initial=0)))
        left = {n for n in left if (by_row(got[n], found.outputs[n]) > rows[n]).any()}
        if not left:
            break
    known = {n: float(rows[n].max()) for n in over - left} | ({} if left else appended)
    return replace(found, bounds={n: max(b, known.get(n, 0.0)) for n, b in found.bounds.items()})
