"""Measure what forms of attention cost in ONNX Runtime on the CPU, and write their prices.

Every form is a file of its own, made by the exporter's own emitters, from and to
[batch, length, heads * width] as projections leave them.  All forms of one size take turns in one
process; the fastest repetition of each is kept.  Prices are the non-negative numbers that explain
these times best, relative errors counted: seconds for a call, a step of a loop, a number moved, a
score and a multiplication.  They go to ``backends/onnx/prices.py``, the times they explain to
``results/onnx_prices.json``.

    python examples/benchmarks/onnx_prices.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from machine import hardware

from attn_rewrite.backends.onnx.blocks import Problem, plan_blocks
from attn_rewrite.backends.onnx.contrib import emit_multi_head
from attn_rewrite.backends.onnx.cost import Form, Sizes, kind_of, work
from attn_rewrite.backends.onnx.dense import SdpaOptions, emit_sdpa
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.grouped import emit_whole, price_of_whole
from attn_rewrite.backends.onnx.tile_plans import plan_tiles
from attn_rewrite.backends.onnx.tiles import emit_attention
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.expr import KV, H, Q, Read, call
from attn_rewrite.cascade.ir import TensorDecl

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "onnx_prices.json"
MODULE = HERE.parents[1] / "backends" / "onnx" / "prices.py"
SEVERAL = ((12, 64, (128, 256, 512, 1024, 2048, 4096)), (8, 128, (128, 512, 2048)))
UNITS = ("call", "step", "moved", "score", "product")
Arrays = dict[str, np.ndarray[Any, Any]]
Emit = Callable[[Recorder, list[ir.Value]], ir.Value]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A form at a size: what has its price, how it is recorded, what it takes besides Q, K, V."""

    name: str
    form: Form
    emit: Emit
    reads: Arrays = field(default_factory=dict)


def attention(scale: float, guard: Any = None, reads: tuple[TensorDecl, ...] = ()) -> Any:
    score = QK * scale
    return SoftmaxAttention(score, reads=reads) if guard is None else SoftmaxAttention(
        score, guard, reads=reads)  # fmt: skip


def tiled(name: str, form: Any, rows: int) -> Candidate:
    plan = plan_tiles(form, rows)
    return Candidate(name, plan, lambda r, x: emit_attention(r, x, form, plan))


