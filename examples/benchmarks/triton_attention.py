"""Generated Triton kernels beside SDPA, FlexAttention and compiled eager attention, on one GPU.

Every contender of a case runs in the same process, in alternating rounds; a row of the result has
the median of each, its quartiles, TFLOP/s of the work that the mask leaves, and the time over the
tile bound (own dense time times the share of tiles).  ``--dry-run`` lists the cases and touches no
GPU.  Results: examples/benchmarks/results/triton_attention.json.

    make gpu-bench            # or: python examples/benchmarks/triton_attention.py --quick
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "triton_attention.json"
LENGTHS = (1024, 4096, 16384, 32768, 131072)
TOKENS = 16384  # a batch holds so many tokens at short lengths
WINDOW, BLOCK, DENSITY = 4096, 128, 0.25


@dataclass(frozen=True)
class Shape:
    """One case: name, mask, batch, query and key heads, lengths, head dimension."""

    name: str
    mask: str
    b: int
    hq: int
    hkv: int
    q: int
    kv: int
    d: int


MODELS = (
    Shape("Llama-3-8B prefill", "causal", 1, 32, 8, 8192, 8192, 128),
    Shape("Llama-3-8B decode, batch 1", "cached", 1, 32, 8, 1, 32768, 128),
    Shape("Llama-3-8B decode, batch 64", "cached", 64, 32, 8, 1, 32768, 128),
    Shape("Wan 2.1 14B 720p self-attention", "dense", 1, 40, 40, 75600, 75600, 128),
    Shape("HunyuanVideo 720p self-attention", "dense", 1, 24, 24, 118800, 118800, 128),
    Shape("FLUX 4096 x 4096", "dense", 1, 24, 24, 66048, 66048, 128),
)


def shapes(*, quick: bool) -> Iterator[Shape]:
    """The grid of masks, head dimensions and lengths, then shapes of models."""
    for d in (64, 128):
        for length in LENGTHS[:3] if quick else LENGTHS:
            batch = max(1, TOKENS // length)
            heads = 2048 // d
            for mask in ("dense", "causal", "window", "blocks"):
                yield Shape(f"{mask} d{d} {length}", mask, batch, heads, heads, length, length, d)
    yield from MODELS[:2] if quick else MODELS


def share_of_tiles(shape: Shape) -> float:
    """Tiles that run over all tiles, by the block lists of the mask."""
    n = -(-shape.kv // BLOCK)
    if shape.mask == "causal":
        return (n + 1) / (2 * n)
    if shape.mask == "window":
        w = min(WINDOW // BLOCK + 1, n)
        return (w * n - w * (w - 1) / 2) / (n * n)
    return DENSITY if shape.mask == "blocks" else 1.0


def cascade_of(shape: Shape) -> Any:
    """The attention as a cascade."""
    from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
    from attn_rewrite.cascade.expr import KV, TRUE, Extent, H, Q, Read
    from attn_rewrite.cascade.ir import TensorDecl

    guards: dict[str, Any] = {
        "dense": TRUE,
        "causal": Q - KV >= 0,
        "cached": Q + Extent("kv") - Extent("q") >= KV,
        "window": (Q - KV >= 0) & (Q - KV < WINDOW),
        "blocks": Read("keep", (H, Q // BLOCK, KV // BLOCK)),
    }
    reads = (TensorDecl("keep", ("h", "qb", "kb"), dtype="bool"),) if shape.mask == "blocks" else ()
    form = SoftmaxAttention(
        QK * shape.d**-0.5, guards[shape.mask], group=shape.hq // shape.hkv, reads=reads
    )
    return softmax_cascade(form, "bench")


def operands(shape: Shape) -> dict[str, Any]:
    """Random bfloat16 operands on the GPU, and the table of blocks."""
    import torch

    torch.manual_seed(0)

    def normal(heads: int, length: int) -> Any:
        size = (shape.b, heads, length, shape.d)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    found = {
        "Q": normal(shape.hq, shape.q),
        "K": normal(shape.hkv, shape.kv),
        "V": normal(shape.hkv, shape.kv),
    }
    if shape.mask == "blocks":
        blocks = (shape.hq, -(-shape.q // BLOCK), -(-shape.kv // BLOCK))
        found["keep"] = torch.rand(blocks, device="cuda") < DENSITY
    return found


def contenders(shape: Shape, x: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What runs this shape, by name."""
    from attn_rewrite.backends.triton.decode import decode
    from attn_rewrite.backends.triton.lower import lower
    from attn_rewrite.graph import EagerBuilder

    cascade = cascade_of(shape)
    if shape.mask == "cached":
        found: dict[str, Callable[[], Any]] = {"attn-rewrite": lambda: decode(cascade, x)}
    else:
        kernel: Any = lower(cascade, extents={"q": shape.q, "kv": shape.kv})
        inputs = list(x.values())
        found = {"attn-rewrite": lambda: kernel.emit(EagerBuilder(), inputs)}
    found |= _sdpa(shape, x)
    found["flex"] = _flex(shape, x)
    if shape.q * shape.kv * shape.hq * shape.b <= 1 << 31:
        found["eager, compiled"] = _eager(shape, x)
    return found


