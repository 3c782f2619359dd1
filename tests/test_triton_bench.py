"""The GPU suite and its benchmark, as far as they go without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.interpreted.dense import CASES

ROOT = Path(__file__).parents[1]


def test_the_gpu_suite_needs_torch_triton_numpy_and_pytest_only():
    """Neither it nor the benchmark imports what a GPU owner's Python may lack."""
    lacking = "typer rich hypothesis transformers diffusers onnx onnxruntime safetensors".split()
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking!r}))\n"
        "import tests.gpu.test_triton_gpu, tests.gpu.test_triton_edges\n"
        "sys.path.insert(0, 'examples/benchmarks')\n"
        "import triton_attention as t\n"
        "assert t.main(['--dry-run']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in (
        "Llama-3-8B decode, batch 64",
        "Wan 2.1",
        "HunyuanVideo",
        "FLUX",
        "blocks d64 131072",
    ):
        assert name in done.stdout


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import triton_attention

    return triton_attention


def test_the_benchmark_writes_after_every_case_and_goes_on_later(bench, monkeypatch, tmp_path):
    ran = []

    def fake(shape, rounds, seconds, tuned):
        ran.append(shape.name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        times = {"attn-rewrite": {"median_ms": 2.0}, "flex": {"median_ms": 3.0}}
        return {"shape": {"name": shape.name, "mask": shape.mask, "q": shape.q, "d": shape.d, "b": shape.b},
                "tiles": 0.5, "times": times, "ratios": {"flex": 1.5, "sdpa flash": 0.5}}  # fmt: skip

    here = {"gpu": "none", "torch": "0"}
    for name, value in (
        ("row", fake),
        ("environment", lambda: here),
        ("copy_bandwidth", lambda: 4000.0),
    ):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "results.json"
    command = ["--output", str(out), "--only", "d128 16384"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    document = json.loads(out.read_text())
    assert [r["shape"]["name"] for r in document["rows"]] == ran[:2]
    assert document["missing"] == ["window d128 16384", "blocks d128 16384"]
    reached = {(t["what"], t["reached"]) for t in document["targets"]}
    assert ("FlexAttention's time over ours", True) in reached
    assert ("best SDPA time over ours", False) in reached
    assert bench.main([*command, "--resume"]) == 0
    assert ran[3:] == ["window d128 16384", "blocks d128 16384"]
    assert json.loads(out.read_text())["missing"] == []
    assert bench.main([*command, "--minutes", "0"]) == 0


def test_a_contender_that_cannot_run_is_recorded_with_its_reason(bench, monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(bench, "_once", lambda run: 1.0)

    def broken():
        raise MemoryError("its scores take 9 GiB")

    times, failed = bench.measure({"a": lambda: int, "b": broken}, 30, 0.0)
    assert failed == {"b": "its scores take 9 GiB"}
    assert times["a"]["rounds"] == 5


CONTENDERS = {
    "attn-rewrite", "flex", "eager, compiled", "sdpa flash_attention", "sdpa cudnn_attention",
    "sdpa efficient_attention", "sdpa math",
}  # fmt: skip


def test_every_case_has_every_contender_by_name(bench):
    """Masks, lengths and head dimensions, and the shapes of models, those with targets first."""
    shapes = list(bench.shapes())
    names = [s.name for s in shapes]
    assert len(names) == len(set(names))
    assert names[:4] == [f"{m} d128 16384" for m in ("dense", "causal", "window", "blocks")]
    for mask in ("dense", "causal", "window", "blocks"):
        for d in (64, 128):
            for length in (1024, 4096, 16384, 32768, 131072):
                assert f"{mask} d{d} {length}" in names
    models = {
        s.name: (s.mask, s.b, s.hq, s.hkv, s.q, s.kv, s.d)
        for s in shapes
        if " d" not in s.name or "decode" in s.name
    }
    assert models["Llama-3-8B prefill"] == ("causal", 1, 32, 8, 8192, 8192, 128)
    assert models["Llama-3-8B decode, batch 1"] == ("cached", 1, 32, 8, 1, 32768, 128)
    assert models["Llama-3-8B decode, batch 64"] == ("cached", 64, 32, 8, 1, 32768, 128)
    assert {n.split()[0] for n in models} == {"Llama-3-8B", "Wan", "HunyuanVideo", "FLUX"}
    for shape in shapes:
        assert set(bench.contenders(shape, {})) == CONTENDERS


@pytest.mark.parametrize("mask", ["dense", "causal", "window", "blocks", "cached"])
def test_contenders_compute_the_same_attention(bench, mask, monkeypatch):
    """On the CPU, with nothing compiled: what is compared on a GPU is one and the same thing."""
    import triton_contenders

    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(triton_contenders, "WINDOW", 100)
    shape = triton_contenders.Shape("small", mask, 1, 4, 2, 1 if mask == "cached" else 256, 256, 32)
    x = triton_contenders.operands(shape, "cpu")
    if mask == "blocks":
        x["keep"] |= torch.eye(2, dtype=torch.bool)  # no empty rows
    x |= {n: x[n].float() for n in "QKV"}
    makers = bench.contenders(shape, x)
    own = makers.pop("attn-rewrite")
    assert callable(own)
    wanted = makers.pop("eager, compiled")()()
    ran = []
    for name, make in makers.items():
        if name in ("sdpa cudnn_attention", "sdpa efficient_attention"):
            continue  # these have no CPU kernel
        if name == "sdpa flash_attention" and mask not in ("dense", "causal", "cached"):
            continue  # takes no mask on a GPU
        assert torch.allclose(make()(), wanted, atol=2e-5), name
        ran.append(name)
    assert {"flex", "sdpa math"} <= set(ran)
    from attn_rewrite.cascade import interpret

    exact = interpret(triton_contenders.cascade_of(shape), x)["AV"]
    assert torch.allclose(exact.float(), wanted, atol=2e-5)


def test_decoding_is_timed_in_graphs_of_many_calls(bench, monkeypatch):
    """A row says so, and has the time of one call; what was tuned is part of it."""
    import triton_contenders

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(bench, "operands", lambda shape: {})
    monkeypatch.setattr(bench, "contenders", lambda shape, x: {"attn-rewrite": lambda: lambda: 0})
    monkeypatch.setattr(bench, "tune_for", lambda shape, x: {"part": "{}"})
    monkeypatch.setattr(bench, "replayed", lambda run, calls: ("graph", calls))
    ran = []
    monkeypatch.setattr(bench, "_once", lambda run: ran.append(run) or 40.0)
    shape = triton_contenders.Shape("small", "cached", 1, 4, 2, 1, 256, 32)
    row = bench.row(shape, 5, 0.0, True)
    assert set(ran) == {("graph", 20)}
    assert (row["calls in a graph"], row["tuned"]) == (20, {"part": "{}"})
    assert row["times"]["attn-rewrite"]["median_ms"] == 2.0
    assert row["cache_gb_per_s"] == 2 * 2 * 256 * 32 * 2 / 2.0 / 1e6
    plain = bench.row(triton_contenders.Shape("small", "dense", 1, 4, 2, 8, 256, 32), 5, 0.0)
    assert (plain["calls in a graph"], plain["tuned"]) == (0, {})
    assert plain["times"]["attn-rewrite"]["median_ms"] == 40.0


@pytest.mark.parametrize(
    ("mask", "kernels"), [("cached", {"part", "join"}), ("causal", {"attention"})]
)
def test_the_benchmark_tunes_what_it_runs(bench, monkeypatch, mask, kernels):
    import triton_contenders

    from attn_rewrite.backends.triton import tune
    from attn_rewrite.backends.triton.schedule import Schedule

    asked = []
    monkeypatch.setattr(tune, "check_device", lambda tensors: None)
    monkeypatch.setattr(tune, "searched", lambda key, default, *rest: asked.append(key) or default)
    monkeypatch.setattr(tune, "tuned", lambda key, *rest: asked.append(key) or Schedule(warps=8))
    shape = triton_contenders.Shape("small", mask, 1, 4, 2, 1, 256, 32)
    x = triton_contenders.operands(shape, "cpu")
    found = triton_contenders.tune_for(shape, x)
    assert set(found) == kernels
    assert len(asked) == len(set(asked)) == len(kernels)


def test_compilers_trace_what_the_gpu_suite_compiles():
    """Without a break: the operator is all that a graph holds of an attention."""
    from tests.gpu.test_triton_gpu import SIZES, made
    from tests.interpreted.dense import inputs_for

    graphs = []

    def seen(graph, inputs):
        graphs.append(graph)
        return lambda *given: given[:1]

    for name in ("causal", "per head", "bias"):
        x = inputs_for(CASES[name], SIZES, torch.bfloat16, 9)
        torch.compile(made(CASES[name]), fullgraph=True, backend=seen)(*x.values())
    for graph in graphs:
        called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        assert sum("attn_rewrite.triton_cascade" in t for t in called) == 1
    assert len(graphs) == 3


def test_ratios_are_of_the_same_round_and_have_a_spread(bench, monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    clock = iter([1.0, 2.0, 10.0, 30.0, 1.0, 2.0, 10.0, 30.0, 1.0, 2.0] * 3)
    monkeypatch.setattr(bench, "_once", lambda run: next(clock))
    times, failed = bench.measure({"attn-rewrite": lambda: int, "flex": lambda: int}, 10, 60.0)
    assert not failed
    ratio = times["flex"]["ratio"]
    assert ratio["low"] == 2.0
    assert 2.0 <= ratio["median"] <= ratio["high"] == 3.0
    assert times["attn-rewrite"]["ratio"]["median"] == 1.0
    row = {
        "shape": {"name": "dense d128 16384", "mask": "dense", "q": 16384, "d": 128, "b": 1},
        "times": times, "tiles": 1.0, "ratios": {"flex": ratio["median"]},
    }  # fmt: skip
    (first, second) = bench.reached([row], 4000.0)
    assert (first["target"], first["reached"]) == (">= 1.0", True)
    assert (second["value"], second["reached"]) == (None, False)


def test_the_gpu_suite_is_collected_and_skipped_without_a_gpu():
    """Every class of kernel is in it; without a GPU ``make gpu-test`` says so in one sentence."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p",
               "no:cacheprovider", "tests/gpu"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    for word in ("opcheck", "torch_compile", "decoding", "pages", "sequences", "gradients", "dropout",
                 "float16", *CASES):  # fmt: skip
        assert word in done.stdout, word
    assert int(re.search(r"(\d+) tests collected", done.stdout)[1]) > 100
    if torch.cuda.is_available():
        return
    made = subprocess.run(
        ["make", "gpu-test", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"MAKEFLAGS": ""},
    )  # fmt: skip
    assert made.returncode != 0
    assert "no GPU is visible to this Python" in made.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(bench, capsys, tmp_path):
    assert bench.main(["--output", str(tmp_path / "none.json")]) == 1
    assert "no GPU is visible" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        bench.main(["--minutes", "soon"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
