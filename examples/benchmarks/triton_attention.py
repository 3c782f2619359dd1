"""Generated Triton kernels beside SDPA, FlexAttention and compiled eager attention, on one GPU.

Every contender of a case runs in the same process, in alternating rounds; a row of the result has
the median of each, its quartiles, its time over that of attn-rewrite in the same round, TFLOP/s of
the work that the mask leaves, and the time over the tile bound (own dense time times the share of
tiles).  Lists of tiles are made within the time of attn-rewrite; the masks of the other contenders
are made before.

Decoding is replayed from a CUDA graph of several calls for every contender, as servers replay it:
one call takes the GPU less time than Python.  ``--tune`` finds the schedules of attn-rewrite for
each case first; without it they are the defaults.

The results are written after every case, so nothing is lost when time runs out.  A run stops before
``--minutes`` are over (9 if not said); ``--resume`` goes on with the cases that are missing.
``--dry-run`` lists the cases and touches no GPU.

    make gpu-bench                                # results/triton_attention.json
    make gpu-bench BENCH="--only 16384 --only Llama --minutes 5"
    make gpu-bench BENCH=--resume
    make gpu-bench BENCH="--only decode --tune"
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triton_contenders import (
    BLOCK,
    DENSITY,
    WINDOW,
    Run,
    Shape,
    cascade_of,
    contenders,
    operand_bytes,
    operands,
    tune_for,
)

RESULTS = Path(__file__).parent / "results" / "triton_attention.json"
LENGTHS = (16384, 4096, 32768, 1024, 131072)  # what targets are stated for comes first
MASKS = ("dense", "causal", "window", "blocks")
TOKENS = 16384  # a batch holds so many tokens at short lengths
REPLAYED = 20  # calls in a graph


MODELS = (
    Shape("Llama-3-8B prefill", "causal", 1, 32, 8, 8192, 8192, 128),
    Shape("Llama-3-8B decode, batch 1", "cached", 1, 32, 8, 1, 32768, 128),
    Shape("Llama-3-8B decode, batch 64", "cached", 64, 32, 8, 1, 32768, 128),
    Shape("Wan 2.1 14B 720p self-attention", "dense", 1, 40, 40, 75600, 75600, 128),
    Shape("HunyuanVideo 720p self-attention", "dense", 1, 24, 24, 118800, 118800, 128),
    Shape("FLUX 4096 x 4096", "dense", 1, 24, 24, 66048, 66048, 128),
)


def shapes(only: Sequence[str] = ()) -> Iterator[Shape]:
    """Masks, lengths and head dimensions, and shapes of models, those with targets first.

    ``only``: those whose name contains one of the texts.
    """
    grid = [_shape(mask, d, length) for length in LENGTHS for d in (128, 64) for mask in MASKS]
    every = [*grid[:4], *MODELS[:3], *grid[4:], *MODELS[3:]]
    yield from (s for s in every if not only or any(o.lower() in s.name.lower() for o in only))


def _shape(mask: str, d: int, length: int) -> Shape:
    batch, heads = max(1, TOKENS // length), 2048 // d
    return Shape(f"{mask} d{d} {length}", mask, batch, heads, heads, length, length, d)


def share_of_tiles(shape: Shape) -> float:
    """Tiles that run over all tiles, by the block lists of the mask."""
    n = -(-shape.kv // BLOCK)
    if shape.mask == "causal":
        return (n + 1) / (2 * n)
    if shape.mask == "window":
        w = min(WINDOW // BLOCK + 1, n)
        return (w * n - w * (w - 1) / 2) / (n * n)
    return DENSITY if shape.mask == "blocks" else 1.0


def measure(
    makers: dict[str, Callable[[], Run]], rounds: int, seconds: float, calls_each: int = 1
) -> tuple[dict[str, Any], dict[str, str]]:
    """Milliseconds of each contender over alternating rounds, and why others did not run.

    ``ratio`` is a contender's time over that of the first one in the same round, with quartiles.
    As many rounds as fit ``seconds``: at least 5, at most ``rounds``.  Where ``calls_each`` is more
    than one, so many are replayed from a graph, and the time is that of one.
    """
    import torch

    calls: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            run = make()
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            calls[name] = run if calls_each == 1 else replayed(run, calls_each)
        except Exception as error:
            failed[name] = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {n: [] for n in calls}
    start = time.monotonic()
    for done in range(rounds):
        if done >= 5 and time.monotonic() - start > seconds:
            break
        for name, run in calls.items():
            times[name].append(_once(run) / calls_each)
    first = next(iter(times), "")
    found = {n: _summary(t) for n, t in times.items()}
    for name in found:
        pairs = [theirs / mine for theirs, mine in zip(times[name], times[first], strict=True)]
        found[name]["ratio"] = dict(
            zip(("low", "median", "high"), statistics.quantiles(pairs, n=4), strict=True)
        )
    return found, failed


def replayed(run: Run, calls: int) -> Run:
    """A CUDA graph of so many calls."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _once(run: Callable[[], Any]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _summary(times: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "rounds": len(times)}


