"""``attn-rewrite bench``: runtimes and their providers, exit codes, and what strangers give it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from attn_rewrite.cli.app import run
from tests.bad_checkpoints import BAD

TOY = """
import torch
from tests.test_onnx import Sdpa, tokens
def make():
    return Sdpa().eval(), (tokens(2, 40),)
def without():
    return torch.nn.Linear(8, 8).eval(), (torch.ones(2, 8),)
"""
SHORT = ("--repeats", "1", "--warmup", "0")


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_bench_toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def said(capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Standard output, and standard error with each run of blanks as one."""
    read = capfd.readouterr()
    assert "Traceback" not in read.err
    return read.out, " ".join(read.err.split())


@pytest.mark.parametrize("runtime", ["onnxruntime:cuda", "onnxruntime:cpu", "onnxruntime"])
def test_a_provider_that_this_build_has_not(
    runtime: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Told before the model is looked for: the cheaper mistake first."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OtherProvider"])
    assert run(["bench", "nowhere", "--runtime", runtime]) == 5
    out, err = said(capfd)
    name = "CUDAExecutionProvider" if "cuda" in runtime else "CPUExecutionProvider"
    assert not out
    assert f"is built without {name} (it has OtherProvider)" in err
    assert "nowhere" not in err
    assert err.count("error:") == 1


def test_a_provider_that_does_not_start_is_no_run_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A build with CUDA on a machine without: ONNX Runtime itself would go on with the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA may start here")
    opened, both = onnxruntime.InferenceSession, ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: opened(path, options, providers=[providers[-1]]),
    )
    assert run(["bench", "cli_bench_toy:make", "--runtime", "onnxruntime:cuda", *SHORT]) == 5
    out, err = said(capfd)
    assert not out
    assert "did not start CUDAExecutionProvider" in err


@pytest.mark.slow
def test_nodes_that_a_provider_leaves_to_the_cpu_are_in_the_result(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from attn_rewrite.backends.onnx import artifact, runtime

    def opened(path: Path, providers: Any, **options: Any) -> Any:
        if providers == runtime.providers_of("cuda"):  # not the check of the export
            warnings.warn(f"{path.name}: 2 nodes run on the CPU", RuntimeWarning, stacklevel=2)
        return runtime.open_session(path, None, **options)

    monkeypatch.setattr(runtime, "require_provider", lambda provider: None)
    monkeypatch.setattr(artifact, "open_session", opened)
    words = ["bench", "cli_bench_toy:make", "--policy", "window(size=8)", *SHORT, "--json"]
    assert run([*words, "--runtime", "onnxruntime:cuda"]) == 0
    out, err = said(capfd)
    document = json.loads(out)
    assert document["conditions"]["runtime"] == "onnxruntime:cuda"
    assert len(document["notes"]) == 2
    for note in document["notes"]:
        assert note in err
        assert "2 nodes run on the CPU" in note


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime:cpu"])
@pytest.mark.parametrize(
    ("model", "policy", "code", "why"),
    [
        ("without", "window(size=8)", 1, "the model has no attention"),
        ("make", "keep", 1, "nothing was rewritten"),
        ("make", "window(size=8)", 0, ""),
    ],
)
def test_exit_codes_are_those_of_optimize(
    model: str, policy: str, code: int, why: str, runtime: str,
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [f"cli_bench_toy:{model}", "--policy", policy, "--json"]
    assert run(["bench", *words, *SHORT, "--runtime", runtime]) == code
    out, err = said(capfd)
    assert json.loads(out)["original"]["median_s"] > 0
    assert why in err
    assert ("noise" in err) == bool(code)
    if runtime == "torch":
        assert run(["optimize", *words, "-o", "out"]) == code
        capfd.readouterr()
        assert run(["bench", "out", *SHORT]) == code
        assert why in said(capfd)[1]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("nowhere",), 3, "there is no model at"),
        (("no_such_module:make",), 3, "no_such_module"),
        (("cli_bench_toy:make", "--runtime", "onnxruntime:tpu"), 2, "or onnxruntime:cuda"),
        (("cli_bench_toy:make", "--runtime", "torch:cuda"), 2, "or onnxruntime:cuda"),
        (("cli_bench_toy:make", "--runtime", "ONNXRuntime"), 2, "or onnxruntime:cuda"),
        (("cli_bench_toy:make", "--provider", "cuda"), 2, "--provider"),
        (("cli_bench_toy:make", "--original", "x"), 2, "--original is for a saved result"),
        (("damaged",), 3, "truncated or corrupted"),
    ],
)
def test_what_strangers_give_it(
    words: tuple[str, ...], code: int, says: str,
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "damaged").mkdir()
    if words == ("damaged",):
        BAD["truncated"].build(tmp_path / "damaged")
    before = sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    assert run(["bench", *words, *SHORT]) == code
    out, err = said(capfd)
    assert not out
    assert says in err
    assert err.count("error:") == 1
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
