"""``attn-rewrite verify`` of ONNX results: what users do to a folder, each with one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attn_rewrite.cli.app import run
from attn_rewrite.cli.verify import _metadata, _onnx_outputs
from attn_rewrite.errors import PolicyError, ToolError
from tests.test_onnx import WIDTH

TOY = """
from tests.test_onnx import Sdpa, tokens
def make():
    return Sdpa().eval(), (tokens(2, 40),)
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an ONNX file, made from a function that the process can import."""
    place = tmp_path_factory.mktemp("verify")
    (place / "onnx_verify_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        words = ["optimize", "onnx_verify_toy:make", "--policy", "exact", "--export", "onnx"]
        assert run([*words, "-o", str(place / "out")]) == 0
        yield place / "out"


def external(source: Path, place: Path) -> None:
    """``source`` with its weights in a file that is not there."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "lost.data")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    place.write_bytes(model.SerializeToString())


def foreign(place: Path) -> None:
    """A file of another model, with an input of another name."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("z", "output")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["z"], ["output"])], "g", *[[v] for v in values]
    )
    imports = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), place)


def read(place: Path) -> None:
    """What ``verify`` does with every ONNX file of a folder."""
    _metadata(place)
    _onnx_outputs(place, {"x": np.zeros((2, 40, WIDTH), np.float32)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", "cannot be read as ONNX"),
        ("empty", "cannot load model.onnx"),
        ("external", "cannot load model.onnx.*lost.data"),
        ("foreign", "model.onnx takes z, and the original has x: it is no export of this model"),
        ("gone", "cannot be read as ONNX"),
    ],
)
def test_a_file_that_is_no_export_is_named(
    damage: str, words: str, result: Path, tmp_path: Path
) -> None:
    place, whole = tmp_path / "model.onnx", (result / "model.onnx").read_bytes()
    if damage == "external":
        external(result / "model.onnx", place)
    elif damage == "foreign":
        foreign(place)
    elif damage != "gone":
        place.write_bytes(whole[:300] if damage == "truncated" else b"")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ToolError, match=words) as caught:
        read(place)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_inputs_of_another_size_than_a_file_has_are_named(result: Path, tmp_path: Path) -> None:
    model = onnx.load(result / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 40
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(PolicyError, match=r"takes x of \['batch', 40, \d+\], and the inputs here"):
        _onnx_outputs(tmp_path / "model.onnx", {"x": np.zeros((2, 17, WIDTH), np.float32)})


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda f: (f / "model.onnx").unlink(), 3, "model.onnx is missing from the result"),
        (lambda f: (f / "model.onnx").write_bytes(b"x"), 3, "was changed or damaged"),
        (lambda f: (f / "attn_rewrite.json").unlink(), 3, "is not a result of attn-rewrite"),
        (lambda f: foreign(f / "other.onnx"), 5, "other.onnx takes z, and the original has x"),
    ],
)
def test_a_folder_that_was_changed(
    change: object, code: int, words: str, result: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(result, folder)
    assert callable(change)
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    assert run(["verify", str(folder)]) == code
    shown = " ".join(capfd.readouterr().err.split())
    assert words in shown
    assert "Traceback" not in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (3, 41)])
def test_inputs_of_the_users_own(
    batch: int, length: int, result: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch of one is captured as two: what is compared has to be the same batch."""
    from safetensors.numpy import save_file

    x = np.random.default_rng(0).standard_normal((batch, length, WIDTH), np.float32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    words = ["--inputs", str(tmp_path / "x.safetensors"), "--json"]
    assert run(["verify", str(result), *words]) == 0
    errors = json.loads(capfd.readouterr().out)["errors"]
    assert errors.keys() == {"model.pt2", "model.onnx"}
    assert all(0 <= e < 1e-5 for of in errors.values() for e in of.values())


def test_a_policy_without_an_onnx_form_stops_a_benchmark(
    result: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--policy", "fp8", "--runtime", "onnxruntime", "--repeats", "1"]
    assert run(["bench", "onnx_verify_toy:make", *words]) == 5
    read = capfd.readouterr()
    assert "floats of 8 bits or less, which ONNX Runtime has no products of" in read.err
    assert not read.out
    assert "Traceback" not in read.err
