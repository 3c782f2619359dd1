"""An exported file in the hands of whoever uses it: wrong providers, inputs, options and places."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import attn_rewrite as ar
from attn_rewrite import export_onnx
from attn_rewrite.backends.onnx.artifact import OnnxArtifact
from attn_rewrite.errors import PolicyError, ToolError
from tests.test_onnx import Tiled, capture, tokens, window

CPU = "CPUExecutionProvider"


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 12, 16, dtype=dtype), torch.ones(2, 1, 12, 12, dtype=torch.bool)


@pytest.fixture(scope="module")
def optimized() -> Any:
    return ar.optimize(Masked().eval(), "exact", example(), dynamic_shapes={})


@pytest.fixture(scope="module")
def artifact(optimized: Any, tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    return export_onnx(optimized, tmp_path_factory.mktemp("use") / "m.onnx")


X, MASK = np.zeros((2, 12, 16), np.float32), np.ones((2, 1, 12, 12), bool)


def test_a_provider_is_named_alone_or_with_its_options(artifact: OnnxArtifact) -> None:
    for providers in (None, CPU, [CPU], [(CPU, {})], (CPU,)):
        assert artifact.session(providers).get_providers() == [CPU]


@pytest.mark.parametrize(
    ("providers", "error", "words"),
    [
        ([], PolicyError, "no provider is named"),
        ([3], PolicyError, "got 3"),
        ([(CPU, "fast")], PolicyError, "a name and its options"),
        ("CUDAExecutionProvider", ToolError, "did not start CUDAExecutionProvider"),
        (["cpu"], ToolError, "did not start cpu .it has .*CPUExecutionProvider"),
    ],
)
def test_bad_providers(providers: Any, error: type, words: str, artifact: OnnxArtifact) -> None:
    with pytest.raises(error, match=words):
        artifact.session(providers)


def test_threads_are_at_least_one(artifact: OnnxArtifact) -> None:
    with pytest.raises(PolicyError, match="threads is 0"):
        artifact.session(threads=0)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": X}, "needs input mask"),
        ({"x": X, "mask": MASK, "extra": X}, "no input extra; it takes x, mask"),
        (None, "arrays by the names x, mask, or all of them in this order, got a NoneType"),
        ((), "arrays by the names x, mask, or all of them in this order, got a tuple"),
        ({"x": X[:, :7], "mask": MASK}, "'x' as float32 [2, 12, 16], got float32 [2, 7, 16]"),
        ({"x": X[0], "mask": MASK}, "got float32 [12, 16]"),
        ({"x": X.astype("d"), "mask": MASK}, "'x' as float32 [2, 12, 16], got float64"),
        ({"x": X, "mask": MASK.astype("i8")}, "'mask' as bool [2, 1, 12, 12], got int64"),
        ({"x": "hello", "mask": MASK}, "'x' as float32"),
        ({"x": [[1], [2, 3]], "mask": MASK}, "'x' is no array"),
    ],
)
def test_wrong_inputs_are_named(inputs: Any, words: str, artifact: OnnxArtifact) -> None:
    for use in (artifact.verify, artifact.run, artifact.placement):
        with pytest.raises(ToolError, match=re.escape(words)):
            use(inputs)


def test_lists_and_tensors_are_taken(artifact: OnnxArtifact) -> None:
    artifact.verify({"x": X.tolist(), "mask": torch.from_numpy(MASK)})
    artifact.verify((torch.from_numpy(X), MASK))


def test_a_bound_that_is_missing_is_an_error(artifact: OnnxArtifact) -> None:
    good = artifact.run({"x": X, "mask": MASK})
    with pytest.raises(PolicyError, match="no 'output'"):
        artifact.verify({"x": X, "mask": MASK}, good, bound={})


@pytest.mark.parametrize("opset", ["20", 20.0, True])
def test_an_opset_is_a_whole_number(opset: Any, optimized: Any, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="a whole number"):
        export_onnx(optimized, tmp_path / "m.onnx", opset=opset)


@pytest.mark.parametrize("model", [Masked(), None, "model"])
def test_what_is_no_program_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="what optimize returned, or an ExportedProgram, got a"):
        export_onnx(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("path", [None, 3, "", "a\0b"])
def test_a_path_names_a_file(path: Any, optimized: Any) -> None:
    with pytest.raises(PolicyError, match="expected the name of a file"):
        export_onnx(optimized, path)


def test_places_that_take_no_file(optimized: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path, "it is a folder"), (tmp_path / "file" / "m.onnx", "no folder")):
        with pytest.raises(ToolError, match=words) as caught:
            export_onnx(optimized, place)
        assert caught.value.stage == "disk"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # the administrator writes anywhere
        with pytest.raises(ToolError, match="not writable"):
            export_onnx(optimized, locked / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "locked"]


def test_folders_are_made_and_go_again_where_the_export_fails(
    optimized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a" / "b" / "m.onnx"
    with monkeypatch.context() as patch:
        patch.setattr("attn_rewrite.backends.onnx.translate.IR_VERSION", 99)
        with pytest.raises(ToolError, match="cannot load"):
            export_onnx(optimized, place)
    assert not list(tmp_path.iterdir())
    assert export_onnx(optimized, place).path == place
    onnx.checker.check_model(str(place))


def test_bfloat16_is_refused_with_its_reason(tmp_path: Path) -> None:
    model = Masked().to(torch.bfloat16).eval()
    done = ar.optimize(model, "exact", example(torch.bfloat16), dynamic_shapes={})
    with pytest.raises(ToolError, match=r"bfloat16.*float32 or float16, or unchecked with verify="):
        export_onnx(done, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert export_onnx(done, tmp_path / "m.onnx", verify=False).inputs[0].dtype == "bfloat16"


def test_float16_agrees(tmp_path: Path) -> None:
    model = Masked().half().eval()
    done = ar.optimize(model, "exact", example(torch.float16), dynamic_shapes={})
    for target in ("portable", "onnxruntime"):
        artifact = export_onnx(done, tmp_path / "m.onnx", target=target)
        assert artifact.outputs[0].dtype == "float16"
        assert artifact.errors["output"] < 2e-3


def test_declared_ranges_of_lengths_are_kept() -> None:
    batch, length = torch.export.Dim("n", min=1, max=64), torch.export.Dim("l", min=3, max=4096)
    axes = {"x": {0: batch, 1: length}, "mask": {0: batch, 2: length, 3: length}}
    done = ar.optimize(Masked().eval(), "exact", example(), dynamic_shapes=axes)
    ranges = {(int(r.lower), int(r.upper)) for r in done.program.range_constraints.values()}
    assert (3, 4096) in ranges
    assert max(high for _, high in ranges) == 4096


def test_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside functions of rewritten sites; opened and checked by path, never as bytes."""
    monkeypatch.setattr("attn_rewrite.backends.onnx.writing.EXTERNAL_BYTES", 0)
    x = tokens(2, 20)
    artifact = export_onnx(capture(Tiled(window(10)), x), tmp_path / "m.onnx")
    assert artifact.errors
    onnx.checker.check_model(str(artifact.path))
    assert len(onnx.load(artifact.path, load_external_data=False).functions) == 1
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (artifact.path, tmp_path / "m.onnx.data"):
        file.replace(moved / file.name)
    here = replace(artifact, path=moved / "m.onnx")
    here.verify({"x": x.numpy()})
    (moved / "m.onnx.data").unlink()
    for in_child in (False, True):
        with pytest.raises(ToolError, match=r"cannot load m\.onnx"):
            here.verify({"x": x.numpy()}, in_child=in_child)


def test_a_file_that_is_no_onnx_is_said_to_be_none(tmp_path: Path) -> None:
    from attn_rewrite.cli.verify import _metadata

    place = tmp_path / "model.onnx"
    place.write_bytes(b"\xff" * 40)
    with pytest.raises(ToolError, match=r"model\.onnx cannot be read as ONNX"):
        _metadata(place)
    with pytest.raises(ToolError, match=r"model\.onnx cannot be read as ONNX"):
        _metadata(tmp_path / "none" / "model.onnx")
