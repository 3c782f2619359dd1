"""One attention in ONNX Runtime on the CPU: what the export writes against the usual operators.

Three comparisons, each with all sessions in one process taking turns; the minimum and the median of
the repetitions are kept, and the ratio of the minima.  Extra memory is the peak of one call in a
fresh process, beyond what it held before the call.

* ``blocks``: a list of blocks per head (fixed length) against dense ``MultiHeadAttention``.
* ``causal``: dense causal attention as it leaves under the policy ``exact``, against the original
  module exported plainly by torch.
* ``decode``: one new token after a cache of 8-bit codes against the same with a float cache, both
  ``GroupQueryAttention`` in the files that ``export_onnx(cache=...)`` writes.

    python examples/benchmarks/onnx_attention.py blocks --length 8192
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import hardware

HEADS, WIDTH, BLOCK, DENSITY = 12, 64, 64, 0.15
RESULTS = Path(__file__).parent / "results" / "onnx_attention.json"
Arrays = dict[str, np.ndarray]


def _attention(call: Callable[..., Any]) -> Any:
    """A module from and to [batch, sequence, heads * width] around ``call(q, k, v)``."""
    import torch

    class Attention(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            b, s, _ = q.shape
            heads = (x.view(b, s, HEADS, WIDTH).transpose(1, 2) for x in (q, k, v))
            return call(*heads).transpose(1, 2).reshape(b, s, HEADS * WIDTH)

    return Attention().eval()


def _example(length: int) -> Any:
    import torch

    return tuple(torch.randn(1, length, HEADS * WIDTH) for _ in range(3))


def layouts(blocks: int) -> np.ndarray:
    """[heads, blocks, blocks], about 15 % kept in every head; counts differ from row to row."""
    rng = np.random.default_rng(0)
    share = DENSITY * rng.uniform(0.5, 1.5, (HEADS, blocks, 1))
    kept = rng.random((HEADS, blocks, blocks)) < share
    kept[:, np.arange(blocks), np.arange(blocks)] = True
    return kept


def write_blocks(place: Path, length: int) -> float:
    """A block list per head by `export_onnx`; the share of blocks in the file."""
    import torch

    import attn_rewrite.ops  # noqa: F401  (registers the operator)
    from attn_rewrite import export_onnx
    from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
    from attn_rewrite.cascade.expr import KV, H, Q, Read, call
    from attn_rewrite.cascade.ir import TensorDecl

    listed = Read("L", (H, call("floordiv", Q, BLOCK), call("floordiv", KV, BLOCK)))
    declared = TensorDecl("L", ("h", "i", "j"))
    text = str(softmax_cascade(SoftmaxAttention(QK * WIDTH**-0.5, listed, reads=(declared,))))
    table = torch.from_numpy(layouts(-(-length // BLOCK)))

    def call_tiles(q: Any, k: Any, v: Any) -> Any:
        return torch.ops.attn_rewrite.tiled_attention(q, k, v, [module.table], text, BLOCK)

    module = _attention(call_tiles)
    module.register_buffer("table", table)
    program = torch.export.export(module, _example(length))
    (site,) = export_onnx(program, place, verify=False).sites
    assert site.form == "blocks"
    assert site.tiles is not None
    return site.tiles[0] / site.tiles[1]


def _causal() -> Any:
    from torch.nn import functional

    def causal(q: Any, k: Any, v: Any) -> Any:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _attention(causal)


def write_causal(place: Path) -> str:
    """Causal attention under the policy ``exact``; the form it took."""
    import attn_rewrite as ar

    done = ar.optimize(_causal(), "exact", _example(512))
    (site,) = ar.export_onnx(done, place, target="onnxruntime").sites
    return site.form


def write_plainly(place: Path) -> None:
    """The original module as torch exports it, batch and length dynamic."""
    import torch

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    example = tuple(torch.randn(2, 300, HEADS * WIDTH) for _ in range(3))
    torch.onnx.export(
        _causal(), example, place, dynamo=True, dynamic_shapes=(axes, axes, axes), verbose=False
    )


def write_mha(place: Path) -> None:
    """Dense ``MultiHeadAttention`` without a mask: ONNX Runtime's streaming kernel."""
    from onnx import TensorProto, helper, save

    def tensor(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", HEADS * WIDTH])

    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["output"], domain="com.microsoft", num_heads=HEADS
    )
    graph = helper.make_graph([node], "peer", [tensor(n) for n in "qkv"], [tensor("output")])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), place)


