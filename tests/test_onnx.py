"""`export_onnx`: what the file contains, what it computes, and what is left when it fails."""

# ruff: noqa: SIM300 (KV is a coordinate, not a constant)

from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.export import Dim, ExportedProgram

import attn_rewrite as ar
import attn_rewrite.ops  # registers attn_rewrite::tiled_attention
from attn_rewrite.backends.onnx import dense, runtime
from attn_rewrite.backends.onnx.artifact import OnnxArtifact, TensorSpec
from attn_rewrite.backends.onnx.export import export_onnx
from attn_rewrite.cascade.attention import QK, SoftmaxAttention, softmax_cascade
from attn_rewrite.cascade.expr import KV, B, Q, Read
from attn_rewrite.cascade.ir import TensorDecl
from attn_rewrite.errors import LowerError, PolicyError, ToolError, VerifyError

WIDTH, HQ, HKV, D = 24, 4, 2, 6


class Sdpa(nn.Module):
    """Fused projections, one attention, and the projection out."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(WIDTH, HQ * D)
        self.kv = nn.Linear(WIDTH, 2 * HKV * D)
        self.options = options

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, HQ, D).transpose(1, 2)
        k, v = (t.view(b, s, HKV, D).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        return q, k, v

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.heads(x)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True, **self.options
        )


class Tiled(Sdpa):
    """The same with an attention that was rewritten."""

    def __init__(self, form: SoftmaxAttention, block: int = 16) -> None:
        super().__init__()
        self.text, self.block = str(softmax_cascade(form)), block

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        reads = [] if mask is None else [mask]
        op = torch.ops.attn_rewrite.tiled_attention
        return op(*self.heads(x), reads, self.text, self.block)


def capture(model: nn.Module, *args: torch.Tensor, dynamic: bool = True) -> ExportedProgram:
    batch, length = Dim("n", min=1, max=64), Dim("l", min=1, max=4096)
    shapes = []
    for a in args:
        axes = {0: batch, 1: length} if a.dim() < 4 else {0: batch, 2: length, 3: length}
        shapes.append({i: d for i, d in axes.items() if a.shape[i] > 1})
    return torch.export.export(
        model.eval(), args, dynamic_shapes=tuple(shapes) if dynamic else None
    )


def tokens(b: int, s: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, s, WIDTH, generator=torch.Generator().manual_seed(seed))


def reference(
    model: Sdpa, x: torch.Tensor, keep: np.ndarray, bias: np.ndarray | float = 0.0, scale: float = 0
) -> np.ndarray:
    """Dense attention in float64; rows that keep nothing give 0."""
    wide = x.double().numpy()

    def project(layer: nn.Linear) -> np.ndarray:
        w, c = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
        return wide @ w.T + c

    b, s, _ = wide.shape
    q = project(model.q).reshape(b, s, HQ, D).transpose(0, 2, 1, 3)
    k, v = np.split(project(model.kv), 2, -1)
    k, v = (t.reshape(b, s, HKV, D).transpose(0, 2, 1, 3).repeat(HQ // HKV, 1) for t in (k, v))
    score = q @ k.swapaxes(-1, -2) * (scale or 1 / math.sqrt(D)) + bias
    score = np.where(keep, score, -np.inf)
    top = score.max(-1, keepdims=True)
    weights = np.exp(score - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


def bound(model: nn.Module, args: tuple[torch.Tensor, ...], wanted: np.ndarray) -> float:
    """Twice torch's own float32 error, or 4 eps of the largest value."""
    with torch.no_grad():
        return allowed(model(*args), wanted)


def allowed(own: torch.Tensor, wanted: np.ndarray) -> float:
    error = float(np.abs(own.numpy() - wanted).max())
    return max(2 * error, 4 * float(np.finfo(np.float32).eps) * float(np.abs(wanted).max()))


def operators(path: Path) -> set[str]:
    """Every operator of the file, nested graphs and the bodies of its functions included."""

    def walk(graph: onnx.GraphProto | onnx.FunctionProto) -> set[str]:
        found = set()
        for node in graph.node:
            if node.domain == "attn_rewrite":
                assert node.op_type in functions
                found |= walk(functions[node.op_type])
                continue
            assert node.domain in ("", "ai.onnx"), node.domain
            found.add(node.op_type)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    found |= walk(attribute.g)
        return found

    model = onnx.load(path, load_external_data=False)
    functions = {f.name: f for f in model.functions}
    return walk(model.graph)


