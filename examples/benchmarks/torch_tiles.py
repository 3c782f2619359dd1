"""Block-sparse attention of the torch backend on the CPU against PyTorch's dense SDPA.

Each mask runs as one call of ``attn_rewrite::tiled_attention`` in the same process as dense
non-causal SDPA; the two take turns and the minimum of each is kept.  ``ratio`` is the time over
(block fraction at 128 x 128) x (dense time): 1.0 means that skipped blocks cost nothing.  Extra
memory is the peak of one call in a fresh process, beyond what it held before the call.

    python examples/benchmarks/torch_tiles.py --length 8192 --threads 2 --repeat 7
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from attn_rewrite.backends.torch import tile_counts, tiled_attention
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, Expr, H, Q, Read, call, eq
from attn_rewrite.cascade.ir import Cascade, TensorDecl

BATCH, HEADS, WIDTH, BLOCK = 1, 8, 64, 128
LIMIT = 1.8
RESULTS = Path(__file__).parent / "results" / "torch_tiles.json"
Case = tuple[Cascade, list[Tensor]]


def neighborhood(length: int) -> Expr:
    """2-D neighborhood of 17 x 33 on a grid 128 wide; the window shifts at the borders."""
    rows, columns = length // 128, 128

    def near(query: Expr, key: Expr, size: int, window: int) -> Expr:
        start = call("clip", query - window // 2, 0, max(0, size - window))
        return (key >= start) & (key < start + window)

    return near(Q // 128, KV // 128, rows, 17) & near(Q % 128, KV % 128, columns, 33)


def radial() -> Expr:
    """Frames of 256 tokens: near frames whole, a band that narrows, then every eighth diagonal."""
    apart, beside = call("abs", Q // 256 - KV // 256), call("abs", Q % 256 - KV % 256)
    band = (apart < 8) & (beside * apart < 256)
    return (apart <= 1) | band | (eq(apart % 8, 0) & (beside < 16))


def masks(length: int) -> dict[str, Case]:
    """The cascades and their reads, by name."""
    distance, blocks = Q - KV, -(-length // BLOCK)
    listed = Read("L", (H, Q // BLOCK, KV // BLOCK))
    decl = (TensorDecl("L", ("h", "n", "m"), dtype="bool"),)
    rng = torch.Generator().manual_seed(0)

    def cascade(guard: Expr, reads: tuple[TensorDecl, ...] = ()) -> Cascade:
        return softmax_cascade(SoftmaxAttention(QK * WIDTH**-0.5, guard, reads=reads))

    def lists(heads: int) -> list[Tensor]:
        return [torch.rand(heads, blocks, blocks, generator=rng) < 0.25]

    sinks = (distance >= 0) & ((KV < 4) | (distance < 1024))
    return {
        "window 1024, causal": (cascade((distance >= 0) & (distance < 1024)), []),
        "window 1024, symmetric": (cascade(call("abs", distance) <= 512), []),
        "window 1024 and 4 sinks": (cascade(sinks), []),
        "neighborhood 17 x 33": (cascade(neighborhood(length)), []),
        "radial bands": (cascade(radial()), []),
        "random blocks, 25 %": (cascade(listed, decl), lists(1)),
        "random blocks, 25 %, per head": (cascade(listed, decl), lists(HEADS)),
    }


def operands(length: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, length, WIDTH, generator=rng) for _ in range(3))
    return q, k, v


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(case: Case, length: int, repeat: int) -> dict[str, float]:
    """Times of both kernels, taking turns."""
    cascade, reads = case
    q, k, v = operands(length)
    text = str(cascade)

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def tiled() -> Tensor:
        return tiled_attention(q, k, v, reads, text, BLOCK)

    dense(), tiled()
    pairs = [(seconds(dense), seconds(tiled)) for _ in range(repeat)]
    tables = {"L": reads[0].numpy()} if reads else {}
    counts = tile_counts(cascade, length, length, BLOCK, HEADS, tables=tables)
    slow, fast = (min(p[i] for p in pairs) for i in (0, 1))
    return {
        "block_fraction": counts.density,
        "partial_fraction": 1 - counts.full / counts.executed,
        "dense_s": slow,
        "tiled_s": fast,
        "speedup": slow / fast,
        "ratio": fast / (slow * counts.density),
        "ratio_median": statistics.median(f / s for s, f in pairs) / counts.density,
    }


def _status(field: str) -> float:
    """A line of Linux's /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def _peak(name: str, length: int, answer: multiprocessing.Queue[float]) -> None:
    """Peak of one call beyond what the process held before, in MB."""
    q, k, v = operands(length)
    short = [t[:, :, :BLOCK] for t in (q, k, v)]
    cascade, reads = masks(length).get(name, (None, []))

    def run(*tensors: Tensor) -> None:
        if cascade is None:
            torch.nn.functional.scaled_dot_product_attention(*tensors)
        else:
            tiled_attention(*tensors, reads, str(cascade), BLOCK)

    run(*short)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    run(q, k, v)
    answer.put(_status("VmHWM") - before)


def extra_memory(name: str, length: int) -> float:
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=_peak, args=(name, length, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {}
    for name, case in masks(arguments.length).items():
        rows[name] = measure(case, arguments.length, arguments.repeat)
        rows[name]["extra_mb"] = extra_memory(name, arguments.length)
        print(f"{name:32s}", "  ".join(f"{k} {v:.3f}" for k, v in rows[name].items()))
    worst = max(row["ratio"] for row in rows.values())
    print(f"worst ratio {worst:.2f} (limit {LIMIT})")
    record = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "shape": [BATCH, HEADS, arguments.length, WIDTH],
        "block": BLOCK,
        "dense_extra_mb": extra_memory("dense", arguments.length),
        "output_mb": math.prod((BATCH, HEADS, arguments.length, WIDTH)) * 4 / 2**20,
        "masks": rows,
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
