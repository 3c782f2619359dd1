"""Bad input through the real command: exit code, one sentence, nothing half-written left."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bad_checkpoints import BAD, BAD_PROGRAMS, tiny_bert
from tests.command import COMMAND, attn_rewrite

FOLDERS = (
    "without_config",
    "truncated",
    "corrupted_header",
    "missing_shard",
    "index_upwards",
    "unknown_type",
    "pickle_only",
    "remote_code",
)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with the hash of what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    folder.mkdir()
    return tiny_bert(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_checkpoint(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    BAD[name].build(folder)
    before = snapshot(tmp_path)
    done = attn_rewrite("optimize", folder, "--policy", "exact", "-o", tmp_path / "out")
    assert (done.code, done.out) == (3, "")
    assert BAD[name].says in done.error
    assert "Traceback" not in done.err
    assert snapshot(tmp_path) == before
    assert not (folder / "ran").exists(), "code of the checkpoint was run"


def test_exported_program_with_pickled_payload(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    BAD_PROGRAMS["pickled_samples"].build(path)
    done = attn_rewrite("inspect", path, "--json")
    assert done.code == 3
    assert done.document["error"]["message"] == done.error
    assert BAD_PROGRAMS["pickled_samples"].says in done.error
    assert not (tmp_path / "ran").exists(), "code of the archive was run"


def test_missing_folder(tmp_path: Path) -> None:
    done = attn_rewrite("optimize", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert done.code == 3
    assert "there is no model at" in done.error
    assert not any(tmp_path.iterdir())


def test_pickle_is_read_with_the_flag_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    BAD["pickle_only"].build(folder)
    assert attn_rewrite("inspect", folder, "--allow-pickle").code == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--policy", "windw(size=4)"), "did you mean 'window'"),
        (("--policy", "window(sise=4)"), "did you mean 'size'"),
        (("--policy", "window(size=0)"), "window: size is 0, expected at least 1"),
        (("--policy", "window(size=4"), "window(size=4"),
        (("--policy", "nowhere.toml"), "nowhere.toml"),
        (("--budget", "cosin>=0.9"), "did you mean 'cosine'"),
        (("--budget", "cosine>=2"), "cosine is limited to 2.0"),
        (("--export", "onx"), "did you mean 'onnx'"),
        (("--plan", "nowhere.json"), "nowhere.json"),
        (("--policy", "exact", "--plan", "p.json"), "--policy and --plan"),
    ],
)
def test_bad_option_is_refused_before_the_model_is_loaded(
    options: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    # The model does not exist either: the cheaper mistake is told first.
    done = attn_rewrite("optimize", "nowhere", "-o", "out", *options, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert says in done.error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda:7", "bogus", "meta"])
def test_a_device_that_is_not_here(device: str, bert: Path, tmp_path: Path) -> None:
    done = attn_rewrite("inspect", bert, "--device", device, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert f"the device {device!r} cannot be used here" in done.error


def test_layer_glob_that_matches_nothing(bert: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nwhere = { layer = "encoder.block.*" }\napply = "window(size=8)"\n')
    done = attn_rewrite("optimize", bert, "--policy", policy, "-o", tmp_path / "out")
    assert done.code == 2
    assert "layer 'encoder.block.*' matches no Site" in done.error
    assert "encoder.layer.0.attention.self" in done.error
    assert list(tmp_path.iterdir()) == [policy]


@pytest.mark.parametrize(
    ("name", "content", "force", "says"),
    [
        ("report.json", "{}", False, "already holds a result"),
        ("holiday.txt", "photographs", False, "holds other files"),
        ("holiday.txt", "photographs", True, "holds other files"),
    ],
)
def test_occupied_output_folder(
    name: str, content: str, force: bool, says: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    before = snapshot(tmp_path)
    words = ["optimize", "nowhere", "-o", "out", *(["--force"] if force else [])]
    done = attn_rewrite(*words, cwd=tmp_path)
    assert done.code == 2
    assert says in done.error
    assert snapshot(tmp_path) == before


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path)
    for place in ("file", "file/out", "/proc/nowhere/out"):
        done = attn_rewrite("optimize", "nowhere", "-o", place, cwd=tmp_path)
        assert done.code == 2, done.err
        assert place.split("/")[-1] in done.error
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    done = attn_rewrite("optimize", "nowhere", "-o", tmp_path / "locked" / "out")
    assert done.code == 2
    assert "cannot be written" in done.error


def test_model_without_attention(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),), {}, None\n"
    )
    done = attn_rewrite("optimize", "plain:make", "-o", "out", "--json", cwd=tmp_path)
    assert done.code == 1, done.err
    assert done.document["sites"] == []
    assert "no attention" in done.err
    assert {"model.pt2", "plan.json", "report.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert '"sites": []' in (tmp_path / "out" / "report.json").read_text()


def test_bug_of_ours_is_70_and_asks_for_a_report(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import attn_rewrite.driver\n"
        "def find_attention(*args, **kwargs):\n"
        "    raise KeyError('lost')\n"
        "attn_rewrite.driver.find_attention = find_attention\n"
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),), {}, None\n"
    )
    done = attn_rewrite("inspect", "odd:make", cwd=tmp_path)
    assert (done.code, done.out) == (70, "")
    assert "KeyError" in done.error
    assert "report" in done.error
    assert "Traceback" not in done.err
    shown = attn_rewrite("inspect", "odd:make", "--debug", cwd=tmp_path)
    assert shown.code == 70
    assert "Traceback" in shown.err


def interrupted(tmp_path: Path, stop: signal.Signals) -> tuple[int, str]:
    """Stop ``optimize`` in the middle: the model says when it is being captured, and then waits."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time, torch\n"
        "class Slow(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        pathlib.Path('captured').touch()\n"
        "        time.sleep(60)\n"
        "        return x\n"
        "def make():\n"
        "    return Slow().eval(), (torch.ones(2, 4),), {}, None\n"
    )
    command = [*COMMAND, "optimize", "slow:make", "-o", "out", "--force"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started in the background ignores Ctrl-C, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "captured").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert any(p.name.endswith(".partial") for p in tmp_path.iterdir())
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_the_middle(stop: signal.Signals, code: int, tmp_path: Path) -> None:
    earlier = tmp_path / "out"
    earlier.mkdir()
    (earlier / "report.json").write_text("{}")
    returned, err = interrupted(tmp_path, stop)
    assert returned == code
    assert "Traceback" not in err
    assert (earlier / "report.json").read_text() == "{}"
    left = {p.name for p in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"slow.py", "captured", "out"}


@pytest.mark.slow
def test_disk_full(bert: Path, tmp_path: Path) -> None:
    # A process that may write files of at most 40 KB sees what it would see on a full disk.
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from attn_rewrite.cli.app import run\n"
        f"sys.exit(run(['optimize', {str(bert)!r}, '--policy', 'exact', '-o', 'out']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 5, done.stderr
    assert "cannot write the output folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