# ------------------------------------------------------------------------------------ numbers


class Masked(Sdpa):
    """One attention per kind of mask."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor, pad: torch.Tensor, bias: torch.Tensor):
        q, k, v = self.heads(x)
        sdpa = functools.partial(functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        return {
            "none": sdpa(),
            "causal": sdpa(is_causal=True, scale=0.3),
            "keep": sdpa(attn_mask=keep),  # the name of an input: becomes keep_output
            "padding": sdpa(attn_mask=pad[:, None, None, :]),
            "bias": sdpa(attn_mask=bias),
        }


def masked_inputs(b: int, s: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(s)
    keep = torch.rand(b, 1, s, s, generator=random) < 0.6
    pad = (torch.arange(s) < s // 2 + 1).repeat(b, 1)
    return tokens(b, s, 1), keep, pad, torch.randn(b, 1, s, s, generator=random)


@pytest.mark.parametrize("opset", [18, 20, 23, 24])
def test_sdpa_at_every_opset(opset: int, tmp_path: Path) -> None:
    model = Masked()
    artifact = export_onnx(capture(model, *masked_inputs(2, 9)), tmp_path / "m.onnx", opset=opset)
    assert ("Attention" in operators(artifact.path)) == (opset >= 23)
    assert onnx.load(artifact.path).opset_import[0].version == opset
    assert onnx.load(artifact.path).ir_version == 10
    for b, s in itertools.product((1, 3), (1, 9, 40)):
        args = masked_inputs(b, s)
        x, keep, pad, bias = args
        every = np.ones((s, s), bool)
        wanted = {
            "none": reference(model, x, every),
            "causal": reference(model, x, np.tril(every), scale=0.3),
            "keep_output": reference(model, x, keep.numpy()),
            "padding": reference(model, x, pad.numpy()[:, None, None]),
            "bias_output": reference(model, x, every, bias.double().numpy()),
        }
        with torch.no_grad():
            own = model(*args)
        bounds = {n: allowed(own[n.removesuffix("_output")], w) for n, w in wanted.items()}
        inputs = {spec.name: a.numpy() for spec, a in zip(artifact.inputs, args, strict=True)}
        assert artifact.verify(inputs, wanted, bound=bounds).keys() == wanted.keys()


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows_give_zero_as_in_torch(kind: str, opset: int, tmp_path: Path) -> None:
    model = Sdpa()
    keep = torch.rand(2, 1, 12, 12) < 0.5
    keep[0, :, 3] = False
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    x = tokens(2, 12)
    artifact = export_onnx(capture(model, x, mask), tmp_path / "m.onnx", opset=opset)
    got = artifact.run({"x": x.numpy(), "mask": mask.numpy()})["output"]
    assert not model(x, mask)[0, :, 3].any()
    np.testing.assert_array_equal(got[0, :, 3], 0)
    wanted = reference(model, x, keep.numpy())
    assert np.abs(got - wanted).max() <= bound(model, (x, mask), wanted)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_the_lowest_number_give_what_torch_gives(
    dtype: torch.dtype, opset: int, tmp_path: Path
) -> None:
    """Masks of transformers: a row of ``finfo.min`` alone, beside -inf, and beside kept keys.

    ONNX Runtime's Attention takes that number for -inf, and adds masks of halves in halves.
    """
    model = Sdpa().to(dtype)
    low = torch.finfo(dtype).min
    mask = torch.zeros(2, 1, 12, 12, dtype=dtype)
    x = tokens(2, 12).to(dtype)
    artifact = export_onnx(capture(model, x, mask), tmp_path / "m.onnx", opset=opset)
    assert ("Attention" in operators(artifact.path)) == (opset == 23 and dtype == torch.float32)
    mask[0, :, 3] = low
    mask[0, :, 5, 4:] = low
    mask[1, :, 3], mask[1, :, 3, :5] = -math.inf, low
    mask[1, :, 7] = -math.inf
    got = artifact.run({"x": x.numpy(), "mask": mask.numpy()})["output"]
    with torch.no_grad():
        own, wanted = model(x, mask), model.double()(x.double(), mask.double()).numpy()
    assert not got[1, :, 7].any()
    assert np.abs(got[0, :, 3]).max() > 0.1
    assert np.abs(got.astype(np.float64) - wanted).max() <= allowed(own, wanted)


class Shapes(nn.Module):
    """SDPA on tensors of three and five dimensions, d_qk != d_v, cross lengths."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("opset", [20, 23])
