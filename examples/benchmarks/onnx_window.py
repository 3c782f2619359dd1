"""Sliding windows in ONNX Runtime on the CPU: our portable tiles against the built-in operators.

Peers are ``com.microsoft::GroupQueryAttention`` with its own ``local_window_size`` (the same
numbers), the same operator fully causal, and ``MultiHeadAttention`` without a mask.  All sessions
live in one process and take turns; the minimum and the median of the repetitions are kept.  Extra
memory is the peak of one call in a fresh process, beyond what it held before the call.

    python examples/benchmarks/onnx_window.py --lengths 1024 2048 4096 8192 --windows 256
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HEADS, WIDTH = 12, 64
RESULTS = Path(__file__).parent / "results" / "onnx_window.json"
Arrays = dict[str, np.ndarray]


def export_ours(place: Path, window: int, block: int) -> None:
    """A causal window through `export_onnx`, from and to [batch, sequence, heads * width]."""
    import torch

    import attn_rewrite.ops  # noqa: F401  (registers the operator)
    from attn_rewrite.backends.onnx.export import export_onnx
    from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
    from attn_rewrite.cascade.expr import KV, Q

    distance = Q - KV
    guard = (distance >= 0) & (distance < window)
    text = str(softmax_cascade(SoftmaxAttention(QK * WIDTH**-0.5, guard)))

    class Attention(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            b, s, _ = q.shape
            q, k, v = (x.view(b, s, HEADS, WIDTH).transpose(1, 2) for x in (q, k, v))
            y = torch.ops.attn_rewrite.tiled_attention(q, k, v, [], text, block)
            return y.transpose(1, 2).reshape(b, s, HEADS * WIDTH)

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    example = tuple(torch.randn(2, 300, HEADS * WIDTH) for _ in range(3))
    program = torch.export.export(Attention(), example, dynamic_shapes=(axes, axes, axes))
    artifact = export_onnx(program, place)
    assert all(site.skips for site in artifact.sites)


def write_peer(place: Path, operator: str, window: int) -> None:
    """One com.microsoft operator in a file; GroupQueryAttention gets its lengths from the shape.

    Its present keys and values are outputs of the graph: only then does ONNX Runtime 1.32 take the
    kernel without an S x S buffer (at S=2048 55 ms and 30 MiB instead of 81 ms and 216 MiB).
    """
    from onnx import TensorProto, helper, save

    def tensor(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", HEADS * WIDTH])

    constants = [
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [0]),
    ]
    nodes = [
        helper.make_node("Shape", ["q"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Sub", ["length", "one"], ["last"]),
        helper.make_node("Unsqueeze", ["last", "axis"], ["lasts"]),
        helper.make_node("Cast", ["lasts"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Cast", ["length"], ["total"], to=TensorProto.INT32),
    ]
    outputs = [tensor("output")]
    if operator == "MultiHeadAttention":
        nodes, inputs, options = [], ["q", "k", "v"], {"num_heads": HEADS}
    else:
        cache = ["b", HEADS, "s", WIDTH]
        outputs += [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, cache)
            for n in ("present_key", "present_value")
        ]
        inputs = ["q", "k", "v", "", "", "seqlens", "total"]
        options = {"num_heads": HEADS, "kv_num_heads": HEADS}
        options |= {"local_window_size": window} if window else {}
    names = [value.name for value in outputs]
    nodes.append(helper.make_node(operator, inputs, names, domain="com.microsoft", **options))
    graph = helper.make_graph(nodes, "peer", [tensor(n) for n in "qkv"], outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), place)


def inputs_of(length: int) -> Arrays:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((1, length, HEADS * WIDTH), np.float32) for n in "qkv"}


def worst_error(output: np.ndarray, inputs: Arrays, window: int) -> float:
    """Against float64, on 64 queries spread over the sequence."""
    length = output.shape[1]
    q, k, v, y = (
        a.reshape(length, HEADS, WIDTH).astype(np.float64) for a in (*inputs.values(), output)
    )
    worst = 0.0
    for i in np.unique(np.linspace(0, length - 1, 64).astype(int)):
        near = slice(max(0, i - window + 1), i + 1)
        score = np.einsum("hd,nhd->hn", q[i], k[near]) * WIDTH**-0.5
        weights = np.exp(score - score.max(-1, keepdims=True))
        expected = np.einsum("hn,nhd->hd", weights / weights.sum(-1, keepdims=True), v[near])
        worst = max(worst, float(np.abs(expected - y[i]).max()))
    return worst


def _memory(place: str, length: int, threads: int, answer: Any) -> None:
    from attn_rewrite.backends.onnx.runtime import open_session

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith(key))

    session, inputs = open_session(Path(place), threads=threads), inputs_of(length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    held = status("VmRSS")
    session.run(["output"], inputs)
    answer.put((status("VmHWM") - held) / 1024)


def extra_memory(place: Path, length: int, threads: int) -> float | None:
    """MiB that one call adds at its peak; None where the kernel does not say."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_memory, args=(str(place), length, threads, answer))
    child.start()
    found = answer.get(timeout=300)
    child.join()
    return round(float(found), 1)


def measure(files: dict[str, Path], length: int, window: int, options: Any) -> dict[str, Any]:
    """Interleaved times of every file at one length, errors of those with the same window."""
    from attn_rewrite.backends.onnx.runtime import open_session

    inputs = inputs_of(length)
    sessions = {n: open_session(p, threads=options.threads) for n, p in files.items()}
    outputs = {n: s.run(["output"], inputs)[0] for n, s in sessions.items()}
    times: dict[str, list[float]] = {n: [] for n in sessions}
    for _ in range(options.repetitions):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(["output"], inputs)
            times[name].append((time.perf_counter() - start) * 1e3)
    rows = {
        name: {
            "min_ms": round(min(t), 2),
            "median_ms": round(statistics.median(t), 2),
            "extra_mib": extra_memory(files[name], length, options.threads),
            "max_abs_error": worst_error(outputs[name], inputs, window)
            if name in ("tiles", "gqa-window")
            else None,
        }
        for name, t in times.items()
    }
    ratio = round(rows["gqa-window"]["min_ms"] / rows["tiles"]["min_ms"], 2)
    return {"length": length, "window": window, "tiles_over_gqa_window": ratio, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--windows", type=int, nargs="+", default=[256])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    import onnxruntime

    rows = []
    with tempfile.TemporaryDirectory() as name:
        for window in options.windows:
            files = {n: Path(name, f"{n}.onnx") for n in ("tiles", "gqa-window", "gqa", "mha")}
            export_ours(files["tiles"], window, options.block)
            write_peer(files["gqa-window"], "GroupQueryAttention", window)
            write_peer(files["gqa"], "GroupQueryAttention", 0)
            write_peer(files["mha"], "MultiHeadAttention", 0)
            for length in options.lengths:
                rows.append(measure(files, length, window, options))
                summary = {n: r["min_ms"] for n, r in rows[-1]["runs"].items()}
                print(f"S={length} W={window}", summary, f"x{rows[-1]['tiles_over_gqa_window']}")
    document = {
        "date": date.today().isoformat(),
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "threads": options.threads,
        "heads": HEADS,
        "head_dim": WIDTH,
        "block": options.block,
        "repetitions": options.repetitions,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