def listed(sizes: Sizes, scale: float, block: int, density: float) -> Candidate:
    """A list of blocks per head; counts differ from row to row."""
    rng, n = np.random.default_rng(0), -(-sizes.q_len // block)
    kept = rng.random((sizes.heads, n, n)) < density * rng.uniform(0.5, 1.5, (sizes.heads, n, 1))
    kept[:, np.arange(n), np.arange(n)] = True
    guard = Read("L", (H, call("floordiv", Q, block), call("floordiv", KV, block)))
    form = attention(scale, guard, (TensorDecl("L", ("h", "i", "j")),))
    problem = Problem(sizes.heads, 1, sizes.q_len, sizes.kv_len)
    plan = plan_blocks(guard, problem, block, {"L": kept})
    return Candidate(f"blocks of {block}, {density:.0%}", plan,
                     lambda r, x: emit_attention(r, x, form, plan), {"L": kept})  # fmt: skip


def operators(sizes: Sizes, scale: float) -> Iterator[Candidate]:
    plain, causal = SdpaOptions(scale=scale), attention(scale, Q >= KV)
    multi = "MultiHeadAttention"
    yield Candidate("mha", multi, lambda r, x: emit_multi_head(r, x, plain))
    yield Candidate("gqa", "GroupQueryAttention", lambda r, x: emit_whole(r, x, causal))
    window = attention(scale, (Q >= KV) & (Q - KV < 256))
    yield Candidate("gqa window 256", price_of_whole(window), lambda r, x: emit_whole(r, x, window))
    yield Candidate("dense", "dense", lambda r, x: emit_sdpa(r, x, plain))
    if sizes.q_len <= 2048:
        mask = {"M": np.random.default_rng(0).random((1, 1, sizes.q_len, sizes.kv_len)) < 0.9}
        yield Candidate("mha, mask", f"{multi} with a mask",
                        lambda r, x: emit_multi_head(r, x, plain), mask)  # fmt: skip
        yield Candidate("dense, mask", "dense with a mask",
                        lambda r, x: emit_sdpa(r, x, plain), mask)  # fmt: skip


def candidates(sizes: Sizes) -> Iterator[Candidate]:
    scale = sizes.width**-0.5
    yield from operators(sizes, scale)
    for rows in (64, 128):
        yield tiled(f"half, {rows} rows", attention(scale, Q >= KV), rows)
        for size in (32, 256, 1024):
            near = size > Q - KV
            yield tiled(f"window {size}, {rows} rows", attention(scale, (Q >= KV) & near), rows)
    for block, density in ((64, 0.15), (128, 0.15), (64, 0.4)):
        if sizes.q_len >= 4 * block:
            yield listed(sizes, scale, block, density)


def model_of(one: Candidate, sizes: Sizes) -> bytes:
    """The form between the transposes that a model has around it."""
    r, kind, both = Recorder("site", 20), ir.DataType.FLOAT, sizes.heads * sizes.width
    inputs, given = [], []
    for name in "qkv":
        x = ir.Value(name=name, shape=ir.Shape(["b", "s", both]), type=ir.TensorType(kind))
        apart = r.op("Reshape", x, r.integers([0, 0, sizes.heads, sizes.width]))
        head = r.op("Transpose", apart, perm=[0, 2, 1, 3])
        head.shape, head.dtype = ir.Shape(["b", sizes.heads, "s", sizes.width]), kind
        inputs.append(x)
        given.append(head)
    for name, array in one.reads.items():
        of = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        inputs.append(ir.Value(name=name, shape=ir.Shape(array.shape), type=of))
        given.append(inputs[-1])
    y = r.op("Transpose", one.emit(r, given), perm=[0, 2, 1, 3])
    out = r.op("Reshape", y, r.integers([0, 0, both]))
    out.shape, out.dtype = ir.Shape(["b", "s", both]), kind
    imports = {"": 20, "com.microsoft": 1}
    graph = ir.Graph(inputs, [out], nodes=r.nodes, name="price", opset_imports=imports)
    text: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return text


def session_of(one: Candidate, sizes: Sizes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model_of(one, sizes), options, providers=["CPUExecutionProvider"])


def measure(sizes: Sizes, threads: int, seconds: float) -> list[dict[str, Any]]:
    """The fastest call of every form at ``sizes``, taking turns until all had ``seconds``."""
    forms = list(candidates(sizes))
    rng, shape = np.random.default_rng(0), (1, sizes.q_len, sizes.heads * sizes.width)
    arrays = {n: rng.standard_normal(shape, np.float32) for n in "qkv"}
    sessions = [session_of(one, sizes, threads) for one in forms]
    times: list[list[float]] = [[] for _ in forms]
    for turn in range(60):
        for one, session, taken in zip(forms, sessions, times, strict=True):
            if turn > 4 and sum(taken) > seconds:
                continue
            start = time.perf_counter()
            session.run(None, arrays | one.reads)
            if turn:  # the first is a warm-up
                taken.append(time.perf_counter() - start)
    return [
        {"form": one.name, "price": kind_of(one.form), **asdict(sizes), "seconds": min(taken),
         "counts": work(one.form, sizes).counts()}
        for one, taken in zip(forms, times, strict=True)
    ]  # fmt: skip


def fitted(rows: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Prices of one form, and the largest relative error of what they say of its times."""
    from scipy.optimize import nnls

    counts = np.array([row["counts"] for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    unit = np.where(counts.max(0) > 0, counts.max(0), 1.0)
    found, _ = nnls(counts / unit / seconds[:, None], np.ones(len(rows)))
    prices = [float(f"{p:.3g}") for p in found / unit]
    return prices, float(np.abs(counts @ np.array(prices) / seconds - 1).max())


def module_text(prices: dict[str, list[float]], errors: dict[str, float], about: str) -> str:
    rows = "".join(
        f'    "{name}": ({", ".join(map(repr, found))}),\n' for name, found in prices.items()
    )
    worst = "".join(f'    "{name}": {round(e, 2)},\n' for name, e in errors.items())
    return f'''"""Prices of attention in ONNX Runtime by examples/benchmarks/onnx_prices.py.

{about}
"""

# Seconds for a call, a step of a loop, a number moved, a score, and a multiplication.
PRICES: dict[str, tuple[float, ...]] = {{
{rows}}}
# The largest relative error of an estimate at a size that was measured.
ERRORS = {{
{worst}}}
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for a form at a size")
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--module", type=Path, default=MODULE)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for heads, width, lengths in SEVERAL:
        for length in (n for n in lengths if n <= options.longest):
            sizes = Sizes(heads, heads, length, length, width, width)
            rows += measure(sizes, options.threads, options.seconds)
            print(sizes, {r["form"]: round(r["seconds"] * 1e3, 2) for r in rows
                          if r["q_len"] == length and r["heads"] == heads}, flush=True)  # fmt: skip
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["price"]].append(row)
    fits = {name: fitted(found) for name, found in grouped.items()}
    prices, errors = ({n: f[i] for n, f in fits.items()} for i in (0, 1))
    about = (
        f"{date.today().isoformat()}, ONNX Runtime {ort.__version__}, {options.threads} threads, "
        f"float32,\n{hardware()}."
    )
    options.module.write_text(module_text(prices, errors, about))
    document = {
        "date": date.today().isoformat(), "onnxruntime": ort.__version__, "machine": hardware(),
        "threads": options.threads, "units": UNITS, "prices": prices, "worst_error": errors,
        "rows": rows,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({"prices": prices, "worst_error": errors}, indent=1))


if __name__ == "__main__":
    main()
