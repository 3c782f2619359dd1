"""Block-sparse attention of the torch backend on the CPU against PyTorch's dense SDPA.

Each mask runs as one call of ``attn_rewrite::tiled_attention`` in the same process as dense
non-causal SDPA and compiled FlexAttention; they take turns and the minimum of each is kept.
``ratio`` is the time over (block fraction at 128 x 128) x (dense time): 1.0 means that skipped
blocks cost nothing.  Extra memory is the peak of one call in a process of its own, output included,
beyond what it held after a call like it; dense SDPA likewise.  Of the first call at a length it is
given apart, after one at a length that is a block shorter: that call also evaluates the mask and
plans.  Where FlexAttention does not compile its row says so.

Rows of earlier runs in the results file stay if machine, shape, threads and PyTorch are the same;
every row says when it was measured, and how often.  ``--prices`` measures what a score costs in
tiles of each side, from which `PRICES` of ``backends/torch/blocks.py`` are copied.

    python examples/benchmarks/torch_tiles.py --length 8192 --threads 2 --repeat 7
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.torch import tile_counts, tiled_attention
from attn_rewrite.backends.torch.blocks import PRICES, choose_block
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, as_softmax, softmax_cascade
from attn_rewrite.cascade.expr import KV, Call, Const, Expr, H, Q, Rank, Read, call, eq
from attn_rewrite.cascade.ir import Cascade, TensorDecl

BATCH, HEADS, WIDTH, BLOCK = 1, 8, 64, 128
LIMIT, MEMORY_LIMIT = 1.8, 1.1
RESULTS = Path(__file__).parent / "results" / "torch_tiles.json"
Case = tuple[Cascade, list[Tensor]]


def neighborhood(length: int) -> Expr:
    """2-D neighborhood of 17 x 33 on a grid 128 wide; the window shifts at the borders."""
    rows, columns = length // 128, 128

    def near(query: Expr, key: Expr, size: int, window: int) -> Expr:
        start = call("clip", query - window // 2, 0, max(0, size - window))
        return (key >= start) & (key < start + window)

    return near(Q // 128, KV // 128, rows, 17) & near(Q % 128, KV % 128, columns, 33)


def gna(length: int) -> Expr:
    """2-D generalized neighborhood of 16 x 64, stride 8 x 32, on a grid 128 wide."""
    rows, columns = length // 128, 128

    def near(query: Expr, key: Expr, size: int, window: int, stride: int) -> Expr:
        leader = call("min", query // stride * stride + stride // 2, size - 1)
        start = call("clip", leader - window // 2, 0, max(0, size - window))
        return (key >= start) & (key < start + window)

    return near(Q // 128, KV // 128, rows, 16, 8) & near(Q % 128, KV % 128, columns, 64, 32)


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
        "GNA 16 x 64, stride 8 x 32": (cascade(gna(length)), []),
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


def predicate(guard: Expr, reads: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """The guard as a ``mask_mod`` of FlexAttention: coordinates b, h, q, kv to a truth value."""
    operators: dict[str, Callable[..., Any]] = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "abs": torch.abs,
        "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq,
        "and": torch.logical_and, "or": torch.logical_or, "mod": torch.remainder,
        "floordiv": partial(torch.div, rounding_mode="floor"), "clip": torch.clamp,
        "min": lambda a, b: a.clamp(max=b),
    }  # fmt: skip

    def evaluate(expr: Expr, at: Mapping[str, Tensor]) -> Any:
        match expr:
            case Const(value):
                return int(value)
            case Rank(name):
                return at[name]
            case Read(tensor, index):
                table = reads[tensor]
                sizes = zip(index, table.shape, strict=True)
                return table[tuple(evaluate(i, at) if n > 1 else 0 for i, n in sizes)]
            case Call(op, arguments):
                return operators[op](*(evaluate(a, at) for a in arguments))
        raise TypeError(f"the guard holds {expr}, which has no FlexAttention form here")

    def keep(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found: Tensor = evaluate(guard, {"b": b, "h": h, "q": q, "kv": kv})
        return found

    return keep


def flex(case: Case, length: int) -> tuple[Callable[[], Tensor] | None, dict[str, float | str]]:
    """Compiled FlexAttention with the guard as block mask, and how long it took to get there."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cascade, reads = case
    form = as_softmax(cascade)
    assert form is not None
    keep = predicate(form.guard, dict(zip((t.name for t in form.reads), reads, strict=True)))
    q, k, v = operands(length)
    start = time.perf_counter()
    try:
        # Made head by head where heads differ, else once: an eager mask of all pairs is 64 MB.
        heads = HEADS if reads and len(reads[0]) > 1 else None
        blocks = create_block_mask(
            keep, None, heads, length, length, device="cpu", BLOCK_SIZE=BLOCK
        )
        made = time.perf_counter()
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            with torch.no_grad():
                return compiled(q, k, v, block_mask=blocks, scale=WIDTH**-0.5)

        run()
    except Exception as error:  # whatever stops the peer belongs in the table
        return None, {"flex_error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    end = time.perf_counter()
    return run, {"flex_mask_s": made - start, "flex_compile_s": end - made}


def tables_of(case: Case) -> dict[str, Any]:
    """Values of the block lists of a mask."""
    return {"L": case[1][0].numpy()} if case[1] else {}


def side_of(case: Case, length: int) -> int:
    """The side of the tiles that the planner chooses."""
    return choose_block(case[0], {"q": length, "kv": length, "h": HEADS}, tables_of(case))


def measure(case: Case, length: int, repeat: int, *, with_flex: bool) -> dict[str, Any]:
    """Times of the kernels, taking turns."""
    cascade, reads = case
    q, k, v = operands(length)
    text, block = str(cascade), side_of(case, length)

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def tiled() -> Tensor:
        return tiled_attention(q, k, v, reads, text, block)

    peer, told = flex(case, length) if with_flex else (None, {})
    functions = [dense, tiled, *([peer] if peer else [])]
    outputs = [function() for function in functions]
    if peer:
        told["flex_difference"] = float((outputs[2] - outputs[1]).abs().max())
    turns = [[seconds(function) for function in functions] for _ in range(repeat)]
    counts = tile_counts(cascade, length, length, BLOCK, HEADS, tables=tables_of(case))
    slow, fast, *other = (min(t) for t in zip(*turns, strict=True))
    ratios = sorted(t[1] / t[0] / counts.density for t in turns)
    if peer:
        told |= {"flex_s": other[0], "flex_ratio": other[0] / (slow * counts.density)}
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "repeat": repeat,
        "block": block,
        "block_fraction": counts.density,
        "partial_fraction": 1 - counts.full / counts.executed,
        "dense_s": slow,
        "tiled_s": fast,
        "speedup": slow / fast,
        "ratio": fast / (slow * counts.density),
        "ratio_of_turns": [ratios[0], statistics.median(ratios), ratios[-1]],
        **told,
    }


