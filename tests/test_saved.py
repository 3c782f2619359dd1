"""Saving and loading: the folder is whole or absent, and what is loaded is what was saved."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attn_rewrite as ar
from attn_rewrite import folder as folder_module
from attn_rewrite import saved
from attn_rewrite.capture import capture_model
from attn_rewrite.checkpoint import LoadedModel, load_model
from attn_rewrite.checkpoints.files import sha256
from attn_rewrite.errors import CheckpointError, PolicyError, ToolError
from attn_rewrite.folder import check_output, output_folder
from attn_rewrite.portable import portable_program, read_program, save_program
from tests.bad_checkpoints import tiny_bert

EPS = torch.finfo(torch.float32).eps


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_and_raise(target: Path, error: BaseException) -> None:
    with output_folder(target) as part:
        (part / "model.pt2").write_bytes(b"half")
        raise error


# The folder


def test_folder_appears_at_the_end_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with output_folder(target) as part:
        (part / "x").write_text("1")
        (part / "sub").mkdir()
        (part / "sub" / "y").write_text("2")
        assert not target.exists()
        assert part.parent == target.parent, "a rename must not cross file systems"
    assert (target / "sub" / "y").read_text() == "2"
    assert left_over(target.parent) == ["b"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_after_an_interruption(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        write_and_raise(tmp_path / "a" / "b", error())
    assert left_over(tmp_path) == []


def test_empty_folder_is_free_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with output_folder(tmp_path / "link") as part:
        (part / "x").write_text("1")
    assert (tmp_path / "empty" / "x").read_text() == "1"
    assert (tmp_path / "link").is_symlink()


def test_occupied_folder_needs_force_and_force_replaces_only_results(tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.mkdir()
    (result / "report.json").write_text("old")
    with pytest.raises(PolicyError, match="already holds a result"), output_folder(result):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError), output_folder(result, force=True):
        raise RuntimeError
    assert (result / "report.json").read_text() == "old"
    with output_folder(result, force=True) as part:
        (part / "report.json").write_text("new")
    assert left_over(result) == ["report.json"]
    assert (result / "report.json").read_text() == "new"
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    with pytest.raises(PolicyError, match=r"holds other files \(thesis.tex\)"):
        check_output(home, force=True)
    assert left_over(tmp_path) == ["home", "result"]


def test_a_failed_rename_brings_the_old_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    with output_folder(target) as part:
        (part / "report.json").write_text("old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ToolError) as caught, output_folder(target, force=True):
        pass
    assert caught.value.stage == "write"
    assert (target / "report.json").read_text() == "old"
    assert left_over(tmp_path) == ["result"]


def test_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(PolicyError) as caught, output_folder(target):
            pytest.fail("the block must not run")
        assert caught.value.exit_code == 2

    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write anywhere: denial is simulated
    denial = pytest.raises(PolicyError, match="cannot be written: Permission denied")
    with denial, output_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed"),
    ],
)
def test_full_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        write_and_raise(tmp_path / "out", error)
    assert caught.value.exit_code == 5
    assert caught.value.stage == "write"
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "no such companion")


# Results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_bert(tmp_path_factory.mktemp("bert")), batch=2, length=16)


@pytest.fixture(scope="module")
def optimized(checkpoint: LoadedModel) -> ar.OptimizedModule:
    return ar.optimize(checkpoint.model, "exact", checkpoint.args, checkpoint.kwargs)


@pytest.fixture
def result(optimized, checkpoint, tmp_path: Path) -> Path:
    return ar.save(optimized, tmp_path / "result", source=checkpoint)


def test_files_of_a_result(result: Path, checkpoint: LoadedModel) -> None:
    manifest = json.loads((result / "attn_rewrite.json").read_text())
    assert {"model.pt2", "plan.json", "report.json", "config.json"} <= set(manifest["files"])
    for name, digest in manifest["files"].items():
        assert sha256(result / name) == digest
    assert set(left_over(result)) == {*manifest["files"], "attn_rewrite.json"}
    assert manifest["source"] == {
        "path": checkpoint.path,
        "kind": "transformers",
        "hashes": checkpoint.hashes,
    }
    assert manifest["versions"]["torch"] == torch.__version__
    original = Path(checkpoint.path) / "config.json"
    assert (result / "config.json").read_bytes() == original.read_bytes()


def test_what_is_loaded_is_what_was_saved(result: Path, optimized, checkpoint) -> None:
    loaded = ar.load(result)
    with torch.no_grad():
        before, after = optimized(**checkpoint.kwargs), loaded(**checkpoint.kwargs)
        original = checkpoint.model(**checkpoint.kwargs)
    assert type(after) is type(original)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert loaded.report == optimized.report
    assert loaded.plan.to_json() == optimized.plan.to_json()
    assert loaded.state_dict().keys() == optimized.state_dict().keys()
    again = ar.save(loaded, result.parent / "again")
    assert ar.load(again).report == optimized.report


def test_a_bare_load_needs_neither_transformers_nor_the_original(result: Path, checkpoint) -> None:
    from safetensors.torch import save_file

    tensors = {k: v for k, v in checkpoint.kwargs.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, result.parent / "in.safetensors")
    script = """