def row(shape: Shape, rounds: int, seconds: float, tuned: bool = False) -> dict[str, Any]:
    """One case as plain values."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    if 2 * operand_bytes(shape) > free:
        why = f"its operands take {operand_bytes(shape) >> 30} GiB of {free >> 30} that are free"
        return {"shape": asdict(shape), "tiles": share_of_tiles(shape), "times": {},
                "not run": {"every contender": why}}  # fmt: skip
    # Dynamo compiles a function for a few shapes only, and then runs it uncompiled.
    torch._dynamo.reset()
    x = operands(shape)
    each = REPLAYED if shape.mask == "cached" else 1
    with torch.no_grad():
        schedules = tune_for(shape, x) if tuned else {}
        times, failed = measure(contenders(shape, x), rounds, seconds, each)
    share = share_of_tiles(shape)
    flops = 4 * shape.b * shape.hq * shape.q * shape.kv * shape.d * share
    found = {"shape": asdict(shape), "tiles": share, "times": times, "not run": failed,
             "calls in a graph": each if each > 1 else 0, "tuned": schedules}  # fmt: skip
    mine = times.get("attn-rewrite")
    if mine is not None:
        others = {n: t for n, t in times.items() if n != "attn-rewrite"}
        found["tflops"] = flops / mine["median_ms"] / 1e9
        found["ratios"] = {n: t["ratio"]["median"] for n, t in others.items()}
        found["ratio_quartiles"] = {
            n: [t["ratio"]["low"], t["ratio"]["high"]] for n, t in others.items()
        }
        cache = 2 * shape.b * shape.hkv * shape.kv * shape.d * 2
        found["cache_gb_per_s"] = cache / mine["median_ms"] / 1e6
    return found


def add_tile_bounds(rows: list[dict[str, Any]]) -> None:
    """Time over (own dense time x share of tiles), for masks of a shape that also ran dense."""
    dense = {
        (r["shape"]["d"], r["shape"]["q"], r["shape"]["b"]): r["times"]["attn-rewrite"]["median_ms"]
        for r in rows
        if r["shape"]["mask"] == "dense" and "attn-rewrite" in r["times"]
    }
    for r in rows:
        own = dense.get((r["shape"]["d"], r["shape"]["q"], r["shape"]["b"]))
        if own and "attn-rewrite" in r["times"]:
            r["over_tile_bound"] = r["times"]["attn-rewrite"]["median_ms"] / (own * r["tiles"])


def reached(rows: list[dict[str, Any]], bandwidth: float) -> list[dict[str, Any]]:
    """The targets stated for one GPU generation, and what the rows say of them."""
    found = []
    for r in rows:
        shape, ratios = r["shape"], r.get("ratios", {})
        sdpa = [t for n, t in ratios.items() if n.startswith("sdpa")]
        stated: list[tuple[str, float | None, str, float]] = []
        if shape["mask"] in ("dense", "causal") and (shape["q"], shape["d"]) == (16384, 128):
            stated = [
                ("FlexAttention's time over ours", ratios.get("flex"), ">=", 1.0),
                ("best SDPA time over ours", min(sdpa, default=None), ">=", 0.85),
            ]
        elif shape["mask"] in ("window", "blocks") and shape["q"] >= 16384:
            stated = [("time over tile bound", r.get("over_tile_bound"), "<=", 1.1)]
        elif shape["mask"] == "cached" and "cache_gb_per_s" in r:
            stated = [("share of a copy's bandwidth", r["cache_gb_per_s"] / bandwidth, ">=", 0.85)]
        for what, value, sign, limit in stated:
            held = value is not None and (value >= limit if sign == ">=" else value <= limit)
            found.append({"case": shape["name"], "what": what, "value": value,
                          "target": f"{sign} {limit}", "reached": held})  # fmt: skip
    return found


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 2 GiB on this GPU: the memory ceiling as it is here."""
    import torch

    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [_once(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def environment() -> dict[str, str]:
    """Hardware and versions."""
    import torch
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "runtime": str(torch.version.cuda or torch.version.hip),
    }


def write(path: Path, document: dict[str, Any]) -> None:
    """Write the results; nobody sees them half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    os.replace(part, path)


def earlier(path: Path, here: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of an earlier run on the same hardware and versions."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text("utf-8"))
    return list(document["rows"]) if document["environment"] == here else []


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dry-run", action="store_true", help="list the cases; needs no GPU")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT",
                        help="cases whose name contains TEXT; may be repeated")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before so many are over")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed rounds of one case")
    parser.add_argument("--rounds", type=int, default=30, help="at most so many")
    parser.add_argument("--resume", action="store_true", help="only cases the results lack")
    parser.add_argument("--tune", action="store_true", help="tune attn-rewrite for each case first")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, print one line per case, and write the results after each."""
    options = options_of(arguments)
    cases = list(shapes(options.only))
    if options.dry_run:
        for shape in cases:
            print(f"{shape.name}: {shape}, tiles {share_of_tiles(shape):.3f}, "
                  f"operands {operand_bytes(shape) / 2**30:.2f} GiB")  # fmt: skip
            str(cascade_of(shape))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU is visible to this Python; --dry-run lists the cases", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * options.minutes
    here = environment()
    rows = earlier(options.output, here) if options.resume else []
    have = {r["shape"]["name"] for r in rows}
    bandwidth = copy_bandwidth()
    longest = 0.0
    for shape in cases:
        start = time.monotonic()
        if shape.name in have:
            continue
        if start + longest > end:  # no case takes much longer than the longest so far
            break
        rows.append(row(shape, options.rounds, options.seconds, options.tune))
        longest = max(longest, time.monotonic() - start)
        add_tile_bounds(rows)
        write(options.output, {
            "environment": here, "copy_gb_per_s": bandwidth, "rows": rows,
            "targets": reached(rows, bandwidth),
            "missing": [s.name for s in cases if s.name not in {r["shape"]["name"] for r in rows}],
        })  # fmt: skip
        print(shape.name, json.dumps({k: v for k, v in rows[-1].items() if k in SHOWN}), flush=True)
    missing = len({s.name for s in cases} - {r["shape"]["name"] for r in rows})
    print(f"{len(rows)} cases in {options.output}, {missing} missing (--resume)")
    return 0


SHOWN = ("tflops", "ratios", "cache_gb_per_s", "over_tile_bound", "not run")


if __name__ == "__main__":
    sys.exit(main())