def prices(length: int, repeat: int) -> dict[str, Any]:
    """What a score costs in tiles of each side, over the largest side: by mask, and the mean."""
    q, k, v = operands(length)
    by_mask: dict[str, dict[str, float]] = {}
    for name, case in masks(length).items():
        cascade, reads = case
        best = dict.fromkeys(PRICES, math.inf)
        for turn in range(repeat + 1):
            for side in PRICES:
                spent = seconds(partial(tiled_attention, q, k, v, reads, str(cascade), side))
                best[side] = min(best[side], spent) if turn else math.inf
        each = {
            side: spent
            / tile_counts(cascade, length, length, side, HEADS, tables=tables_of(case)).pairs
            for side, spent in best.items()
        }
        by_mask[name] = {str(side): cost / each[max(each)] for side, cost in each.items()}
        print(f"{name:32s}", by_mask[name], flush=True)
    mean = {s: statistics.geometric_mean(m[s] for m in by_mask.values()) for s in map(str, PRICES)}
    print(f"{'mean':32s}", mean)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"measured": when, "repeat": repeat, "by_mask": by_mask, "mean": mean}


def _status(field: str) -> float:
    """A line of Linux's /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def _peaks(
    name: str, length: int, threads: int, answer: multiprocessing.Queue[list[float]]
) -> None:
    """Peaks of the first call and of the next beyond what the process held before each, in MB."""
    torch.set_num_threads(threads)
    q, k, v = operands(length)
    # What runs must be loaded, and its threads started, before: a call that is one block shorter.
    short = [t[:, :, : length - BLOCK] for t in (q, k, v)]
    case = masks(length).get(name)
    block = BLOCK if case is None else side_of(case, length)  # chosen when a model is rewritten

    def run(*tensors: Tensor) -> None:
        if case is None:
            torch.nn.functional.scaled_dot_product_attention(*tensors)
        else:
            tiled_attention(*tensors, case[1], str(case[0]), block)

    def peak() -> float:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed is no memory held
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status("VmRSS")
        run(q, k, v)
        return _status("VmHWM") - before

    run(*short)
    answer.put([peak(), peak()])


def extra_memory(name: str, length: int, threads: int) -> list[float]:
    """`_peaks` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[list[float]] = context.Queue()
    process = context.Process(target=_peaks, args=(name, length, threads, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def record_of(length: int, threads: int) -> dict[str, Any]:
    """What every row of a results file has in common."""
    return {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": threads,
        "shape": [BATCH, HEADS, length, WIDTH],
        "fraction_block": BLOCK,
        "output_mb": math.prod((BATCH, HEADS, length, WIDTH)) * 4 / 2**20,
    }


def earlier(path: Path, common: Mapping[str, Any]) -> dict[str, Any]:
    """The results file, if it is of the same machine and sizes."""
    found = json.loads(path.read_text()) if path.exists() else {}
    same = all(found.get(name) == value for name, value in common.items())
    return found if same else {}


def shown(row: Mapping[str, Any]) -> str:
    """A row as one line."""
    numbers = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}
    return "  ".join(f"{k} {v}" for k, v in numbers.items() if not isinstance(v, list))


def main() -> None:
    """Measure what the arguments ask for, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", action="append", help="masks whose name has this in it")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--prices", action="store_true", help="measure tile sides instead")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    length, threads, repeat = arguments.length, arguments.threads, arguments.repeat
    record = record_of(length, threads)
    known = earlier(arguments.output, record)
    rows = dict(known.get("masks", {}))
    if arguments.prices:
        write(arguments.output, {**record, "masks": rows, "prices": prices(length, repeat)})
        return
    dense_mb = max(extra_memory("dense", length, threads))
    for name, case in masks(length).items():
        if not any(part in name for part in arguments.only or [""]):
            continue
        row = measure(case, length, repeat, with_flex=not arguments.no_flex)
        first, later = extra_memory(name, length, threads)
        memory = {"first_extra_mb": first, "extra_mb": later, "dense_extra_mb": dense_mb}
        rows[name] = {**row, **memory}
        print(f"{name:32s}", shown(rows[name]), flush=True)
        ordered = {n: rows[n] for n in masks(length) if n in rows}
        write(arguments.output, {**known, **record, "masks": ordered})
    worst = max(float(row["ratio"]) for row in rows.values())
    memory = [
        max(float(row[field]) / row["dense_extra_mb"] for row in rows.values())
        for field in ("extra_mb", "first_extra_mb")
    ]
    print(f"worst ratio {worst:.2f} (limit {LIMIT})")
    print(f"worst memory {memory[0]:.2f}, first call {memory[1]:.2f} (limit {MEMORY_LIMIT})")


def write(path: Path, record: Mapping[str, Any]) -> None:
    """The results file as it stands: whole rows only."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
