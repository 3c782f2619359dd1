"""Bad checkpoints: each is one `CheckpointError` of one sentence, and no code of theirs runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from attn_rewrite.checkpoint import load_model
from attn_rewrite.checkpoints.exported import _is_arithmetic
from attn_rewrite.errors import CheckpointError, PolicyError
from tests.bad_checkpoints import BAD, BAD_PROGRAMS, exported, pickle_bomb, pickle_only, tiny_bert


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("name", BAD)
def test_bad_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    BAD[name].build(folder)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert BAD[name].says in one_sentence(caught.value)
    assert caught.value.exit_code == 3
    assert snapshot(tmp_path) == before
    assert not (folder / "ran").exists(), "code of the checkpoint was run"


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_bad_program(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    BAD_PROGRAMS[name].build(path)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert BAD_PROGRAMS[name].says in one_sentence(caught.value)
    assert not (tmp_path / "ran").exists(), "code of the archive was run"


def test_the_bombs_do_go_off_without_the_inspection(tmp_path: Path) -> None:
    """Decoy check: the archives above would run code if torch were let at them."""
    for name in ("pickled_weight", "pickled_constant", "pickled_samples", "code_as_size"):
        path = tmp_path / name / "model.pt2"
        path.parent.mkdir()
        BAD_PROGRAMS[name].build(path)
        with contextlib.suppress(Exception):  # the bomb is not a tensor: torch fails after it
            torch.export.load(path)
        assert (path.parent / "ran").exists(), name


def test_missing_path_and_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model at"):
        load_model(tmp_path / "nowhere")
    weights = tiny_bert(tmp_path / "m") / "model.safetensors"
    with pytest.raises(CheckpointError, match="name the folder that holds it"):
        load_model(weights)


def test_pickle_with_the_flag_reads_tensors_only(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    pickle_only(good)
    loaded = load_model(good, allow_pickle=True, length=8)
    assert set(loaded.hashes) == {"pytorch_model.bin"}
    reference = load_model(tiny_bert(tmp_path / "safe"), length=8)
    for ours, theirs in zip(loaded.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    bad = tmp_path / "bad"
    bad.mkdir()
    pickle_bomb(bad)
    with pytest.raises(CheckpointError):
        load_model(bad, allow_pickle=True)
    assert not (bad / "ran").exists()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"inputs_id": torch.zeros(1, 4, dtype=torch.long)}, "did you mean 'input_ids'"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "has 1 dimensions"),
        ({"input_ids": torch.zeros(1, 4)}, "expected whole numbers"),
    ],
)
def test_bad_inputs_file(tensors: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "inputs.safetensors")
    folder = tiny_bert(tmp_path / "model")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, inputs=tmp_path / "inputs.safetensors")
    assert says in one_sentence(caught.value)


def test_unreadable_inputs_and_too_long(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    (tmp_path / "inputs.safetensors").write_text("no")
    with pytest.raises(CheckpointError, match="cannot read the inputs"):
        load_model(folder, inputs=tmp_path / "inputs.safetensors")
    with pytest.raises(PolicyError, match="length 41 is over the 40 positions"):
        load_model(folder, length=41)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("no_such_module_here:make", "cannot import"),
        ("json:nothing", "has no 'nothing'"),
        ("json:dumps", "failed: TypeError"),
        ("json:__name__", "expected a function"),
        ("builtins:dict", "returned a dict"),
        ("builtins:tuple", "expected a torch.nn.Module"),
    ],
)
def test_bad_callable(spec: str, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(spec)
    assert says in one_sentence(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s53', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s0'))",
        "s0*(s1 + 3)//2 - Max(1, s0)",
        "L['x'].size()[0] <= 512",
        "Mod(L['x'].size()[1], 8) == 0",
        "L['past']['k'].stride()[0] != 1 and not L['y'].size()[0] == 4",
        "6*torch.sym_max(1, (5 + L['x'].size()[1]) // 6) != torch._sym_sqrt(4)",
        "math.floor(torch.sym_float(L['x'].size()[0]) / 2) < math.inf",
    ],
)
def test_expressions_of_torch_are_accepted(text: str) -> None:
    assert _is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "open('x')",
        "().__class__",
        "L['x'].__class__",
        "Symbol('__import__(\"os\")')",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "exec('1')",
        "L['x'].size.__globals__",
        "torch.load('x')",
        "torch.ops.aten.from_file('x')",
        "math.__loader__",
        "math.sym_max.size.__globals__",
        "x.torch.sym_max(1, 2)",
        "torch.sym_max.__globals__",
        "f'{1}'",
        "x := 1",
        "1;2",
    ],
)
def test_code_is_not_arithmetic(text: str) -> None:
    assert not _is_arithmetic(text)


def test_a_good_program_passes(tmp_path: Path) -> None:
    loaded = load_model(exported(tmp_path / "m.pt2"))
    x = torch.randn(5, 4)
    with torch.no_grad():
        value = loaded.model(x)
    state = {k: v.double() for k, v in loaded.model.state_dict().items()}
    expected = x.double() @ state["linear.weight"].T + state["linear.bias"] + torch.arange(4.0) * 5
    assert (value - expected).abs().max() <= 4 * torch.finfo(
        torch.float32
    ).eps * expected.abs().max()
    assert json.loads(json.dumps(loaded.hashes)) == loaded.hashes