def _sdpa(shape: Shape, x: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """PyTorch's fused kernels, each by name, where they take the mask without a tensor."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if shape.mask not in ("dense", "causal") and not (shape.mask == "cached" and shape.q == 1):
        return {}

    def call(backend: Any) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    x["Q"], x["K"], x["V"], is_causal=shape.mask == "causal",
                    enable_gqa=shape.hq != shape.hkv,
                )  # fmt: skip

        return run

    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    return {f"sdpa {n.lower()}": call(getattr(SDPBackend, n)) for n in names}


def _flex(shape: Shape, x: dict[str, Any]) -> Callable[[], Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    keep, offset = x.get("keep"), shape.kv - shape.q
    rules: dict[str, Any] = {
        "causal": lambda b, h, q, k: q >= k,
        "cached": lambda b, h, q, k: k <= q + offset,
        "window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW),
        "blocks": lambda b, h, q, k: keep[h, q // BLOCK, k // BLOCK],
    }
    mask = None
    if shape.mask in rules:
        heads = shape.hq if shape.mask == "blocks" else None
        make = torch.compile(create_block_mask)
        mask = make(rules[shape.mask], None, heads, shape.q, shape.kv, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = shape.hq != shape.hkv
    return lambda: compiled(x["Q"], x["K"], x["V"], block_mask=mask, enable_gqa=grouped)


def _eager(shape: Shape, x: dict[str, Any]) -> Callable[[], Any]:
    import torch

    group = shape.hq // shape.hkv

    def attend(q: Any, k: Any, v: Any) -> Any:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        s = q @ k.mT * shape.d**-0.5
        at_q = torch.arange(shape.q, device="cuda")[:, None] + (
            shape.kv - shape.q if shape.mask == "cached" else 0
        )
        at_k = torch.arange(shape.kv, device="cuda")
        if shape.mask in ("causal", "cached", "window"):
            s = s.masked_fill(at_q < at_k, -torch.inf)
        if shape.mask == "window":
            s = s.masked_fill(at_q - at_k >= WINDOW, -torch.inf)
        if shape.mask == "blocks":
            s = s.masked_fill(~x["keep"][:, at_q // BLOCK, at_k // BLOCK], -torch.inf)
        return s.softmax(-1) @ v

    compiled = torch.compile(attend)
    return lambda: compiled(x["Q"], x["K"], x["V"])


def measure(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Milliseconds of each contender over alternating rounds, and why others did not run."""
    import torch

    failed: dict[str, str] = {}
    for name, run in calls.items():
        try:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
        except Exception as error:
            failed[name] = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
    times: dict[str, list[float]] = {n: [] for n in calls if n not in failed}
    for _ in range(rounds):
        for name in times:
            times[name].append(_once(calls[name]))
    return {n: _summary(t) for n, t in times.items()}, failed


def _once(run: Callable[[], Any]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "low_ms": low, "high_ms": high}


def row(shape: Shape, rounds: int) -> dict[str, Any]:
    """One case as plain values."""
    x = operands(shape)
    times, failed = measure(contenders(shape, x), rounds)
    share = share_of_tiles(shape)
    flops = 4 * shape.b * shape.hq * shape.q * shape.kv * shape.d * share
    found = {"shape": asdict(shape), "tiles": share, "times": times, "not run": failed}
    mine = times.get("attn-rewrite")
    if mine is not None:
        others = {n: t for n, t in times.items() if n != "attn-rewrite"}
        found["tflops"] = flops / mine["median_ms"] / 1e9
        found["ratios"] = {n: t["median_ms"] / mine["median_ms"] for n, t in others.items()}
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


def main(arguments: list[str] | None = None) -> int:
    """Run, print one line per case, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--dry-run", action="store_true", help="list the cases; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="short lengths and two models")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    cases = list(shapes(quick=options.quick))
    if options.dry_run:
        for shape in cases:
            print(f"{shape.name}: {shape}, tiles {share_of_tiles(shape):.3f}")
            str(cascade_of(shape))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU is visible to this Python; --dry-run lists the cases", file=sys.stderr)
        return 1
    rows = []
    for shape in cases:
        rows.append(row(shape, options.rounds))
        print(
            json.dumps({k: rows[-1][k] for k in ("tflops", "ratios") if k in rows[-1]}), shape.name
        )
    add_tile_bounds(rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "rounds": options.rounds, "rows": rows}
    options.output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