def test_sdpa_of_any_rank(lead: tuple[int, ...], opset: int, tmp_path: Path) -> None:
    args = [torch.randn(*lead, n, d) for n, d in ((5, 8), (7, 8), (7, 3))]
    program = torch.export.export(Shapes(), tuple(args))
    artifact = export_onnx(program, tmp_path / "m.onnx", opset=opset)
    q, k, v = (a.double().numpy() for a in args)
    score = q @ k.swapaxes(-1, -2) / math.sqrt(8)
    weights = np.exp(score - score.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ v
    got = artifact.run({n: a.numpy() for n, a in zip("qkv", args, strict=True)})["output"]
    assert np.abs(got - wanted).max() <= bound(Shapes(), tuple(args), wanted)


def window(size: int, *, read: bool = False) -> SoftmaxAttention:
    guard = (Q - KV >= 0) & (Q - KV < size)
    if not read:
        return SoftmaxAttention(QK * (1 / math.sqrt(D)), guard, group=HQ // HKV)
    keep = Read("M0", (B, KV))
    reads = (TensorDecl("M0", ("b", "kv"), dtype="bool"),)
    return SoftmaxAttention(QK * (1 / math.sqrt(D)), guard & keep, group=HQ // HKV, reads=reads)


@pytest.mark.parametrize(("read", "opset"), [(False, 18), (True, 20), (False, 23)])
def test_a_rewritten_window_leaves_as_tiles(read: bool, opset: int, tmp_path: Path) -> None:
    model = Tiled(window(10, read=read))
    pad = torch.ones(2, 40, dtype=torch.bool)
    sample = (tokens(2, 40), pad) if read else (tokens(2, 40),)
    artifact = export_onnx(capture(model, *sample), tmp_path / "m.onnx", opset=opset)
    (site,) = artifact.sites
    assert (site.form, site.skips, site.rows, site.width) == ("tiles", True, 16, 25)
    assert "Scan" in operators(artifact.path)
    for b, s in ((1, 1), (1, 50), (3, 129)):
        x = tokens(b, s, 2)
        d = np.arange(s)[:, None] - np.arange(s)
        keep = np.broadcast_to((d >= 0) & (d < 10), (b, 1, s, s))
        inputs = {"x": x.numpy()}
        args: tuple[torch.Tensor, ...] = (x,)
        if read:
            inputs["mask"] = np.arange(s)[None] >= np.arange(b)[:, None] * 5  # left padding
            keep = keep & inputs["mask"][:, None, None]
            args = (x, torch.from_numpy(inputs["mask"]))
        wanted = reference(model, x, keep)
        artifact.verify(inputs, {"output": wanted}, bound={"output": bound(model, args, wanted)})


def test_what_a_mask_lets_be_skipped_is_said(tmp_path: Path) -> None:
    grid = (Q >= KV) & ((Q - KV < 5) | (Q < 3))
    masks = [grid, Q >= KV, (Q - KV < 5) | (Q < 3)]
    found = [
        export_onnx(capture(Tiled(SoftmaxAttention(QK, m, group=2)), tokens(2, 20)), tmp_path / "m")
        for m in masks
    ]
    sites = [artifact.sites[0] for artifact in found]
    assert [s.form for s in sites] == ["half", "half", "dense mask"]
    assert [s.skips for s in sites] == [True, True, False]
    assert "keys from 0 to q" in sites[1].detail
    assert "q < 3" in sites[2].detail or "q <= 2" in sites[2].detail


# ------------------------------------------------------------------------------------ the file


class Named(nn.Module):
    """A dictionary of outputs, one of them returned twice, and an input returned as it is."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
        hidden = input_ids * attention_mask
        return {"last_hidden_state": hidden, "again": hidden, "mask": attention_mask, "none": None}


def test_names_axes_and_metadata(tmp_path: Path) -> None:
    args = (torch.randn(2, 5), torch.ones(2, 5))
    artifact = export_onnx(capture(Named(), *args), tmp_path / "m.onnx")
    assert [s.name for s in artifact.inputs] == ["input_ids", "attention_mask"]
    assert [s.name for s in artifact.outputs] == ["last_hidden_state", "again", "mask"]
    assert all(s.shape == ("batch", "sequence") for s in (*artifact.inputs, *artifact.outputs))
    inputs = {"input_ids": np.ones((3, 7), np.float32), "attention_mask": np.eye(3, 7, dtype="f")}
    got = artifact.run(inputs)
    for name in ("last_hidden_state", "again", "mask"):
        np.testing.assert_array_equal(got[name], np.eye(3, 7))
    meta = {p.key: p.value for p in onnx.load(artifact.path).metadata_props}
    assert meta["attn_rewrite.target"] == "portable"
    assert json.loads(meta["attn_rewrite.sites"]) == []
    text = artifact.path.read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # no stack traces
    assert artifact.bytes == artifact.path.stat().st_size


def test_site_names_come_from_the_rewrite_or_the_module_path(tmp_path: Path) -> None:
    model = nn.Sequential(Tiled(window(10)))
    program = capture(model, tokens(2, 20))
    assert export_onnx(program, tmp_path / "m.onnx").sites[0].name == "0.0"
    for node in program.graph.nodes:
        if "tiled_attention" in str(node.target):
            node.meta["attn_rewrite_site"] = "layer.7.attention.0"
    artifact = export_onnx(program, tmp_path / "m.onnx")
    assert artifact.sites[0].name == "layer.7.attention.0"
    proto = onnx.load(artifact.path)
    call = next(n for n in proto.graph.node if n.op_type == "layer_7_attention_0")
    assert {p.key: p.value for p in call.metadata_props}["attn_rewrite.site"] == (
        "layer.7.attention.0"
    )
    props = {p.key: p.value for p in proto.functions[0].metadata_props}
    assert props["attn_rewrite.cascade"] == str(softmax_cascade(window(10)))


def test_a_mask_of_its_own_batch_symbol_is_called_batch_too(tmp_path: Path) -> None:
    args = (tokens(2, 40), torch.ones(2, 40, dtype=torch.bool))
    axes = [{0: Dim(f"n{i}", min=1), 1: Dim(f"l{i}", min=1)} for i in range(2)]
    model = Tiled(window(10, read=True)).eval()
    program = torch.export.export(model, args, dynamic_shapes=tuple(axes))
    shapes = [s.shape for s in export_onnx(program, tmp_path / "m.onnx").inputs]
    assert shapes == [("batch", "sequence", WIDTH), ("batch", "mask_1")]


def test_static_programs_keep_their_sizes(tmp_path: Path) -> None:
    program = capture(Tiled(window(10)), tokens(2, 40), dynamic=False)
    artifact = export_onnx(program, tmp_path / "m.onnx")
    assert artifact.inputs[0].shape == (2, 40, WIDTH)
    assert artifact.outputs[0].shape == (2, HQ, 40, D)
    assert set(artifact.errors) == {"output"}


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_rewrite.backends.onnx.writing.EXTERNAL_BYTES", 0)


@pytest.mark.usefixtures("external")
def test_external_data_survives_being_overwritten(tmp_path: Path) -> None:
    place = tmp_path / "m.onnx"
    x = tokens(2, 20)
    program = capture(Tiled(window(10)), x)
    for round_ in range(2):
        artifact = export_onnx(program, place)
        data = [p for p in tmp_path.iterdir() if p != place]
        assert [p.name for p in data] == [f"m.onnx{'.1' * (round_ % 2)}.data"]
        assert artifact.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
        artifact.verify({"x": x.numpy()})


def test_run_in_a_child_process_gives_the_same(artifact: OnnxArtifact) -> None:
    x = tokens(3, 17).numpy()
    here, there = (artifact.run({"x": x}, in_child=c)["output"] for c in (False, True))
    np.testing.assert_allclose(here, there, rtol=1e-6, atol=1e-6)
    assert artifact.verify({"x": x}, in_child=True).keys() == {"output"}


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"opset": 25}, PolicyError, "25 .*expands Attention"),
        ({"opset": 28}, PolicyError, "18 to 24"),
        ({"opset": 17}, PolicyError, "starts at 18"),
        ({"target": "portabel"}, PolicyError, "portable or onnxruntime"),
    ],
)
def test_bad_options(options: dict, error: type, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        export_onnx(capture(Sdpa(), tokens(2, 5)), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """Writes to a buffer on every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls


class Untranslatable(nn.Module):
    """Uses an operator that ONNX does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x @ x.mT).real


class Dropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        (Counting(), "onnx-mutation", "calls"),
        (Untranslatable(), "onnx-translation", "linalg_eig"),
        (Dropping(), None, "dropout 0.5"),
    ],
)
def test_what_has_no_onnx_form_is_refused(
    model: nn.Module, code: str | None, words: str, tmp_path: Path
) -> None:
    program = torch.export.export(model, (torch.randn(1, 2, 4, 4),))
    with pytest.raises(LowerError, match=words) as caught:
        export_onnx(program, tmp_path / "m.onnx")
    assert [r.code for r in caught.value.refusals] == ([code] if code else [])
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Sdpa(), tokens(2, 9))
    place = tmp_path / "m.onnx"
    export_onnx(program, place)
    before = place.read_bytes()
    right = dense.SdpaOptions

    def wrong(**options: object) -> dense.SdpaOptions:
        return right(**{**options, "scale": 0.41})  # 1 / sqrt(6) is 0.408

    monkeypatch.setattr("attn_rewrite.backends.onnx.sites.SdpaOptions", wrong)
    with pytest.raises(VerifyError, match="'output' is off by"):
        export_onnx(program, place)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert place.read_bytes() == before
    export_onnx(program, place, verify=False)
    assert place.read_bytes() != before


def test_a_file_that_does_not_load_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_rewrite.backends.onnx.translate.IR_VERSION", 99)
    with pytest.raises(ToolError, match=r"cannot load m\.onnx") as caught:
        export_onnx(capture(Sdpa(), tokens(2, 9)), tmp_path / "m.onnx")
    assert caught.value.stage == "onnxruntime"
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ToolError, match="No space left") as caught:
        export_onnx(capture(Sdpa(), tokens(2, 9)), tmp_path / "m.onnx")
    assert caught.value.stage == "disk"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spelled", "codes"),
    [
        (torch.round, [0.25, -1.0, 2.25, 0.5]),
        (lambda x: x.sign() * (x.abs() + 0.5).floor(), [0.25, -1.0, 2.25, 0.75]),
    ],
    ids=["even", "away"],
)
def test_another_rounding_of_a_near_tie_is_allowed_and_no_more(
    spelled: Callable[[torch.Tensor], torch.Tensor], codes: list[float]
) -> None:
    """2.5 steps of a quarter: float32 may round it to 2 or 3, which is a quarter in the output."""
    from attn_rewrite.backends.onnx.oracle import expected

    class Codes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"codes": spelled(x / 0.25) * 0.25, "plain": 2 * x, "low": (x + 7).floor()}

    program = torch.export.export(Codes(), (torch.zeros(4),))
    apart = expected(program, {"x": np.float32([0.3, -1.1, 2.2, 0.0])})
    assert apart.bounds["codes"] < 1e-5
    tie = expected(program, {"x": np.float32([0.3, -1.1, 2.2, 0.625])})
    assert 0.5 <= tie.bounds["codes"] < 0.5 + 1e-5
    assert tie.bounds["plain"] < 1e-5
    assert tie.bounds["low"] < 1e-5  # no rounding to the nearest: a step there is an error
    np.testing.assert_array_equal(tie.outputs["codes"], codes)


def test_a_mask_that_skips_nothing_is_not_called_sparse(tmp_path: Path) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0).eval()
    example = (torch.randn(2, 48, 32),)
    done = ar.optimize(layer, "window(size=8)", example, dynamic_shapes={})
    (site,) = export_onnx(done, tmp_path / "m.onnx").sites
    assert (site.form, site.skips) == ("dense mask", False)
    assert "no whole blocks at this length" in site.detail


@pytest.mark.slow
def test_lengths_are_fixed_where_that_is_asked_for(tmp_path: Path) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0).eval()
    done = ar.optimize(layer, "window(size=8)", (torch.randn(2, 300, 32),))
    free = export_onnx(done, tmp_path / "free.onnx")
    fixed = export_onnx(done, tmp_path / "fixed.onnx", static=True)
    assert free.inputs[0].shape == ("batch", "sequence", 32)
    assert fixed.inputs[0].shape == ("batch", 300, 32)
    assert fixed.metadata["attn_rewrite.lengths"] == "those of the example: asked for"
    with pytest.raises(PolicyError, match="static= needs what optimize returned"):
        export_onnx(done.program, tmp_path / "no.onnx", static=True)
    with pytest.raises(PolicyError, match="static= and cache="):
        export_onnx(done, tmp_path / "no.onnx", static=True, cache="float")
    assert not (tmp_path / "no.onnx").exists()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    place = tmp_path_factory.mktemp("shared") / "m.onnx"
    return export_onnx(capture(Sdpa(), tokens(2, 9)), place)


def test_verify_finds_a_wrong_value_shape_and_name(artifact: OnnxArtifact) -> None:
    x = tokens(2, 9).numpy()
    good = artifact.run({"x": x})["output"]
    artifact.verify({"x": x}, {"output": good.astype(np.float64)})
    with pytest.raises(VerifyError, match="off by"):
        artifact.verify({"x": x}, {"output": good + 1e-3})
    bad = tokens(2, 9).numpy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(VerifyError, match="off by nan"):
        artifact.verify({"x": bad}, {"output": good})
    with pytest.raises(VerifyError, match="shape"):
        artifact.verify({"x": x}, {"output": good[:1]})
    with pytest.raises(VerifyError, match="no output 'y'"):
        artifact.verify({"x": x}, {"y": good})
    with pytest.raises(ToolError, match="needs input x"):
        artifact.verify({}, {"output": good})


def test_providers_that_do_not_start_are_an_error(artifact: OnnxArtifact) -> None:
    with pytest.raises(ToolError, match="CUDAExecutionProvider"):
        artifact.session(["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_nodes_that_fall_back_to_the_cpu_are_listed(artifact: OnnxArtifact) -> None:
    """Azure's provider is in every wheel and runs none of our operators."""
    with pytest.warns(RuntimeWarning, match=r"nodes run on the CPU, not on Azure.*: .*\d MatMul"):
        artifact.session(["AzureExecutionProvider", "CPUExecutionProvider"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact.session(["CPUExecutionProvider"])


def test_a_run_that_fails_is_an_error(artifact: OnnxArtifact) -> None:
    # The shape is the file's business: what is said of its inputs here would stop it before.
    free = replace(artifact, inputs=(TensorSpec("x", "float32", ("batch", "length", "width")),))
    for in_child in (False, True):
        with pytest.raises(ToolError, match="while running"):
            free.run({"x": np.zeros((2, 9, 3), np.float32)}, in_child=in_child)


def test_missing_packages_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(Sdpa(), tokens(2, 9))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ToolError, match=r"pip install 'attn-rewrite\[onnx\]'"):
            export_onnx(program, tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ToolError, match=r"attn-rewrite\[onnx\]"):
        runtime.runtime()
    monkeypatch.setattr(runtime, "_installed", lambda name: True)
    with pytest.raises(ToolError, match="uninstall both"):
        runtime.runtime()


def test_importing_the_export_is_light() -> None:
    code = (
        "import sys, attn_rewrite.backends.onnx.export, attn_rewrite.backends.onnx.child;"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'onnxscript') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_window_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "onnx_window.py"
    sizes = ["--lengths", "96", "--windows", "16", "--block", "32", "--repetitions", "1"]
    command = [sys.executable, str(script), *sizes, "-o", str(tmp_path / "r.json")]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["runs"]["tiles"]["max_abs_error"] < 1e-5
    assert row["runs"]["gqa-window"]["max_abs_error"] < 1e-5
