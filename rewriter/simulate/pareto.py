"""Array size against latency: the same design at several array sizes.

Source: the sweep of FuseMax (MICRO 2024), section VI, over arrays of 16 x 16 to 512 x 512 PEs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attn_rewrite.errors import ToolError
from attn_rewrite.simulate.designs import Design, named
from attn_rewrite.simulate.fusemax import Result, evaluate
from attn_rewrite.simulate.traffic import minimum_buffer
from attn_rewrite.simulate.workload import Workload

SIZES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Point:
    """One array size with its result; ``dominated`` when a smaller array is as fast."""

    array: int
    result: Result
    dominated: bool = False


def sweep(
    workload: Workload, design: Design | str = "fusemax", sizes: Iterable[int] = SIZES
) -> tuple[Point, ...]:
    """Model ``workload`` with arrays of ``sizes``, smallest first.

    The 1-D array and the clock follow the design; the buffer grows where it would not hold one row
    of tiles.
    """
    base = named(design)
    points: list[Point] = []
    for size in sorted(set(sizes)):
        scaled = replace(base, hardware=replace(base.hardware, array=size))
        need = minimum_buffer(workload, scaled)
        if need > scaled.hardware.buffer:
            scaled = replace(scaled, hardware=replace(scaled.hardware, buffer=need))
        result = evaluate(workload, scaled)
        best = min((p.result.latency_s for p in points), default=float("inf"))
        points.append(Point(size, result, result.latency_s >= best))
    return tuple(points)


def plot(series: Sequence[tuple[str, Sequence[Point]]], path: Path | str) -> None:
    """Draw processing elements against latency, one line per series, both axes logarithmic.

    The suffix of ``path`` gives the format (``.svg``, ``.png``, ``.pdf``).

    Raises:
        ToolError: matplotlib is not installed, does not know the format, or cannot write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolError(
            "the plot needs matplotlib; install attn-rewrite[plot]", stage="plot"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in series:
        pes = [p.array**2 for p in points]
        axes.plot(pes, [p.result.latency_s for p in points], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="2-D processing elements", ylabel="latency (s)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ToolError(f"the plot cannot be written to {path}: {error}", stage="plot") from error
