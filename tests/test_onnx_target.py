"""The target ``onnxruntime``: its own operators where they are exact and faster, said per site."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.cascade.attention import QK, SoftmaxAttention
from attn_rewrite.cascade.text import parse
from attn_rewrite.cli.app import run
from attn_rewrite.site_marks import SITE_KEY
from tests.test_onnx import HQ, Sdpa, Tiled, bound, capture, tokens
from tests.test_onnx_window import causal_window


class Cross(nn.Module):
    """Queries and keys of lengths of their own; values of another width."""

    def __init__(self, heads_kv: int = HQ, **options: object) -> None:
        super().__init__()
        self.heads_kv, self.options = heads_kv, options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


def inputs(model: Cross, s: int, t: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, HQ, s, 8), (2, model.heads_kv, t, 8), (2, model.heads_kv, t, 6)]
    return [torch.randn(*x).to(dtype) for x in shapes]


def census(path: Path) -> set[str]:
    nodes = onnx.load(path).graph.node
    return {f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes}


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_without_a_mask_is_one_operator(scale: float | None, tmp_path: Path) -> None:
    model = Cross(scale=scale)
    x = inputs(model, 200, 330)  # enough scores for it to be the cheaper form
    artifact = export_onnx(
        torch.export.export(model, tuple(x)), tmp_path / "m.onnx", target="onnxruntime"
    )
    (site,) = artifact.sites
    assert (site.form, artifact.target) == ("MultiHeadAttention", "onnxruntime")
    assert "dense slower by measured prices" in site.choice
    assert "com.microsoft::MultiHeadAttention" in census(artifact.path)
    q, k, v = (t.double().numpy() for t in x)
    score = q @ k.swapaxes(-1, -2) * (scale or 8**-0.5)
    weights = np.exp(score - score.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ v
    got = artifact.run({n: t.numpy() for n, t in zip("qkv", x, strict=True)})["output"]
    assert np.abs(got - wanted).max() <= bound(model, tuple(x), wanted)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Cross(is_causal=True), "one head dimension"),
        (Cross(2, enable_gqa=True), "MultiHeadAttention slower by measured prices"),
    ],
)
def test_what_the_operator_does_not_express_is_portable(
    model: Cross, words: str, tmp_path: Path
) -> None:
    program = torch.export.export(model, tuple(inputs(model, 20, 20)))
    artifact = export_onnx(program, tmp_path / "m.onnx", target="onnxruntime")
    assert words in artifact.sites[0].choice
    assert not any("::" in name for name in census(artifact.path))


def test_bfloat16_has_no_kernel(tmp_path: Path) -> None:
    model = Cross()
    program = torch.export.export(model, tuple(inputs(model, 9, 9, torch.bfloat16)))
    artifact = export_onnx(program, tmp_path / "m.onnx", target="onnxruntime", verify=False)
    assert "no kernel" in artifact.sites[0].choice


def test_tiles_stay_tiles(tmp_path: Path) -> None:
    model = Tiled(SoftmaxAttention(QK, causal_window(5), group=2))
    program = capture(model, tokens(2, 20))
    artifact = export_onnx(program, tmp_path / "m.onnx", target="onnxruntime")
    (site,) = artifact.sites
    assert (site.form, site.skips) == ("tiles", True)
    assert "SparseAttention" in site.choice
    assert site.to_json()["choice"] == site.choice


def test_portable_files_hold_standard_operators_only(tmp_path: Path) -> None:
    model = Cross()
    program = torch.export.export(model, tuple(inputs(model, 9, 9)))
    artifact = export_onnx(program, tmp_path / "m.onnx")
    assert artifact.sites[0].choice == ""
    assert not any("::" in name for name in census(artifact.path))


class Two(nn.Module):
    """Two rewritten attentions under names that are one operator name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Tiled(SoftmaxAttention(QK, causal_window(5), group=2))
        self.second = Tiled(SoftmaxAttention(QK, causal_window(9), group=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("names", [("a.b", "c"), ("a.b", "a_b")])
def test_a_rewritten_site_is_a_function_that_says_what_it_computes(
    names: tuple[str, str], opset: int, tmp_path: Path
) -> None:
    program = capture(Two(), tokens(2, 20))
    spliced = [n for n in program.graph.nodes if "tiled_attention" in str(n.target)]
    for node, name in zip(spliced, names, strict=True):
        node.meta[SITE_KEY] = name
    artifact = export_onnx(program, tmp_path / "m.onnx", opset=opset)  # compares the numbers
    proto = onnx.load(artifact.path)
    onnx.checker.check_model(proto)
    calls = [n.op_type for n in proto.graph.node if n.domain == "attn_rewrite"]
    assert [s.name for s in artifact.sites] == list(names)
    assert len(set(calls)) == 2
    assert calls[0] == "a_b"
    functions = {f.name: f for f in proto.functions}
    assert set(functions) == set(calls)
    texts = [parse(functions[c].doc_string) for c in calls]
    assert texts == [parse(m.text) for m in (Two().first, Two().second)]


def test_where_every_operator_ran_is_listed(tmp_path: Path) -> None:
    model = Tiled(SoftmaxAttention(QK, causal_window(5), group=2))
    artifact = export_onnx(capture(model, tokens(2, 20)), tmp_path / "m.onnx")
    found = artifact.placement({"x": tokens(1, 30).numpy()})
    assert list(found) == ["CPUExecutionProvider"]
    assert {"Scan", "Softmax", "MatMul"} <= set(found["CPUExecutionProvider"]) | {"MatMul"}
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("options", "policy", "target"),
    [
        ({}, "exact", "portable"),
        ({}, "window(size=16)", "onnxruntime"),
        ({"is_causal": True}, "exact", "onnxruntime"),
        ({"is_causal": True}, "window(size=9, sinks=3)", "portable"),
    ],
)
def test_models_under_policies(options: dict, policy: str, target: str, tmp_path: Path) -> None:
    done = ar.optimize(Sdpa(**options).eval(), policy, (tokens(2, 300),))
    artifact = export_onnx(done, tmp_path / "m.onnx", target=target)  # compares at two sizes
    (site,) = artifact.sites
    assert artifact.errors
    assert site.skips == (policy != "exact" or bool(options))
    assert site.form == ("tiles" if policy != "exact" else "half" if options else "dense")
    assert bool(site.choice) == (target == "onnxruntime")
    assert artifact.verify({"x": tokens(3, 77, seed=5).numpy()})


@pytest.mark.slow
def test_bench_in_onnx_runtime(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "from tests.test_onnx import Sdpa, tokens\n"
        "def make():\n    return Sdpa().eval(), (tokens(2, 300),), {}, None\n"
    )
    paths = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "attn_rewrite", "bench", "toy:make", "--runtime",
               "onnxruntime", "--policy", "window(size=16)", "--repeats", "2", "--json"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["conditions"]["runtime"] == "onnxruntime"
    assert document["original"]["median_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("optimize", "--export", "onnx:portabel"), "'onnx:portabel' is not known"),
        (("optimize", "--cache", "float"), "--cache is about ONNX files"),
        (("optimize", "--static"), "--static is about ONNX files"),
        (("optimize", "--export", "onnx", "--cache", "int4"), "unknown cache 'int4'"),
        (("optimize", "--export", "onnx", "--cache", "int8", "--static"), "static= and cache="),
        (("bench", "--runtime", "onnx"), "'onnx' is not known"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    out = ["-o", "out"] if command == "optimize" else []
    assert run([command, "no-such-model", *out, *options]) == 2
    shown = " ".join(capfd.readouterr().err.split())
    assert words in shown
    assert "no-such-model" not in shown
    assert not list(tmp_path.iterdir())