import sys, torch
import attn_rewrite.ops
from safetensors.torch import load_file, save_file
program = torch.export.load(sys.argv[1])
with torch.no_grad():
    out = program.module()(**load_file(sys.argv[2]))
assert type(out) is dict, type(out)
assert "transformers" not in sys.modules
save_file({"y": out["last_hidden_state"]}, sys.argv[3])
"""
    paths = [str(result / "model.pt2"), *(str(result.parent / n) for n in ("in.safetensors", "y"))]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    from safetensors.torch import load_file

    with torch.no_grad():
        expected = copy.deepcopy(checkpoint.model).double()(**checkpoint.kwargs).last_hidden_state
        single = checkpoint.model(**checkpoint.kwargs).last_hidden_state
    value = load_file(result.parent / "y")["y"]
    allowed = max(2 * (single - expected).abs().max(), 4 * EPS * expected.abs().max())
    assert (value - expected).abs().max() <= allowed


@pytest.mark.parametrize("name", ["model.pt2", "plan.json", "report.json", "config.json"])
def test_a_damaged_or_missing_file_is_noticed(name: str, result: Path) -> None:
    path = result / name
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(CheckpointError, match="its hash differs"):
        ar.load(result)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        ar.load(result)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "has format 99"),
        ({"files": {}}, "does not list"),
        ({"extra": "../../secret"}, "points outside"),
    ],
)
def test_a_wrong_manifest(changes: dict[str, object], says: str, result: Path) -> None:
    path = result / "attn_rewrite.json"
    manifest = json.loads(path.read_text())
    if "extra" in changes:
        manifest["files"][changes.pop("extra")] = "0" * 64
    path.write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(CheckpointError, match=says):
        ar.load(result)


def test_a_folder_that_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a result"):
        ar.load(tmp_path)
    with pytest.raises(CheckpointError, match="not a result"):
        ar.load(tmp_path / "nowhere")


def test_saving_twice_needs_force(result: Path, optimized) -> None:
    with pytest.raises(PolicyError, match="--force"):
        ar.save(optimized, result)
    assert ar.load(ar.save(optimized, result, force=True)) is not None


def test_a_full_disk_while_writing_the_model(
    optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(ToolError, match="No space left") as caught:
        ar.save(optimized, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert left_over(tmp_path) == []


def test_a_disk_that_fails_at_fsync(
    optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder_module.os, "fsync", fail)
    with pytest.raises(ToolError, match="Input/output error"):
        ar.save(optimized, tmp_path / "out")
    assert left_over(tmp_path) == []


# Portable programs


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: dict[str, torch.Tensor]
    third: torch.Tensor | None = None


class Returns(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[Pair, list[torch.Tensor]]:
        return Pair(x + 1, {"a": x * 2}), [x]


def test_dataclass_outputs_are_saved_plain_and_come_back(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    program = capture_model(Returns(), (x,)).program
    plain = portable_program(program)
    value, rest = plain.module()(x)
    assert value.keys() == {"first", "second"}
    assert torch.equal(value["second"]["a"], x * 2)
    assert torch.equal(rest[0], x)
    assert portable_program(plain) is plain
    save_program(program, tmp_path / "m.pt2")
    back, _ = read_program(tmp_path / "m.pt2").module()(x)
    assert isinstance(back, Pair)
    assert torch.equal(back.first, x + 1)
    assert back.third is None


def test_weights_are_shared_not_copied(checkpoint: LoadedModel) -> None:
    program = capture_model(checkpoint.model, checkpoint.args, checkpoint.kwargs).program
    plain = portable_program(program)
    assert plain is not program
    for name, tensor in program.state_dict.items():
        assert plain.state_dict[name] is tensor


def test_versions_name_what_is_installed() -> None:
    found = saved.versions()
    assert found["torch"] == torch.__version__
    assert found["python"].startswith("3.")