def write_decoder(place: Path, cache: str) -> list[Any]:
    """A Llama-like layer with its cache; the input specifications of the file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import attn_rewrite as ar

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = {"input_ids": torch.randint(0, 64, (1, 32))}
    done = ar.optimize(model, "exact", (), ids)
    artifact = ar.export_onnx(done, place, target="onnxruntime", cache=cache)
    assert [s.form for s in artifact.sites] == ["GroupQueryAttention"]
    return list(artifact.inputs)


def inputs_of(length: int) -> Arrays:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((1, length, HEADS * WIDTH), np.float32) for n in "qkv"}


def step_of(specs: list[Any], past: int) -> Arrays:
    """One new token after ``past`` ones."""
    rng = np.random.default_rng(0)
    feed: Arrays = {"input_ids": np.array([[3]])}
    for spec in specs:
        if spec.name.startswith("past_key_values."):
            shape = (1, spec.shape[1], past, spec.shape[3])
            numbers = rng.standard_normal(shape, np.float32)
            feed[spec.name] = numbers if spec.dtype == "float32" else (40 * numbers).astype("i1")
    return feed


def _memory(place: str, inputs: Arrays, threads: int, answer: Any) -> None:
    from attn_rewrite.backends.onnx.runtime import open_session

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith(key))

    session = open_session(Path(place), threads=threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    held = status("VmRSS")
    session.run(None, inputs)
    answer.put((status("VmHWM") - held) / 1024)


def extra_memory(place: Path, inputs: Arrays, threads: int) -> float | None:
    """MiB that one call adds at its peak; None where the kernel does not say."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_memory, args=(str(place), inputs, threads, answer))
    child.start()
    found = answer.get(timeout=300)
    child.join()
    return round(float(found), 1)


def measure(files: dict[str, tuple[Path, Arrays]], options: Any) -> dict[str, Any]:
    """Interleaved times of every file, and the memory of a call."""
    from attn_rewrite.backends.onnx.runtime import open_session

    sessions = {n: open_session(p, threads=options.threads) for n, (p, _) in files.items()}
    times: dict[str, list[float]] = {n: [] for n in sessions}
    for turn in range(options.repetitions + 1):  # the first is a warm-up
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, files[name][1])
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    del sessions
    return {
        name: {
            "min_ms": round(min(t), 3),
            "median_ms": round(statistics.median(t), 3),
            "max_ms": round(max(t), 3),
            "extra_mib": extra_memory(*files[name], options.threads),
        }
        for name, t in times.items()
    }


def compare_blocks(folder: Path, options: Any) -> dict[str, Any]:
    inputs = inputs_of(options.length)
    density = write_blocks(folder / "blocks.onnx", options.length)
    write_mha(folder / "mha.onnx")
    files = {n: (folder / f"{n}.onnx", inputs) for n in ("blocks", "mha")}
    runs = measure(files, options)
    return {"density": round(density, 4), "runs": runs, "pair": ["mha", "blocks"]}


def compare_causal(folder: Path, options: Any) -> dict[str, Any]:
    form = write_causal(folder / "exact.onnx")
    write_plainly(folder / "plain.onnx")
    inputs = inputs_of(options.length)
    files = {n: (folder / f"{n}.onnx", inputs) for n in ("exact", "plain")}
    return {"form": form, "runs": measure(files, options), "pair": ["plain", "exact"]}


def compare_decode(folder: Path, options: Any) -> dict[str, Any]:
    files = {}
    for cache in ("float", "int8"):
        place = folder / f"{cache}.onnx"
        files[cache] = (place, step_of(write_decoder(place, cache), options.length))
    return {"query_heads": 32, "key_heads": 8, "head_dim": 128,
            "runs": measure(files, options), "pair": ["float", "int8"]}  # fmt: skip


KINDS = {"blocks": compare_blocks, "causal": compare_causal, "decode": compare_decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    import onnxruntime

    with tempfile.TemporaryDirectory() as name:
        found = KINDS[options.kind](Path(name), options)
    slow, fast = found.pop("pair")
    found["ratio"] = round(found["runs"][slow]["min_ms"] / found["runs"][fast]["min_ms"], 2)
    found["ratio_is"] = f"{slow} / {fast}"
    found |= {"date": date.today().isoformat(), "onnxruntime": onnxruntime.__version__,
              "machine": hardware(), "threads": options.threads,
              "heads": found.pop("query_heads", HEADS),
              "head_dim": found.get("head_dim", WIDTH), "length": options.length,
              "repetitions": options.repetitions}  # fmt: skip
    print(json.dumps(found, indent=2))
    document = json.loads(options.output.read_text()) if options.output.exists() else {}
    document[f"{options.kind} {options.length}"] = found
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
